"""What every rule is given, and how it is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chgval.registry import name_of
from chgval.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The K samples that have a score, as a rule sees them.

    Attributes:
        score_K: probability that the label is wrong.
        value_K, loss_K: CHG value and mean loss of the run.
        label_K: given class.
        confident_label_K: class that confident learning counts the sample in, -1 for none.
        below_threshold_K: whether the margin is below those of threshold samples; None without such.
    """

    score_K: FloatArray
    value_K: FloatArray
    loss_K: FloatArray
    label_K: IntArray
    confident_label_K: IntArray
    below_threshold_K: NDArray[np.bool_] | None = None


FlagFunction = Callable[[Judged], NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A registered rule.

    Attributes:
        flag: says which samples are flagged, shape (K,).
        trains: whether it needs runs of its own, with threshold samples, and so a dataset.
    """

    flag: FlagFunction
    trains: bool = False


REGISTRY: dict[str, Rule] = {}


def rule(*, trains: bool = False) -> Callable[[FlagFunction], FlagFunction]:
    """Register a function as the rule that is called as its file."""

    def register(flag: FlagFunction) -> FlagFunction:
        REGISTRY[name_of(flag)] = Rule(flag, trains)
        return flag

    return register

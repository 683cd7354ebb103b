"""What a game is, and how it is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from chgval.registry import name_of
from chgval.valuation.closed_form import CoalitionSums, Factors

# Last-layer gradients of n samples, their losses, and the sums of the whole coalition, where it is not just
# these samples; returns their values, float64, shape (n,).
ValueFunction = Callable[[Factors, Tensor, CoalitionSums | None], Tensor]


@dataclass(frozen=True, slots=True)
class Game:
    """A registered game.

    Attributes:
        values: returns the Shapley value of every sample.
        times_loss: whether its gradients are multiplied by the loss.
        has_sums: whether what it needs to know of a coalition adds up over shards of it.
    """

    values: ValueFunction
    times_loss: bool = False
    has_sums: bool = True


REGISTRY: dict[str, Game] = {}


def game(*, times_loss: bool = False, has_sums: bool = True) -> Callable[[ValueFunction], ValueFunction]:
    """Register a function as the game that is called as its file."""

    def register(values: ValueFunction) -> ValueFunction:
        REGISTRY[name_of(values)] = Game(values, times_loss, has_sums)
        return values

    return register

"""What people and a run say of labels.

Shape legend: N samples, A annotators.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chgval.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Annotations:
    """Labels that several annotators gave.

    Attributes:
        names: of the A annotators.
        labels_NA: class that each gave, shape (N, A); -1 where there is none.
        are_told_apart: whether a name stands for the same annotator in all rows; else the labels of a row
            are in no order, and all annotators count as alike.
    """

    names: tuple[str, ...]
    labels_NA: IntArray
    are_told_apart: bool


@dataclass(slots=True, kw_only=True)
class NoiseSignals:
    """What a run says of every label; rows of which it says nothing hold NaN (labels: -1).

    Attributes:
        noise_score_N: probability that the given label is wrong.
        noise_score_std_N: standard deviation of that over noise models that explain the labels about equally
            well; NaN also where nothing can be said of any label.
        suggested_label_N: the most probable class other than the given one.
        suggested_probability_N: probability that the true class is the suggested one.
        confident_label_N: class that confident learning counts the sample in, -1 for none (Northcutt et al.
            2021, arXiv:1911.00068, equation 1).
        explained: share of the labels' entropy, in [0, 1], that is explained without having seen them.
        memorised: share of the labels that are more likely wrong than right, in [0, 1], that the network
            predicts all the same; 0 if there are none, and for embeddings.
        consensus: what labels of several annotators say together, if there are any.
    """

    noise_score_N: FloatArray
    noise_score_std_N: FloatArray
    suggested_label_N: IntArray
    suggested_probability_N: FloatArray
    confident_label_N: IntArray
    explained: float = 0.0
    memorised: float = 0.0
    consensus: Consensus | None = None

    @classmethod
    def unknown(cls, num_samples: int) -> NoiseSignals:
        """Return signals that say nothing of any label."""
        return cls(
            noise_score_N=np.full(num_samples, np.nan),
            noise_score_std_N=np.full(num_samples, np.nan),
            suggested_label_N=np.full(num_samples, -1),
            suggested_probability_N=np.full(num_samples, np.nan),
            confident_label_N=np.full(num_samples, -1),
        )


@dataclass(slots=True, kw_only=True)
class Consensus:
    """What labels of several annotators and the run say together.

    Attributes:
        label_N: the most probable class; -1 where nothing is said.
        probability_N: that it is the true one.
        scores_NA: probability that each annotator's label is wrong, shape (N, A); NaN where there is none.
    """

    label_N: IntArray
    probability_N: FloatArray
    scores_NA: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseRate:
    """Estimated share of wrong labels, and the interval that it lies in."""

    rate: float
    low: float
    high: float

    @property
    def is_unknown(self) -> bool:
        """Whether nothing can be said: the interval leaves all open."""
        return (self.low, self.high) == (0, 1)

"""Plain records that pass between the layers.

Shape legend: N samples (one entry per input row, NaN or -1 where the row has no figure), K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# What a part of a run needs to go on: tensors, and what JSON can hold, in dictionaries by name.
State = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSignals:
    """What one epoch says of every sample; rows that the epoch did not see hold NaN (labels: -1).

    Attributes:
        value_N: Shapley value in this epoch's game; higher is more useful.
        loss_N: cross entropy, in nats.
        margin_N: logit of the given label minus the highest other logit (its mean over epochs is AUM).
        el2n_N: Euclidean norm of softmax minus one-hot, in [0, sqrt(2)].
        label_probability_N: softmax probability of the given label.
        predicted_label_N: class of the highest logit.
    """

    value_N: FloatArray
    loss_N: FloatArray
    margin_N: FloatArray
    el2n_N: FloatArray
    label_probability_N: FloatArray
    predicted_label_N: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSignals:
    """What a whole run says of every sample: figures over the epochs that saw it.

    Attributes:
        num_epochs_N: how many epochs saw the sample.
        value_N, loss_N, margin_N, el2n_N, label_probability_N: means over those epochs.
        value_std_N: standard deviation of the value over epochs (divided by n - 1; NaN for one epoch).
        value_stderr_N: value_std / sqrt(number of epochs).
        forgetting_events_N: how often the sample went from predicted right to predicted wrong between one
            epoch and the next that saw it (0 also for a sample that was never right).
        predicted_label_N: class with the highest averaged probability.
        predicted_probability_N: that probability.
    """

    num_epochs_N: IntArray
    value_N: FloatArray
    value_std_N: FloatArray
    value_stderr_N: FloatArray
    loss_N: FloatArray
    margin_N: FloatArray
    el2n_N: FloatArray
    label_probability_N: FloatArray
    forgetting_events_N: IntArray
    predicted_label_N: IntArray
    predicted_probability_N: FloatArray


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
class StepRecord:
    """Progress inside an epoch: what a person watching wants to see.

    Attributes:
        epoch, num_epochs: which epoch is running (from 1) and how many there are.
        step, num_steps: optimizer steps done in this epoch, and how many it has.
        loss, accuracy: means over the epoch so far (accuracy on the training batches, in [0, 1]).
        num_samples: samples trained on in this epoch so far.
        seconds: wall time that this took.
    """

    epoch: int
    num_epochs: int
    step: int
    num_steps: int
    loss: float
    accuracy: float
    num_samples: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """A finished epoch. `signals` is None where the run does not value.

    Attributes:
        epoch, num_epochs: which epoch ended (from 1) and how many there are.
        loss, accuracy: means over the epoch's training batches (accuracy in [0, 1]).
        num_samples: training samples that the epoch saw.
        seconds: wall time of the epoch, valuation included.
        signals: the epoch's values and signals.
    """

    epoch: int
    num_epochs: int
    loss: float
    accuracy: float
    num_samples: int
    seconds: float
    signals: EpochSignals | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRecord:
    """The device was out of memory: batches of `batch_size` are computed in `num_parts` from now on."""

    batch_size: int
    num_parts: int


# What a training yields.
Record = StepRecord | EpochRecord | SplitRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLine:
    """One sample in a summary."""

    id: str
    label_name: str
    predicted_name: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassLine:
    """One class in a summary. `agreement`: share whose predicted label is the given one, in [0, 1]."""

    name: str
    num_samples: int
    mean_value: float
    agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a person wants to know at the end of a run.

    Attributes:
        classes: one line per class, the largest first where there are too many to show.
        hidden_classes: classes left out of `classes`.
        lowest, highest: the samples of the lowest and of the highest value, the most extreme first.
        histogram_counts, histogram_edges: of the values; one more edge than counts. The first and last bin
            are open.
    """

    classes: list[ClassLine]
    hidden_classes: int
    lowest: list[SampleLine]
    highest: list[SampleLine]
    histogram_counts: list[int]
    histogram_edges: list[float]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspectLine:
    """One suspect in a summary."""

    id: str
    label_name: str
    suggested_name: str
    noise_score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSummary:
    """What a person wants to know of a dataset's labels.

    Attributes:
        rate: estimated share of wrong labels.
        num_assessed, num_flagged: samples that have a score, and flagged ones.
        classes: name, samples, flagged samples and estimated share of wrong labels of every class, the most
            flagged first.
        hidden_classes: classes left out of `classes`.
        pairs: given name, suggested name and flagged samples, the commonest first.
        suspects: the most suspicious flagged samples, the worst first.
    """

    rate: NoiseRate
    num_assessed: int
    num_flagged: int
    classes: list[tuple[str, int, int, float]]
    hidden_classes: int
    pairs: list[tuple[str, str, int]]
    suspects: list[SuspectLine]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How a model does on samples that it was not trained on.

    Attributes:
        num_samples: how many there were.
        accuracy: share predicted right, in [0, 1].
        loss: mean cross entropy, in nats.
        calibration_error: mean distance of confidence and accuracy over 15 equal bins of the confidence.
        class_accuracies: of every class, NaN for those without samples.
    """

    num_samples: int
    accuracy: float
    loss: float
    calibration_error: float
    class_accuracies: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedClass:
    """What is kept of a class."""

    name: str
    num_rows: int
    num_dropped: int
    num_kept: int

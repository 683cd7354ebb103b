"""What a training yields on its way."""

from __future__ import annotations

from dataclasses import dataclass

from chgval.valuation.signals import EpochSignals


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

    @property
    def speed(self) -> float:
        """Samples per second."""
        return self.num_samples / max(self.seconds, 1e-9)


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

    @property
    def speed(self) -> float:
        """Samples per second."""
        return self.num_samples / max(self.seconds, 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRecord:
    """The device was out of memory: batches of `batch_size` are computed in `num_parts` from now on."""

    batch_size: int
    num_parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainRecord:
    """Steps could not be captured as CUDA graphs, for this reason: they are made plainly, which is slower."""

    reason: str


# What a training yields.
Record = StepRecord | EpochRecord | SplitRecord | PlainRecord


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

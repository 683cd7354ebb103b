"""The signals that a training streams: one table, which the accumulator, reports and `--by` follow.

Shape legend: N samples (one entry per input row), B samples of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # names and texts of signals are needed where torch is not
    from torch import Tensor

    from chgval.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model says of a batch, as signals read it.

    Attributes:
        logits_BC: shape (B, C), float32.
        log_probabilities_BC: logarithm of softmax.
        residuals_BC: softmax minus one-hot.
        labels_B1: given classes, shape (B, 1).
    """

    logits_BC: Tensor
    log_probabilities_BC: Tensor
    residuals_BC: Tensor
    labels_B1: Tensor

    def of_labels(self, values_BC: Tensor) -> Tensor:
        """Return the entries of the given classes, shape (B,)."""
        return values_BC.gather(1, self.labels_B1).squeeze(1)


@dataclass(frozen=True, slots=True)
class Signal:
    """A number that each epoch says of each sample.

    Attributes:
        name: its column in the values of an epoch; the mean over epochs is NAME_mean in the report.
        about: what it is, with its unit.
        read: takes it from a batch's outputs, shape (B,).
    """

    name: str
    about: str
    read: Callable[[Outputs], Tensor]


def _margin(outputs: Outputs) -> Tensor:
    others_BC = outputs.logits_BC.scatter(1, outputs.labels_B1, float("-inf"))
    return outputs.of_labels(outputs.logits_BC) - others_BC.amax(1)


SIGNALS = (
    Signal(
        "loss",
        "cross entropy, in nats; lower is better fitted",
        lambda outputs: -outputs.of_labels(outputs.log_probabilities_BC),
    ),
    Signal(
        "margin",
        "logit of the given label minus the highest other one, higher is better fitted; its mean over epochs "
        "is AUM (Pleiss et al. 2020, arXiv:2001.10528)",
        _margin,
    ),
    Signal(
        "el2n",
        "Euclidean norm of softmax minus one-hot, from 0 (well fitted) to 1.41 (Paul et al. 2021, "
        "arXiv:2107.07075)",
        lambda outputs: outputs.residuals_BC.square().sum(1).sqrt(),
    ),
    Signal(
        "label_probability",
        "softmax probability of the given label, 0 to 1",
        lambda outputs: outputs.of_labels(outputs.log_probabilities_BC).exp(),
    ),
)
SIGNAL_NAMES = tuple(signal.name for signal in SIGNALS)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSignals:
    """What one epoch says of every sample; rows that the epoch did not see hold NaN (labels: -1).

    Attributes:
        value_N: Shapley value in this epoch's game; higher is more useful.
        signals: those of SIGNALS by name, shape (N,) each.
        predicted_label_N: class of the highest logit.
    """

    value_N: FloatArray
    signals: dict[str, FloatArray]
    predicted_label_N: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSignals:
    """What a whole run says of every sample, over the epochs that saw it; NaN (labels: -1) where none did.

    Attributes:
        num_epochs_N: how many epochs saw the sample.
        value_N: mean of the value over those epochs.
        value_std_N: standard deviation of the value over epochs (divided by n - 1; NaN for one epoch).
        value_stderr_N: value_std / sqrt(number of epochs).
        means: those of SIGNALS over those epochs, by name, shape (N,) each.
        forgetting_events_N: how often the sample went from predicted right to predicted wrong between one
            epoch and the next that saw it (0 also for a sample that was never right).
        predicted_label_N: class with the highest averaged probability.
        predicted_probability_N: that probability.
    """

    num_epochs_N: IntArray
    value_N: FloatArray
    value_std_N: FloatArray
    value_stderr_N: FloatArray
    means: dict[str, FloatArray]
    forgetting_events_N: IntArray
    predicted_label_N: IntArray
    predicted_probability_N: FloatArray

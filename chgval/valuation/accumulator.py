"""The streaming accumulator: batches of logits and last-layer inputs go in, values come out.

A training step only pays for copying its logits and last-layer inputs into the epoch's buffers. All else
(losses, residuals, margins, the closed form) is done once an epoch, in large chunks.

Shape legend: N samples, B rows of one batch, C classes, D last-layer inputs.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chgval.errors import FactorError
from chgval.types import FloatArray, IntArray, State
from chgval.valuation.closed_form import (
    CoalitionSums,
    Factors,
    chunks,
    coalition_sums,
    rows_of_classes,
)
from chgval.valuation.games import REGISTRY as GAMES
from chgval.valuation.signals import SIGNAL_NAMES, SIGNALS, EpochSignals, Outputs, RunSignals


@dataclass(slots=True)
class _RunningMean:
    """Mean and squared deviations of a score per sample over the epochs that saw it (Welford)."""

    mean_N: Tensor
    squared_deviation_N: Tensor

    @classmethod
    def zeros(cls, like_N: Tensor) -> _RunningMean:
        return cls(like_N.new_zeros(len(like_N)), like_N.new_zeros(len(like_N)))

    def add(self, score_N: Tensor, seen_N: Tensor, count_N: Tensor) -> None:
        delta_N = (score_N - self.mean_N).where(seen_N, 0)
        self.mean_N += delta_N / count_N.clamp(min=1)
        self.squared_deviation_N += delta_N * (score_N - self.mean_N).where(seen_N, 0)


class ValueAccumulator:
    """Turns the logits and last-layer inputs of a run into values and signals of every sample.

    Args:
        labels_N: given class of every sample, int64, shape (N,); on the device that shall hold the buffers.
            Samples with label -1 are never passed to `update`.
        num_classes: C.
        num_features: D, inputs of the last linear layer.
        has_bias: whether that layer has a bias.
        utility: name of the game (see `chgval.valuation.games`).
        per_class: whether each class is a coalition of its own.
        averaged_from: first epoch, from 1, whose probabilities enter the averaged ones. Early epochs predict
            poorly; they would blur the average.
    """

    def __init__(
        self,
        labels_N: Tensor,
        num_classes: int,
        num_features: int,
        *,
        has_bias: bool = True,
        utility: str = "chg",
        per_class: bool = False,
        averaged_from: int = 1,
    ) -> None:
        num_samples, device = len(labels_N), labels_N.device
        self.labels_N = labels_N
        self.num_classes = num_classes
        self.has_bias = has_bias
        self.game = GAMES[utility]
        self.per_class = per_class
        self.averaged_from = averaged_from
        self._num_epochs = 0
        # The epoch's buffers. Rows that an epoch does not see keep what they held and are masked by _seen_N.
        self._logits_NC = torch.zeros(num_samples, num_classes, dtype=torch.float32, device=device)
        self._features_ND = torch.zeros(num_samples, num_features, dtype=torch.float32, device=device)
        self._seen_N = torch.zeros(num_samples, dtype=torch.bool, device=device)
        self._closed: tuple[dict[str, Tensor], Factors] | None = None
        self._seen_last_N = torch.zeros_like(self._seen_N)
        self._staging: _Staging | None = None
        # The run's sums.
        double_N = torch.zeros(num_samples, dtype=torch.float64, device=device)
        self._count_N = torch.zeros(num_samples, dtype=torch.int64, device=device)
        self._means = {name: _RunningMean.zeros(double_N) for name in ("value", *SIGNAL_NAMES)}
        self._probability_sums_NC = torch.zeros_like(self._logits_NC)
        self._probability_weights_N = self._logits_NC.new_zeros(num_samples)
        self._was_right_N = torch.zeros_like(self._seen_N)
        self._forgetting_events_N = torch.zeros_like(self._count_N)

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.labels_N.device

    @property
    def has_seen(self) -> bool:
        """Whether the epoch under way has seen a sample."""
        self._wait()
        return bool(self._seen_N.any())

    @staticmethod
    def memory_bytes(num_samples: int, num_classes: int, num_features: int) -> int:
        """Bytes that the buffers and sums take on their device."""
        return num_samples * (4 * (2 * num_classes + num_features) + 23 * 8)

    def update(self, indices_B: Tensor, logits_BC: Tensor, features_BD: Tensor) -> None:
        """Take in one batch. Copies only; waits for nothing on the device.

        Buffers on the host take in a batch of a CUDA device when the next one comes, by which time it has
        been copied.

        Args:
            indices_B: which samples these are, int64, shape (B,).
            logits_BC: shape (B, C), any floating type.
            features_BD: input of the last linear layer, shape (B, D), any floating type.
        """
        if logits_BC.device.type == "cuda" and self.device.type == "cpu":
            self._staging = self._staging or _Staging(pins=True)
            self._staging.put(indices_B, logits_BC.detach(), features_BD.detach())
            if self._staging.num_waiting > 1:
                self._take_in(*self._staging.take())
        else:
            self._take_in(indices_B, logits_BC.detach(), features_BD.detach())

    def _take_in(self, indices_B: Tensor, logits_BC: Tensor, features_BD: Tensor) -> None:
        # Of a batch that a loader made on the host.
        indices_B = indices_B.to(self.device, non_blocking=self.device.type == "cuda")
        self._logits_NC.index_copy_(0, indices_B, logits_BC.to(self.device, torch.float32))
        self._features_ND.index_copy_(0, indices_B, features_BD.to(self.device, torch.float32))
        self._seen_N.index_fill_(0, indices_B, True)

    def _wait(self) -> None:
        """Take in what is still on its way."""
        while self._staging is not None and self._staging.num_waiting:
            self._take_in(*self._staging.take())

    def add_predictions(self, indices_B: Tensor, logits_BC: Tensor, weight: float) -> None:
        """Take in what another model, such as the average of the weights, says of a batch.

        Args:
            indices_B: which samples these are, int64, shape (B,).
            logits_BC: shape (B, C), any floating type.
            weight: how much it counts in the averaged probabilities; an epoch's training steps count 1.
        """
        device = self._logits_NC.device
        indices_B = indices_B.to(device)
        probabilities_BC = logits_BC.detach().to(device, torch.float32).softmax(1)
        self._probability_sums_NC.index_add_(0, indices_B, probabilities_BC, alpha=weight)
        self._probability_weights_N[indices_B] += weight

    def averaged_probabilities(self) -> NDArray[np.float32]:
        """Return the averaged probabilities of every class, shape (N, C); NaN for samples never seen.

        Averaged are those of the training steps from epoch `averaged_from` on, and those that
        `add_predictions` was given. They sum to 1.
        """
        averaged: NDArray[np.float32] = (
            (self._probability_sums_NC / self._probability_weights_N[:, None]).cpu().numpy()
        )
        return averaged

    def epoch_sums(self) -> CoalitionSums:
        """Return the sums of the epoch's closed form, over the samples that this accumulator saw.

        Shards of one run add up their sums and give the total to `finish_epoch`. The factors of samples that
        were not seen are zero, so they add nothing.
        """
        _, factors = self._close_epoch()
        sums = coalition_sums(factors)
        return CoalitionSums(int(self._seen_N.sum()), sums.total_CF, sums.squared_norm)

    def finish_epoch(self, sums: CoalitionSums | None = None) -> EpochSignals:
        """End the epoch: compute its values, add them to the run's means, and make room for the next epoch.

        Args:
            sums: of the whole coalition, where other shards hold a part of it.
        Returns:
            The epoch's values and signals, shape (N,) each.
        Raises:
            FactorError: the epoch saw no sample; or `sums` are given for a game that is not played on them.
        """
        if sums is not None and (self.per_class or not self.game.has_sums):
            raise FactorError(
                "sums of shards fit one coalition of gradients; not per-class or hardness values."
            )
        signals, factors = self._close_epoch()
        signals["value"] = self._values(factors, signals["loss"], sums)
        seen_N = self._seen_N
        self._count_N += seen_N
        for name, running in self._means.items():
            running.add(signals[name], seen_N, self._count_N)
        right_N = signals["predicted_label"] == self.labels_N
        self._forgetting_events_N += seen_N & self._was_right_N & ~right_N
        self._was_right_N = right_N.where(seen_N, self._was_right_N)

        epoch = EpochSignals(
            value_N=_numbers(signals["value"], seen_N),
            signals={name: _numbers(signals[name], seen_N) for name in SIGNAL_NAMES},
            predicted_label_N=_integers(signals["predicted_label"].where(seen_N, -1)),
        )
        self._closed = None
        self._seen_last_N.copy_(seen_N)  # in place: captured steps write into these tensors
        self._seen_N.zero_()
        return epoch

    @property
    def num_epochs_N(self) -> IntArray:
        """How many finished epochs saw each sample, shape (N,)."""
        return _integers(self._count_N)

    def last_features(self) -> Tensor:
        """Return the last-layer inputs of the last epoch, on the host, shape (N, D); NaN where none was seen.

        Call it between two epochs.
        """
        return self._features_ND.where(self._seen_last_N[:, None], torch.nan).cpu()

    def run_signals(self) -> RunSignals:
        """Return what all finished epochs say together, shape (N,) each."""
        count_N = self._count_N
        seen_N = count_N > 0
        std_N = (self._means["value"].squared_deviation_N / (count_N - 1)).sqrt()
        std_N = std_N.where(count_N > 1, torch.nan)
        sum_N, predicted_N = self._probability_sums_NC.max(1)
        probability_N = sum_N / self._probability_weights_N
        averaged_N = self._probability_weights_N > 0
        return RunSignals(
            num_epochs_N=self.num_epochs_N,
            value_N=_numbers(self._means["value"].mean_N, seen_N),
            value_std_N=_numbers(std_N, seen_N),
            value_stderr_N=_numbers(std_N / count_N.double().sqrt(), seen_N),
            means={name: _numbers(self._means[name].mean_N, seen_N) for name in SIGNAL_NAMES},
            forgetting_events_N=_integers(self._forgetting_events_N),
            predicted_label_N=_integers(predicted_N.where(averaged_N, -1)),
            predicted_probability_N=_numbers(probability_N, averaged_N),
        )

    def state_dict(self) -> State:
        """Return all that another accumulator of the same run needs to resume; call it between two batches.

        The epoch's buffers are part of it only while an epoch is under way.
        """
        self._wait()
        epoch = {"logits": self._logits_NC, "features": self._features_ND, "seen": self._seen_N}
        return {
            "num_epochs": self._num_epochs,
            "means": {
                name: {"mean": mean.mean_N, "squared_deviation": mean.squared_deviation_N}
                for name, mean in self._means.items()
            },
            "sums": self._sums(),
            "epoch": epoch if self._seen_N.any() else None,
        }

    def load_state_dict(self, state: State) -> None:
        """Resume from the state of another accumulator of the same run.

        Raises:
            ValueError: it is no state of such a run.
        """
        count_N = state["sums"]["count"]
        if count_N.min() < 0 or count_N.max() > state["num_epochs"]:
            raise ValueError("counts of epochs that there were not")
        self._num_epochs = state["num_epochs"]
        for name, mean in self._means.items():
            mean.mean_N.copy_(state["means"][name]["mean"])
            mean.squared_deviation_N.copy_(state["means"][name]["squared_deviation"])
        for name, tensor in self._sums().items():
            tensor.copy_(state["sums"][name])
        self._seen_N.zero_()
        if state["epoch"] is not None:
            self._logits_NC.copy_(state["epoch"]["logits"])
            self._features_ND.copy_(state["epoch"]["features"])
            self._seen_N.copy_(state["epoch"]["seen"])

    def _sums(self) -> dict[str, Tensor]:
        return {
            "count": self._count_N,
            "probability_sums": self._probability_sums_NC,
            "probability_weights": self._probability_weights_N,
            "was_right": self._was_right_N,
            "forgetting_events": self._forgetting_events_N,
        }

    def _close_epoch(self) -> tuple[dict[str, Tensor], Factors]:
        """Read the signals off the epoch's logits, then turn the logits into residuals, in place.

        Returns:
            The signals, shape (N,) each, and the gradients, which are zero where a sample was not seen.
        """
        if self._closed is not None:
            return self._closed
        self._wait()
        self._num_epochs += 1
        is_averaged = self._num_epochs >= self.averaged_from
        parts: dict[str, list[Tensor]] = {}
        for rows in chunks(len(self.labels_N), self.num_classes, self.device):
            outputs = _outputs(self._logits_NC[rows], self.labels_N[rows].clamp(min=0))
            signals = {signal.name: signal.read(outputs) for signal in SIGNALS}
            signals["predicted_label"] = outputs.logits_BC.argmax(1)
            seen_B1 = self._seen_N[rows, None]
            if is_averaged:
                self._probability_sums_NC[rows] += outputs.log_probabilities_BC.exp().where(seen_B1, 0)
            residuals_BC = outputs.residuals_BC
            if self.game.times_loss:
                residuals_BC *= signals["loss"][:, None]
            self._logits_NC[rows] = residuals_BC.where(seen_B1, 0)
            self._features_ND[rows] = self._features_ND[rows].where(seen_B1, 0)
            for name, score_B in signals.items():
                parts.setdefault(name, []).append(score_B)
        if is_averaged:
            self._probability_weights_N += self._seen_N
        factors = Factors(self._logits_NC, self._features_ND, self.has_bias)
        self._closed = {name: torch.cat(found) for name, found in parts.items()}, factors
        return self._closed

    def _values(self, factors: Factors, losses_N: Tensor, sums: CoalitionSums | None) -> Tensor:
        """Values of the samples seen in this epoch; what the other rows hold is masked by the caller."""
        if self.game.has_sums and not self.per_class:
            return self.game.values(factors, losses_N, self.epoch_sums() if sums is None else sums)
        # Samples that were not seen make a group of their own.
        groups_N = self.labels_N.where(self._seen_N, self.num_classes)
        values_N = torch.zeros_like(losses_N, dtype=torch.float64)
        seen = self._seen_N.nonzero().squeeze(1)
        for rows in rows_of_classes(groups_N, self.num_classes + 1) if self.per_class else [seen]:
            if len(rows):
                values_N[rows] = self.game.values(factors.at(rows), losses_N[rows], None)
        return values_N


class _Staging:
    """Batches of a device on their way to the host, in the order in which they were put.

    Args:
        pins: whether to take memory that a CUDA device copies to by itself. torch keeps such memory for the
            next batch when this one is done with.
    """

    def __init__(self, *, pins: bool) -> None:
        self._pins = pins
        self._waiting: deque[tuple[list[Tensor], torch.cuda.Event | None]] = deque()

    @property
    def num_waiting(self) -> int:
        """Batches that were put and not taken."""
        return len(self._waiting)

    def put(self, *tensors: Tensor) -> None:
        """Start to copy a batch."""
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=self._pins) for t in tensors]
        for copied, tensor in zip(copies, tensors, strict=True):
            copied.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event() if self._pins else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()
        self._waiting.append((copies, event))

    def take(self) -> list[Tensor]:
        """Return the batch that was put first, once it is there."""
        copies, event = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        return copies


def _outputs(logits_BC: Tensor, labels_B: Tensor) -> Outputs:
    labels_B1 = labels_B[:, None]
    log_probabilities_BC = logits_BC.log_softmax(1)
    residuals_BC = log_probabilities_BC.exp()
    residuals_BC.scatter_add_(1, labels_B1, -torch.ones_like(residuals_BC[:, :1]))
    return Outputs(logits_BC, log_probabilities_BC, residuals_BC, labels_B1)


def _numbers(score_N: Tensor, seen_N: Tensor) -> FloatArray:
    array: FloatArray = score_N.double().where(seen_N, torch.nan).cpu().numpy()
    return array


def _integers(number_N: Tensor) -> IntArray:
    array: IntArray = number_N.cpu().numpy()
    return array

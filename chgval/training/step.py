"""One training step, as a function that changes tensors in place and waits for nothing.

So it can be captured once as a CUDA graph, and replayed: see `training/graph.py`.

Shape legend: B rows of one batch, C classes, D last-layer inputs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from chgval.data.loader import Batch
from chgval.training.models import SplitModel
from chgval.training.optimizers import LossScale, NesterovSGD
from chgval.types import State
from chgval.valuation.signals import EpochSignals

# The moving average of the weights forgets over this share of a run's steps: enough to smooth the last ones
# out, short enough to follow the falling learning rate.
AVERAGED_SHARE = 1 / 12


class WeightAverage:
    """Exponential moving average of a model's weights, and of its normalisation statistics.

    It predicts better than the last weights do, and remembers single labels less.

    Args:
        model: the one to follow, on its device.
        total_steps: optimizer steps of the whole run.
        share: of these steps, over which it forgets.
    """

    def __init__(self, model: SplitModel, total_steps: int, *, share: float = AVERAGED_SHARE) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._averaged, self._followed = _floating_tensors(self.model), _floating_tensors(model)
        decay = max(0.0, 1 - 1 / (share * total_steps))
        self._move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Move towards the model's present weights. Waits for nothing on the device."""
        self._move(self._averaged, self._followed, None)


class Observer(Protocol):
    """What looks at a training, such as the accumulator of values."""

    @property
    def device(self) -> torch.device:
        """Where it keeps what it sees."""
        ...

    def update(self, indices_B: Tensor, logits_BC: Tensor, features_BD: Tensor) -> None:
        """Take in what a step computed anyway: rows, logits and last-layer inputs of its batch.

        On the device of the training it changes tensors in place only, and can be called twice for a batch.
        """
        ...

    def finish_epoch(self) -> EpochSignals:
        """End the epoch, and return what it says of every sample."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """What an epoch has come to, as the host reads it.

    Attributes:
        loss_sum: of its samples so far, not weighted, in nats.
        num_right: samples so far that were predicted right.
        bad_step: the first step, from 1, whose loss was NaN or infinite; 0 for none.
        bad_loss: that loss.
    """

    loss_sum: float
    num_right: float
    bad_step: int
    bad_loss: float


class Sums:
    """What an epoch adds up, on the device, until it is read."""

    def __init__(self, device: torch.device) -> None:
        self._loss_sum, self._num_right, self._step, self._bad_step, self._bad_loss = (
            torch.zeros((), device=device) for _ in range(5)
        )

    def clear(self) -> None:
        """Begin an epoch."""
        for tensor in self.state_dict().values():
            tensor.zero_()

    def after(self, loss: Tensor, loss_sum: Tensor, num_right: Tensor) -> State:
        """Return what they are with one more step, without adding it.

        Args:
            loss: of the step, the (weighted) mean.
            loss_sum: of its samples, not weighted.
            num_right: of its samples.
        """
        step = self._step + 1
        is_bad = ~loss.isfinite() & (self._bad_step == 0)
        return {
            "loss_sum": self._loss_sum + loss_sum,
            "num_right": self._num_right + num_right,
            "step": step,
            "bad_step": torch.where(is_bad, step, self._bad_step),
            "bad_loss": torch.where(is_bad, loss, self._bad_loss),
        }

    def read(self) -> Reading:
        """Return what they are now. Waits for the device, once."""
        loss_sum, num_right, bad_step, bad_loss = torch.stack(
            [self._loss_sum, self._num_right, self._bad_step, self._bad_loss]
        ).tolist()
        return Reading(loss_sum, num_right, int(bad_step), bad_loss)

    def state_dict(self) -> State:
        """Return what other sums need to resume."""
        return {
            "loss_sum": self._loss_sum,
            "num_right": self._num_right,
            "step": self._step,
            "bad_step": self._bad_step,
            "bad_loss": self._bad_loss,
        }

    def load_state_dict(self, state: State) -> None:
        """Become what others are, or will be. Takes no memory on the device."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


@dataclass(frozen=True, slots=True)
class Step:
    """Everything that a step changes.

    Attributes:
        model: returns (logits, last-layer inputs).
        optimizer: moves its weights.
        sums: of the epoch.
        scale: of the loss, in float16.
        average: follows the weights.
        observer: is shown the batch, if it is on the device of the training.
    """

    model: nn.Module
    optimizer: NesterovSGD
    sums: Sums
    scale: LossScale | None = None
    average: WeightAverage | None = None
    observer: Observer | None = None

    def __call__(self, batch: Batch, weights_B: Tensor | None, num_parts: int) -> tuple[Tensor, Tensor]:
        """Train on a batch.

        All that takes memory comes before the weights move: where there is none, the step can be made anew,
        in more parts. Statistics of normalisation layers have then moved a little towards the batch, and
        will again.

        Args:
            batch: on the device.
            weights_B: how much each sample counts in the loss; None counts all alike.
            num_parts: how many parts the batch is shown in, one after the other.
        Returns:
            Logits (B, C) and last-layer inputs (B, D), float32, without gradients.
        Raises:
            torch.OutOfMemoryError: there is no memory; the weights are as they were.
        """
        self.optimizer.clear_gradients()
        loss, losses_B, logits_BC, features_BD = compute_gradients(
            self.model, batch, weights_B, num_parts, self.scale
        )
        num_right = (logits_BC.argmax(1) == batch.labels_B).sum()
        sums = self.sums.after(loss, losses_B.sum(), num_right)
        if self.observer is not None:
            self.observer.update(batch.indices_B, logits_BC, features_BD)
        self.optimizer.step(self.scale)
        if self.average is not None:
            self.average.update()
        self.sums.load_state_dict(sums)
        return logits_BC, features_BD


def compute_gradients(
    model: nn.Module,
    batch: Batch,
    weights_B: Tensor | None = None,
    num_parts: int = 1,
    scale: LossScale | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add the gradients of a batch's mean loss to those of a model's weights.

    Args:
        model: returns (logits, last-layer inputs).
        batch: on the model's device.
        weights_B: how much each sample counts in the loss; None counts all alike.
        num_parts: how many parts the batch is shown in, one after the other.
        scale: by which the gradients are multiplied.
    Returns:
        Loss, float32, shape (); and without gradients the losses (B,), logits (B, C) and last-layer inputs
        (B, D) of the batch.
    """
    size = len(batch.indices_B)
    loss = torch.zeros((), device=batch.inputs_B.device)
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    start = 0
    # A batch may be small: of parts of one sample, normalisation layers could make nothing.
    for labels_P in batch.labels_B.tensor_split(max(1, min(num_parts, size // 2))):
        part = slice(start, start + len(labels_P))
        start = part.stop
        logits_PC, features_PD = model(batch.inputs_B[part])
        losses_P = functional.cross_entropy(logits_PC, labels_P, reduction="none")
        weighted_P = losses_P if weights_B is None else losses_P * weights_B[part]
        part_loss = weighted_P.sum() / size
        (part_loss if scale is None else part_loss * scale.value).backward()  # type: ignore[no-untyped-call]
        loss += part_loss.detach()
        outputs.append((losses_P.detach(), logits_PC.detach(), features_PD.detach()))
    if len(outputs) == 1:
        return loss, *outputs[0]
    losses_B, logits_BC, features_BD = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return loss, losses_B, logits_BC, features_BD


def _floating_tensors(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]

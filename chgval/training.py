"""The one training loop. Valuation observes it; it does not change what is trained.

Shape legend: B rows of one batch, C classes, D last-layer inputs, S steps of one epoch.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from chgval.accumulate import ValueAccumulator
from chgval.data.loader import Loader
from chgval.errors import DataError, NonFiniteError
from chgval.models import SplitModel
from chgval.recipe import Recipe
from chgval.records import EpochRecord, StepRecord

# The host reads the losses every so many steps, so that on a GPU no step waits for it.
STEPS_BETWEEN_READINGS = 10
# Share of the steps in which the one-cycle schedule rises.
WARM_UP_SHARE = 0.25
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


@dataclass(frozen=True, slots=True)
class Subset:
    """What an epoch trains on.

    Attributes:
        rows: rows of the dataset, int64, shape (K,), on the host.
        weights_N: how much each row of the dataset counts in the loss, on the device; None counts all alike.
            The mean over the subset is 1, so that weights do not change the step size.
    """

    rows: Tensor
    weights_N: Tensor | None = None

    @classmethod
    def weighted(cls, rows: Tensor, weights_K: Tensor, num_rows: int, device: torch.device) -> Subset:
        """Return a subset with these weights, scaled to a mean of 1; all zero they count alike."""
        total = float(weights_K.sum())
        if total <= 0:
            return cls(rows)
        weights_N = torch.zeros(num_rows)
        weights_N[rows] = weights_K.float() * (len(rows) / total)
        return cls(rows, weights_N.to(device))


def train_epochs(
    model: nn.Module,
    loader: Loader,
    recipe: Recipe,
    *,
    device: torch.device,
    generator: torch.Generator,
    accumulator: ValueAccumulator | None = None,
    average: WeightAverage | None = None,
    separate_pass: bool = False,
    choose: Callable[[int], Subset | None] | None = None,
) -> Iterator[StepRecord | EpochRecord]:
    """Train, and yield what happens: some records of steps, then the record of each epoch.

    Args:
        model: returns (logits, last-layer inputs); lies on the device.
        loader: where the batches come from.
        recipe: how to train.
        device: where to train.
        generator: order and augmentation are drawn from it.
        accumulator: observes the epochs, if they are to be valued.
        average: follows the model's weights, step by step.
        separate_pass: whether the accumulator sees a pass of its own before each epoch (Algorithm 1 to the
            letter: no augmentation, evaluation mode), or the training steps themselves.
        choose: is called before each epoch, whose number it is given, and says what to train on; None is all.
    Raises:
        NonFiniteError: the loss became NaN or infinite.
        DataError: no sample is left that can be read.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
        foreach=True,
    )
    for epoch in range(1, recipe.epochs + 1):
        started = time.perf_counter()
        if accumulator is not None and separate_pass:
            observe(model, loader, accumulator.update)
        subset = None if choose is None else choose(epoch)
        rows, weights_N = (None, None) if subset is None else (subset.rows, subset.weights_N)
        training_started = time.perf_counter()
        model.train()
        num_steps = loader.num_batches(rows)
        losses_S = torch.zeros(num_steps, device=device)
        totals = _Totals(torch.zeros((), device=device), torch.zeros((), device=device))
        for step, batch in enumerate(loader.training_batches(generator, rows), start=1):
            progress = (epoch - 1 + (step - 0.5) / num_steps) / recipe.epochs
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * schedule_factor(recipe.schedule, progress)
            logits_BC, features_BD = model(batch.inputs_B)
            losses_B = functional.cross_entropy(logits_BC, batch.labels_B, reduction="none")
            weighted_B = losses_B if weights_N is None else losses_B * weights_N[batch.indices_B]
            loss = weighted_B.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if average is not None:
                average.update()
            if accumulator is not None and not separate_pass:
                accumulator.update(batch.indices_B, logits_BC, features_BD)

            losses_S[step - 1] = loss.detach()
            totals.add(losses_B.detach(), logits_BC.detach(), batch.labels_B)
            if step % STEPS_BETWEEN_READINGS == 0 and step < num_steps:
                _check_finite(losses_S, epoch, recipe)
                yield totals.step_record(epoch, recipe, step, num_steps, training_started)
        if not totals.num_samples:
            raise DataError("none of the images could be decoded; check the files.")
        _check_finite(losses_S, epoch, recipe)
        last = totals.step_record(epoch, recipe, num_steps, num_steps, training_started)
        yield last
        yield EpochRecord(
            epoch=epoch,
            num_epochs=recipe.epochs,
            loss=last.loss,
            accuracy=last.accuracy,
            num_samples=last.num_samples,
            signals=None if accumulator is None else accumulator.finish_epoch(),
            seconds=time.perf_counter() - started,
        )


def observe(
    model: nn.Module,
    loader: Loader,
    take: Callable[[Tensor, Tensor, Tensor], None],
    *,
    mirrored: bool = False,
) -> None:
    """Show every sample once, as it is or mirrored, to the model, without training.

    Args:
        model: is put in evaluation mode.
        loader: where the batches come from.
        take: is given indices, logits and last-layer inputs of each batch.
        mirrored: whether the images are flipped left to right.
    """
    model.eval()
    with torch.inference_mode():
        for batch in loader.plain_batches():
            inputs_B = batch.inputs_B.flip(3) if mirrored else batch.inputs_B
            take(batch.indices_B, *model(inputs_B))


def schedule_factor(schedule: str, progress: float) -> float:
    """Return the share of the highest learning rate after that share of the run."""
    if schedule == "one-cycle":
        if progress < WARM_UP_SHARE:
            return progress / WARM_UP_SHARE
        progress = (progress - WARM_UP_SHARE) / (1 - WARM_UP_SHARE)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _floating_tensors(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]


@dataclass(slots=True)
class _Totals:
    """Sums over an epoch so far; they stay on the device until they are read."""

    loss_sum: Tensor
    right: Tensor
    num_samples: int = 0

    def add(self, losses_B: Tensor, logits_BC: Tensor, labels_B: Tensor) -> None:
        self.loss_sum += losses_B.sum()
        self.right += (logits_BC.argmax(1) == labels_B).sum()
        self.num_samples += len(labels_B)

    def step_record(
        self, epoch: int, recipe: Recipe, step: int, num_steps: int, started: float
    ) -> StepRecord:
        return StepRecord(
            epoch=epoch,
            num_epochs=recipe.epochs,
            step=step,
            num_steps=num_steps,
            loss=self.loss_sum.item() / self.num_samples,
            accuracy=self.right.item() / self.num_samples,
            num_samples=self.num_samples,
            seconds=time.perf_counter() - started,
        )


def _check_finite(losses_S: Tensor, epoch: int, recipe: Recipe) -> None:
    bad_S = ~losses_S.isfinite()
    if bad_S.any():
        step = int(bad_S.int().argmax()) + 1
        raise NonFiniteError(
            f"the training loss became {losses_S[step - 1].item()} at epoch {epoch}, step {step} of "
            f"{len(losses_S)}; try a lower --lr (it was {recipe.lr:g}), or check --mean and --std."
        )

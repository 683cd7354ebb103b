"""The one training loop. It knows steps only: what observes them does not change what is trained.

Shape legend: B rows of one batch, C classes, D last-layer inputs, S steps of one epoch.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from chgval.data.loader import Batch, Loader
from chgval.errors import DataError, DeviceMemoryError, NonFiniteError
from chgval.training.models import SplitModel
from chgval.training.optimizers import NesterovSGD
from chgval.training.recipe import Recipe
from chgval.training.records import EpochRecord, Record, SplitRecord, StepRecord
from chgval.types import State
from chgval.valuation.signals import EpochSignals

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


class Observer(Protocol):
    """What looks at a training, such as the accumulator of values."""

    def update(self, indices_B: Tensor, logits_BC: Tensor, features_BD: Tensor) -> None:
        """Take in what a step computed anyway: rows, logits and last-layer inputs of its batch."""
        ...

    def finish_epoch(self) -> EpochSignals:
        """End the epoch, and return what it says of every sample."""
        ...


class Trainer:
    """The training loop. Between two steps its state can be kept, and another one resumes from there.

    Args:
        model: returns (logits, last-layer inputs); lies on the device.
        loader: where the batches come from.
        recipe: how to train.
        device: where to train.
        generator: order and augmentation are drawn from it.
        average: follows the model's weights, step by step.
        observer: looks at the training.
        sees_steps: whether the observer is given the training steps; else only the ends of epochs.
        before_epoch: is called at the start of each epoch, and again where one is resumed; it is given the
            epoch's number and whether it is resumed, and says what to train on. None is all.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        recipe: Recipe,
        *,
        device: torch.device,
        generator: torch.Generator,
        average: WeightAverage | None = None,
        observer: Observer | None = None,
        sees_steps: bool = True,
        before_epoch: Callable[[int, bool], Subset | None] | None = None,
    ) -> None:
        self._model = model
        self._loader = loader
        self._recipe = recipe
        self._device = device
        self._generator = generator
        self._average = average
        self._observer = observer
        self._sees_steps = sees_steps
        self._before_epoch = before_epoch
        self._optimizer = NesterovSGD(model.parameters(), recipe)
        # A batch is shown to the model in so many parts, more where the device is out of memory otherwise.
        self._num_parts = 1
        self.finished_epochs = 0
        self._begun: _Epoch | None = None

    @property
    def is_over(self) -> bool:
        """Whether all epochs have been trained."""
        return self.finished_epochs >= self._recipe.epochs

    @property
    def position(self) -> tuple[int, int]:
        """Epochs that are finished, and steps that were made in the next one."""
        return self.finished_epochs, 0 if self._begun is None else self._begun.step

    def records(self, is_stopped: Callable[[], bool] = lambda: False) -> Generator[Record]:
        """Train, and yield what happens: some records of steps, then the record of each epoch.

        Args:
            is_stopped: is asked after each step whether to end here.
        Raises:
            NonFiniteError: the loss became NaN or infinite.
            DataError: no sample is left that can be read.
            DeviceMemoryError: the device has no memory even for small parts of a batch.
        """
        while not self.is_over:
            yield from self._train_epoch(self.finished_epochs + 1, is_stopped)
            if is_stopped():
                return

    def state_dict(self) -> State:
        """Return all that a trainer of the same run needs to resume from here, between two steps."""
        return {
            "finished_epochs": self.finished_epochs,
            "num_parts": self._num_parts,
            "generator": self._generator.get_state(),
            # Dropout layers draw from these.
            "torch_generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(self._device) if self._on_cuda else None,
            "model": self._model.state_dict(),
            "average": None if self._average is None else self._average.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "begun": None if self._begun is None else self._begun.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Resume from the state of another trainer of the same run.

        Raises:
            ValueError: it is no state of such a run.
        """
        finished, parts = state["finished_epochs"], state["num_parts"]
        if not (
            isinstance(finished, int)
            and isinstance(parts, int)
            and 0 <= finished <= self._recipe.epochs
            and 1 <= parts <= self._recipe.batch_size
        ):
            raise ValueError(f"{finished} epochs in {parts} parts of batches")
        self._model.load_state_dict(state["model"])
        if self._average is not None:
            self._average.model.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._begun = None if state["begun"] is None else _Epoch.from_state_dict(state["begun"], self._device)
        self.finished_epochs, self._num_parts = finished, parts
        self._generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])
        if self._on_cuda:
            torch.cuda.set_rng_state(state["cuda_generator"], self._device)

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    def _train_epoch(self, epoch: int, is_stopped: Callable[[], bool]) -> Iterator[Record]:
        recipe = self._recipe
        started = time.perf_counter()
        subset = None
        if self._before_epoch is not None:
            subset = self._before_epoch(epoch, self._begun is not None)
        if self._begun is None:
            rows = self._loader.rows if subset is None else subset.rows
            num_steps = self._loader.num_batches(rows)
            self._begun = _Epoch.start(rows, num_steps, self._generator, self._device, started)
        begun = self._begun
        weights_N = None if subset is None else subset.weights_N
        self._model.train()
        self._generator.set_state(begun.generator_state)
        for batch in self._loader.training_batches(begun.rows, self._generator, first=begun.step):
            if len(batch.indices_B):
                progress = (epoch - 1 + (begun.step + 0.5) / begun.num_steps) / recipe.epochs
                lr = recipe.lr * schedule_factor(recipe.schedule, progress)
                while not self._step(batch, lr, weights_N, begun):
                    yield self._halve(batch)
            begun.step += 1
            if (
                begun.step % STEPS_BETWEEN_READINGS == 0
                and begun.num_samples
                and begun.step < begun.num_steps
            ):
                begun.check_finite(epoch, recipe)
                yield begun.record(epoch, recipe)
            if is_stopped():
                return
        if not begun.num_samples:
            raise DataError("none of the images could be decoded; check the files.")
        begun.check_finite(epoch, recipe)
        last = begun.record(epoch, recipe)
        yield last
        signals = None if self._observer is None else self._observer.finish_epoch()
        self.finished_epochs, self._begun = epoch, None
        yield EpochRecord(
            epoch=epoch,
            num_epochs=recipe.epochs,
            loss=last.loss,
            accuracy=last.accuracy,
            num_samples=last.num_samples,
            signals=signals,
            seconds=time.perf_counter() - begun.started,
        )

    def _step(self, batch: Batch, lr: float, weights_N: Tensor | None, begun: _Epoch) -> bool:
        """Make an optimizer step; return False, and leave the weights alone, where there is no memory for it.

        Statistics of normalisation layers have then moved a little towards the batch, and will again.
        """
        self._optimizer.clear_gradients()
        try:
            loss, losses_B, logits_BC, features_BD = compute_gradients(
                self._model, batch, weights_N, self._num_parts
            )
        except torch.OutOfMemoryError:
            return False
        self._optimizer.step(lr)
        if self._average is not None:
            self._average.update()
        if self._observer is not None and self._sees_steps:
            self._observer.update(batch.indices_B, logits_BC, features_BD)
        begun.add(loss, losses_B, logits_BC, batch.labels_B)
        return True

    def _halve(self, batch: Batch) -> SplitRecord:
        """Show batches to the model in twice as many parts from now on."""
        size = len(batch.indices_B)
        if 2 * self._num_parts > size // 2:  # normalisation layers need two samples
            raise DeviceMemoryError(
                f"{self._device} is out of memory even for {size // self._num_parts} samples at a time; pass "
                "a smaller --arch or --image-size."
            )
        self._num_parts *= 2
        self._optimizer.clear_gradients()
        if self._on_cuda:
            torch.cuda.empty_cache()
        return SplitRecord(batch_size=size, num_parts=self._num_parts)


def compute_gradients(
    model: nn.Module, batch: Batch, weights_N: Tensor | None = None, num_parts: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add the gradients of a batch's mean loss to those of a model's weights.

    Args:
        model: returns (logits, last-layer inputs).
        batch: on the model's device.
        weights_N: how much each row of the dataset counts in the loss; None counts all alike.
        num_parts: how many parts the batch is shown in, one after the other.
    Returns:
        Loss, float32, shape (); and without gradients the losses (B,), logits (B, C) and last-layer inputs
        (B, D) of the batch.
    """
    size = len(batch.indices_B)
    loss = torch.zeros((), device=batch.inputs_B.device)
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    # A batch may be small: of parts of one sample, normalisation layers could make nothing.
    for rows in torch.arange(size).tensor_split(max(1, min(num_parts, size // 2))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        logits_BC, features_BD = model(batch.inputs_B[part])
        losses_B = functional.cross_entropy(logits_BC, batch.labels_B[part], reduction="none")
        weighted_B = losses_B if weights_N is None else losses_B * weights_N[batch.indices_B[part]]
        part_loss = weighted_B.sum() / size
        part_loss.backward()  # type: ignore[no-untyped-call]
        loss += part_loss.detach()
        outputs.append((losses_B.detach(), logits_BC.detach(), features_BD.detach()))
    if len(outputs) == 1:
        return loss, *outputs[0]
    losses_B, logits_BC, features_BD = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return loss, losses_B, logits_BC, features_BD


def forward_all(
    model: nn.Module,
    loader: Loader,
    take: Callable[[Tensor, Tensor, Tensor], None],
    *,
    view: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Show every sample once to the model, without training.

    Args:
        model: is put in evaluation mode.
        loader: where the batches come from.
        take: is given indices, logits and last-layer inputs of each batch.
        view: what to show of a batch of inputs; None shows them as they are.
    """
    model.eval()
    with torch.inference_mode():
        for batch in loader.plain_batches():
            inputs_B = batch.inputs_B if view is None else view(batch.inputs_B)
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
class _Epoch:
    """How far an epoch is. Its sums stay on the device until they are read.

    Attributes:
        rows: that it trains on, on the host, in the order of the dataset.
        generator_state: before its order and augmentation were drawn.
        losses_S: of its steps, weighted as they were trained on.
        loss_sum: of its samples so far, not weighted.
        right: samples so far that were predicted right.
        num_samples, step: done so far.
        started, training_started: on the clock, as if it had been trained in one go.
    """

    rows: Tensor
    generator_state: Tensor
    losses_S: Tensor
    loss_sum: Tensor
    right: Tensor
    num_samples: int
    step: int
    started: float
    training_started: float

    @classmethod
    def start(
        cls, rows: Tensor, num_steps: int, generator: torch.Generator, device: torch.device, started: float
    ) -> _Epoch:
        return cls(
            rows=rows,
            generator_state=generator.get_state(),
            losses_S=torch.zeros(num_steps, device=device),
            loss_sum=torch.zeros((), device=device),
            right=torch.zeros((), device=device),
            num_samples=0,
            step=0,
            started=started,
            training_started=time.perf_counter(),
        )

    @classmethod
    def from_state_dict(cls, state: State, device: torch.device) -> _Epoch:
        now = time.perf_counter()
        if not (isinstance(state["step"], int) and 0 <= state["step"] <= len(state["losses_S"])):
            raise ValueError("a step that the epoch has not")
        on_device = {name: state[name].to(device) for name in ("losses_S", "loss_sum", "right")}
        clocks = {name: now - state[name] for name in ("started", "training_started")}
        return cls(**{**state, **on_device, **clocks})

    def state_dict(self) -> State:
        now = time.perf_counter()
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**state, "started": now - self.started, "training_started": now - self.training_started}

    @property
    def num_steps(self) -> int:
        return len(self.losses_S)

    def add(self, loss: Tensor, losses_B: Tensor, logits_BC: Tensor, labels_B: Tensor) -> None:
        self.losses_S[self.step] = loss
        self.loss_sum += losses_B.sum()
        self.right += (logits_BC.argmax(1) == labels_B).sum()
        self.num_samples += len(labels_B)

    def record(self, epoch: int, recipe: Recipe) -> StepRecord:
        return StepRecord(
            epoch=epoch,
            num_epochs=recipe.epochs,
            step=self.step,
            num_steps=self.num_steps,
            loss=self.loss_sum.item() / self.num_samples,
            accuracy=self.right.item() / self.num_samples,
            num_samples=self.num_samples,
            seconds=time.perf_counter() - self.training_started,
        )

    def check_finite(self, epoch: int, recipe: Recipe) -> None:
        bad_S = ~self.losses_S.isfinite()
        if bad_S.any():
            step = int(bad_S.int().argmax()) + 1
            raise NonFiniteError(
                f"the training loss became {self.losses_S[step - 1].item()} at epoch {epoch}, step {step} of "
                f"{self.num_steps}; try a lower --lr (it was {recipe.lr:g}), or check --mean and --std."
            )

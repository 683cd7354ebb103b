"""The one training loop. It knows steps only: what observes them does not change what is trained.

Shape legend: B rows of one batch, C classes, D last-layer inputs, S steps of one epoch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chgval.data.loader import Batch, Loader
from chgval.errors import DataError, DeviceMemoryError, NonFiniteError
from chgval.training.devices import cudnn_settings, is_out_of_memory
from chgval.training.graph import CapturedSteps
from chgval.training.optimizers import LossScale, NesterovSGD
from chgval.training.recipe import Recipe
from chgval.training.records import EpochRecord, PlainRecord, Record, SplitRecord, StepRecord
from chgval.training.step import Observer, Step, Sums, WeightAverage
from chgval.types import State

# The host reads the losses every so many steps, so that on a GPU no step waits for it.
STEPS_BETWEEN_READINGS = 10
# Of the loss in float16: below it, no step has moved the weights for a while.
LEAST_SCALE = 2.0**-10
# Share of the steps in which the one-cycle schedule rises.
WARM_UP_SHARE = 0.25


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
        scales_loss: whether gradients of the unscaled loss could be too small for the model's type (float16).
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
        scales_loss: bool = False,
    ) -> None:
        self._model = model
        self._loader = loader
        self._recipe = recipe
        self._device = device
        self._generator = generator
        self._average = average
        self._observer = observer
        self._before_epoch = before_epoch
        self._optimizer = NesterovSGD(model.parameters(), recipe, device)
        self._sums = Sums(device)
        self._scale = LossScale(device) if scales_loss else None
        # What keeps its buffers elsewhere is shown each batch after the step.
        is_near = observer is not None and observer.device.type == device.type
        self._shown_later = observer if sees_steps and not is_near else None
        self._step = Step(
            model,
            self._optimizer,
            self._sums,
            self._scale,
            average,
            observer if sees_steps and is_near else None,
        )
        # A batch is shown to the model in so many parts, more where the device is out of memory otherwise.
        self._num_parts = 1
        self._captured = CapturedSteps(self._make_step, device) if self._on_cuda else None
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
        self._optimizer.clear_gradients()
        self._free_graphs()

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
            "scale": None if self._scale is None else self._scale.state_dict(),
            "sums": self._sums.state_dict(),
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
        if self._scale is not None:
            self._scale.load_state_dict(state["scale"])
        self._sums.load_state_dict(state["sums"])
        self._begun = None if state["begun"] is None else _Epoch.from_state_dict(state["begun"])
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
            self._begun = _Epoch.start(rows, self._loader.num_batches(rows), self._generator, started)
            self._sums.clear()
        begun = self._begun
        weights_N = None if subset is None else subset.weights_N
        self._model.train()
        self._generator.set_state(begun.generator_state)
        for batch in self._loader.training_batches(begun.rows, self._generator, first=begun.step):
            if len(batch.indices_B):
                progress = (epoch - 1 + (begun.step + 0.5) / begun.num_steps) / recipe.epochs
                self._optimizer.lr.fill_(recipe.lr * schedule_factor(recipe.schedule, progress))
                yield from self._train_on(batch, weights_N)
                begun.num_samples += len(batch.indices_B)
            begun.step += 1
            if (
                begun.step % STEPS_BETWEEN_READINGS == 0
                and begun.num_samples
                and begun.step < begun.num_steps
            ):
                yield self._record(begun, epoch)
            if is_stopped():
                return
        if not begun.num_samples:
            raise DataError("none of the images could be decoded; check the files.")
        last = self._record(begun, epoch)
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

    def _train_on(self, batch: Batch, weights_N: Tensor | None) -> Iterator[Record]:
        """Make a step, in as many parts as there is memory for, and say what is unusual about it."""
        weights_B = None if weights_N is None else weights_N[batch.indices_B]
        make = self._make_step if self._captured is None else self._captured
        was_captured = self._captured is not None and self._captured.failure is None
        while True:
            try:
                logits_BC, features_BD = make(batch, weights_B)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of that block, as the error holds what is to be freed.
            yield self._halve(batch)
        if self._shown_later is not None:
            self._shown_later.update(batch.indices_B, logits_BC, features_BD)
        if was_captured and self._captured is not None and self._captured.failure is not None:
            yield PlainRecord(reason=self._captured.failure)

    def _make_step(self, batch: Batch, weights_B: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._step(batch, weights_B, self._num_parts)

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
        self._free_graphs()
        return SplitRecord(batch_size=size, num_parts=self._num_parts)

    def _free_graphs(self) -> None:
        if self._captured is not None:
            self._captured.forget()
            with suppress(RuntimeError):  # a capture that failed may have left torch unable to
                torch.cuda.empty_cache()

    def _record(self, begun: _Epoch, epoch: int) -> StepRecord:
        """Read how an epoch goes. Waits for the device.

        Raises:
            NonFiniteError: the loss became NaN or infinite.
        """
        reading = self._sums.read()
        if reading.bad_step:
            raise NonFiniteError(
                f"the training loss became {reading.bad_loss} at epoch {epoch}, step {reading.bad_step} "
                f"of {begun.num_steps}; try a lower --lr (it was {self._recipe.lr:g}), or check --mean and "
                "--std."
            )
        if self._scale is not None and float(self._scale.value) < LEAST_SCALE:
            raise NonFiniteError(
                f"gradients are out of the range of float16 at every step, as in epoch {epoch}, step "
                f"{begun.step}; pass --precision float32, or a lower --lr (it was {self._recipe.lr:g})."
            )
        return StepRecord(
            epoch=epoch,
            num_epochs=self._recipe.epochs,
            step=begun.step,
            num_steps=begun.num_steps,
            loss=reading.loss_sum / begun.num_samples,
            accuracy=reading.num_right / begun.num_samples,
            num_samples=begun.num_samples,
            seconds=time.perf_counter() - begun.training_started,
        )


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

    Where the device is out of memory, batches are shown in parts from then on.
    """
    model.eval()
    num_parts = 1
    # Such passes are too short to earn a search for the fastest kernels back.
    with torch.inference_mode(), cudnn_settings(benchmark=False):
        for batch in loader.plain_batches():
            inputs_B = batch.inputs_B if view is None else view(batch.inputs_B)
            while True:
                try:
                    outputs = [model(part_B) for part_B in inputs_B.tensor_split(num_parts)]
                    break
                except RuntimeError as error:
                    if num_parts >= len(inputs_B) or not is_out_of_memory(error):
                        raise
                num_parts *= 2
            logits_BC, features_BD = (torch.cat(parts) for parts in zip(*outputs, strict=True))
            take(batch.indices_B, logits_BC, features_BD)


def schedule_factor(schedule: str, progress: float) -> float:
    """Return the share of the highest learning rate after that share of the run."""
    if schedule == "one-cycle":
        if progress < WARM_UP_SHARE:
            return progress / WARM_UP_SHARE
        progress = (progress - WARM_UP_SHARE) / (1 - WARM_UP_SHARE)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(slots=True)
class _Epoch:
    """How far an epoch is; what it adds up is in `Sums`.

    Attributes:
        rows: that it trains on, on the host, in the order of the dataset.
        generator_state: before its order and augmentation were drawn.
        num_steps: that it has.
        num_samples, step: done so far.
        started, training_started: on the clock, as if it had been trained in one go.
    """

    rows: Tensor
    generator_state: Tensor
    num_steps: int
    num_samples: int
    step: int
    started: float
    training_started: float

    @classmethod
    def start(cls, rows: Tensor, num_steps: int, generator: torch.Generator, started: float) -> _Epoch:
        return cls(
            rows=rows,
            generator_state=generator.get_state(),
            num_steps=num_steps,
            num_samples=0,
            step=0,
            started=started,
            training_started=time.perf_counter(),
        )

    @classmethod
    def from_state_dict(cls, state: State) -> _Epoch:
        now = time.perf_counter()
        if not (isinstance(state["step"], int) and 0 <= state["step"] <= state["num_steps"]):
            raise ValueError("a step that the epoch has not")
        clocks = {name: now - state[name] for name in ("started", "training_started")}
        return cls(**{**state, **clocks})

    def state_dict(self) -> State:
        now = time.perf_counter()
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**state, "started": now - self.started, "training_started": now - self.training_started}

"""Steps as CUDA graphs: hundreds of small kernels are started at once, not one by one by the host.

Source of the technique: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from chgval.data.loader import Batch
from chgval.errors import first_line
from chgval.training.devices import is_out_of_memory

# Steps of each shape that are made plainly first: kernels are chosen and compiled, and memory is taken, by
# then.
WARM_UP_STEPS = 3

# Trains on a batch, in which samples may have weights, by changing tensors in place; see `Step`.
StepFunction = Callable[[Batch, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph, the tensors that it reads, and those that it writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    weights_B: Tensor | None
    outputs: tuple[Tensor, Tensor]

    def replay(self, batch: Batch, weights_B: Tensor | None) -> tuple[Tensor, Tensor]:
        self.batch.indices_B.copy_(batch.indices_B)
        self.batch.inputs_B.copy_(batch.inputs_B)
        self.batch.labels_B.copy_(batch.labels_B)
        if self.weights_B is not None and weights_B is not None:
            self.weights_B.copy_(weights_B)
        self.graph.replay()
        return self.outputs


class CapturedSteps:
    """Makes steps on a CUDA device, as graphs where that can be done.

    A graph is of one batch size: batches of an epoch have two at most. What a step returns is overwritten by
    the next one.

    Args:
        step: makes one.
        device: where.
    Attributes:
        failure: why steps are made plainly after all; None while they are not.
    """

    def __init__(self, step: StepFunction, device: torch.device) -> None:
        self._step = step
        self._device = device
        self._stream = _stream_beside(device)
        self.failure: str | None = None
        self.forget()

    def __call__(self, batch: Batch, weights_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Make a step.

        Raises:
            torch.OutOfMemoryError: there is no memory; the weights are as they were.
        """
        shape = (len(batch.indices_B), weights_B is not None)
        if shape not in self._graphs and self.failure is None and self._num_seen[shape] >= WARM_UP_STEPS:
            self._try_to_capture(batch, weights_B, shape)
        if shape in self._graphs:
            return self._graphs[shape].replay(batch, weights_B)
        self._num_seen[shape] += 1
        try:
            return self._made_plainly(batch, weights_B)
        except RuntimeError as error:
            if not self._graphs or not is_out_of_memory(error):
                raise
        self.forget()  # the graph of another size holds the memory of a whole step
        torch.cuda.empty_cache()
        return self._made_plainly(batch, weights_B)

    def forget(self) -> None:
        """Free all graphs; they are captured anew."""
        self._graphs: dict[tuple[int, bool], _Captured] = {}
        self._num_seen: Counter[tuple[int, bool]] = Counter()
        self._latest: torch.cuda.CUDAGraph | None = None
        self._pool = torch.cuda.graph_pool_handle()

    def _made_plainly(self, batch: Batch, weights_B: Tensor | None) -> tuple[Tensor, Tensor]:
        # Not on the stream that everything else is on: what a step leaves behind there could not be captured.
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        try:
            with torch.cuda.stream(self._stream):
                return self._step(batch, weights_B)
        finally:
            present.wait_stream(self._stream)

    def _try_to_capture(self, batch: Batch, weights_B: Tensor | None, shape: tuple[int, bool]) -> None:
        """Capture the step, or say why it cannot be.

        Raises:
            torch.OutOfMemoryError: there is no memory.
        """
        present = torch.cuda.current_stream(self._device)
        try:
            self._graphs[shape] = self._capture(batch, weights_B)
            return
        except RuntimeError as error:
            # What ends a capture that failed raises an error of its own.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            is_memory, reason = is_out_of_memory(cause), first_line(cause)
        # It also leaves its stream, and its pool, where they were in the middle of it.
        torch.cuda.set_stream(present)
        with suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(present.device_index, self._pool)
        if is_memory:
            self.forget()
            raise torch.OutOfMemoryError(reason)
        self.failure = reason

    def _capture(self, batch: Batch, weights_B: Tensor | None) -> _Captured:
        fixed = Batch(batch.indices_B.clone(), batch.inputs_B.clone(), batch.labels_B.clone())
        fixed_weights_B = None if weights_B is None else weights_B.clone()
        # Kept where this fails: torch's allocators may still point to it.
        self._latest = graph = torch.cuda.CUDAGraph()
        # Threads that pin memory for the next batches go on meanwhile.
        capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with _nothing_collected(), capture:
            outputs = self._step(fixed, fixed_weights_B)
        return _Captured(graph, fixed, fixed_weights_B, outputs)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Collect garbage before the block and none in it: a graph of an earlier run would end the capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device that steps are made on: libraries keep memory for each that they see."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

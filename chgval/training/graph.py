"""Steps as CUDA graphs: hundreds of small kernels are started at once, not one by one by the host.

Source of the technique: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chgval.data.loader import Batch
from chgval.errors import first_line

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
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.failure: str | None = None
        self.forget()

    def __call__(self, batch: Batch, weights_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Make a step.

        Raises:
            torch.OutOfMemoryError: there is no memory; the weights are as they were.
        """
        shape = (len(batch.indices_B), weights_B is not None)
        if shape in self._graphs:
            return self._graphs[shape].replay(batch, weights_B)
        if self.failure is not None or self._num_seen[shape] < WARM_UP_STEPS:
            return self._made_plainly(batch, weights_B, shape)
        try:
            captured = self._graphs[shape] = self._capture(batch, weights_B)
        except RuntimeError as error:  # the network cannot be captured, or there is no memory for that
            self.failure = first_line(error)
            return self._made_plainly(batch, weights_B, shape)
        return captured.replay(batch, weights_B)

    def forget(self) -> None:
        """Free all graphs; they are captured anew."""
        self._graphs: dict[tuple[int, bool], _Captured] = {}
        self._num_seen: Counter[tuple[int, bool]] = Counter()
        self._pool = torch.cuda.graph_pool_handle()

    def _made_plainly(
        self, batch: Batch, weights_B: Tensor | None, shape: tuple[int, bool]
    ) -> tuple[Tensor, Tensor]:
        # Not on the stream that everything else is on: what a step leaves behind there could not be captured.
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        try:
            with torch.cuda.stream(self._stream):
                outputs = self._step(batch, weights_B)
        finally:
            present.wait_stream(self._stream)
        self._num_seen[shape] += 1
        return outputs

    def _capture(self, batch: Batch, weights_B: Tensor | None) -> _Captured:
        fixed = Batch(batch.indices_B.clone(), batch.inputs_B.clone(), batch.labels_B.clone())
        fixed_weights_B = None if weights_B is None else weights_B.clone()
        graph = torch.cuda.CUDAGraph()
        # Threads that pin memory for the next batches go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self._step(fixed, fixed_weights_B)
        return _Captured(graph, fixed, fixed_weights_B, outputs)

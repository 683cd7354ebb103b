"""CUDA graphs without CUDA: operations are recorded while they are captured, and made again when replayed.

As with CUDA, a capture changes nothing, reading a number on the host is an error in it, and a replay sees
only what is in the tensors that were captured: whatever else the code decides is as it was then.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOT_PERMITTED = "operation not permitted when stream is capturing"


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Recording(TorchDispatchMode):
    """Records operations, and keeps what the tensors held that they were given."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self._made, self._held = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError(NOT_PERMITTED)
        for tensor in tensors_in((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._made | self._held.keys():
                self._held[storage.data_ptr()] = storage, storage.clone()
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in self._held:
                self._made.add(pointer)
        self.operations.append((func, args, kwargs, result))
        return result

    def undo(self):
        for storage, held in self._held.values():
            storage.copy_(held)


class RecordedGraph:
    """Stands for torch.cuda.CUDAGraph."""

    num_replays = 0

    @torch.no_grad()
    def replay(self):
        type(self).num_replays += 1
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tensors_in(result), tensors_in(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.detach().copy_(new)


@contextmanager
def capturing(graph, *_, **__):
    """Stands for torch.cuda.graph."""
    recording = Recording()
    try:
        with recording:
            yield
    finally:
        recording.undo()
    graph.operations = recording.operations


def replace_cuda(monkeypatch):
    """Let code that captures run on the CPU; return the class of its graphs."""
    stream = SimpleNamespace(wait_stream=lambda _: None)
    kind = type("RecordedGraph", (RecordedGraph,), {"num_replays": 0})
    stands_for = {
        "CUDAGraph": kind,
        "graph": capturing,
        "Stream": lambda _: stream,
        "current_stream": lambda _: stream,
        "stream": lambda _: nullcontext(),
        "set_stream": lambda _: None,
        "graph_pool_handle": lambda: None,
    }
    for name, thing in stands_for.items():
        monkeypatch.setattr(torch.cuda, name, thing)
    return kind

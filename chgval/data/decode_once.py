"""Small images are decoded once, on all cores, and kept."""

from __future__ import annotations

import math
import mmap
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from chgval.data.dataset import LargeImages, PixelImages
from chgval.data.decode import (
    Encoded,
    Pixels,
    SharedPixels,
    UnreadableImageError,
    count_pixels_with,
    decode_centre,
)
from chgval.data.pixel_file import PixelFile
from chgval.errors import DataError
from chgval.interruption import end_with_parent, starting_workers
from chgval.system import start_method, total_memory, usable_cores

# How much decoded images may fill of the machine's memory, at most, before they go to a file. What the system
# keeps of a file in memory it can take back.
MEMORY_SHARE = 0.25
MEMORY_BYTES = 2**30
# Images of one task, which a core is busy with for milliseconds.
DECODED_AT_A_TIME = 64
# Bytes of encoded images of a task, at most, besides the last of them.
TASK_BYTES = 4 * 2**20
# Tasks that wait for each core.
TASKS_AHEAD = 4
# Fewer images are decoded before processes are started: threads will do.
FEWEST_FOR_PROCESSES = 1000


@dataclass(frozen=True, slots=True)
class LoadedImages:
    """Images ready for a model, why some rows are not, and digests of all if they were asked for."""

    content: PixelImages | LargeImages
    problems: dict[int, str]
    notes: Sequence[str] = ()
    digests: Sequence[int] | None = None


_Result = tuple[dict[int, str], list[int]]


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What every core does.

    Attributes:
        read: gives the encoded image of an item.
        digest: gives what stands for an encoded image in a fingerprint, if that is asked for.
        pixels_N3SS: where the pixels go; processes share it.
        max_pixels: that an image may have.
    """

    read: Callable[[Any], Encoded]
    digest: Callable[[Encoded], int] | None
    pixels_N3SS: Pixels | PixelFile
    max_pixels: int

    def decode(self, start: int, items: list[Any]) -> _Result:
        """Decode the images of some rows; return why some of them cannot be, and their digests."""
        problems, digests = {}, []
        for row, item in enumerate(items, start):
            encoded = self.read(item)
            if self.digest is not None:
                digests.append(self.digest(encoded))
            try:
                if isinstance(encoded, UnreadableImageError):
                    raise encoded
                self.pixels_N3SS[row] = decode_centre(encoded, self.pixels_N3SS.shape[-1], self.max_pixels)
            except UnreadableImageError as error:
                problems[row] = str(error)
        return problems, digests


def as_it_is(encoded: Encoded) -> Encoded:
    """Return what has been read already."""
    return encoded


def decode_once(
    items: Iterable[Any],
    read: Callable[[Any], Encoded],
    num_rows: int,
    size: int,
    max_pixels: int,
    *,
    workers: int | None = None,
    digest: Callable[[Encoded], int] | None = None,
) -> LoadedImages:
    """Decode images, in order, on all cores.

    Args:
        items: one for each row.
        read: gives the encoded image of an item; is called where that is decoded.
        num_rows: how many there are.
        size: side of the squares that are kept.
        max_pixels: that an image may have.
        workers: processes; 0 takes threads. Default: one per core, and threads for few images.
        digest: gives what stands for an encoded image in a fingerprint, if that is wanted.
    Raises:
        DataError: a process died.
    """
    processes = _processes(num_rows, workers)
    decoding = _Decoding(read, digest, _allocate(num_rows, size, shared=processes > 0), max_pixels)
    problems: dict[int, str] = {}
    digests: list[int] = []
    waiting: deque[Future[_Result]] = deque()

    def take() -> None:
        found, made = waiting.popleft().result()
        problems.update(found)
        digests.extend(made)

    with _pool(decoding, processes) as (pool, decode):
        for start, group in _grouped(items):
            with starting_workers():  # at the first task
                waiting.append(pool.submit(decode, start, group))
            if len(waiting) > TASKS_AHEAD * max(1, processes or usable_cores()):
                take()
        while waiting:
            take()
    images = PixelImages(decoding.pixels_N3SS)
    return LoadedImages(images, problems, digests=None if digest is None else digests)


def _processes(num_rows: int, workers: int | None) -> int:
    """Return how many processes to start; 0 where threads will do, or processes can only be started anew."""
    can_start = start_method() == "fork" and not multiprocessing.current_process().daemon
    if not can_start or (workers is None and num_rows < FEWEST_FOR_PROCESSES):
        return 0
    return min(usable_cores() if workers is None else workers, math.ceil(num_rows / DECODED_AT_A_TIME))


@contextmanager
def _pool(
    decoding: _Decoding, processes: int
) -> Iterator[tuple[Executor, Callable[[int, list[Any]], _Result]]]:
    """Give what runs tasks, and what they call."""
    if not processes:
        with ThreadPoolExecutor(usable_cores()) as threads:
            yield threads, decoding.decode
        return
    context = multiprocessing.get_context("fork")
    # What a worker is begun with is inherited: nothing of it is copied.
    pool = ProcessPoolExecutor(processes, context, _begin_worker, (decoding, SharedPixels(context)))
    try:
        yield pool, _decode_in_worker
    except BrokenProcessPool as error:
        raise DataError(
            "a process that decodes images died; often memory ran out: pass fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# What a worker process does.
_inherited: list[_Decoding] = []


def _begin_worker(decoding: _Decoding, pixels: SharedPixels) -> None:
    end_with_parent(0)
    count_pixels_with(pixels)
    _inherited.append(decoding)


def _decode_in_worker(start: int, items: list[Any]) -> _Result:
    return _inherited[0].decode(start, items)


def _grouped(items: Iterable[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Yield tasks: the first row, and the items."""
    group: list[Any] = []
    start = waiting = 0
    for item in items:
        group.append(item)
        waiting += len(item) if isinstance(item, bytes) else 0
        if len(group) == DECODED_AT_A_TIME or waiting >= TASK_BYTES:
            yield start, group
            start, group, waiting = start + len(group), [], 0
    if group:
        yield start, group


def _allocate(num_rows: int, size: int, *, shared: bool) -> Pixels | PixelFile:
    memory, shape = total_memory(), (num_rows, 3, size, size)
    most = MEMORY_BYTES if memory is None else min(MEMORY_SHARE * memory, MEMORY_BYTES)
    if math.prod(shape) > most:
        return PixelFile(num_rows, size)
    if not shared:
        return np.zeros(shape, dtype=np.uint8)
    return np.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=np.uint8).reshape(shape)

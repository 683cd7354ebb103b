"""Batches on the device, in a given order: augmented for training, plain for a pass that only looks.

Shape legend: N input rows, B rows of one batch, S side of a square image, D numbers of an embedding.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from chgval.data.dataset import Dataset, Embeddings, LargeImages, PixelImages
from chgval.data.decode import Pixels, UnreadableImageError, decode_centre, decode_random_crop
from chgval.data.pixel_file import PixelFile
from chgval.errors import DataError, OutputError, first_line
from chgval.interruption import end_with_parent, starting_workers
from chgval.system import start_method, usable_cores

Augment = Literal["none", "crop", "crop-flip"]

# Random shifts of small images reach this share of their side: 4 of 32 pixels, as for CIFAR.
SHIFT_SHARE = 1 / 8
# Pixels used to estimate mean and standard deviation.
STATISTICS_IMAGES = 2000
# So many of them are decoded by one process, while others decode the next ones.
STATISTICS_IMAGES_AT_A_TIME = 32
# Share of a GPU's free memory that the samples may take.
DEVICE_MEMORY_SHARE = 0.5
# Rows of a file that are copied to a device at a time.
ROWS_AT_A_TIME = 4096
# Batches of so many bytes are gathered and augmented at a time on a GPU: all of an epoch, if it is small. On
# a CPU it is done batch by batch, which stays in its caches.
GATHERED_BYTES = 2**28
# A pass without gradients takes batches of this size on a CPU, whose caches they fit in; elsewhere it takes
# twice the training batch.
PLAIN_BATCH_ON_CPU = 64
# What torch says where the batches of workers, which are files to it, cannot be opened.
TOO_MANY_FILES = "Too many open files"
# Processes that decode large images, unless the user says: more than any GPU needs.
MOST_WORKERS = 32
# Batches that a worker makes before they are asked for.
BATCHES_AHEAD = 2
# Where Linux keeps shared memory, and the share of what is free there that batches may take.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (nothing is written by that name)
SHARED_MEMORY_SHARE = 0.5
# Characters: the name of a socket has at most 107, of which multiprocessing takes 32.
LONGEST_SOCKET_FOLDER = 70


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples on the device. `inputs_B` is float32: (B, 3, S, S) in channels-last order, or (B, D)."""

    indices_B: Tensor
    inputs_B: Tensor
    labels_B: Tensor


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean and standard deviation that inputs are normalised by: per channel, or per embedding number."""

    mean: Tensor
    std: Tensor


class Loader(Protocol):
    """Where a training loop takes its batches from."""

    statistics: Statistics

    @property
    def rows(self) -> Tensor:
        """Rows of all usable samples, ascending, on the host."""
        ...

    def num_batches(self, rows: Tensor) -> int:
        """Return the optimizer steps in one epoch on these rows."""
        ...

    def training_batches(
        self, rows: Tensor, generator: torch.Generator, *, first: int = 0
    ) -> Iterator[Batch]:
        """Yield these rows once, in random order, augmented.

        Args:
            rows: of usable samples.
            generator: all randomness is drawn from it, at the start.
            first: the number of the first batch that is yielded, from 0; those before are left out.
        """
        ...

    def plain_batches(self) -> Iterator[Batch]:
        """Yield all usable samples once, in order, as they are."""
        ...


def make_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    augment: Augment,
    device: torch.device,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    workers: int | None = None,
    fail_on_error: bool = False,
) -> Loader:
    """Return the loader that fits the dataset's content.

    Args:
        dataset: the samples.
        batch_size: most samples in one batch; batches of an epoch differ in size by at most one, and hold
            at least two.
        augment: how images are varied; embeddings never are.
        device: where the batches go.
        mean: of the pixels, in [0, 1], per channel, or of an embedding's numbers; None takes it from them.
        std: likewise.
        workers: processes that decode large images; None takes one per core.
        fail_on_error: whether an image that turns out unreadable stops the run.
    """
    match dataset.content:
        case Embeddings() | PixelImages():
            return MemoryLoader(dataset, batch_size, augment, device, mean, std)
        case LargeImages():
            workers = min(MOST_WORKERS, usable_cores()) if workers is None else workers
            return DecodingLoader(dataset, batch_size, augment, device, mean, std, workers, fail_on_error)


class MemoryLoader:
    """Samples that fit in memory as the model takes them: small images and embeddings.

    They are put on the device once, if they leave room there; everything about an epoch that is random is
    drawn before it starts, so that no step waits for the host.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        augment: Augment,
        device: torch.device,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
    ) -> None:
        rows_N = torch.from_numpy(dataset.usable_rows())
        self._is_embedding = isinstance(dataset.content, Embeddings)
        if isinstance(dataset.content, Embeddings):
            contents: Tensor | PixelFile = torch.from_numpy(dataset.content.vectors_ND)
            self.statistics = (
                _vector_statistics(_rows(contents, rows_N))
                if mean is None or std is None
                else Statistics(torch.tensor(mean), torch.tensor(std))
            )
        elif isinstance(dataset.content, PixelImages):
            pixels_N3SS = dataset.content.pixels_N3SS
            contents = pixels_N3SS if isinstance(pixels_N3SS, PixelFile) else torch.from_numpy(pixels_N3SS)
            self.statistics = _statistics(_rows(contents, _spread(rows_N, STATISTICS_IMAGES)), mean, std)
        else:
            raise TypeError("images that are decoded at each use need a DecodingLoader")
        # Contents that would fill the device stay where they are; each batch is then copied by itself.
        is_near = _fits(contents, device)
        self._contents = _on_device(contents, device) if is_near else contents
        self._pins = not is_near and device.type == "cuda"
        self._labels = torch.from_numpy(dataset.labels_N).to(device)
        self.rows = rows_N
        self._batch_size = batch_size
        self._augment: Augment = "none" if self._is_embedding else augment
        self._device = device
        self._normaliser = _Normaliser(self.statistics, device)

    def num_batches(self, rows: Tensor) -> int:
        """Return the optimizer steps in one epoch on these rows."""
        return _num_batches(len(rows), self._batch_size)

    def training_batches(
        self, rows: Tensor, generator: torch.Generator, *, first: int = 0
    ) -> Iterator[Batch]:
        """Yield these rows once, in random order, augmented."""
        num_rows = len(rows)
        order_N = rows[torch.randperm(num_rows, generator=generator)]
        near_order_N = order_N.to(self._device)
        shift = max(1, round(SHIFT_SHARE * self._contents.shape[-1]))
        shifts_N2 = torch.randint(2 * shift + 1, (num_rows, 2), generator=generator).to(self._device)
        flips_N = (torch.rand(num_rows, generator=generator) < 0.5).to(self._device)
        batches = order_N.tensor_split(self.num_batches(rows))
        start = sum(map(len, batches[:first]))
        for group in _groups(batches[first:], self._batches_at_a_time(len(batches[0]))):
            sizes = [len(indices_B) for indices_B in group]
            part = slice(start, start + sum(sizes))
            start = part.stop
            contents_G = self._take(order_N[part], near_order_N[part])
            if self._augment != "none":
                contents_G = _shifted(contents_G, shifts_N2[part], shift)
            if self._augment == "crop-flip":
                contents_G = _flipped(contents_G, flips_N[part])
            indices_G = torch.split(near_order_N[part], sizes)
            for indices_B, contents_B in zip(indices_G, torch.split(contents_G, sizes), strict=True):
                yield self._batch(indices_B, contents_B)

    def plain_batches(self) -> Iterator[Batch]:
        """Yield all usable samples once, in order, as they are."""
        size = _plain_batch_size(self._batch_size, self._device)
        near_rows = torch.split(self.rows.to(self._device), size)
        for indices_B, near_B in zip(torch.split(self.rows, size), near_rows, strict=True):
            yield self._batch(near_B, self._take(indices_B, near_B))

    def _batches_at_a_time(self, batch_size: int) -> int:
        if self._device.type == "cpu" or self._pins:
            return 1
        num_rows = max(1, self._contents.shape[0])
        return max(1, GATHERED_BYTES * num_rows // max(1, batch_size * self._contents.nbytes))

    def _take(self, indices_B: Tensor, near_B: Tensor) -> Tensor:
        """Return the contents of rows, which are given on the host and on the device, on the device."""
        contents_B = _rows(self._contents, indices_B if self._pins else near_B)
        # torch keeps pinned memory that it is done with for the next batch, which so waits for nothing.
        return (contents_B.pin_memory() if self._pins else contents_B).to(self._device, non_blocking=True)

    def _batch(self, indices_B: Tensor, contents_B: Tensor) -> Batch:
        return Batch(indices_B, self._normaliser(contents_B), self._labels[indices_B])


class DecodingLoader:
    """Large images, decoded at each use by worker processes.

    An image that cannot be decoded is left out of its batch and entered in the dataset's problems.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        augment: Augment,
        device: torch.device,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        workers: int,
        fail_on_error: bool,
    ) -> None:
        if not isinstance(dataset.content, LargeImages):
            raise TypeError("samples that are in memory need a MemoryLoader")
        self._dataset = dataset
        self._content = dataset.content
        self._batch_size = batch_size
        self._augment: Augment = augment
        self._device = device
        self._workers = workers
        self._fail_on_error = fail_on_error
        self._labels = torch.from_numpy(dataset.labels_N).to(device)
        if mean is None or std is None:
            rows = _spread(torch.from_numpy(dataset.usable_rows()), STATISTICS_IMAGES // 4)
            parts = [part.tolist() for part in torch.split(rows, STATISTICS_IMAGES_AT_A_TIME) if len(part)]
            decoded = [pixels_B for _, pixels_B in self._decoded(parts, seed=None) if len(pixels_B)]
            dataset.check()
        else:
            decoded = []
        samples = torch.cat(decoded) if decoded else torch.from_numpy(_NO_PIXELS).permute(0, 3, 1, 2)
        self.statistics = _statistics(samples, mean, std)
        self._normaliser = _Normaliser(self.statistics, device)

    @property
    def rows(self) -> Tensor:
        """Rows of the samples that have not turned out to be unreadable so far."""
        return torch.from_numpy(self._dataset.usable_rows())

    def num_batches(self, rows: Tensor) -> int:
        """Return the optimizer steps in one epoch on these rows."""
        return _num_batches(len(rows), self._batch_size)

    def training_batches(
        self, rows: Tensor, generator: torch.Generator, *, first: int = 0
    ) -> Iterator[Batch]:
        """Yield these rows once, in random order, each in a random crop; a batch may turn out to be empty."""
        order_N = rows[torch.randperm(len(rows), generator=generator)]
        seed = int(torch.randint(2**62, (), generator=generator)) if self._augment != "none" else None
        flips_N = (torch.rand(len(self._dataset), generator=generator) < 0.5).to(self._device)
        batches = [part.tolist() for part in order_N.tensor_split(self.num_batches(rows))]
        for indices_B, pixels_B in self._decoded(batches[first:], seed):
            yield self._batch(indices_B, pixels_B, flips_N if self._augment == "crop-flip" else None)

    def plain_batches(self) -> Iterator[Batch]:
        """Yield all usable samples once, in order, cut to their centre."""
        size = _plain_batch_size(self._batch_size, self._device)
        batches = [part.tolist() for part in torch.split(self.rows, size)]
        for indices_B, pixels_B in self._decoded(batches, seed=None):
            if len(indices_B):
                yield self._batch(indices_B, pixels_B)

    def _decoded(self, batches: list[list[int]], seed: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (row numbers, uint8 pixels) of every batch, without the rows that cannot be decoded.

        Where none can, both are empty.
        """
        loader: DataLoader[_Decoded] = DataLoader(
            _DecodingDataset(self._content, seed),
            batch_sampler=batches,
            num_workers=self._workers,
            collate_fn=_Collate(shares=self._workers > 0 and _can_share(self._bytes_under_way(batches))),
            prefetch_factor=BATCHES_AHEAD if self._workers else None,
            pin_memory=self._device.type == "cuda",
            multiprocessing_context=start_method() if self._workers else None,
            worker_init_fn=end_with_parent,
            # Of its own, as it would otherwise draw from the global one, which dropout draws from too.
            generator=torch.Generator(),
        )
        try:
            with starting_workers():
                decoded = iter(loader)
        except OSError as error:
            with _silent_finalizers():
                error.__traceback__ = None  # holds torch's iterator, which cannot end when it is half made
            raise DataError(
                f"{self._dataset.source}: no processes that decode images can be started "
                f"({error.strerror or error}); pass fewer --workers, or --workers 0."
            ) from error
        try:
            for batch in decoded:
                for row, reason in batch.problems.items():
                    self._dataset.problems[row] = reason
                    if self._fail_on_error:
                        raise DataError(
                            f"{self._dataset.source}: {self._dataset.ids[row]} cannot be read ({reason}); "
                            "fix it, or leave out --on-error fail."
                        )
                yield torch.as_tensor(batch.indices_B), torch.as_tensor(batch.pixels_BSS3).permute(0, 3, 1, 2)
        except (DataError, OutputError) as error:
            # torch puts the traceback of the worker before the message.
            kind, message = type(error), str(error).strip().splitlines()[-1]
            raise kind(message.removeprefix(f"{kind.__module__}.{kind.__name__}: ")) from error
        except RuntimeError as error:
            if TOO_MANY_FILES in str(error):
                raise DataError(
                    f"{self._dataset.source}: too many open files to hear from the processes that decode "
                    "images; raise the limit (ulimit -n), or pass fewer --workers."
                ) from error
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"{self._dataset.source}: a process that decodes images died ({first_line(error)}); often "
                "memory ran out: pass fewer --workers (with --resume, where the run was kept)."
            ) from error

    def _bytes_under_way(self, batches: list[list[int]]) -> int:
        """Return what the largest batches take that workers have made and the training has not used up."""
        largest = max(map(len, batches), default=0)
        return (self._workers * BATCHES_AHEAD + 1) * largest * 3 * self._content.size**2

    def _batch(self, indices_B: Tensor, pixels_B: Tensor, flips_N: Tensor | None = None) -> Batch:
        indices_B = indices_B.to(self._device, non_blocking=True)
        pixels_B = pixels_B.to(self._device, non_blocking=True)
        if flips_N is not None:
            pixels_B = _flipped(pixels_B, flips_N[indices_B])
        return Batch(indices_B, self._normaliser(pixels_B), self._labels[indices_B])


_Decoded = tuple[int, Pixels | str]
_NO_PIXELS = np.zeros((0, 1, 1, 3), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class _DecodedBatch:
    """What a worker process sends. Of pixels, colours are innermost."""

    indices_B: NDArray[np.int64] | Tensor
    pixels_BSS3: Pixels | Tensor
    problems: dict[int, str]

    def pin_memory(self) -> _DecodedBatch:
        """Put the batch where a GPU copies it from; the DataLoader calls this, in a thread of its own."""
        indices_B, pixels_BSS3 = torch.as_tensor(self.indices_B), torch.as_tensor(self.pixels_BSS3)
        return _DecodedBatch(indices_B.pin_memory(), pixels_BSS3.pin_memory(), self.problems)


@contextmanager
def _silent_finalizers() -> Iterator[None]:
    previous, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = previous


class _DecodingDataset(torch.utils.data.Dataset[_Decoded]):
    """What a worker process holds: where the images are, and the epoch's seed."""

    def __init__(self, content: LargeImages, seed: int | None) -> None:
        self._content = content
        self._seed = seed

    def __getitem__(self, row: int) -> _Decoded:
        try:
            encoded = self._content.encoded.read(row)
            if self._seed is None:
                pixels = decode_centre(encoded, self._content.size, self._content.max_pixels)
            else:
                # A generator per row: the crop depends neither on the worker nor on the batch.
                rng = np.random.default_rng([self._seed, row])
                pixels = decode_random_crop(encoded, self._content.size, rng, self._content.max_pixels)
        except UnreadableImageError as error:
            return row, str(error)
        return row, pixels


class _Collate:
    """Gathers the images of a batch, in memory that the process that trains reads, if that is shared.

    Args:
        shares: whether to share it. What there is no room for goes through a pipe, which is slower.
    """

    def __init__(self, *, shares: bool) -> None:
        self._shares = shares

    def __call__(self, samples: list[_Decoded]) -> _DecodedBatch:
        good = [(row, pixels) for row, pixels in samples if not isinstance(pixels, str)]
        problems = {row: reason for row, reason in samples if isinstance(reason, str)}
        indices_B = np.array([row for row, _ in good], dtype=np.int64)
        if not good:
            return _DecodedBatch(indices_B, _NO_PIXELS, problems)
        # In the order in which images lie in memory, and in which networks take them: colours innermost.
        images_SS3 = [pixels.transpose(1, 2, 0) for _, pixels in good]
        shared_BSS3 = self._room((len(good), *images_SS3[0].shape))
        if shared_BSS3 is None:
            return _DecodedBatch(indices_B, np.stack(images_SS3), problems)
        np.stack(images_SS3, out=shared_BSS3.numpy())
        return _DecodedBatch(indices_B, shared_BSS3, problems)

    def _room(self, shape: tuple[int, ...]) -> Tensor | None:
        """Return shared memory for uint8 pixels; None where it is not wanted, or there is none."""
        if not self._shares:
            return None
        # Here, as a tensor that torch finds no room for when it is sent is waited for for ever.
        room = torch.empty(shape, dtype=torch.uint8)
        try:
            return room.share_memory_()  # type: ignore[no-any-return, no-untyped-call]
        except (OSError, RuntimeError):
            self._shares = False  # torch leaves a file open at each failure
            return None


def _can_share(num_bytes: int) -> bool:
    """Say whether workers can send so many bytes at a time as tensors.

    Containers often have little shared memory; and torch sends files through sockets in the temporary folder,
    whose names must not be long.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return False
    return num_bytes <= SHARED_MEMORY_SHARE * free and len(tempfile.gettempdir()) <= LONGEST_SOCKET_FOLDER


class _Normaliser:
    """uint8 pixels or raw embeddings to the float32 inputs of a model."""

    def __init__(self, statistics: Statistics, device: torch.device) -> None:
        is_pixels = len(statistics.mean.shape) == 3
        scale = 255.0 if is_pixels else 1.0
        self._offset = (statistics.mean / statistics.std).to(device)
        self._factor = (1 / (scale * statistics.std)).to(device)
        self._is_pixels = is_pixels

    def __call__(self, contents_B: Tensor) -> Tensor:
        if not self._is_pixels:
            return contents_B * self._factor - self._offset
        inputs_B = contents_B.to(torch.float32, memory_format=torch.channels_last)
        return inputs_B.mul_(self._factor).sub_(self._offset)


def _statistics(
    pixels_B3SS: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Statistics:
    """Mean and standard deviation of pixels in [0, 1], per channel, shape (3, 1, 1)."""
    if mean is None or std is None:
        values_3P = pixels_B3SS.transpose(0, 1).flatten(1).double() / 255
        mean = mean or tuple(values_3P.mean(1).tolist())
        std = std or tuple(max(value, 1e-3) for value in values_3P.std(1).tolist())
    return Statistics(torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1))


def _vector_statistics(vectors_ND: Tensor) -> Statistics:
    """Mean and standard deviation of every number of an embedding, shape (D,); constants keep a std of 1."""
    std_D = vectors_ND.double().std(0)
    return Statistics(vectors_ND.double().mean(0).float(), std_D.where(std_D > 1e-6, 1).float())


def _num_batches(num_samples: int, batch_size: int) -> int:
    """Return how many batches of nearly one size; each holds two samples, as normalisation layers need."""
    return max(1, min(math.ceil(num_samples / batch_size), num_samples // 2))


def _fits(contents: Tensor | PixelFile, device: torch.device) -> bool:
    if device.type != "cuda":
        return isinstance(contents, Tensor)
    return contents.nbytes <= DEVICE_MEMORY_SHARE * free_memory(device)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a CUDA device, with those that torch keeps for the next tensors."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def _on_device(contents: Tensor | PixelFile, device: torch.device) -> Tensor:
    if isinstance(contents, Tensor):
        return contents.to(device)
    pixels_N3SS = torch.empty(contents.shape, dtype=torch.uint8, device=device)
    for rows_B in torch.split(torch.arange(contents.shape[0]), ROWS_AT_A_TIME):
        pixels_N3SS[int(rows_B[0]) : int(rows_B[-1]) + 1] = _rows(contents, rows_B).to(device)
    return pixels_N3SS


def _rows(contents: Tensor | PixelFile, indices_B: Tensor) -> Tensor:
    """Return some of the contents, where these are."""
    if isinstance(contents, Tensor):
        return contents[indices_B.to(contents.device)]
    return torch.from_numpy(contents[indices_B.cpu().numpy()])


def _groups(batches: Sequence[Tensor], size: int) -> Iterator[Sequence[Tensor]]:
    """Yield so many batches at a time."""
    for start in range(0, len(batches), size):
        yield batches[start : start + size]


def _plain_batch_size(training_batch_size: int, device: torch.device) -> int:
    return PLAIN_BATCH_ON_CPU if device.type == "cpu" else 2 * training_batch_size


def _spread(rows_N: Tensor, most: int) -> Tensor:
    """Return at most that many of the rows, evenly spread."""
    if len(rows_N) <= most:
        return rows_N
    return rows_N[torch.linspace(0, len(rows_N) - 1, most).long()]


def _shifted(pixels_B3SS: Tensor, shifts_B2: Tensor, shift: int) -> Tensor:
    """Move every image by its own shift, up to `shift` pixels each way; what moves in is black."""
    size = pixels_B3SS.shape[-1]
    padded = functional.pad(pixels_B3SS, (shift, shift, shift, shift))
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)
    batch = torch.arange(len(pixels_B3SS), device=pixels_B3SS.device)
    return windows[batch, :, shifts_B2[:, 0], shifts_B2[:, 1]]


def _flipped(pixels_B3SS: Tensor, flips_B: Tensor) -> Tensor:
    return torch.where(flips_B[:, None, None, None], pixels_B3SS.flip(3), pixels_B3SS)

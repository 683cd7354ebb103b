"""From streams of encoded images to what a model is fed: which size, and decoded once or anew at each use."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import stat
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from chgval.config import DataConfig
from chgval.data.dataset import EncodedImages, LargeImages, digest
from chgval.data.decode import (
    LARGEST_SAMPLE,
    Encoded,
    UnreadableImageError,
    deepest_sample,
    shorter_side,
)
from chgval.data.decode_once import LoadedImages, decode_once
from chgval.data.pixel_file import spooling
from chgval.errors import DataError
from chgval.types import IntArray

# Those of torchvision's ImageFolder, and what else Pillow reads.
TORCHVISION_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
EXTENSIONS = (
    *TORCHVISION_EXTENSIONS,
    *(".gif", ".jfif", ".jpe", ".apng", ".avif", ".jp2", ".j2k", ".jpx", ".tga", ".pnm", ".dib"),
)
# Squares up to this side are decoded once and kept as uint8.
LARGEST_KEPT_SIZE = 64
# Headers read to choose the image size.
PROBED_IMAGES = 512
# Images decoded to see how deep they are, and the share of the range that makes them dark.
PROBED_DEPTHS, FEWEST_LEVELS = 16, 8
# Bytes of a file: the most pixels that are accepted, at 16 bits in four channels, and some more.
LARGEST_ENCODED = 2**31

# Read of each end of a file for its digest.
DIGESTED_BYTES = 4096
DIGESTS_AT_A_TIME = 64

MeasureT = TypeVar("MeasureT")


def depth_notes(probed: Iterable[Encoded], max_pixels: int) -> list[str]:
    """Return what is odd about the samples of images of more than 8 bits: all are scaled as 16-bit ones."""
    largest = _measured(probed, PROBED_DEPTHS, deepest_sample, max_pixels)
    samples = [sample for sample in largest if sample is not None]
    if not samples:
        return []
    if max(samples) > LARGEST_SAMPLE:
        what = f"go up to {max(samples):,}, and all above {LARGEST_SAMPLE:,} become white"
    elif max(samples) < LARGEST_SAMPLE / FEWEST_LEVELS:
        what = f"go up to {max(samples):,} only, of {LARGEST_SAMPLE:,}, and become nearly black"
    else:
        return []
    return [f"samples of images of more than 8 bits {what}; scale them to 8 bits first"]


def choose_size(probed: Iterable[Encoded], largest: int, max_pixels: int) -> int:
    """Return the side of the squares that a model is fed: the median shorter side, but at most `largest`.

    Sizes above 64 pixels are rounded down to a multiple of 32, which every architecture takes.
    """
    sides = _measured(probed, PROBED_IMAGES, shorter_side, max_pixels)
    side = min(largest, int(statistics.median_low(sides))) if sides else min(largest, LARGEST_KEPT_SIZE)
    return max(1, side if side <= LARGEST_KEPT_SIZE else side // 32 * 32)


def _measured(
    probed: Iterable[Encoded], count: int, measure: Callable[[bytes, int], MeasureT], max_pixels: int
) -> list[MeasureT]:
    """Return a measure of the first images, as far as they can be read."""
    found = []
    for encoded in itertools.islice(probed, count):
        if not isinstance(encoded, UnreadableImageError):
            with suppress(UnreadableImageError):
                found.append(measure(encoded, max_pixels))
    return found


def load_files(images: ImageFiles, config: DataConfig, largest_size: int) -> LoadedImages:
    """Make images in files of their own ready for a model.

    Args:
        images: the files.
        config: the image size, where the user gave it, and how many pixels an image may have.
        largest_size: the largest side to choose.
    """
    size, most = config.image_size, config.max_pixels
    probed = np.linspace(0, len(images) - 1, min(len(images), PROBED_IMAGES)).astype(int).tolist()
    if size is None:
        size = choose_size(map(images.read_or_error, probed), largest_size, most)
    if size <= LARGEST_KEPT_SIZE:
        rows = range(len(images))
        loaded = decode_once(
            rows, images.read_or_error, len(rows), size, most, workers=config.workers, digest=content_digest
        )
    else:
        loaded = keep_encoded(images, size, {}, most)
    spread = probed[:: max(1, len(probed) // PROBED_DEPTHS)]
    return dataclasses.replace(loaded, notes=depth_notes(map(images.read_or_error, spread), most))


def keep_encoded(images: EncodedImages, size: int, problems: dict[int, str], max_pixels: int) -> LoadedImages:
    """Leave large images encoded. Where no header can be read at all, every row is checked."""
    probed = np.linspace(0, len(images) - 1, min(len(images), PROBED_IMAGES)).astype(int).tolist()
    problems = {**problems, **_unreadable_headers(images, probed, max_pixels)}
    if len(images) and all(row in problems for row in probed):
        problems.update(_unreadable_headers(images, range(len(images)), max_pixels))
    return LoadedImages(LargeImages(images, size, max_pixels), problems)


def _unreadable_headers(images: EncodedImages, rows: Iterable[int], max_pixels: int) -> dict[int, str]:
    problems = {}
    for row in rows:
        try:
            shorter_side(images.read(row), max_pixels)
        except UnreadableImageError as error:
            problems[row] = str(error)
    return problems


class SpooledImages:
    """Encoded images copied, in order, into one temporary file, for reading in any order.

    Random access to rows of Parquet files reads a whole row group a row; this reads the row. The file goes
    when the object does.
    """

    def __init__(self, stream: Iterable[Encoded]) -> None:
        with spooling():
            self._folder = tempfile.TemporaryDirectory(prefix="chgval-")
        self._path = Path(self._folder.name) / "images"
        self.problems: dict[int, str] = {}
        ends = [0]
        with spooling(), self._path.open("wb") as file:
            for row, encoded in enumerate(stream):
                if isinstance(encoded, UnreadableImageError):
                    self.problems[row] = str(encoded)
                    encoded = b""
                file.write(encoded)
                ends.append(ends[-1] + len(encoded))
        self._ends: IntArray = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, row: int) -> bytes:
        """Return the bytes of one image. Raises OutputError where the file was tidied away."""
        with spooling(), self._path.open("rb") as file:
            file.seek(int(self._ends[row]))
            return file.read(int(self._ends[row + 1] - self._ends[row]))

    def __getstate__(self) -> dict[str, object]:
        # A worker process reads the file; it must not remove it.
        return {name: value for name, value in self.__dict__.items() if name != "_folder"}


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Encoded images in files of their own.

    Attributes:
        paths: of the files.
        refused: why a file is not read, by row.
    """

    paths: Sequence[str]
    refused: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> bytes:
        """Return the file's bytes. Raises UnreadableImageError where it cannot be read."""
        if row in self.refused:
            raise UnreadableImageError(self.refused[row])
        return read_image_file(self.paths[row])

    def read_or_error(self, row: int) -> Encoded:
        """Return the file's bytes, or the error."""
        try:
            return self.read(row)
        except UnreadableImageError as error:
            return error

    def pictures(self, rows: Iterable[int]) -> Iterator[bytes | None]:
        """Yield the bytes of each of these files; None for one that cannot be read."""
        for row in rows:
            encoded = self.read_or_error(row)
            yield encoded if isinstance(encoded, bytes) else None

    def digests(self) -> list[int]:
        """Return what stands for each file in a fingerprint, without reading large ones whole; 0 for none."""
        starts = range(0, len(self), DIGESTS_AT_A_TIME)
        with ThreadPoolExecutor() as pool:  # on a network's disk, each file is waited for
            parts = pool.map(self._digests, starts)
            return list(itertools.chain.from_iterable(parts))

    def _digests(self, start: int) -> list[int]:
        rows = range(start, min(start + DIGESTS_AT_A_TIME, len(self)))
        return [0 if row in self.refused else _file_digest(self.paths[row]) for row in rows]


def content_digest(encoded: Encoded) -> int:
    """Return what stands for a file that was read, as `ImageFiles.digests` has it."""
    if isinstance(encoded, UnreadableImageError):
        return 0
    first, size = encoded[:DIGESTED_BYTES], len(encoded)
    return digest(size.to_bytes(8, "little"), first, encoded[max(len(first), size - DIGESTED_BYTES) :])


def _file_digest(path: str) -> int:
    """Return what stands for a file: of its size, its first and its last bytes; 0 where there are none."""
    try:
        with open_image_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(DIGESTED_BYTES)
            file.seek(max(len(first), size - DIGESTED_BYTES))
            return digest(size.to_bytes(8, "little"), first, file.read(DIGESTED_BYTES))
    except (OSError, UnreadableImageError):
        return 0


def holds_images(root: Path) -> bool:
    """Say whether a folder has images where class folders, or those of a split, have theirs."""
    files = itertools.chain(root.glob("*/*"), root.glob("*/*/*"))
    return any(file.suffix.lower() in EXTENSIONS for file in files)


def leads_into(path: Path, folder: Path) -> bool:
    """Say whether a path ends up in a folder, once all links in it are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def open_image_file(path: Path | str) -> BinaryIO:
    """Open a file to read its bytes.

    Raises:
        UnreadableImageError: it cannot be read, would wait for another program, or has no end.
        DataError: this process has too many files open to read any.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path for each file takes as long as the file)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImageError("no regular file")
        if status.st_size > LARGEST_ENCODED:
            raise UnreadableImageError(f"{status.st_size:,} bytes, more than an image can have")
        return open(path, "rb")  # noqa: PTH123 (whoever asked for it closes it)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise DataError(f"{path}: {error.strerror}; raise the limit (ulimit -n).") from error
        raise UnreadableImageError(error.strerror or str(error)) from error
    except ValueError as error:  # a name with a zero byte
        raise UnreadableImageError(str(error)) from error


def read_image_file(path: Path | str) -> bytes:
    """Return a file's bytes. Raises UnreadableImageError as `open_image_file` does."""
    with open_image_file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise UnreadableImageError(error.strerror or str(error)) from error

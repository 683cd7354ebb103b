"""A folder of class folders, in the order of torchvision's ImageFolder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chgval.config import DataConfig
from chgval.data.dataset import Dataset, digest, fingerprint
from chgval.data.decode import UnreadableImageError
from chgval.data.images import (
    LARGEST_KEPT_SIZE,
    PROBED_IMAGES,
    Encoded,
    choose_size,
    decode_once,
    keep_encoded,
    open_image_file,
    read_image_file,
)
from chgval.errors import DataError
from chgval.files import EPOCHS_ENDING, TRAINING_FILE, TRAINING_STATE_FILE, part_of
from chgval.types import IntArray

# Of each end of a file.
DIGESTED_BYTES = 4096
DIGESTS_AT_A_TIME = 64
# Those of torchvision's ImageFolder, and what else Pillow reads.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".gif", ".jfif"),
)
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Encoded images in files of their own."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> bytes:
        """Return the file's bytes. Raises UnreadableImageError where it cannot be read."""
        return read_image_file(Path(self.paths[row]))

    def read_or_error(self, row: int) -> Encoded:
        """Return the file's bytes, or the error."""
        try:
            return self.read(row)
        except UnreadableImageError as error:
            return error


def holds_images(root: Path) -> bool:
    """Say whether a folder has images where class folders, or those of a split, have theirs."""
    files = itertools.chain(root.glob("*/*"), root.glob("*/*/*"))
    return any(file.suffix.lower() in EXTENSIONS for file in files)


@dataclass(frozen=True, slots=True)
class FolderRows:
    """All images of a folder of class folders, in order, without their contents.

    Attributes:
        root: folder of the class folders.
        paths: of the files.
        ids: paths below the root, as text.
        labels_N: class of every file as an index into class_names.
        folders: names of the class folders.
        class_names: the same as text.
        notes: what a person should know about how the folder was read.
    """

    root: Path
    paths: Sequence[str]
    ids: Sequence[str]
    labels_N: IntArray
    folders: Sequence[str]
    class_names: Sequence[str]
    notes: Sequence[str]


def list_image_folder(root: Path) -> FolderRows:
    """List ROOT/<class>/**/<image>.

    Args:
        root: the folder. Where it holds a folder `train`, that one is listed.
    Raises:
        DataError: there are no class folders, or no images in them.
    """
    notes = []
    if _is_split(root):
        root = root / "train"
        notes.append(f"reading {root} only (the folder holds a train folder)")
    folders = _subfolders(root)
    own = sorted(set(_all_subfolders(root)) - set(folders))
    if own:
        notes.append(f"{len(own)} folders that chgval wrote are no classes ({', '.join(own[:3])})")
    if not folders:
        raise DataError(
            f"{root}: no class folders and no Parquet files found; expected {root}/<class>/<image>, or a "
            "folder of *.parquet files."
        )
    samples = [(path, label) for label, name in enumerate(folders) for path in _images_below(root / name)]
    if not samples:
        raise DataError(
            f"{root}: {len(folders)} class folders but no images in them; images end in "
            f"{', '.join(EXTENSIONS)}."
        )
    paths = [path for path, _ in samples]
    present, labels_N = np.unique([label for _, label in samples], return_inverse=True)
    empty = [name for label, name in enumerate(folders) if label not in present]
    if empty:
        notes.append(f"{len(empty)} folders without images are no classes ({', '.join(empty[:3])})")
    folders = [folders[label] for label in present]
    return FolderRows(
        root=root,
        paths=paths,
        ids=[as_text(Path(path).relative_to(root).as_posix()) for path in paths],
        labels_N=labels_N,
        folders=folders,
        class_names=[as_text(name) for name in folders],
        notes=notes,
    )


def read_image_folder(root: Path, config: DataConfig, largest_size: int) -> Dataset:
    """Read what `list_image_folder` lists.

    Args:
        root: the folder.
        config: the image size, where the user gave it, and how many pixels an image may have.
        largest_size: the largest side to choose.
    Raises:
        DataError: there are no class folders, or no images in them.
    """
    rows = list_image_folder(root)
    images, size, max_pixels = ImageFiles(rows.paths), config.image_size, config.max_pixels
    if size is None:
        probed = np.linspace(0, len(images) - 1, min(len(images), PROBED_IMAGES)).astype(int).tolist()
        size = choose_size(map(images.read_or_error, probed), largest_size, max_pixels)
    if size <= LARGEST_KEPT_SIZE:
        loaded = decode_once(map(images.read_or_error, range(len(images))), len(images), size, max_pixels)
    else:
        loaded = keep_encoded(images, size, {}, max_pixels)
    return Dataset(
        source=str(root),
        ids=rows.ids,
        labels_N=rows.labels_N,
        class_names=rows.class_names,
        content=loaded.content,
        problems=loaded.problems,
        fingerprint=folder_fingerprint(rows),
        notes=rows.notes,
        root=str(rows.root),
    )


def _subfolders(root: Path) -> list[str]:
    """Return the folders that may be classes: not hidden ones, nor what chgval wrote."""
    return [name for name in _all_subfolders(root) if not _is_output(root / name)]


def _all_subfolders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _is_output(folder: Path) -> bool:
    """Say whether a folder holds the epochs of a report, or a training."""
    if folder.suffix == EPOCHS_ENDING:
        return any(folder.glob("epoch=*"))
    state_file = folder / TRAINING_STATE_FILE
    return any(path.exists() for path in (folder / TRAINING_FILE, state_file, part_of(state_file)))


def _is_split(root: Path) -> bool:
    """Say whether `train` is a split and not a class: it holds folders, and all beside it are splits too."""
    names = _subfolders(root)
    return "train" in names and set(names) <= SPLITS and bool(_subfolders(root / "train"))


def _images_below(class_folder: Path) -> list[str]:
    """Return the images below a class folder, sorted by folder, then by name; links are followed.

    A folder that links lead into a second time is left out: its images would count twice, and a link to a
    folder above it would never end.
    """
    seen = set()
    folders = []
    for folder, subfolders, names in os.walk(class_folder, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        folders.append((folder, sorted(name for name in names if name.lower().endswith(EXTENSIONS))))
    # Not with Path: one for each of a million files takes seconds.
    return [os.path.join(folder, name) for folder, names in sorted(folders) for name in names]  # noqa: PTH118


def as_text(name: str) -> str:
    """Return a name that every format can hold: bytes that are no UTF-8 are written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def folder_fingerprint(rows: FolderRows) -> str:
    """Return the fingerprint of a dataset of these rows, without reading large files whole."""
    starts = range(0, len(rows.paths), DIGESTS_AT_A_TIME)
    parts = (rows.paths[start : start + DIGESTS_AT_A_TIME] for start in starts)
    with ThreadPoolExecutor() as pool:  # on a network's disk, each file is waited for
        digests = list(itertools.chain.from_iterable(pool.map(_file_digests, parts)))
    return fingerprint(rows.ids, rows.labels_N, rows.class_names, digests)


def _file_digests(paths: Sequence[str]) -> list[int]:
    return [_file_digest(path) for path in paths]


def _file_digest(path: str) -> int:
    """Return what stands for a file: of its size, its first and its last bytes; 0 where there are none."""
    try:
        with open_image_file(Path(path)) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(DIGESTED_BYTES)
            file.seek(max(len(first), size - DIGESTED_BYTES))
            return digest(size.to_bytes(8, "little"), first, file.read(DIGESTED_BYTES))
    except (OSError, UnreadableImageError):
        return 0

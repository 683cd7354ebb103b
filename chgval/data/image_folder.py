"""A folder of class folders, in the order of torchvision's ImageFolder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from chgval.data.dataset import Dataset, fingerprint
from chgval.data.decode import UnreadableImageError
from chgval.data.images import (
    LARGEST_KEPT_SIZE,
    PROBED_IMAGES,
    Encoded,
    choose_size,
    decode_once,
    keep_encoded,
)
from chgval.errors import DataError

EXTENSIONS = (*IMG_EXTENSIONS, ".gif")


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Encoded images in files of their own."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> bytes:
        """Return the file's bytes. Raises UnreadableImageError where it cannot be read."""
        try:
            return Path(self.paths[row]).read_bytes()
        except OSError as error:
            raise UnreadableImageError(error.strerror or type(error).__name__) from error

    def read_or_error(self, row: int) -> Encoded:
        """Return the file's bytes, or the error."""
        try:
            return self.read(row)
        except UnreadableImageError as error:
            return error


def read_image_folder(root: Path, size: int | None, largest_size: int) -> Dataset:
    """Read ROOT/<class>/**/<image>.

    Args:
        root: the folder. Where it holds a folder `train`, that one is read.
        size: side of the squares that the model is fed; None chooses it from the images.
        largest_size: the largest side to choose.
    Raises:
        DataError: there are no class folders, or no images in them.
    """
    source, notes = str(root), []
    if (root / "train").is_dir():
        root = root / "train"
        notes.append(f"reading {root} only (the folder holds a train folder)")
    try:
        class_names = [name for name in find_classes(root)[0] if not name.startswith(".")]
    except FileNotFoundError:
        class_names = []
    if not class_names:
        raise DataError(
            f"{root}: no class folders and no Parquet files found; expected {root}/<class>/<image>, or a "
            "folder of *.parquet files."
        )
    classes = {name: index for index, name in enumerate(class_names)}
    samples = make_dataset(root, classes, extensions=EXTENSIONS, allow_empty=True)
    if not samples:
        raise DataError(
            f"{root}: {len(class_names)} class folders but no images in them; images end in "
            f"{', '.join(EXTENSIONS)}."
        )
    images = ImageFiles([path for path, _ in samples])
    labels_N = np.array([label for _, label in samples], dtype=np.int64)
    ids = [Path(path).relative_to(root).as_posix() for path in images.paths]

    if size is None:
        probed = np.linspace(0, len(images) - 1, min(len(images), PROBED_IMAGES)).astype(int).tolist()
        size = choose_size(map(images.read_or_error, probed), largest_size)
    if size <= LARGEST_KEPT_SIZE:
        loaded = decode_once(map(images.read_or_error, range(len(images))), len(images), size)
    else:
        loaded = keep_encoded(images, [_file_size(path) for path in images.paths], size, {})
    return Dataset(
        source=source,
        ids=ids,
        labels_N=labels_N,
        class_names=class_names,
        content=loaded.content,
        problems=loaded.problems,
        fingerprint=fingerprint(ids, labels_N, class_names, loaded.encoded_sizes),
        notes=notes,
    )


def _file_size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0

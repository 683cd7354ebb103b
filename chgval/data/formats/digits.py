"""The built-in demonstration: scikit-learn's handwritten digits, with some labels flipped."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from chgval.config import DataConfig, Link
from chgval.data.dataset import Dataset, PixelImages, fingerprint
from chgval.data.formats.base import Format, KnownRows, ListedRows, Rewritten, RowChanges, dataset_format
from chgval.errors import DataError, SettingsError
from chgval.types import IntArray

SOURCE = "builtin:digits"
FLIPPED_SHARE = 0.1
# The flips belong to the dataset, not to the run: every --seed values the same labels.
FLIP_SEED = 0


def read_digits() -> Dataset:
    """Return the 1,797 digits of 8 x 8 pixels, a stated share of whose labels is replaced by another digit.

    The id of a row says its true digit, so that a person can see what was found.
    """
    gray_N64, true_N = _pixels_and_digits()
    rng = np.random.default_rng(FLIP_SEED)
    flipped = rng.permutation(len(true_N))[: round(FLIPPED_SHARE * len(true_N))]
    labels_N = true_N.copy()
    labels_N[flipped] = (true_N[flipped] + rng.integers(1, 10, len(flipped))) % 10
    ids = [f"digit-{row:04d}-is-{digit}" for row, digit in enumerate(true_N)]
    names = [str(digit) for digit in range(10)]
    gray_N = (gray_N64.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    pixels_N3SS = np.ascontiguousarray(np.repeat(gray_N[:, None], 3, axis=1))
    return Dataset(
        source=SOURCE,
        ids=ids,
        labels_N=labels_N,
        class_names=names,
        content=PixelImages(pixels_N3SS),
        fingerprint=fingerprint(ids, labels_N, names, pixels_N3SS.tobytes()),
        flips=False,
        notes=[
            f"{len(flipped)} of {len(true_N):,} labels ({FLIPPED_SHARE:.0%}) were flipped; "
            "ids end in the true digit"
        ],
    )


def _pixels_and_digits() -> tuple[IntArray, IntArray]:
    """Return the 64 pixels of each image, from 0 to 16, and its digit.

    They are read from the file that scikit-learn holds them in: to load scikit-learn takes over a second.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError(f"{SOURCE}: is part of scikit-learn, which is not installed; pip install it.")
    table_NK = np.loadtxt(
        Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", dtype=np.int64, delimiter=","
    )
    return table_NK[:, :-1], table_NK[:, -1]


@dataset_format
class Digits(Format):
    """builtin:digits."""

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Say whether it is built in."""
        if not config.source.startswith("builtin:"):
            return False
        if config.source != SOURCE:
            raise DataError(f"{config.source}: no such built-in dataset; there is {SOURCE}.")
        if config.names_columns or config.image_size is not None:
            raise SettingsError(f"{SOURCE} has no columns, and one image size; leave those options out.")
        if config.split is not None:
            raise SettingsError(f"--split {config.split}: {SOURCE} has no splits; leave it out.")
        return True

    def read(self, largest_size: int) -> Dataset:
        """Read all digits."""
        return read_digits()

    def listed(self) -> ListedRows:
        """Return all digits."""
        digits = read_digits()
        return ListedRows(digits.ids, digits.labels_N, digits.class_names)

    def local_files(self) -> set[Path]:
        """Return nothing."""
        return set()

    def pictures(self, rows: Sequence[int]) -> Iterator[bytes | None]:
        """Yield the digits as PNG."""
        content = read_digits().content
        if not isinstance(content, PixelImages):
            raise TypeError("digits are images")
        for row in rows:
            file = io.BytesIO()
            pixels_SS3 = content.pixels_N3SS[np.array([row])][0].transpose(1, 2, 0)
            Image.fromarray(np.ascontiguousarray(pixels_SS3)).save(file, "PNG")
            yield file.getvalue()

    def check_target(self, target: Path, link: Link) -> None:
        """Refuse all."""
        raise SettingsError(f"{SOURCE}: is built in; only folders and Parquet files are written anew.")

    def check_same(self, known: KnownRows) -> None:
        """Accept all: it never changes."""

    def write(self, known: KnownRows, changes: RowChanges, target: Path, link: Link) -> Rewritten:
        """Refuse all, as `check_target` does."""
        raise SettingsError(f"{SOURCE}: is built in.")

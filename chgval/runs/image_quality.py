"""Dark, bright, blurry, empty and odd-sized images, as the cleanvision library finds them.

Shape legend: N rows, K of them readable.
"""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chgval.data.decode import UnreadableImageError, upright
from chgval.data.formats import Format
from chgval.errors import SettingsError
from chgval.types import FloatArray, IntArray

# What is looked for, as cleanvision calls it. Copies are found by chgval itself.
PROPERTIES = ("dark", "light", "blurry", "low_information", "grayscale", "odd_size", "odd_aspect_ratio")
# Images that are read at a time.
CHUNK_ROWS = 64


@dataclass(frozen=True, slots=True)
class Quality:
    """What is wrong with images as such.

    Attributes:
        scores: by property, shape (N,) each, from 0 (worst) to 1; NaN for what cannot be read.
        flags: by property, which images have it.
    """

    scores: dict[str, FloatArray]
    flags: dict[str, NDArray[np.bool_]]


def image_quality(source: Format, rows: IntArray, num_rows: int) -> Quality:
    """Look at all readable images of a dataset.

    Args:
        source: the dataset.
        rows: that can be read.
        num_rows: N.
    Raises:
        SettingsError: cleanvision is not installed.
    """
    try:
        from cleanvision import Imagelab
    except ImportError as error:
        raise SettingsError(
            "--quality: needs the cleanvision library; install it with pip install 'chgval[quality]'."
        ) from error
    scores = {name: np.full(num_rows, np.nan) for name in PROPERTIES}
    flags = {name: np.zeros(num_rows, dtype=bool) for name in PROPERTIES}
    if len(rows):
        # Its bars, and what pandas says of how it is used.
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lab = Imagelab(torchvision_dataset=_Pictures(source, rows), verbose=False)
            lab.find_issues({name: {} for name in PROPERTIES}, n_jobs=1, verbose=False)
        for name in PROPERTIES:
            scores[name][rows] = lab.issues[f"{name}_score"].to_numpy(dtype=float)
            flags[name][rows] = lab.issues[f"is_{name}_issue"].to_numpy(dtype=bool)
    return Quality(scores, flags)


class _Pictures:
    """A dataset as cleanvision reads one of torchvision: tuples with a PIL image."""

    def __init__(self, source: Format, rows: IntArray) -> None:
        self._source = source
        self._rows = rows
        self._read: dict[int, bytes | None] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> tuple[Image.Image]:
        if place not in self._read:  # in turn, so that a shard is not opened for each of its images
            places = range(place, min(place + CHUNK_ROWS, len(self)))
            pictures = self._source.pictures(self._rows[list(places)].tolist())
            self._read = dict(zip(places, pictures, strict=True))
        encoded = self._read[place]
        if encoded is None:
            raise UnreadableImageError("it is gone")
        return (upright(encoded, self._source.config.max_pixels),)


def explained_by_labels(score_N: FloatArray, labels_N: IntArray) -> float:
    """Return the share of a property's variance that lies between classes (eta squared), from 0 to 1.

    Args:
        score_N: of the property; NaN is left out.
        labels_N: given classes; -1 is left out.
    """
    known_N = np.isfinite(score_N) & (labels_N >= 0)
    score, labels = score_N[known_N], labels_N[known_N]
    total = ((score - score.mean()) ** 2).sum() if len(score) else 0.0
    if not total:
        return 0.0
    counts = np.bincount(labels)
    means = np.bincount(labels, weights=score) / np.maximum(counts, 1)
    return float((counts * (means - score.mean()) ** 2).sum() / total)

"""The built-in demonstration: scikit-learn's handwritten digits, with some labels flipped."""

from __future__ import annotations

import numpy as np

from chgval.data.dataset import Dataset, PixelImages, fingerprint

FLIPPED_SHARE = 0.1
# The flips belong to the dataset, not to the run: every --seed values the same labels.
FLIP_SEED = 0


def read_digits() -> Dataset:
    """Return the 1,797 digits of 8 x 8 pixels, a stated share of whose labels is replaced by another digit.

    The id of a row says its true digit, so that a person can see what was found.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    true_N = bunch.target.astype(np.int64)
    rng = np.random.default_rng(FLIP_SEED)
    flipped = rng.permutation(len(true_N))[: round(FLIPPED_SHARE * len(true_N))]
    labels_N = true_N.copy()
    labels_N[flipped] = (true_N[flipped] + rng.integers(1, 10, len(flipped))) % 10
    ids = [f"digit-{row:04d}-is-{digit}" for row, digit in enumerate(true_N)]
    names = [str(digit) for digit in range(10)]
    gray_N = (bunch.images * (255 / 16)).round().astype(np.uint8)
    pixels_N3SS = np.ascontiguousarray(np.repeat(gray_N[:, None], 3, axis=1))
    return Dataset(
        source="builtin:digits",
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

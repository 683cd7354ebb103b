"""Tiny datasets of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASS_NAMES = ["cat", "dog"]
PIXELS = 12


def make_image(label: int, seed: int, size: int = PIXELS) -> Image.Image:
    """Noise that is brighter at the top for class 0 and at the bottom for class 1."""
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 120, (size, size, 3))
    half = slice(None, size // 2) if label == 0 else slice(size // 2, None)
    array[half] += 120
    return Image.fromarray(array.astype(np.uint8))


def make_blobs(seed: int, size: int) -> Image.Image:
    """A picture of random blobs, smooth as photographs are, that no other resembles."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (9, 9, 3)).astype(np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def write_folder(root: Path, per_class: int = 20, size: int = PIXELS) -> Path:
    for label, name in enumerate(CLASS_NAMES):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            make_image(label, 1000 * label + number, size).save(root / name / f"{number:03d}.png")
    return root

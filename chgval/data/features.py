"""Embeddings in a file of their own, a row for each sample of a dataset, in its order."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chgval.errors import DataError, first_line

# Arrays of these names are taken where a file has several.
FEATURE_NAMES = ("features", "embeddings", "x", "X")


def read_features(path: Path, num_rows: int, source: str) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Return the embeddings of all rows, shape (N, D), and why a row has none, by row.

    Args:
        path: .npy, .npz or .safetensors, with a row per sample.
        num_rows: samples that the dataset has.
        source: the dataset, for messages.
    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        array = _load(path)
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"--features {path}: cannot be read ({first_line(error)}); expected an array of numbers as .npy, "
            ".npz or .safetensors."
        ) from error
    if array.ndim != 2 or array.dtype.kind not in "fiu" or not array.size:
        raise DataError(
            f"--features {path}: holds {array.dtype} of shape {array.shape}; expected numbers, a row for "
            "each sample."
        )
    if len(array) != num_rows:
        raise DataError(
            f"--features {path}: has {len(array):,} rows where {source} has {num_rows:,}; expected one for "
            "each, in the same order."
        )
    with np.errstate(over="ignore"):  # what is too large is told below
        vectors_ND = np.array(array, dtype=np.float32, order="C")
    problems = {}
    for row in np.flatnonzero(~np.isfinite(vectors_ND).all(1)).tolist():
        problems[row] = "features are not finite numbers"
        vectors_ND[row] = 0
    return vectors_ND, problems


def _load(path: Path) -> NDArray[np.generic]:
    match path.suffix:
        case ".npy":
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        case ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return np.asarray(arrays[_only(path, list(arrays))])
        case ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, "pt") as tensors:  # NumPy has no bfloat16
                    tensor = tensors.get_tensor(_only(path, list(tensors.keys())))
                    found: NDArray[np.generic] = tensor.float().numpy()
                    return found
            except SafetensorError as error:
                raise ValueError(str(error)) from error
        case _:
            raise ValueError(f"its ending is {path.suffix or 'none'}")


def _only(path: Path, names: list[str]) -> str:
    """Return the array that holds the features: the only one, or that of a known name."""
    if len(names) == 1:
        return names[0]
    known = [name for name in FEATURE_NAMES if name in names]
    if not known:
        raise ValueError(f"{path.name} holds {', '.join(names) or 'nothing'}, and none is called features")
    return known[0]

"""The samples nearest to a suspect among those that are surely of a class: what its label should be like.

Shape legend: N samples, D features, R rows that are asked about, K neighbours of each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chgval.types import FloatArray, IntArray

# Of each class, at most so many samples, and at most half of them, are taken to be surely of it.
SUREST_OF_CLASS = 1000


def surest_rows(label_N: IntArray, score_N: FloatArray, label: int) -> IntArray:
    """Return the rows of a class whose labels are the least suspicious, sorted by row.

    Args:
        label_N: given classes.
        score_N: noise scores; rows without one are left out.
        label: the class.
    """
    rows = np.flatnonzero((label_N == label) & np.isfinite(score_N))
    count = min(SUREST_OF_CLASS, (len(rows) + 1) // 2)
    return np.sort(rows[np.argsort(score_N[rows], kind="stable")[:count]])


def nearest_sure(
    features_ND: NDArray[np.floating],
    label_N: IntArray,
    score_N: FloatArray,
    rows: IntArray,
    label_R: IntArray,
    count: int,
) -> IntArray:
    """Return the nearest rows that are surely of a class, shape (R, K), the nearest first; -1 for none.

    Near is what points in the same direction from the mean of all features.

    Args:
        features_ND: last-layer inputs or embeddings; rows with NaN are none's neighbours.
        label_N: given classes.
        score_N: noise scores.
        rows: the samples that are asked about.
        label_R: the class whose samples are wanted, for each of them; -1 for none.
        count: K.
    """
    from sklearn.neighbors import NearestNeighbors

    nearest_RK = np.full((len(rows), count), -1)
    known_N = np.isfinite(features_ND).all(1)
    if not known_N.any():
        return nearest_RK
    mean_D = features_ND[known_N].mean(0, dtype=np.float64).astype(np.float32)

    def directions(wanted: IntArray) -> NDArray[np.float32]:
        centred = features_ND[wanted].astype(np.float32) - mean_D
        unit: NDArray[np.float32] = centred / np.maximum(
            np.linalg.norm(centred, axis=1, keepdims=True), 1e-12
        )
        return unit

    for label in np.unique(label_R[label_R >= 0]).tolist():
        candidates = surest_rows(label_N, score_N, label)
        candidates = candidates[known_N[candidates]]
        places = np.flatnonzero((label_R == label) & known_N[rows])
        if not len(candidates) or not len(places):
            continue
        # One more than is wanted, as a sample may be among those that are sure itself.
        most = min(count + 1, len(candidates))
        neighbours = NearestNeighbors(n_neighbors=most, algorithm="brute").fit(directions(candidates))
        found = candidates[neighbours.kneighbors(directions(rows[places]), return_distance=False)]
        for place, near in zip(places.tolist(), found, strict=True):
            others = near[near != rows[place]][:count]
            nearest_RK[place, : len(others)] = others
    return nearest_RK

"""Outliers: samples that are like few others, such as pictures of something else.

Shape legend: N samples, D features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chgval.types import FloatArray

# Neighbours that a sample is compared with: more than there are strangers of one kind, but not more than this
# share of all, nor than this many.
SHARE_OF_NEIGHBOURS, MOST_NEIGHBOURS = 0.1, 300
# Local outlier factor from which on a sample is an outlier (Breunig et al. 2000, section 7.1; the default of
# scikit-learn).
LEAST_FACTOR = 1.5


def outlier_factors(features_ND: NDArray[np.floating]) -> FloatArray:
    """Return how much sparser the surroundings of each sample are than those of its nearest samples.

    About 1 for an ordinary sample; NaN for rows with NaN. It is the local outlier factor (Breunig et al.,
    "LOF: identifying density-based local outliers", SIGMOD 2000) of the directions of the signed square
    roots of the features: roots make the skewed outputs of a ReLU more even, and what is left of a length
    says how sure a network is, not what it sees.

    Args:
        features_ND: last-layer inputs, or embeddings.
    """
    from sklearn.neighbors import LocalOutlierFactor

    factor_N = np.full(len(features_ND), np.nan)
    with np.errstate(over="ignore"):  # what is too large for the type is known of nothing
        vectors_ND = features_ND.astype(np.float32)
    known_N = np.isfinite(vectors_ND).all(1)
    count = min(MOST_NEIGHBOURS, int(SHARE_OF_NEIGHBOURS * known_N.sum()))
    if count < 1:
        return factor_N
    known_KD = vectors_ND[known_N]
    roots_KD = np.sign(known_KD) * np.sqrt(np.abs(known_KD))
    roots_KD /= np.maximum(np.linalg.norm(roots_KD, axis=1, keepdims=True), 1e-12)
    factors = LocalOutlierFactor(n_neighbors=count, algorithm="brute").fit(roots_KD)
    factor_N[known_N] = -factors.negative_outlier_factor_
    return factor_N

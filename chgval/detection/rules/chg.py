"""The lower of two clusters of CHG values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chgval.detection.rules.base import Judged, rule


@rule()
def flag(judged: Judged) -> NDArray[np.bool_]:
    """Flag the lower of two clusters of values, as OpenDataVal cuts values for its noisy-sample F1.

    Source: Jiang et al. 2023 (arXiv:2306.10577). It always flags somebody.
    """
    from sklearn.cluster import KMeans

    value_K = judged.value_K
    clusters = KMeans(2, n_init=1, init=np.quantile(value_K, [[0.0], [1.0]])).fit(value_K[:, None])
    flags_K: NDArray[np.bool_] = clusters.labels_ == clusters.cluster_centers_[:, 0].argmin()
    return flags_K

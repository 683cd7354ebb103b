"""The higher of two normal distributions of the loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chgval.detection.rules.base import Judged, rule


@rule()
def flag(judged: Judged) -> NDArray[np.bool_]:
    """Flag the samples that belong to the higher of two normal distributions of the loss.

    Source: Li et al. 2020 (arXiv:2002.07394), section 3.1. It always flags somebody.
    """
    from sklearn.mixture import GaussianMixture

    loss_K = judged.loss_K
    means = np.quantile(loss_K, [[0.1], [0.9]])
    mixture = GaussianMixture(2, means_init=means, random_state=0).fit(loss_K[:, None])
    flags_K: NDArray[np.bool_] = mixture.predict(loss_K[:, None]) == mixture.means_[:, 0].argmax()
    return flags_K

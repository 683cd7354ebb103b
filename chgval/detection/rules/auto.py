"""The default: the cut of the highest expected F1 among those that are probably right."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chgval.detection.rules.base import Judged, rule
from chgval.detection.settings import SETTINGS
from chgval.types import FloatArray


@rule()
def flag(judged: Judged) -> NDArray[np.bool_]:
    """Flag scores from the automatic cut on."""
    flags_K: NDArray[np.bool_] = judged.score_K >= automatic_cut(judged.score_K)
    return flags_K


def automatic_cut(score_N: FloatArray) -> float:
    """Return the score from which on samples are flagged; infinite if none should be.

    It is the cut of the highest expected F1 among those whose flags are expected to be right at least half of
    the time: on a clean dataset that leaves hardly any.
    """
    total = score_N.sum()
    if not total:
        return np.inf
    # The best F1 flags what exceeds half of it (Lipton et al. 2014, arXiv:1402.1892, theorem 1): iterated
    # from 0, cut and F1 rise to it without sorting all scores.
    f1, last = 0.0, -1.0
    while f1 > last:
        flagged_N = score_N[score_N > f1 / 2]
        last, f1 = f1, 2 * flagged_N.sum() / (len(flagged_N) + total)
    # Short of the best, F1 rises with every flag: as many as the precision allows.
    descending_N = np.sort(flagged_N)[::-1]
    allowed_N = descending_N.cumsum() >= SETTINGS.least_precision * np.arange(1, len(descending_N) + 1)
    allowed_N[:-1] &= descending_N[1:] < descending_N[:-1]  # equal scores are flagged together
    return float(descending_N[allowed_N].min(initial=np.inf))

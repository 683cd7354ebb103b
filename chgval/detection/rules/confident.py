"""Off-diagonal samples of confident learning."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chgval.detection.rules.base import Judged, rule


@rule()
def flag(judged: Judged) -> NDArray[np.bool_]:
    """Flag what is counted in another class than its own (Northcutt et al. 2021, arXiv:1911.00068)."""
    confident_K = judged.confident_label_K
    flags_K: NDArray[np.bool_] = (confident_K >= 0) & (confident_K != judged.label_K)
    return flags_K

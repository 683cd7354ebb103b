"""Margins below those of samples whose labels are wrong on purpose."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chgval.detection.rules.base import Judged, rule


@rule(trains=True)
def flag(judged: Judged) -> NDArray[np.bool_]:
    """Flag what lies below the threshold samples (Pleiss et al. 2020, arXiv:2001.10528, section 3.2)."""
    if judged.below_threshold_K is None:
        raise ValueError("the rule aum needs runs with threshold samples")
    return judged.below_threshold_K

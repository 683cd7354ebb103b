"""Types that all layers share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# What a part of a run needs to resume: tensors, and what JSON can hold, in dictionaries by name.
State = dict[str, Any]

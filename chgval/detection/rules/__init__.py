"""Which samples are flagged: one file per rule, found here by its name.

To add a rule, write one file with one function that is registered by `@rule()` (see base.py).
"""

from chgval.detection.rules.base import REGISTRY, Judged, Rule
from chgval.registry import load_all

load_all(__name__, __path__)

__all__ = ["REGISTRY", "Judged", "Rule"]

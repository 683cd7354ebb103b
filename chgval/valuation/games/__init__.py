"""Games whose Shapley values are computed: one file per game, found here by its name.

To add a game, write one file with one function that is registered by `@game()` (see base.py).
"""

from chgval.registry import load_all
from chgval.valuation.games.base import REGISTRY, Game

load_all(__name__, __path__)

__all__ = ["REGISTRY", "Game"]

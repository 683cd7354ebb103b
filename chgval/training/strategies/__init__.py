"""What to train on next: one file per strategy, found here by its name.

A strategy is a function that is given a Question and returns a Choice (see base.py). To add one, write a file
with one function that is registered by `@strategy()`.
"""

from chgval.registry import load_all
from chgval.training.strategies.base import REGISTRY, Choice, Predictions, Question, Strategy

load_all(__name__, __path__)

__all__ = ["REGISTRY", "Choice", "Predictions", "Question", "Strategy"]

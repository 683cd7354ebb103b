"""What to train on next: one file per strategy, found here by its name.

A strategy is a function that is given a Question and returns a Choice (see base.py). To add one, write a file
with one function that is registered by `@strategy("its-name")`, and add the name to Strategy in config.py.
"""

import importlib
import pkgutil

from chgval.strategies.base import REGISTRY, Choice, Pass, Question, Strategy

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["REGISTRY", "Choice", "Pass", "Question", "Strategy"]

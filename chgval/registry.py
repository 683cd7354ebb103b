"""Plug-ins: packages with a file for each, found by the names of the files; there is no second list."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any


@cache
def names_in(package: str) -> tuple[str, ...]:
    """Return the names of the plug-ins of a package, as `training.strategies`, without loading any."""
    folder = Path(__file__).parent.joinpath(*package.split("."))
    names = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return tuple(sorted(name.replace("_", "-") for name in names if name != "base"))


def load_all(package: str, path: Iterable[str]) -> None:
    """Load all modules of a package, which register what they have."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def name_of(function: Callable[..., Any]) -> str:
    """Return the name that a function is registered by: that of its file."""
    return function.__module__.rpartition(".")[2].replace("_", "-")

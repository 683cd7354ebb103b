"""What each sample of an image dataset is worth, from one training run.

The names below are the public interface; they are loaded when they are first used, so that
`import chgval` itself loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chgval.api import (
        apply,
        compare,
        detect_issues,
        detect_noise,
        embed,
        merge,
        report,
        select,
        train,
        value,
    )
    from chgval.detection.issues import find_label_issues
    from chgval.errors import ChgvalError
    from chgval.reports.report import Report, read_report
    from chgval.tracker import Tracker

__version__ = "0.1.0"

_HOMES = {
    "ChgvalError": "chgval.errors",
    "Report": "chgval.reports.report",
    "Tracker": "chgval.tracker",
    "apply": "chgval.api",
    "compare": "chgval.api",
    "detect_issues": "chgval.api",
    "detect_noise": "chgval.api",
    "embed": "chgval.api",
    "find_label_issues": "chgval.detection.issues",
    "merge": "chgval.api",
    "read_report": "chgval.reports.report",
    "report": "chgval.api",
    "select": "chgval.api",
    "train": "chgval.api",
    "value": "chgval.api",
}
__all__ = [
    "ChgvalError",
    "Report",
    "Tracker",
    "apply",
    "compare",
    "detect_issues",
    "detect_noise",
    "embed",
    "find_label_issues",
    "merge",
    "read_report",
    "report",
    "select",
    "train",
    "value",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'chgval' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

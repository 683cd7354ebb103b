"""The one family of errors that a user can cause.

Every message names the input, says what was expected and what to do. The command line prints the message
as one line and exits with 1; anything else that is raised is a fault of chgval and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class ChgvalError(Exception):
    """Base of every error that a user can cause."""


class DataError(ChgvalError):
    """The dataset cannot be read, or cannot be valued as it is."""


class SettingsError(ChgvalError):
    """A setting is out of range, or does not fit the dataset or another setting."""


class ModelError(ChgvalError):
    """The model cannot be built, does not fit the images, or its weights cannot be loaded."""


class TrackerError(ChgvalError):
    """What a Tracker is given does not fit its labels, its model or what came before."""


class FactorError(ChgvalError):
    """The factors given to the closed form do not fit each other."""


class NonFiniteError(ChgvalError):
    """The training loss became NaN or infinite."""


class DeviceMemoryError(ChgvalError):
    """The device has too little memory."""


class OutputError(ChgvalError):
    """An output cannot be written, or is in the way."""


def first_line(error: Exception, longest: int = 200) -> str:
    """Return what another library's error says, short enough to stand inside a message of one line."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def first_few(names: Sequence[str], count: int) -> str:
    """Return the first names as text, and whether there are more."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")

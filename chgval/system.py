"""What only some operating systems have, each with what is done where it is missing."""

from __future__ import annotations

import sys


def peak_memory() -> int | None:
    """Return the most memory that this process has taken, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

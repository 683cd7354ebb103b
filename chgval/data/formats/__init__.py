"""Formats of datasets: a file or folder for each, found here by its name.

To add a format, write one class that is registered by `@dataset_format` (see base.py). A source is in the
first format, by name, that says so; those that take what is left come last.
"""

from chgval.config import DataConfig
from chgval.data.formats.base import REGISTRY, Format
from chgval.errors import DataError
from chgval.registry import load_all

load_all(__name__, __path__)

__all__ = ["Format", "format_of"]


def format_of(config: DataConfig) -> Format:
    """Return the dataset that the user named, in its format.

    Raises:
        DataError: it does not exist, or is in no known format.
        SettingsError: options do not fit its format.
    """
    for name in sorted(REGISTRY, key=lambda name: (REGISTRY[name].is_fallback, name)):
        if REGISTRY[name].matches(config):
            return REGISTRY[name](config)
    raise DataError(f"{config.source}: no such file or folder.")

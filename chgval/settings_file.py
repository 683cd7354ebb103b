"""Settings from a file: TOML that a person wrote, or what chgval keeps with what it has made.

Nothing here may import torch, or numpy: mistakes in paths are told before these are loaded.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chgval.errors import SettingsError, first_line
from chgval.files import METADATA_KEY
from chgval.settings import SettingPath, check_known, keywords_of, settings_in


def read_settings(path: Path, config_class: type) -> dict[SettingPath, Any]:
    """Return the settings that a file holds, by the path to each.

    Args:
        path: a TOML file of options, such as `batch-size = 64`; or training.json or a report, of which
            all that changes results is taken.
        config_class: the settings of the command.
    Raises:
        SettingsError: it cannot be read, or has a setting that the command does not have.
    """
    try:
        if path.suffix == ".toml":
            return _of_person(tomllib.loads(path.read_text("utf-8")), config_class)
        kept = json.loads(path.read_text("utf-8")) if path.suffix == ".json" else _metadata(path)
        return _of_run(kept["settings"], config_class)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"--config {path}: cannot be read ({first_line(error)}); expected a TOML file of options such as "
            "epochs = 20, training.json, or a report of chgval."
        ) from error


def _of_person(given: Mapping[str, Any], config_class: type) -> dict[SettingPath, Any]:
    paths = keywords_of(config_class)
    named = {name.replace("-", "_"): value for name, value in given.items()}
    check_known(named, paths)
    return {paths[name]: value for name, value in named.items()}


def _of_run(kept: Mapping[str, Any], config_class: type) -> dict[SettingPath, Any]:
    """Return what a run was given, besides what it read and wrote, and settings of other commands."""
    found: dict[SettingPath, Any] = {}
    for path, setting in settings_in(config_class):
        value: Any = kept
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None and len(path) == 1:  # a command may have a setting of a group of others by itself
            groups = [kept.get(group) for group in ("train", "data")]
            value = next((g[path[0]] for g in groups if isinstance(g, Mapping) and g.get(path[0])), None)
        if value is not None and setting.option.affects_results and value != setting.default:
            found[path] = tuple(value) if isinstance(value, list) else value
    return found


def _metadata(path: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq  # takes a tenth of a second

    found: dict[str, Any] = json.loads(pq.read_schema(path).metadata[METADATA_KEY])
    return found

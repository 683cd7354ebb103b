"""Settings made from names and values, for the command line and for Python alike.

Nothing here may import torch, or numpy: `chgval --help` must start at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from chgval.config import Option, option_name, option_of
from chgval.errors import SettingsError

ConfigT = TypeVar("ConfigT")
# Where a setting is in its class: ("train", "epochs").
SettingPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of a command.

    Attributes:
        name: on the command line, such as --batch-size.
        option: what is said of it.
        kind: its type.
        default: its value if nothing is given.
        output_name: what the command's output is called by default.
    """

    name: str
    option: Option
    kind: Any
    default: Any
    output_name: str

    @property
    def kinds(self) -> list[Any]:
        """The types that it may have, besides None."""
        is_union = typing.get_origin(self.kind) in (typing.Union, types.UnionType)
        parts = typing.get_args(self.kind) if is_union else (self.kind,)
        return [part for part in parts if part is not types.NoneType]


def settings_in(config_class: type, path: SettingPath = ()) -> Iterator[tuple[SettingPath, Setting]]:
    """Yield the settings of a class and of the groups in it; one of the class hides a group's of its name."""
    hints = typing.get_type_hints(config_class)
    groups = []
    own = set()
    for field in dataclasses.fields(config_class):
        option = option_of(field)
        if option is None:
            groups.append(field)
            continue
        name = option_name(field)
        own.add(name)
        output_name = getattr(config_class, "name", "")
        yield (*path, field.name), Setting(name, option, hints[field.name], field.default, output_name)
    for field in groups:
        for below, setting in settings_in(_group_in(hints[field.name]), (*path, field.name)):
            if setting.name not in own:
                yield below, setting


def build(
    config_class: type[ConfigT], given: Mapping[SettingPath, Any], without: tuple[str, ...] = ()
) -> ConfigT:
    """Make settings from what was given.

    Args:
        config_class: the settings.
        given: values by the path to each; what is missing has its default.
        without: groups that are None.
    Raises:
        SettingsError: a value is none of those that it may be, or they do not fit each other.
    """
    hints = typing.get_type_hints(config_class)
    settings = dict(settings_in(config_class))
    made: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        path = (field.name,)
        if path in given:
            made[field.name] = converted(settings[path], given[path])
        elif option_of(field) is None:
            below = {path[1:]: value for path, value in given.items() if path[0] == field.name}
            made[field.name] = None if field.name in without else build(_group_in(hints[field.name]), below)
    return config_class(**made)


def converted(setting: Setting, value: Any) -> Any:
    """Return a value in the type of its setting: paths and numbers may be text, and lists tuples.

    Raises:
        SettingsError: it cannot be of that type.
    """
    if value is None:
        return setting.default
    for kind in setting.kinds:
        origin = typing.get_origin(kind)
        if origin is Literal and value in typing.get_args(kind):
            return value
        if kind is Path and isinstance(value, str | Path):
            return Path(value)
        if origin is tuple:
            return _as_tuple(setting, kind, value)
        if kind is str and isinstance(value, str | Path | int | float) and not isinstance(value, bool):
            return str(value)
        if kind is bool and isinstance(value, bool):
            return value
        if kind is float and setting.option.is_share and isinstance(value, str):
            return as_share(setting.name, value)
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if is_number and (kind is float or (kind is int and float(value).is_integer())):
            return kind(value)
    raise SettingsError(f"{setting.name} {value}: expected {_described(setting)}.")


def as_share(name: str, text: str) -> float:
    """Return the number that a text such as 0.3 or 30% says.

    Raises:
        SettingsError: it says none.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        if rest:
            raise ValueError("text behind the sign")
        return float(number) / (100 if percent else 1)
    except ValueError as error:
        raise SettingsError(f"{name} {text}: expected a share, such as 0.3 or 30%.") from error


def keywords_of(config_class: type) -> dict[str, SettingPath]:
    """Return what settings are called where no dashes are possible, and where each is in its class."""
    return {_keyword(path, setting.name): path for path, setting in settings_in(config_class)}


def _keyword(path: SettingPath, name: str) -> str:
    """Return what a setting is called in Python and in files: as its option, if that can be a name."""
    if path[-1] in ("source", "sources"):
        return "data"
    keyword = name.lstrip("-").replace("-", "_")
    return keyword if keyword.isidentifier() else path[-1]


def check_known(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise SettingsError where a setting is none of those that there are."""
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"expected some of {', '.join(sorted(known))}."
        raise SettingsError(f"{unknown[0]}: no such setting; {advice}")


def _as_tuple(setting: Setting, kind: Any, value: Any) -> tuple[Any, ...]:
    if typing.get_args(kind)[1:] == (Ellipsis,):  # any number of names
        names = (value,) if isinstance(value, str) else value
        if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
            raise SettingsError(f"{setting.name} {value}: expected a name, or a list of names.")
        return tuple(names)
    try:
        parts = value.split(",") if isinstance(value, str) else value
        red, green, blue = (float(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"{setting.name} {value}: expected three numbers such as 0.49,0.48,0.45."
        ) from error
    return red, green, blue


def _described(setting: Setting) -> str:
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}
    said = []
    for kind in setting.kinds:
        if typing.get_origin(kind) is Literal:
            said.append(f"one of {', '.join(map(str, typing.get_args(kind)))}")
        else:
            said.append(names.get(kind, str(kind)))
    return " or ".join(said)


def _group_in(hint: Any) -> Any:
    """Return the class of a group of settings, which may also be None."""
    return next(kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind))

"""Options of the command line, derived from the fields of settings (`chgval.config`).

Nothing here may import torch, or numpy, before a command runs: `chgval --help` must start at once.
"""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperCommand

from chgval.cli.reporting import reporting
from chgval.config import OUTPUT_PANEL, Option, option_name, option_of, strategies
from chgval.errors import SettingsError
from chgval.registry import names_in

ConfigT = TypeVar("ConfigT")


class PanelCommand(TyperCommand):
    """A command whose plain help is grouped by panel.

    Typer groups only in rich's boxes, and loading those takes longer than all else that --help does.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options of each panel."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                other = "Arguments" if param.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(param, "rich_help_panel", None) or other, []).append(record)
        sections["Options"] = sections.pop("Options", [])  # what has no panel comes last
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _console_options(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print more on the way.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
) -> None:
    """Options of every command."""


def with_settings(config_class: type[ConfigT], run: Callable[..., None]) -> Callable[..., None]:
    """Return a command that has all settings as options, and calls `run` with what they make.

    Errors that a user can cause become one line and an exit code.

    Args:
        config_class: the settings; groups of settings in it give their options too. An option of the command
            itself hides one of a group that is called the same.
        run: is called with `console` and `config`, and with its other parameters, which become options.
    """
    settings = dict(_settings_in(config_class))
    own = [
        parameter
        for function in (run, _console_options)
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("console", "config")
    ]
    parameters = [_parameter(path, *found) for path, found in settings.items()]

    @functools.wraps(run)
    def command(*, quiet: bool, verbose: bool, debug: bool, **given: Any) -> None:
        values = {path: given.pop(_name_of(path)) for path in settings}
        with reporting(quiet=quiet, verbose=verbose, debug=debug) as console:
            run(console=console, config=build(config_class, values), **given)

    # What typer reads the options from.
    ordered = [p.replace(kind=p.KEYWORD_ONLY) for p in (*parameters, *own)]
    command.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return command


def build(config_class: type[ConfigT], values: dict[tuple[str, ...], Any]) -> ConfigT:
    """Make settings from what was given, by the path to each: ("train", "epochs").

    Raises:
        SettingsError: they do not fit each other, or a value is out of bounds.
    """
    hints = typing.get_type_hints(config_class)
    made: dict[str, Any] = {}
    for setting in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if (setting.name,) in values:
            made[setting.name] = _converted(setting, hints[setting.name], values[(setting.name,)])
            continue
        group = _group_of(hints[setting.name])
        if group is not None:
            below = {path[1:]: value for path, value in values.items() if path[0] == setting.name}
            made[setting.name] = build(group, below)
    return config_class(**made)


def _settings_in(
    config_class: type, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], tuple[dataclasses.Field[Any], Any, str]]]:
    """Yield the settings of a class and its groups: path, field, type, and the output's default name."""
    hints = typing.get_type_hints(config_class)
    fields = dataclasses.fields(config_class)
    own = {option_name(setting) for setting in fields if option_of(setting) is not None}
    for setting in fields:
        if option_of(setting) is not None:
            yield (*path, setting.name), (setting, hints[setting.name], getattr(config_class, "name", ""))
    for setting in fields:
        group = _group_of(hints[setting.name]) if option_of(setting) is None else None
        if group is not None:
            for below, found in _settings_in(group, (*path, setting.name)):
                if option_name(found[0]) not in own:
                    yield below, found


def _group_of(hint: Any) -> Any:
    """Return the class of a group of settings; None for other types."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
    return kinds[0] if kinds else None


def _name_of(path: tuple[str, ...]) -> str:
    return "_".join(path)


def _parameter(
    path: tuple[str, ...], setting: dataclasses.Field[Any], kind: Any, output_name: str
) -> inspect.Parameter:
    found = option_of(setting)
    if found is None:
        raise TypeError(f"{setting.name} is no option")
    name, default = _name_of(path), setting.default
    shown = found.help.replace("{strategies}", ", ".join(strategies())).replace("{name}", output_name)
    if found.is_argument:
        source: Any = Annotated[str, typer.Argument(metavar=found.metavar, help=shown)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=source)
    names = found.names or (option_name(setting),)
    more: dict[str, Any] = {"metavar": found.metavar, "rich_help_panel": found.panel, "help": shown}
    if setting.name in COMPLETIONS:
        more["autocompletion"] = COMPLETIONS[setting.name]
    kind = _command_line_type(found, kind, more)
    if isinstance(default, tuple):
        default = None
    annotation: Any = Annotated[kind, typer.Option(*names, **more)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _command_line_type(found: Option, kind: Any, more: dict[str, Any]) -> Any:
    """Return what typer parses for a setting of this type, and add what it needs to know."""
    kinds = [part for part in typing.get_args(kind) if part is not types.NoneType]
    if found.plugins:
        return Literal[names_in(found.plugins)]
    if typing.get_origin(kind) is tuple:
        return list[str] | None
    if any(typing.get_origin(part) is tuple for part in kinds):
        return str | None
    if int in (kind, *kinds):
        more["min"], more["max"] = found.least, found.most
    return kind


def _converted(setting: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    """Return what the command line gave in the type of the setting."""
    if typing.get_origin(kind) is tuple:
        return tuple(value or ())
    if isinstance(value, str) and any(typing.get_origin(part) is tuple for part in typing.get_args(kind)):
        return _three_numbers(option_name(setting), value)
    return value


def _three_numbers(name: str, text: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"{name} {text}: expected three numbers such as 0.49,0.48,0.45.") from error
    return red, green, blue


def _starting_with(names: Callable[[], typing.Iterable[str]]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def _archs() -> list[str]:
    from chgval.training.models import EMBEDDING_ARCHS, image_archs

    return [*image_archs(), *EMBEDDING_ARCHS]


def _scores() -> list[str]:
    from chgval.reports.tables import SCORES

    return [*SCORES, "random"]


# What a shell offers after an option.
COMPLETIONS = {
    "arch": _starting_with(_archs),
    "by": _starting_with(_scores),
    "strategy": _starting_with(strategies),
    "threshold": _starting_with(lambda: names_in("detection.rules")),
}

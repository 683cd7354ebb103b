"""Options of the command line, derived from the fields of settings (`chgval.config`).

Nothing here may import torch, or numpy, before a command runs: `chgval --help` must start at once.
"""

import functools
import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from chgval.cli.reporting import reporting
from chgval.config import OUTPUT_PANEL, SHOWN_SAMPLES, strategies
from chgval.errors import SettingsError, first_few
from chgval.registry import names_in
from chgval.runs.preflight import check_at_once
from chgval.settings import Setting, SettingPath, as_share, build, settings_in
from chgval.settings_file import read_settings

# Of what was typed and is not taken.
SHOWN_EXTRA = 3


class PanelCommand(TyperCommand):
    """A command whose plain help is grouped by panel.

    Typer groups only in rich's boxes, and loading those takes longer than all else that --help does.
    """

    allow_extra_args = True  # to say better what is wrong with them

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what was typed, and refuse what is left over, as where a shell has expanded a pattern."""
        rest: list[str] = super().parse_args(ctx, args)
        if ctx.args and not ctx.resilient_parsing:  # as for completion
            ctx.fail(
                f"{ctx.info_name} takes no {first_few(ctx.args, SHOWN_EXTRA)} besides. Quote patterns, as in "
                '"shards/*.parquet"; images are read by their folder.'
            )
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options of each panel; or only those that most people need."""
        if not ctx.meta.get(SHOWS_ALL):
            self._format_common(ctx, formatter)
            return
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

    def _format_common(self, ctx: Any, formatter: Any) -> None:
        """Write a line for each option that most people need."""
        params = [param for param in self.get_params(ctx) if param.param_type_name == "option"]
        records = [
            param.get_help_record(ctx)
            for param in params
            if param.name in (*COMMON, *self.callback.common)  # type: ignore[union-attr]
        ]
        with formatter.section("Options"):
            formatter.write_dl(
                [(names, FIRST_PART.match(text)[0]) for names, text in records]  # type: ignore[index, misc]
            )
        formatter.write_paragraph()
        formatter.write_text(f"All {len(params)} options: chgval {ctx.info_name} --help-all")


# What says enough of an option.
FIRST_PART = re.compile(r"[^.;:]*([.,][^ ][^.;:]*)*")
# Options of all commands that the short help shows.
COMMON = ("plan", "quiet", "help")
# Where a call keeps that the whole help was asked for.
SHOWS_ALL = "chgval.shows_all"


def _show_all(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        ctx.meta[SHOWS_ALL] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


def _console_options(
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Settings from TOML, training.json, or a report; the command line comes first.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    help_all: Annotated[
        bool,
        typer.Option(
            "--help-all",
            callback=_show_all,
            is_eager=True,
            help="Show all options.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print more on the way.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the summary as JSON on standard output.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = False,
    show: Annotated[
        int,
        typer.Option(min=0, help="Rows in each list of the summary.", rich_help_panel=OUTPUT_PANEL),
    ] = SHOWN_SAMPLES,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
) -> None:
    """Options of every command."""


def with_settings(config_class: type, run: Callable[..., None]) -> Callable[..., None]:
    """Return a command that has all settings as options, and calls `run` with what they make.

    Errors that a user can cause become one line and an exit code.

    Args:
        config_class: the settings; groups of settings in it give their options too.
        run: is called with `console` and `config`, and with its other parameters, which become options.
    """
    settings = dict(settings_in(config_class))
    own = [
        parameter
        for function in (run, _console_options)
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("console", "config")
    ]
    parameters = [_parameter(path, setting) for path, setting in settings.items()]

    @functools.wraps(run)
    def command(
        *,
        ctx: typer.Context,
        config_file: Path | None,
        quiet: bool,
        verbose: bool,
        debug: bool,
        as_json: bool,
        show: int,
        help_all: bool,  # noqa: ARG001 (has been shown)
        **given: Any,
    ) -> None:
        values = {path: given.pop("_".join(path)) for path in settings}
        with reporting(quiet=quiet, verbose=verbose, debug=debug, shown=show, as_json=as_json) as console:
            if config_file is not None:  # what is on the command line comes first
                kept = read_settings(config_file, config_class)
                values |= {path: value for path, value in kept.items() if not _is_given(ctx, path)}
            config: Any = build(config_class, values)
            if as_json and config.writes_to_stdout:
                raise SettingsError("--json: standard output has a table already; name a file for that.")
            check_at_once(config, writes=not given.get("plan"))
            with console.loading():
                run(console=console, config=config, **given)

    # What typer reads the options from.
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    ordered = [p.replace(kind=p.KEYWORD_ONLY) for p in (context, *parameters, *own)]
    common = {"_".join(path) for path, setting in settings.items() if setting.option.is_common}
    command.common = common  # type: ignore[attr-defined]
    command.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return command


def _is_given(ctx: typer.Context, path: SettingPath) -> bool:
    source = ctx.get_parameter_source("_".join(path))
    return source is not None and source.name == "COMMANDLINE"


def _parameter(path: SettingPath, setting: Setting) -> inspect.Parameter:
    """Return a setting as a parameter that typer makes an option of."""
    name, option = "_".join(path), setting.option
    shown = option.help.replace("{strategies}", ", ".join(strategies()))
    shown = shown.replace("{name}", setting.output_name)
    if option.is_argument:
        one_or_many = str if setting.kind is str else list[str]
        source: Any = Annotated[one_or_many, typer.Argument(metavar=option.metavar, help=shown)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=source)
    more: dict[str, Any] = {"metavar": option.metavar, "rich_help_panel": option.panel, "help": shown}
    if path[-1] in COMPLETIONS:
        more["autocompletion"] = COMPLETIONS[path[-1]]
    kind, default = setting.kind, setting.default
    if option.plugins:
        kind = Literal[names_in(option.plugins)]
    elif int in setting.kinds:
        more["min"] = option.least
    elif option.is_share and float in setting.kinds:
        more["parser"] = _share_of(setting.name)
        more["metavar"] = option.metavar or "SHARE"
    for part in setting.kinds:
        if typing.get_origin(part) is tuple:  # of names: the option again and again; of numbers: one text
            is_open = typing.get_args(part)[1:] == (Ellipsis,)
            kind, default = (list[str] if is_open else str) | None, None
    names = option.names or (setting.name,)
    annotation: Any = Annotated[kind, typer.Option(*names, **more)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _share_of(name: str) -> Callable[[str | float], float]:
    """Return what reads a share that is given as 0.3 or 30%; a default is a number already."""

    def share(given: str | float) -> float:
        return as_share(name, given) if isinstance(given, str) else given

    return share


def _starting_with(names: Callable[[], typing.Iterable[str]]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def _archs() -> list[str]:
    from chgval.training.models import EMBEDDING_ARCHS, image_archs

    return [*image_archs(), *EMBEDDING_ARCHS]


def _ranked_by() -> tuple[str, ...]:
    from chgval.reports.tables import RANKED_BY

    return RANKED_BY


# What a shell offers after an option.
COMPLETIONS = {
    "arch": _starting_with(_archs),
    "by": _starting_with(_ranked_by),
    "strategy": _starting_with(strategies),
    "threshold": _starting_with(lambda: names_in("detection.rules")),
}

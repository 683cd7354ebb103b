"""The command line: flags to settings, settings to a run, errors to one line and an exit code.

Nothing here may import torch, or numpy, before a command runs: `chgval --help` must start at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

import chgval
from chgval.config import DataConfig, OutputConfig, TrainConfig, ValueConfig
from chgval.errors import ChgvalError, SettingsError

if TYPE_CHECKING:
    from chgval.console import Console

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class PanelCommand(TyperCommand):
    """A command whose plain help is grouped by panel.

    Typer groups only in rich's boxes, and loading those takes longer than all else that --help does.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options of each panel."""
        sections: dict[str, list[tuple[str, str]]] = {}
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


app = typer.Typer(
    name="chgval",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


class Mode(StrEnum):
    """Where the values come from."""

    ONLINE = "online"
    EXACT = "exact"


class UtilityName(StrEnum):
    """The game whose Shapley values are computed."""

    CHG = "chg"
    GRADIENT = "gradient"
    HARDNESS = "hardness"


class Format(StrEnum):
    """File formats of a report."""

    PARQUET = "parquet"
    CSV = "csv"
    JSONL = "jsonl"
    ARROW = "arrow"


class Schedule(StrEnum):
    """How the learning rate changes over a run."""

    ONE_CYCLE = "one-cycle"
    COSINE = "cosine"


class Augment(StrEnum):
    """How training images are varied."""

    NONE = "none"
    CROP = "crop"
    CROP_FLIP = "crop-flip"


class OnError(StrEnum):
    """What happens to samples that cannot be read."""

    KEEP = "keep"
    FAIL = "fail"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chgval {chgval.__version__}")
        raise typer.Exit


def _complete_arch(incomplete: str) -> list[str]:
    from chgval.models import EMBEDDING_ARCHS, image_archs

    return [name for name in (*image_archs(), *EMBEDDING_ARCHS) if name.startswith(incomplete)]


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """What each sample of an image dataset is worth, from one training run.

    Start with: chgval value builtin:digits
    """


DATA_PANEL, MODEL_PANEL = "Data", "Model and training"
VALUES_PANEL, OUTPUT_PANEL = "Values", "Output"


@app.command(cls=PanelCommand)
def value(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Folder of class folders; Parquet file, glob, folder or URI; or builtin:digits.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="Report to write; - is standard output. Default: values.parquet.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = "",
    report_format: Annotated[
        Format | None,
        typer.Option("--format", help="Default: by the ending, or parquet.", rich_help_panel=OUTPUT_PANEL),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing report.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Tell what a run would do and cost, and stop.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print more on the way.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    image_column: Annotated[
        str | None,
        typer.Option(help="Parquet column of images. Default: by type and name.", rich_help_panel=DATA_PANEL),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Parquet column of labels. Default: label, or by name.", rich_help_panel=DATA_PANEL
        ),
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(
            help="Parquet column of ids. Default: id, paths, or row numbers.", rich_help_panel=DATA_PANEL
        ),
    ] = None,
    features_column: Annotated[
        str | None,
        typer.Option(help="Parquet column of embeddings to value, not images.", rich_help_panel=DATA_PANEL),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Side in pixels. Default: from the images.", min=1, rich_help_panel=DATA_PANEL),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            metavar="R,G,B",
            help="Pixel mean in [0, 1]. Default: from the images.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(
            metavar="R,G,B", help="Pixel deviation. Default: from the images.", rich_help_panel=DATA_PANEL
        ),
    ] = None,
    on_error: Annotated[
        OnError,
        typer.Option(help="Keep unreadable samples in the report, or stop.", rich_help_panel=DATA_PANEL),
    ] = OnError.KEEP,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that decode large images.", min=0, rich_help_panel=DATA_PANEL),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="resnet8, resnet20, any torchvision classifier; linear or mlp for embeddings. Default: by "
            "image size and device.",
            autocompletion=_complete_arch,
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Pretrained weights (safetensors or state dict).", rich_help_panel=MODEL_PANEL),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the data. Default: by its size.", min=1, rich_help_panel=MODEL_PANEL),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples per step. Default: 128, fewer for small data.", min=2, rich_help_panel=MODEL_PANEL
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Highest learning rate. Default: by the model.", rich_help_panel=MODEL_PANEL),
    ] = None,
    momentum: Annotated[
        float, typer.Option(help="Nesterov momentum of SGD.", rich_help_panel=MODEL_PANEL)
    ] = 0.9,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay of SGD.", rich_help_panel=MODEL_PANEL)
    ] = 5e-4,
    schedule: Annotated[
        Schedule, typer.Option(help="Learning rate over the run.", rich_help_panel=MODEL_PANEL)
    ] = Schedule.ONE_CYCLE,
    augment: Annotated[
        Augment | None,
        typer.Option(help="Random shifts and mirroring. Default: crop-flip.", rich_help_panel=MODEL_PANEL),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=MODEL_PANEL)
    ] = "auto",
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Compile the model first.", rich_help_panel=MODEL_PANEL)
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Of all randomness in the run.", min=0, rich_help_panel=MODEL_PANEL)
    ] = 0,
    mode: Annotated[
        Mode,
        typer.Option(
            help="online: from the training steps, at no cost. exact: from a pass before each epoch.",
            rich_help_panel=VALUES_PANEL,
        ),
    ] = Mode.ONLINE,
    utility: Annotated[
        UtilityName,
        typer.Option(help="The game: loss x gradient, gradient, or loss.", rich_help_panel=VALUES_PANEL),
    ] = UtilityName.CHG,
    per_class: Annotated[
        bool,
        typer.Option("--per-class", help="Value samples within their class.", rich_help_panel=VALUES_PANEL),
    ] = False,
    no_values: Annotated[
        bool,
        typer.Option("--no-values", help="Train the same, without valuing.", rich_help_panel=VALUES_PANEL),
    ] = False,
) -> None:
    """Train once on DATA and report what every sample is worth.

    The report has one row per input row: its CHG Shapley value, rank and percentile, and signals of the same
    run (loss, margin, EL2N, predicted label, ...). Low values come first when looking for wrong labels.

    \b
    Examples:
      chgval value builtin:digits
      chgval value photos/ -o photos.parquet        # photos/CLASS/IMAGE
      chgval value "shards/*.parquet" --arch resnet18 --epochs 20
      chgval value embeddings.parquet --features-column embedding
      chgval value photos/ -o - --format csv | sort -t, -k5,5g | head
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.console import Console  # imported here so that --help stays fast

    console = Console(quiet=quiet, verbose=verbose)
    with reporting_errors(console, debug=debug):
        config = ValueConfig(
            data=DataConfig(
                source=data,
                image_column=image_column,
                label_column=label_column,
                id_column=id_column,
                features_column=features_column,
                image_size=image_size,
                mean=_three_numbers("--mean", mean),
                std=_three_numbers("--std", std),
                on_error=on_error.value,
                workers=workers,
            ),
            train=TrainConfig(
                arch=arch,
                weights=weights,
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                schedule=schedule.value,
                augment=None if augment is None else augment.value,
                device=device,
                compile_model=compile_model,
                seed=seed,
            ),
            output=OutputConfig(
                path=output,
                report_format=None if report_format is None else report_format.value,
                overwrite=overwrite,
            ),
            mode="none" if no_values else mode.value,
            utility=utility.value,
            per_class=per_class,
        )
        from chgval.runs.value import run_plan, run_value

        if plan:
            run_plan(config, console)
        else:
            run_value(config, console, command=shlex.join(["chgval", *sys.argv[1:]]))


@contextmanager
def reporting_errors(console: Console, *, debug: bool) -> Iterator[None]:
    """Turn the errors that a user can cause into one line and an exit code."""
    try:
        yield
    except ChgvalError as error:
        if debug:
            raise
        console.fail(str(error))
        raise typer.Exit(EXIT_USAGE if isinstance(error, SettingsError) else EXIT_FAILED) from error
    except KeyboardInterrupt as error:
        console.fail("interrupted; values of finished epochs are kept beside the report, if it is a file")
        raise typer.Exit(EXIT_INTERRUPTED) from error
    except BrokenPipeError as error:
        # The reader of standard output has seen enough; nothing more may be flushed into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from error


def _three_numbers(option: str, text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"{option} {text}: expected three numbers such as 0.49,0.48,0.45.") from error
    return red, green, blue


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character must not end the run.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()

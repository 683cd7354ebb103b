"""Options that several commands share, and what a command does with them: build settings, report errors.

Nothing here may import torch, or numpy, before a command runs: `chgval --help` must start at once.
Annotations are evaluated as they stand: with_options reads them.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from chgval.config import (
    LISTINGS,
    MAX_PIXELS,
    RANKED_BY,
    REPORT_FORMATS,
    RULES,
    STRATEGIES,
    DataConfig,
    OutputConfig,
    ResumeConfig,
    Rule,
    Strategy,
    TrainConfig,
)
from chgval.errors import ChgvalError, SettingsError, first_line
from chgval.files import claimed
from chgval.interruption import Interrupted, raising_interruptions, telling_how_to_go_on

if TYPE_CHECKING:
    from chgval.console import Console

EXIT_FAILED, EXIT_USAGE, EXIT_TOO_NOISY = 1, 2, 3
DATA_PANEL, MODEL_PANEL, OUTPUT_PANEL = "Data", "Model and training", "Output"


LabelledDataset = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Folder of class folders; Parquet file, glob, folder or URI; or builtin:digits.",
    ),
]
# What commands that start from values take: a report, or a dataset and where its report goes.
ReportOrDataset = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="Values report, - for one on standard input, or a dataset, which is valued first.",
    ),
]
KeptValues = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Keep the values report of a dataset here.", rich_help_panel=OUTPUT_PANEL
    ),
]
DATASET_PANEL = "Dataset"
DatasetOfReport = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="DATA",
        help="Where the dataset of a report is now. Default: where it was valued.",
        rich_help_panel=DATASET_PANEL,
    ),
]


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


class ManifestFormat(StrEnum):
    """File formats of a manifest: those of a report, or only names or numbers of the kept rows."""

    PARQUET = "parquet"
    CSV = "csv"
    JSONL = "jsonl"
    ARROW = "arrow"
    PATHS = "paths"
    INDICES = "indices"


class LinkName(StrEnum):
    """How files of a folder get into a new one."""

    COPY = "copy"
    HARD = "hard"
    SYM = "sym"


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


class Score(StrEnum):
    """What suspects are ranked by."""

    ALL = "all"
    CHG = "chg"


def with_options(**groups: Callable[..., object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of whole groups.

    The command's function is called with a `console`, with what each group makes of its options under the
    group's name, and with its own options; where both have an option, it is the command's. Errors that a user
    can cause become one line and an exit code.

    Args:
        groups: functions whose parameters are options, and which turn them into settings.
    """
    signatures = {name: inspect.signature(group) for name, group in groups.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        made = {"console", *groups}
        signature_of_command = inspect.signature(command).parameters
        own = {name: given for name, given in signature_of_command.items() if name not in made}
        parameters = list(own.values())
        for signature in (*signatures.values(), inspect.signature(_console_options)):
            parameters.extend(given for name, given in signature.parameters.items() if name not in own)

        @functools.wraps(command)
        def run(*, quiet: bool, verbose: bool, debug: bool, **options: Any) -> None:
            from chgval.console import Console  # imported here so that --help stays fast

            console = Console(quiet=quiet, verbose=verbose)
            with reporting_errors(console, debug=debug):
                settings = {
                    name: groups[name](
                        **{
                            option: options.pop(option)
                            for option in signature.parameters
                            if option not in own
                        }
                    )
                    for name, signature in signatures.items()
                }
                command(console=console, **settings, **options)

        # What typer reads the options from.
        keyword_only = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]
        run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


@contextmanager
def reporting_errors(console: "Console", *, debug: bool) -> Iterator[None]:
    """Turn the errors that a user can cause into one line and an exit code."""
    try:
        with raising_interruptions():
            yield
    except ChgvalError as error:
        if debug:
            raise
        console.fail(str(error))
        raise typer.Exit(EXIT_USAGE if isinstance(error, SettingsError) else EXIT_FAILED) from error
    except Interrupted as error:
        console.fail(str(error))
        raise typer.Exit(128 + error.signum) from error
    except (MemoryError, RuntimeError) as error:
        if debug or not _is_out_of_memory(error):
            raise
        console.fail(
            f"out of memory ({first_line(error)}); pass a smaller --batch-size, --arch or --image-size, or "
            "fewer --workers."
        )
        raise typer.Exit(EXIT_FAILED) from error
    finally:
        _end_workers()


def _end_workers() -> None:
    """End processes that decode images and are still there, as what holds a traceback holds them.

    They heed no signal that can be ignored, and Python would wait for them before it ends.
    """
    processes = sys.modules.get("multiprocessing")
    for child in [] if processes is None else processes.active_children():
        child.kill()


def _is_out_of_memory(error: Exception) -> bool:
    """Say whether an error of torch, which for the host's memory has no class of its own, is about memory."""
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, MemoryError) or on_device or "DefaultCPUAllocator" in str(error)


@contextmanager
def running(
    outputs: Sequence[Path], state_file: Path | None, command: str, *, resumes: bool
) -> Iterator[None]:
    """Hold what a command writes for it alone, and say how to go on where it is interrupted.

    Args:
        outputs: what it writes.
        state_file: where it keeps the state of its runs.
        command: the command line.
        resumes: whether it goes on with a state that is there.
    """
    state_files = () if state_file is None else (state_file,)
    with telling_how_to_go_on(state_file, command, resumes=resumes), claimed(*outputs, *state_files):
        yield


def output_options(name: str, formats: type[StrEnum] = Format) -> Callable[..., OutputConfig]:
    """Options of where a command's table goes, which is called `name` if the user does not say."""

    def options(
        output: Annotated[
            str,
            typer.Option(
                "--output",
                "-o",
                help=f"File to write; - is standard output. Default: {name}.parquet.",
                rich_help_panel=OUTPUT_PANEL,
            ),
        ] = "",
        output_format: Annotated[
            formats | None,  # type: ignore[valid-type]
            typer.Option(
                "--format", help="Default: by the ending, or parquet.", rich_help_panel=OUTPUT_PANEL
            ),
        ] = None,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Replace existing files.", rich_help_panel=OUTPUT_PANEL)
        ] = False,
    ) -> OutputConfig:
        wanted = None if output_format is None else output_format.value
        return OutputConfig(
            path=output,
            name=name,
            report_format=next((known for known in REPORT_FORMATS if known == wanted), None),
            overwrite=overwrite,
            listing=next((known for known in LISTINGS if known == wanted), None),
        )

    return options


def data_options(
    image_column: Annotated[
        str | None,
        typer.Option(help="Parquet column of images. Default: by type and name.", rich_help_panel=DATA_PANEL),
    ] = None,
    label_column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<str>",
            help="Parquet column of labels. Again for each annotator, or one of lists. Default: label, or by "
            "name.",
            rich_help_panel=DATA_PANEL,
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
        typer.Option(
            help="Processes that decode large images. Default: one per core, at most 8.",
            min=0,
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    max_pixels: Annotated[
        int,
        typer.Option(help="Refuse images of more pixels.", min=1, rich_help_panel=DATA_PANEL),
    ] = MAX_PIXELS,
) -> DataConfig:
    """Options of how a dataset is read; its source is the command's argument."""
    return DataConfig(
        image_column=image_column,
        label_columns=tuple(label_column or ()),
        id_column=id_column,
        features_column=features_column,
        image_size=image_size,
        mean=_three_numbers("--mean", mean),
        std=_three_numbers("--std", std),
        on_error=on_error.value,
        workers=workers,
        max_pixels=max_pixels,
    )


def _complete_arch(incomplete: str) -> list[str]:
    from chgval.models import EMBEDDING_ARCHS, image_archs

    return [name for name in (*image_archs(), *EMBEDDING_ARCHS) if name.startswith(incomplete)]


def train_options(
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
) -> TrainConfig:
    """Options of the model and its training."""
    return TrainConfig(
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
    )


def resume_options(
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an unfinished run.", rich_help_panel=OUTPUT_PANEL),
    ] = False,
    checkpoint_minutes: Annotated[
        float,
        typer.Option(
            help="Keep the state of a run so often inside an epoch; it is kept after each.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = 10.0,
) -> ResumeConfig:
    """Options of unfinished runs."""
    return ResumeConfig(resume=resume, minutes=checkpoint_minutes)


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


def rule_of(threshold: str) -> Rule | float:
    """Return the rule or the score that the user named."""
    for rule in RULES:
        if threshold == rule:
            return rule
    try:
        return float(threshold)
    except ValueError as error:
        raise SettingsError(
            f"--threshold {threshold}: expected {', '.join(RULES)}, or a score from 0 to 1."
        ) from error


def complete_rule(incomplete: str) -> list[str]:
    """Return the rules that begin so."""
    return [rule for rule in RULES if rule.startswith(incomplete)]


def strategy_of(name: str | None, fraction: float | None) -> Strategy:
    """Return the strategy that the user named, or the default one."""
    if name is None:
        return "full" if fraction is None else "auto"
    for strategy in STRATEGIES:
        if name == strategy:
            return strategy
    raise SettingsError(f"--strategy {name}: expected one of {', '.join(STRATEGIES)}.")


def complete_strategy(incomplete: str) -> list[str]:
    """Return the strategies that begin so."""
    return [name for name in STRATEGIES if name.startswith(incomplete)]


def complete_figure(incomplete: str) -> list[str]:
    """Return the figures to rank by that begin so."""
    return [name for name in RANKED_BY if name.startswith(incomplete)]


def _three_numbers(option: str, text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"{option} {text}: expected three numbers such as 0.49,0.48,0.45.") from error
    return red, green, blue

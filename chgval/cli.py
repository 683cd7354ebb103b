"""The command line: flags to settings, settings to a run.

Nothing here may import torch, or numpy, before a command runs: `chgval --help` must start at once.
Annotations are evaluated as they stand: with_options reads them.
"""

import dataclasses
import os
import shlex
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import chgval
from chgval.config import (
    STRATEGIES,
    DataConfig,
    DetectConfig,
    OutputConfig,
    ResumeConfig,
    SelectConfig,
    TrainConfig,
    TrainingConfig,
    ValueConfig,
)
from chgval.interruption import end_at_signals
from chgval.options import (
    DATASET_PANEL,
    EXIT_FAILED,
    EXIT_TOO_NOISY,
    OUTPUT_PANEL,
    DatasetOfReport,
    KeptValues,
    LabelledDataset,
    LinkName,
    ManifestFormat,
    Mode,
    PanelCommand,
    ReportOrDataset,
    Score,
    UtilityName,
    complete_figure,
    complete_rule,
    complete_strategy,
    data_options,
    output_options,
    resume_options,
    rule_of,
    running,
    strategy_of,
    train_options,
    with_options,
)

if TYPE_CHECKING:
    from chgval.console import Console

app = typer.Typer(
    name="chgval",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chgval {chgval.__version__}")
        raise typer.Exit


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


VALUES_PANEL, DETECTION_PANEL, ROWS_PANEL = "Values", "Detection", "Rows"


@app.command(cls=PanelCommand)
@with_options(output=output_options("values"), data=data_options, train=train_options, resume=resume_options)
def value(
    console: "Console",
    output: OutputConfig,
    data: DataConfig,
    train: TrainConfig,
    resume: ResumeConfig,
    source: LabelledDataset,
    pred_probs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write averaged probabilities of all classes, as .npy.",
            rich_help_panel=VALUES_PANEL,
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Tell what a run would do and cost, and stop.")
    ] = False,
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
      chgval value crowd.parquet --label-column ann --label-column bob
      chgval value photos/ -o - --format csv | sort -t, -k5,5g | head
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.runs.value import run_plan, run_value

    config = ValueConfig(
        data=dataclasses.replace(data, source=source),
        train=train,
        output=output,
        resume=resume,
        mode="none" if no_values else mode.value,
        utility=utility.value,
        per_class=per_class,
        pred_probs=pred_probs,
    )
    if plan:
        run_plan(config, console)
    else:
        with running(config.outputs, config.state_file, _command_line(), resumes=resume.resume):
            run_value(config, console, command=_command_line())


@app.command(name="detect-noise", cls=PanelCommand)
@with_options(
    output=output_options("suspects"), data=data_options, train=train_options, resume=resume_options
)
def detect_noise(
    console: "Console",
    output: OutputConfig,
    data: DataConfig,
    train: TrainConfig,
    resume: ResumeConfig,
    source: ReportOrDataset,
    threshold: Annotated[
        str,
        typer.Option(
            metavar="RULE|SCORE",
            help="What to flag: auto; samples from a noise score on; or another rule: confident "
            "(confident learning), gmm (mixture of losses), chg (two-means of values), aum (threshold "
            "samples; trains a dataset twice more).",
            autocompletion=complete_rule,
            rich_help_panel=DETECTION_PANEL,
        ),
    ] = "auto",
    expected_noise: Annotated[
        float | None,
        typer.Option(help="Flag this share of the samples instead.", rich_help_panel=DETECTION_PANEL),
    ] = None,
    score: Annotated[
        Score,
        typer.Option(help="Rank by all signals, or by the CHG value alone.", rich_help_panel=DETECTION_PANEL),
    ] = Score.ALL,
    duplicates: Annotated[
        bool,
        typer.Option(
            "--duplicates",
            help="Also list near-duplicates with other labels; needs a dataset of images.",
            rich_help_panel=DETECTION_PANEL,
        ),
    ] = False,
    fail_over: Annotated[
        float | None,
        typer.Option(
            help="Exit with 3 if more of the labels are estimated to be wrong.",
            rich_help_panel=DETECTION_PANEL,
        ),
    ] = None,
    all_rows: Annotated[
        bool,
        typer.Option("--all", help="Write every row, not only flagged ones.", rich_help_panel=ROWS_PANEL),
    ] = False,
    top: Annotated[
        int | None, typer.Option(help="Write at most so many rows.", min=1, rich_help_panel=ROWS_PANEL)
    ] = None,
    values: KeptValues = None,
    cleaned: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE",
            help="Write the dataset without the flagged rows: to a new folder, or one .parquet file.",
            rich_help_panel=DATASET_PANEL,
        ),
    ] = None,
    relabel: Annotated[
        float | None,
        typer.Option(
            help="Keep flagged rows in it under their suggested label if that is right with this "
            "probability.",
            rich_help_panel=DATASET_PANEL,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Write it even if it loses over half of its rows, or a whole class.",
            rich_help_panel=DATASET_PANEL,
        ),
    ] = False,
    dataset: DatasetOfReport = None,
) -> None:
    """List the samples of INPUT whose label is probably wrong, worst first.

    Each has a noise_score, the probability that its label is wrong, and a suggested label. All comes from the
    one training run behind a values report; a report is read without training.

    \b
    Examples:
      chgval detect-noise values.parquet
      chgval detect-noise photos/ --values values.parquet  # values it first
      chgval detect-noise values.parquet --all --threshold 0.9 -o scores.csv
      chgval value photos/ -o - | chgval detect-noise - -o - --format csv
      chgval detect-noise photos/ --fail-over 0.05        # exit code 3: too noisy
      chgval detect-noise values.parquet --cleaned clean/ --relabel 0.9
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    config = DetectConfig(
        value=ValueConfig(data=dataclasses.replace(data, source=source), train=train, resume=resume),
        values=None if values is None else OutputConfig(path=values, overwrite=output.overwrite),
        output=output,
        rule=rule_of(threshold),
        expected_noise=expected_noise,
        score=score.value,
        duplicates=duplicates,
        all_rows=all_rows,
        top=top,
        fail_over=fail_over,
        cleaned=cleaned,
        relabel=relabel,
        force=force,
        dataset=dataset,
    )
    from chgval.runs.detect_noise import run_detect_noise

    with running(config.outputs, config.state_file, _command_line(), resumes=resume.resume):
        rate = run_detect_noise(config, console, command=_command_line())
    if config.fail_over is not None and rate.is_unknown:
        console.fail("--fail-over: nothing can be said about these labels, so it cannot be checked")
        raise typer.Exit(EXIT_FAILED)
    if config.fail_over is not None and rate.rate > config.fail_over:
        console.fail(
            f"{rate.rate:.1%} of the labels are estimated to be wrong, over --fail-over {fail_over:g}"
        )
        raise typer.Exit(EXIT_TOO_NOISY)


SELECTION_PANEL = "Selection"


@app.command(cls=PanelCommand)
@with_options(
    output=output_options("subset", ManifestFormat),
    data=data_options,
    train=train_options,
    resume=resume_options,
)
def select(
    console: "Console",
    output: OutputConfig,
    data: DataConfig,
    train: TrainConfig,
    resume: ResumeConfig,
    source: ReportOrDataset,
    fraction: Annotated[
        float | None, typer.Option(help="Share of ALL rows to keep.", rich_help_panel=SELECTION_PANEL)
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Rows to keep.", min=1, rich_help_panel=SELECTION_PANEL)
    ] = None,
    min_value: Annotated[
        float | None,
        typer.Option(
            help="Keep rows of at least this value (with --lowest, at most).", rich_help_panel=SELECTION_PANEL
        ),
    ] = None,
    per_class: Annotated[
        bool,
        typer.Option(
            "--per-class/--global",
            help="Keep the same share of every class, or rank all rows against each other.",
            rich_help_panel=SELECTION_PANEL,
        ),
    ] = True,
    by: Annotated[
        str,
        typer.Option(
            metavar="COLUMN",
            help="Column of the report to rank by, or random.",
            autocompletion=complete_figure,
            rich_help_panel=SELECTION_PANEL,
        ),
    ] = "value",
    lowest: Annotated[
        bool,
        typer.Option("--lowest", help="Keep the lowest, not the highest.", rich_help_panel=SELECTION_PANEL),
    ] = False,
    drop: Annotated[
        str | None,
        typer.Option(
            metavar="SUSPECTS",
            help="Leave out what detect-noise flagged in this table, or - for standard input.",
            rich_help_panel=SELECTION_PANEL,
        ),
    ] = None,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights",
            help="Weigh kept rows from 0 (lowest) to 1 (highest), not all by 1.",
            rich_help_panel=SELECTION_PANEL,
        ),
    ] = False,
    with_random: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Also write a random manifest with as many rows of each class.",
            rich_help_panel=SELECTION_PANEL,
        ),
    ] = None,
    values: KeptValues = None,
    materialize: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE",
            help="Write the kept rows as a dataset: to a new folder, or one .parquet file.",
            rich_help_panel=DATASET_PANEL,
        ),
    ] = None,
    link: Annotated[
        LinkName | None,
        typer.Option(help="How images of a folder get there. Default: copy.", rich_help_panel=DATASET_PANEL),
    ] = None,
    dataset: DatasetOfReport = None,
    end_with_null: Annotated[
        bool,
        typer.Option(
            "-0",
            help="End paths or indices with NUL, as xargs -0 takes them.",
            rich_help_panel=SELECTION_PANEL,
        ),
    ] = False,
) -> None:
    """Keep the part of a dataset that is worth most, and write down which it is.

    The manifest has one row per input row: whether it is kept, its rank and its weight. Other tools take the
    kept paths or indices, or the pruned dataset itself.

    \b
    Examples:
      chgval select values.parquet --fraction 0.3
      chgval select values.parquet --fraction 0.5 --drop suspects.parquet
      chgval select values.parquet --count 5000 --with-random random.parquet
      chgval select photos/ --fraction 0.3 --materialize pruned/ --link hard
      chgval select v.parquet --fraction 0.3 --format paths -0 -o - | xargs -0 du
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.runs.select import run_select

    config = SelectConfig(
        value=ValueConfig(data=dataclasses.replace(data, source=source), train=train, resume=resume),
        values=None if values is None else OutputConfig(path=values, overwrite=output.overwrite),
        output=output,
        end_with_null=end_with_null,
        fraction=fraction,
        count=count,
        min_value=min_value,
        per_class=per_class,
        by=by,
        lowest=lowest,
        drop=drop,
        with_random=None
        if with_random is None
        else OutputConfig(path=with_random, overwrite=output.overwrite),
        weights=weights,
        materialize=materialize,
        link=None if link is None else link.value,
        dataset=dataset,
    )
    with running(config.outputs, config.state_file, _command_line(), resumes=resume.resume):
        run_select(config, console, command=_command_line())


TEST_PANEL = "Test"


@app.command(name="train", cls=PanelCommand)
@with_options(data=data_options, train=train_options, resume=resume_options)
def train_model(
    console: "Console",
    data: DataConfig,
    train: TrainConfig,
    resume: ResumeConfig,
    source: LabelledDataset,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for the model, its settings and metrics.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = Path("trained"),
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an earlier training there.", rich_help_panel=OUTPUT_PANEL),
    ] = False,
    subset: Annotated[
        str | None,
        typer.Option(
            metavar="MANIFEST",
            help="Train on what select kept, with its weights.",
            rich_help_panel=SELECTION_PANEL,
        ),
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(help="Share of the samples to train on at a time.", rich_help_panel=SELECTION_PANEL),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"What chooses them: {', '.join(STRATEGIES)}. Default: auto with --fraction, else full.",
            autocompletion=complete_strategy,
            rich_help_panel=SELECTION_PANEL,
        ),
    ] = None,
    select_every: Annotated[
        int | None,
        typer.Option(
            help="Epochs from one choice to the next. Default: a fifteenth of all.",
            min=1,
            rich_help_panel=SELECTION_PANEL,
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Dataset to test on.", rich_help_panel=TEST_PANEL),
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(
            help="Share of the samples that is not trained on; it is tested on, unless --test is given.",
            rich_help_panel=TEST_PANEL,
        ),
    ] = None,
    test_every: Annotated[
        int, typer.Option(help="Epochs from one test to the next.", min=1, rich_help_panel=TEST_PANEL)
    ] = 1,
    target_accuracy: Annotated[
        float | None,
        typer.Option(help="Stop when the test reaches it.", rich_help_panel=TEST_PANEL),
    ] = None,
) -> None:
    """Train a model, on everything or on what is worth it, and keep it.

    With --fraction it trains on a part that is chosen anew every few epochs. The folder then holds
    model.safetensors, training.json (all settings and results), metrics.parquet (a row per epoch), and in
    subsets/ what was chosen.

    \b
    Examples:
      chgval train photos/ --test more-photos/
      chgval train photos/ --subset subset.parquet --holdout 0.1
      chgval train photos/ --fraction 0.3 --holdout 0.1
      chgval train photos/ --strategy chg --fraction 0.1 --select-every 10
      chgval train photos/ --test more-photos/ --target-accuracy 0.9
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.runs.train import run_train

    config = TrainingConfig(
        data=dataclasses.replace(data, source=source),
        train=train,
        resume=resume,
        folder=output,
        overwrite=overwrite,
        subset=subset,
        strategy=strategy_of(strategy, fraction),
        fraction=fraction,
        select_every=select_every,
        test=test,
        holdout=holdout,
        test_every=test_every,
        target_accuracy=target_accuracy,
    )
    with running(config.outputs, config.state_file, _command_line(), resumes=resume.resume):
        run_train(config, console, command=_command_line())


def _command_line() -> str:
    return shlex.join(["chgval", *sys.argv[1:]])


def main() -> None:
    """Run the command line."""
    end_at_signals()
    for descriptor in range(3):  # a file that got the number of a closed stream would be written to as that
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (for as long as the process)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character must not end the run.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()

"""The commands: what they are called and do, and what is printed of what a run returned.

Nothing here may import torch, or numpy, before a command runs: `chgval --help` must start at once.
"""

import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import chgval
from chgval.cli.options import PanelCommand, with_settings
from chgval.cli.reporting import EXIT_FAILED, EXIT_TOO_NOISY
from chgval.config import (
    ApplyConfig,
    CompareConfig,
    DetectConfig,
    EmbedConfig,
    IssuesConfig,
    MergeConfig,
    ReportConfig,
    SelectConfig,
    TrainingConfig,
    ValueConfig,
)
from chgval.interruption import end_at_signals
from chgval.system import wait_without_spinning

if TYPE_CHECKING:
    from chgval.cli.console import Console

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


def command(
    name: str, config_class: type, *, hidden: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the command of that name, with the settings of a class as its options."""

    def register(run: Callable[..., None]) -> Callable[..., None]:
        app.command(name=name, cls=PanelCommand, hidden=hidden)(with_settings(config_class, run))
        return run

    return register


@command("value", ValueConfig)
def value(
    console: "Console",
    config: ValueConfig,
    plan: Annotated[
        bool, typer.Option("--plan", help="Tell what a run would do and cost, and stop.")
    ] = False,
) -> None:
    """Train once on DATA and report what every sample is worth.

    The report has one row per input row: its CHG Shapley value, rank and percentile, and signals of the same
    run (loss, margin, EL2N, predicted label, ...). Low values come first when looking for wrong labels.

    \b
    Examples:
      chgval value builtin:digits
      chgval value photos/                          # photos/CLASS/IMAGE
      chgval value train.csv --images-root train/   # file names and labels
      chgval value "shards/*.parquet" --arch resnet18 --epochs 20
      chgval value embeddings.parquet --features-column embedding
      chgval value photos/ --frozen                 # by a pretrained network
      chgval value photos/ -o - --format csv | sort -t, -k5,5g | head
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    if plan:
        from chgval.cli.results import show_plan
        from chgval.runs.plan import run_plan

        show_plan(console, run_plan(config))
        return
    from chgval.cli.results import show_values
    from chgval.runs.value import run_value

    show_values(console, run_value(config), config)


# Noise may sound like grain in an image; it is wrong labels.
@command("find-label-errors", DetectConfig, hidden=True)
@command("detect-noise", DetectConfig)
def detect_noise(console: "Console", config: DetectConfig) -> None:
    """List the samples whose label is probably wrong, worst first.

    Each has a noise_score, the probability that its label is wrong, and a suggested label. All comes from the
    one training run behind a values report; a report is read without training.

    \b
    Examples:
      chgval detect-noise photos.values.parquet
      chgval detect-noise photos/                   # values it first
      chgval detect-noise photos/ --fail-over 5%    # exit code 3: too noisy
      chgval detect-noise photos.values.parquet --cleaned clean/ --relabel 0.9
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.cli.results import show_suspects
    from chgval.runs.detect_noise import run_detect_noise

    suspects = run_detect_noise(config)
    show_suspects(console, suspects, config)
    rate = suspects.rate
    if config.fail_over is not None and rate.is_unknown:
        console.fail("--fail-over: nothing can be said about these labels, so it cannot be checked")
        raise typer.Exit(EXIT_FAILED)
    if config.fail_over is not None and rate.rate > config.fail_over:
        console.fail(
            f"{rate.rate:.1%} of the labels are estimated to be wrong, over --fail-over {config.fail_over:g}"
        )
        raise typer.Exit(EXIT_TOO_NOISY)


@command("select", SelectConfig)
def select(console: "Console", config: SelectConfig) -> None:
    """Keep the part of a dataset that is worth most.

    The subset has one row per input row: whether it is kept, its rank and its weight. Other tools take the
    kept paths or indices, or the pruned dataset itself.

    \b
    Examples:
      chgval select photos.values.parquet --fraction 30%
      chgval select v.parquet --count 5000 --write-random random.parquet
      chgval select photos/ --fraction 0.3 --materialize pruned/ --link hard
      chgval select v.parquet --fraction 0.3 --format paths -0 -o - | xargs -0 du
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.cli.results import show_selection
    from chgval.runs.select import run_select

    show_selection(console, run_select(config), config)


@command("train", TrainingConfig)
def train(console: "Console", config: TrainingConfig) -> None:
    """Train a model, on everything or on what is worth it.

    With --fraction it trains on a part that is chosen anew every few epochs. The folder then holds
    model.safetensors, training.json (all settings and results), metrics.parquet (a row per epoch), and in
    subsets/ what was chosen.

    \b
    Examples:
      chgval train photos/ --test more-photos/
      chgval train photos/ --subset photos.subset.parquet --holdout 0.1
      chgval train photos/ --fraction 0.3 --holdout 0.1
      chgval train photos/ --strategy chg --fraction 0.1 --select-every 10
      chgval train photos/ --test more-photos/ --target-accuracy 0.9
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.cli.results import show_trained
    from chgval.runs.train import run_train

    show_trained(console, run_train(config), config)


@command("report", ReportConfig)
def report(console: "Console", config: ReportConfig) -> None:
    """Make a page to look at the most suspicious samples, and decide.

    One HTML file, with pictures and figures in it, that opens in any browser without a network. Decisions
    stay in the browser, and are downloaded for chgval apply.

    \b
    Examples:
      chgval report photos.values.parquet
      chgval report photos.values.parquet --dataset /mnt/photos -o review.html
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.cli.results import show_page
    from chgval.runs.report import run_report

    show_page(console, run_report(config), config)


@command("detect-issues", IssuesConfig)
def detect_issues(console: "Console", config: IssuesConfig) -> None:
    """List outliers, copies, and samples that are also in a test set.

    Nothing is trained: copies are found by their pixels, also mirrored, encoded anew or cropped; outliers by
    the features that the run kept (--write-features). The table proposes what to drop, and chgval apply and
    chgval report take it.

    \b
    Examples:
      chgval value photos/ --write-features photos.features.npy
      chgval detect-issues photos.values.parquet
      chgval detect-issues photos.values.parquet --against test-photos/
      chgval report photos.values.parquet --issues photos.issues.parquet
      chgval apply photos.issues.parquet --dataset photos/
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.cli.results import show_issues
    from chgval.runs.issues import run_detect_issues

    show_issues(console, run_detect_issues(config), config)


@command("embed", EmbedConfig)
def embed(console: "Console", config: EmbedConfig) -> None:
    """Turn images into what a pretrained network makes of them, in one pass.

    The table has ids, labels and embeddings (last-layer inputs), for chgval value --features-column
    embedding: a linear model on good features is the fastest way to good verdicts. Image size and
    normalisation come with the weights. Weights of a name are fetched once, and nothing else ever is.

    \b
    Examples:
      chgval embed photos/
      chgval embed photos/ --arch resnet50 --weights DEFAULT
      chgval embed photos/ --weights photos.trained/model.safetensors
      chgval value photos/ --frozen                  # the same in one step
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.cli.results import show_embedded
    from chgval.runs.embedding import run_embed

    show_embedded(console, run_embed(config), config)


@command("compare", CompareConfig)
def compare(console: "Console", config: CompareConfig) -> None:
    """Put trainings side by side, or say how differently two reports rank the same rows.

    Trainings are folders of chgval train: accuracies, times and what each was trained on. Of two reports: how
    far their values and noise scores agree, and which rows they rank most differently.

    \b
    Examples:
      chgval compare photos.trained/ pruned.trained/
      chgval compare full.trained/ 30.trained/ 10.trained/ -o comparison.html
      chgval compare seed1.parquet seed2.parquet --plots figures/
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.cli.results import show_comparison
    from chgval.runs.compare import run_compare

    show_comparison(console, run_compare(config), config)


@command("merge", MergeConfig)
def merge(console: "Console", config: MergeConfig) -> None:
    """Average the values and noise scores of several runs on the same rows.

    The standard error is then that over runs, such as of several seeds: how far another run would differ.
    That over the epochs of one run is not that, as its epochs have a model in common.

    \b
    Examples:
      chgval value photos/ --seed 1 -o 1.parquet
      chgval value photos/ --seed 2 -o 2.parquet
      chgval merge 1.parquet 2.parquet -o photos.merged.parquet
      chgval merge seeds/*.parquet -o - --format csv | head
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.cli.results import show_merged
    from chgval.runs.merge import run_merge

    show_merged(console, run_merge(config), config)


@command("apply", ApplyConfig)
def apply(console: "Console", config: ApplyConfig) -> None:
    """Write a dataset as people decided: rows to drop left out, others under their new label.

    DECISIONS is a table with the columns id, label_name (the label when it was decided), decision (keep,
    relabel, drop or unsure) and new_label_name. Rows that it does not name stay as they are. A copy is kept
    beside the output.

    \b
    Examples:
      chgval apply photos.decisions.csv --dataset photos/
      chgval apply decisions.csv --dataset train.parquet -o clean.parquet
      chgval apply decisions.csv --dataset photos/ --labels-only -o labels.csv
    """  # noqa: D301 (the backspace keeps the lines of the next paragraph)
    from chgval.cli.results import show_applied
    from chgval.runs.apply import run_apply

    show_applied(console, run_apply(config), config)


def main() -> None:
    """Run the command line."""
    wait_without_spinning()
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

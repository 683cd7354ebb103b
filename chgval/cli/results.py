"""What is printed of the results of runs."""

from __future__ import annotations

import dataclasses
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from chgval.cli.console import Console, Side
from chgval.config import (
    STANDARD_STREAM,
    ApplyConfig,
    CompareConfig,
    DetectConfig,
    EmbedConfig,
    IssuesConfig,
    MergeConfig,
    OutputConfig,
    ReportConfig,
    SelectConfig,
    TrainingConfig,
    ValueConfig,
)
from chgval.detection.verdict import annotators_shown
from chgval.reports.report import Report
from chgval.runs.detect_noise import summarise_labels
from chgval.runs.summaries import (
    SHOWN_CLASSES,
    NoiseSummary,
    RunSummary,
    SelectedClass,
    count_statuses,
    statuses,
    summarise_values,
)
from chgval.training.records import Evaluation

if TYPE_CHECKING:  # these import torch, which reports do without
    from chgval.runs.apply import Applied
    from chgval.runs.compare import Comparison
    from chgval.runs.detect_noise import Suspects
    from chgval.runs.embedding import Embedded
    from chgval.runs.issues import Issues
    from chgval.runs.plan import Plan
    from chgval.runs.report import Written
    from chgval.runs.select import Selection
    from chgval.runs.train import Trained

HISTOGRAM_WIDTH = 40
SHOWN_ANNOTATORS = 10


def show_plan(console: Console, plan: Plan) -> None:
    """Print what a run would do and cost."""
    console.settings(plan.shown)
    costs = plan.costs
    console.hand_over(
        {
            "samples_per_second": costs.rate,
            "epochs": plan.num_epochs,
            "seconds_per_epoch": costs.epoch_seconds,
            "seconds": costs.epoch_seconds * plan.num_epochs,
            "host_bytes": costs.host_bytes,
            "device_bytes": costs.device_bytes,
        }
    )


def show_values(console: Console, report: Report, config: ValueConfig) -> None:
    """Print what a run found, what to read before acting on it, and where its report is."""
    _report(console, report, config.output, config.outputs, has_page=config.report is not None)


def show_merged(console: Console, report: Report, config: MergeConfig) -> None:
    """Print what several runs found together, and where that is."""
    stderr_N, value_N = report.scores("value_stderr"), report.values
    known_N = np.isfinite(stderr_N)
    if known_N.any():
        share = np.sqrt(np.square(stderr_N[known_N]).mean()) / max(value_N[known_N].std(), 1e-300)
        console.say(
            f"{len(config.sources)} runs; the standard error of a value over them is {share:.1%} of the "
            "standard deviation of the values"
        )
    _report(console, report, config.output, config.outputs)


def _report(
    console: Console,
    report: Report,
    output: OutputConfig | None,
    outputs: Sequence[Path],
    *,
    has_page: bool = False,
) -> None:
    """Print what is in a values report, and where it is."""
    if console.is_quiet and not console.as_json:
        return
    summary, labels = summarise_values(report, console.shown), summarise_labels(report)
    _summary(console, summary, labels)
    _annotators(console, annotators_shown(report.verdict))
    console.say("")
    if labels is not None:
        console.say(_rate_line(labels))
    _notes(console, report.notes)
    target = "" if output is None else f" -> {output.target}"
    console.say(f"{len(report):,} rows ({count_statuses(report)}) in {console.seconds:.1f} s{target}")
    following = None
    if output is not None and not output.to_stdout:
        following = _next(console, "detect-noise" if has_page else "report", output.path)
    result = {
        **_outputs(outputs),
        "rows": len(report),
        "statuses": statuses(report),
        **dataclasses.asdict(summary),
        "labels": None if labels is None else _labels_json(console, labels),
        "notes": list(report.notes),
        "seconds": console.seconds,
        "next": following,
    }
    console.hand_over(result)


def show_suspects(console: Console, suspects: Suspects, config: DetectConfig) -> None:
    """Print what was found out about labels, and where it was written."""
    summary = suspects.summary
    _noise(console, summary)
    _annotators(console, annotators_shown(suspects.report.verdict))
    if suspects.num_duplicates:
        console.table(
            "Near-duplicates with another label",
            {"id": "left", "label": "left", "other label": "left", "other id": "left"},
            summary.duplicates[: console.shown],
        )
    console.say("")
    _notes(console, suspects.report.notes)
    if suspects.num_duplicates is not None:
        console.say(f"{suspects.num_duplicates:,} samples have a near-duplicate with another label")
    if config.output is not None:
        rows = suspects.table.num_rows
        console.say(f"{rows:,} of {suspects.num_rows:,} rows -> {config.output.target}")
    following = None
    if suspects.cleaned is not None:
        console.say(suspects.cleaned)
        if config.cleaned is not None and config.cleaned.suffix in ("", ".parquet"):  # needs no other option
            following = _next(console, "train", str(config.cleaned), "--holdout", "0.1")
    elif suspects.values is not None:
        is_file = config.output is not None and not config.output.to_stdout and suspects.table.num_rows
        drop = ["--drop", config.output.path] if config.output is not None and is_file else []
        following = _next(console, "select", suspects.values, "--fraction", "0.5", *drop)
    result = {
        **_outputs(config.outputs),
        "rows": suspects.num_rows,
        "labels": _labels_json(console, summary),
        "num_duplicates": suspects.num_duplicates,
        "notes": list(suspects.report.notes),
        "seconds": console.seconds,
        "next": following,
    }
    console.hand_over(result)


def show_selection(console: Console, selection: Selection, config: SelectConfig) -> None:
    """Print what is kept of every class, and where it was written."""
    hidden = max(0, len(selection.classes) - SHOWN_CLASSES)
    _kept_classes(console, selection.classes[:SHOWN_CLASSES], hidden)
    for warning in selection.warnings:
        console.warn(warning)
    console.say("")
    if config.output is not None:
        kept = f"{selection.kept_N.sum():,} of {len(selection.kept_N):,} rows kept"
        console.say(f"{kept} -> {config.output.target}")
    following = None
    if selection.materialized is not None:
        console.say(selection.materialized)
        if config.materialize is not None and config.materialize.suffix in ("", ".parquet"):
            following = _next(console, "train", str(config.materialize), "--holdout", "0.1")
    elif config.output is not None and not config.output.to_stdout and config.output.listing is None:
        dataset = selection.report.dataset or "DATA"
        following = _next(console, "train", dataset, "--subset", config.output.path, "--holdout", "0.1")
    result = {
        **_outputs(config.outputs),
        "rows": len(selection.kept_N),
        "kept": int(selection.kept_N.sum()),
        "classes": [dataclasses.asdict(line) for line in selection.classes],
        "warnings": selection.warnings,
        "seconds": console.seconds,
        "next": following,
    }
    console.hand_over(result)


def show_trained(console: Console, trained: Trained, config: TrainingConfig) -> None:
    """Print the last test, whether the target was reached, and where the model is."""
    if trained.evaluation is not None:
        _accuracies(console, trained.class_names, trained.evaluation)
    console.say("")
    if config.target_accuracy is not None:
        reached = trained.target
        console.say(
            f"accuracy {config.target_accuracy:.1%} was not reached"
            if reached is None
            else f"accuracy {config.target_accuracy:.1%} reached in epoch {reached['epoch']}, after "
            f"{reached['seconds']:.1f} s"
        )
    epochs = "1 epoch" if len(trained.epochs) == 1 else f"{len(trained.epochs):,} epochs"
    console.say(f"trained {epochs} in {trained.seconds:.1f} s -> {trained.folder}")
    following = None
    if trained.evaluation is None:
        tested = f"{trained.folder}-tested"
        following = _next(console, "train", config.data.source, "--holdout", "0.1", "-o", tested)
    result = {
        **_outputs(config.outputs),
        "epochs": len(trained.epochs),
        "test": None if trained.evaluation is None else dataclasses.asdict(trained.evaluation),
        "class_names": trained.class_names,
        "target": trained.target,
        "seconds": trained.seconds,
        "next": following,
    }
    console.hand_over(result)


def show_comparison(console: Console, found: Comparison, config: CompareConfig) -> None:
    """Print a table of what was compared, and where pages and figures of it are."""
    if console.is_quiet and not console.as_json:
        return
    texts = ("", "training", "model", "strategy")
    sides: list[Side] = ["left" if heading in texts else "right" for heading in found.headings]
    console.table("Comparison", dict(zip(found.headings, sides, strict=True)), found.lines)
    columns: dict[str, Side] = {"id": "left", "label": "left", "first": "right", "second": "right"}
    _listed(console, "Ranked most differently (percentiles of values)", columns, found.different)
    console.say("")
    for path in (config.path, config.plots):
        if path is not None:
            console.say(f"-> {path}")
    console.hand_over({**_outputs(config.outputs), "compared": found.facts, "seconds": console.seconds})


def show_embedded(console: Console, embedded: Embedded, config: EmbedConfig) -> None:
    """Print what was made of how many images, which could not be read, and where it is."""
    for name, reason in list(embedded.problems.items())[: console.shown]:
        console.warn(f"{name}: {reason}; its embedding is null")
    if len(embedded.problems) > console.shown:
        console.warn(f"... and {len(embedded.problems) - console.shown:,} more that cannot be read")
    console.say(
        f"{embedded.num_embedded:,} of {embedded.num_rows:,} images, as {embedded.num_features:,} numbers "
        f"each, by {embedded.arch} on {embedded.image_size} pixels -> {config.output.target}"
    )
    following = None
    if not config.output.to_stdout:
        several = config.data.label_columns if len(config.data.label_columns) > 1 else ()
        columns = ["--features-column", "embedding", *(f"--label-column={name}" for name in several)]
        following = _next(console, "value", config.output.path, *columns)
    result = {
        **_outputs(config.outputs),
        **dataclasses.asdict(embedded),
        "seconds": console.seconds,
        "next": following,
    }
    console.hand_over(result)


def show_issues(console: Console, issues: Issues, config: IssuesConfig) -> None:
    """Print how many rows have which issue, the worst of each, and where all are."""
    if console.is_quiet and not console.as_json:
        return
    counts = [(name, f"{count:,}") for name, count in issues.counts.items()]
    console.table("Issues", {"issue": "left", "rows": "right"}, counts)
    columns: dict[str, Side] = {"id": "left", "label": "left", "times as sparse": "right"}
    _listed(console, "Most unlike all others", columns, issues.outliers)
    columns = {"id": "left", "label": "left", "other label": "left", "other id": "left"}
    _listed(console, "Copies with another label", columns, issues.conflicts)
    told = [(name, f"{share:.0%}") for name, share in issues.told.items()]
    _listed(console, "What goes with the labels", {"property": "left", "explained by them": "right"}, told)
    console.say("")
    _notes(console, issues.notes)
    rows = issues.table["issues"]
    num_found = len(rows) - rows.null_count
    following = None
    if config.output is not None:
        console.say(f"{num_found:,} of {len(rows):,} rows have an issue -> {config.output.target}")
        if not config.output.to_stdout and config.source != STANDARD_STREAM:
            following = _next(console, "report", config.source, "--issues", config.output.path)
    result = {
        **_outputs(config.outputs),
        "rows": len(rows),
        "issues": issues.counts,
        "explained": issues.explained,
        "notes": issues.notes,
        "seconds": console.seconds,
        "next": following,
    }
    console.hand_over(result)


def _listed(console: Console, title: str, columns: dict[str, Side], lines: Sequence[tuple[str, ...]]) -> None:
    """Print as many lines as a person wants, if there are any."""
    if lines and console.shown:
        console.table(title, columns, lines[: console.shown])


def show_page(console: Console, written: Written, config: ReportConfig) -> None:
    """Print what is on a page, and where it is."""
    console.say(
        f"{written.num_samples:,} samples, {written.num_flagged:,} of them flagged, "
        f"{written.num_pictures:,} pictures, {written.num_bytes / 1e6:.1f} MB -> {config.target}"
    )
    console.say(f"open it in a browser: {config.target.resolve().as_uri()}")
    following = None
    if written.dataset is not None:
        console.say(f"decide there and download {written.decisions}; then, in the folder that it is in:")
        following = _next(console, "apply", written.decisions, "--dataset", written.dataset)
    result = {
        **_outputs(config.outputs),
        **dataclasses.asdict(written),
        "seconds": console.seconds,
        "next": following,
    }
    console.hand_over(result)


def show_applied(console: Console, applied: Applied, config: ApplyConfig) -> None:
    """Print what was decided, and what was written."""
    counts = applied.counts
    console.say(
        f"{counts['keep']:,} to keep, {counts['relabel']:,} to relabel, {counts['drop']:,} to drop, "
        f"{counts['unsure']:,} unsure"
    )
    console.say(f"{applied.num_written:,} of {applied.num_rows:,} rows -> {config.target}")
    following = None
    if not config.labels_only and (config.target.is_dir() or config.target.suffix == ".parquet"):
        following = _next(console, "value", str(config.target))
    result = {
        **_outputs(config.outputs),
        "rows": applied.num_rows,
        "written": applied.num_written,
        "decisions": counts,
        "seconds": console.seconds,
        "next": following,
    }
    console.hand_over(result)


def _next(console: Console, *words: str) -> str:
    """Print the command that most people want to run next, and return it."""
    command = shlex.join(["chgval", *words])
    console.say_next(command)
    return command


def _outputs(paths: Sequence[Path]) -> dict[str, object]:
    return {"outputs": [str(path) for path in paths]}


def _labels_json(console: Console, summary: NoiseSummary) -> dict[str, object]:
    """Return what was found out about labels, with as many samples as a person is shown."""
    shown = {"suspects": summary.suspects[: console.shown], "duplicates": summary.duplicates[: console.shown]}
    return dataclasses.asdict(dataclasses.replace(summary, **shown))  # type: ignore[arg-type]


def _rate_line(summary: NoiseSummary) -> str:
    rate = summary.rate
    noise = f"{rate.rate:.1%} of the labels ({rate.low:.1%} to {rate.high:.1%})"
    if rate.is_unknown:
        noise = "unknown"
    return f"estimated noise: {noise}; {summary.num_flagged:,} of {summary.num_assessed:,} flagged"


def _summary(console: Console, summary: RunSummary, labels: NoiseSummary | None) -> None:
    """Print what a run found: counts per class, a histogram, the lowest values and likely wrong labels."""
    if console.is_quiet:
        return
    flagged = {} if labels is None else {name: count for name, _, count, _ in labels.classes}
    _classes(
        console,
        {"samples": "right", "mean value": "right", "agreement": "right", "suspects": "right"},
        [
            (
                line.name,
                f"{line.num_samples:,}",
                f"{line.mean_value:.3g}",
                f"{line.agreement:.0%}",
                f"{flagged[line.name]:,}" if line.name in flagged else "",
            )
            if line.num_samples
            else (line.name, "0", "", "", "")
            for line in summary.classes
        ],
        summary.hidden_classes,
    )
    console.say("agreement: share predicted, late in the run, as the label that they have")
    _histogram(console, summary)
    console.table(
        "Lowest values",
        {"value": "right", "percentile": "right", "label": "left", "predicted": "left", "id": "left"},
        [
            (f"{line.value:.3g}", f"{line.percentile:.1f}", line.label_name, line.predicted_name, line.id)
            for line in summary.lowest
        ],
    )
    if labels is not None:
        _suspects(console, labels)


def _suspects(console: Console, summary: NoiseSummary) -> None:
    """Print the likeliest wrong labels, with as many digits as tell their scores apart."""
    lines = summary.suspects[: console.shown]
    if not lines:
        return
    scores = [line.noise_score for line in lines]
    digits = next((n for n in range(3, 9) if len({f"{s:.{n}f}" for s in scores}) == len(set(scores))), 9)
    console.table(
        "Most suspicious labels (look here first)",
        {"score": "right", "label": "left", "suggested": "left", "id": "left"},
        [(f"{line.noise_score:.{digits}f}", line.label_name, line.suggested_name, line.id) for line in lines],
    )


def _notes(console: Console, notes: Sequence[str]) -> None:
    """Print sentences that a person should read, in lines that fit a terminal."""
    for note in notes:
        lines = textwrap.wrap(
            f"note: {note}", console.line_width, subsequent_indent="  ", break_on_hyphens=False
        )
        for line in lines:
            console.say(line)


def _annotators(console: Console, rows: Sequence[tuple[str, str, str]]) -> None:
    """Print how often each annotator is wrong: share of wrong labels, number of labels and name."""
    if rows and not console.is_quiet:
        shown = [*rows[:SHOWN_ANNOTATORS]]
        if len(rows) > SHOWN_ANNOTATORS:
            shown.append(("", "", f"... and {len(rows) - SHOWN_ANNOTATORS:,} more"))
        console.table("Annotators", {"wrong": "right", "labels": "right", "annotator": "left"}, shown)


def _noise(console: Console, summary: NoiseSummary) -> None:
    """Print what was found out about labels: the noise rate, flags per class, pairs and suspects."""
    if console.is_quiet:
        return
    console.say("")
    console.say(_rate_line(summary))
    _classes(
        console,
        {"samples": "right", "flagged": "right", "noise": "right"},
        [
            (name, f"{samples:,}", f"{flagged:,}", f"{noise:.1%}")
            for name, samples, flagged, noise in summary.classes
        ],
        summary.hidden_classes,
    )
    if not summary.num_flagged:
        return
    if summary.pairs:
        console.table(
            "Commonest corrections",
            {"flagged": "right", "label": "left", "suggested": "left"},
            [(f"{count:,}", given, suggested) for given, suggested, count in summary.pairs],
        )
    _suspects(console, summary)


def _kept_classes(console: Console, classes: Sequence[SelectedClass], hidden_classes: int) -> None:
    """Print what is kept of every class."""
    if not console.is_quiet:
        _classes(
            console,
            {"rows": "right", "dropped": "right", "kept": "right", "share": "right"},
            [
                (
                    line.name,
                    f"{line.num_rows:,}",
                    f"{line.num_dropped:,}",
                    f"{line.num_kept:,}",
                    f"{line.num_kept / line.num_rows:.1%}",
                )
                for line in classes
            ],
            hidden_classes,
        )


def _accuracies(console: Console, class_names: Sequence[str], evaluation: Evaluation) -> None:
    """Print the accuracy on every class that has test samples, the lowest first."""
    if console.is_quiet:
        return
    known = [
        (accuracy, name)
        for name, accuracy in zip(class_names, evaluation.class_accuracies, strict=True)
        if not np.isnan(accuracy)
    ]
    lines = [(name, f"{accuracy:.1%}") for accuracy, name in sorted(known)]
    _classes(console, {"accuracy": "right"}, lines[:SHOWN_CLASSES], max(0, len(lines) - SHOWN_CLASSES))


def _classes(
    console: Console, headings: dict[str, Side], rows: Sequence[tuple[str, ...]], hidden_classes: int
) -> None:
    last = f"... and {hidden_classes:,} more classes" if hidden_classes else ""
    console.table("Classes", {"class": "left", **headings}, rows, last)


def _histogram(console: Console, summary: RunSummary) -> None:
    console.say("")
    console.print(Text("Values", style="italic"))
    most = max(summary.histogram_counts)
    block, sliver = ("█", "▏") if console.encoding.startswith("utf") else ("#", "|")
    edges = summary.histogram_edges
    last = len(summary.histogram_counts) - 1
    for number, count in enumerate(summary.histogram_counts):
        low = "below" if number == 0 else f"{edges[number]:.3g}"
        high = "or more" if number == last else f"{edges[number + 1]:.3g}"
        bar = block * round(HISTOGRAM_WIDTH * count / most) or (sliver if count else "")
        console.say(f"{low:>10} {high:>10} {count:>9,} {bar}")

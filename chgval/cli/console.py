"""All printing for people. It goes to standard error; standard output belongs to the report."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal, TextIO, cast

import numpy as np
from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from chgval.config import DetectConfig, SelectConfig, TrainingConfig, ValueConfig
from chgval.detection.verdict import annotators_shown
from chgval.progress import tell_record
from chgval.reports.report import Report
from chgval.runs.summaries import (
    SHOWN_CLASSES,
    NoiseSummary,
    RunSummary,
    SampleLine,
    SelectedClass,
    count_statuses,
    summarise_values,
)
from chgval.training.records import Evaluation, Record, StepRecord

if TYPE_CHECKING:  # these import torch, which reports do without
    from chgval.runs.detect_noise import Suspects
    from chgval.runs.select import Selection
    from chgval.runs.train import Trained

Side = Literal["left", "right"]

HISTOGRAM_WIDTH = 40
NARROWEST_NAME = 8
GAP = "  "
LINE_WIDTH = 80
SHOWN_ANNOTATORS = 10


class _Unfailing:
    """A stream that takes what is written even when its terminal, or its reader, has gone: runs continue."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class Console:
    """Prints to standard error what a person wants to see of a run; listens to runs (`chgval.progress`).

    Args:
        command: the command line, which reports name.
        quiet: whether to print errors only.
        verbose: whether to print details too, such as a line every few steps where there is no bar.
    """

    def __init__(self, command: str = "chgval", *, quiet: bool = False, verbose: bool = False) -> None:
        # As a text stream it has what rich asks for; rich itself would end the run with the terminal.
        stream = cast(TextIO, _Unfailing(sys.stderr))
        self._rich = RichConsole(file=stream, highlight=False, soft_wrap=True)
        self.command = command
        self._started = time.perf_counter()
        self._quiet = quiet
        self._verbose = verbose and not quiet

    def say(self, text: str) -> None:
        """Print one line."""
        if not self._quiet:
            self._rich.print(Text(printable(text)))

    def detail(self, text: str) -> None:
        """Print one line that only --verbose shows."""
        if self._verbose:
            self._rich.print(Text(printable(text), style="dim"))

    def warn(self, text: str) -> None:
        """Print one line about something that the user should look at."""
        if not self._quiet:
            self._rich.print(Text("warning: ", style="yellow") + Text(printable(text)))

    def fail(self, text: str) -> None:
        """Print why the command could not do what it was asked."""
        self._rich.print(Text("error: ", style="bold red") + Text(printable(text)))

    def settings(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Print names and values in two columns."""
        if not self._quiet:
            width = max(len(name) for name, _ in pairs)
            for name, value in pairs:
                self._rich.print(Text(f"{name:<{width}}  ", style="bold") + Text(printable(value)))

    @contextmanager
    def following(self, total_steps: int) -> Iterator[Callable[[Record], None]]:
        """Show records of a run as they come: a bar on a terminal, else a line per epoch."""
        if self._quiet or not self._rich.is_terminal:
            yield lambda record: tell_record(self, record)
            return
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[state]}"),
            console=self._rich,
            transient=True,
        ) as progress:
            task = progress.add_task("training", total=total_steps, state="")

            def show(record: Record) -> None:
                if not isinstance(record, StepRecord):
                    tell_record(self, record)
                    return
                progress.update(
                    task,
                    completed=(record.epoch - 1) * record.num_steps + record.step,
                    # An epoch on a part of the samples has fewer steps.
                    total=record.num_epochs * record.num_steps,
                    description=f"epoch {record.epoch}/{record.num_epochs}",
                    state=f"loss {record.loss:.3f}  acc {record.accuracy:.1%}  {record.speed:,.0f}/s",
                )

            yield show

    def values(self, report: Report, config: ValueConfig) -> None:
        """Print what a run found, what to read before acting on it, and where its report is."""
        if self._quiet:
            return
        self.summary(summarise_values(report))
        self.annotators(annotators_shown(report.verdict))
        self.notes(report.notes)
        self.say("")
        seconds = time.perf_counter() - self._started
        target = "" if config.output is None else f" -> {config.output.target}"
        self.say(f"{len(report):,} rows ({count_statuses(report)}) in {seconds:.1f} s{target}")

    def suspects(self, suspects: Suspects, config: DetectConfig) -> None:
        """Print what was found out about labels, and where it was written."""
        self.noise(suspects.summary)
        self.annotators(annotators_shown(suspects.report.verdict))
        self.say("")
        self.notes(suspects.report.notes)
        if suspects.num_duplicates is not None:
            self.say(f"{suspects.num_duplicates:,} samples have a near-duplicate with another label")
        if config.output is not None:
            rows = suspects.table.num_rows
            self.say(f"{rows:,} of {suspects.num_rows:,} rows -> {config.output.target}")
        if suspects.cleaned is not None:
            self.say(suspects.cleaned)

    def selection(self, selection: Selection, config: SelectConfig) -> None:
        """Print what is kept of every class, and where it was written."""
        hidden = max(0, len(selection.classes) - SHOWN_CLASSES)
        self.kept_classes(selection.classes[:SHOWN_CLASSES], hidden)
        for warning in selection.warnings:
            self.warn(warning)
        self.say("")
        if config.output is not None:
            kept = f"{selection.kept_N.sum():,} of {len(selection.kept_N):,} rows kept"
            self.say(f"{kept} -> {config.output.target}")
        if selection.materialized is not None:
            self.say(selection.materialized)

    def trained(self, trained: Trained, config: TrainingConfig) -> None:
        """Print the last test, whether the target was reached, and where the model is."""
        if trained.evaluation is not None:
            self.accuracies(trained.class_names, trained.evaluation)
        self.say("")
        if config.target_accuracy is not None:
            reached = trained.target
            self.say(
                f"accuracy {config.target_accuracy:.1%} was not reached"
                if reached is None
                else f"accuracy {config.target_accuracy:.1%} reached in epoch {reached['epoch']}, after "
                f"{reached['seconds']:.1f} s"
            )
        self.say(f"trained {len(trained.epochs)} epochs in {trained.seconds:.1f} s -> {trained.folder}")

    def summary(self, summary: RunSummary) -> None:
        """Print what a run found: counts per class, extremes and a histogram."""
        if self._quiet:
            return
        self._classes(
            {"samples": "right", "mean value": "right", "agreement": "right"},
            [
                (line.name, f"{line.num_samples:,}", f"{line.mean_value:.3e}", f"{line.agreement:.0%}")
                if line.num_samples
                else (line.name, "0", "", "")
                for line in summary.classes
            ],
            summary.hidden_classes,
        )
        self.say("agreement: share predicted, late in the run, as the label that they have")
        self._histogram(summary)
        self._samples("Lowest values (look here first)", summary.lowest)
        self._samples("Highest values", summary.highest)

    def notes(self, notes: Sequence[str]) -> None:
        """Print sentences that a person should read, in lines that fit a terminal."""
        for note in notes:
            lines = textwrap.wrap(f"note: {note}", LINE_WIDTH, subsequent_indent="  ", break_on_hyphens=False)
            for line in lines:
                self.say(line)

    def annotators(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Print how often each annotator is wrong: share of wrong labels, number of labels and name."""
        if rows and not self._quiet:
            shown = [*rows[:SHOWN_ANNOTATORS]]
            if len(rows) > SHOWN_ANNOTATORS:
                shown.append(("", "", f"... and {len(rows) - SHOWN_ANNOTATORS:,} more"))
            self._table("Annotators", {"wrong": "right", "labels": "right", "annotator": "left"}, shown)

    def noise(self, summary: NoiseSummary) -> None:
        """Print what was found out about labels: the noise rate, flags per class, pairs and suspects."""
        if self._quiet:
            return
        rate = summary.rate
        self.say("")
        noise = f"{rate.rate:.1%} of the labels are wrong (between {rate.low:.1%} and {rate.high:.1%})"
        if rate.is_unknown:
            noise = "unknown how many of the labels are wrong"
        flagged = f"{summary.num_flagged:,} of {summary.num_assessed:,} flagged"
        self.say(f"estimated noise: {noise}; {flagged}")
        self._classes(
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
            self._table(
                "Commonest corrections",
                {"flagged": "right", "label": "left", "suggested": "left"},
                [(f"{count:,}", given, suggested) for given, suggested, count in summary.pairs],
            )
        self._table(
            "Most suspicious labels",
            {"score": "right", "label": "left", "suggested": "left", "id": "left"},
            [
                (f"{line.noise_score:.3f}", line.label_name, line.suggested_name, line.id)
                for line in summary.suspects
            ],
        )

    def kept_classes(self, classes: Sequence[SelectedClass], hidden_classes: int) -> None:
        """Print what is kept of every class."""
        if not self._quiet:
            self._classes(
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

    def accuracies(self, class_names: Sequence[str], evaluation: Evaluation) -> None:
        """Print the accuracy on every class that has test samples, the lowest first."""
        if self._quiet:
            return
        known = [
            (accuracy, name)
            for name, accuracy in zip(class_names, evaluation.class_accuracies, strict=True)
            if not np.isnan(accuracy)
        ]
        lines = [(name, f"{accuracy:.1%}") for accuracy, name in sorted(known)]
        self._classes({"accuracy": "right"}, lines[:SHOWN_CLASSES], max(0, len(lines) - SHOWN_CLASSES))

    def _classes(
        self, headings: dict[str, Side], rows: Sequence[tuple[str, ...]], hidden_classes: int
    ) -> None:
        last = f"... and {hidden_classes:,} more classes" if hidden_classes else ""
        self._table("Classes", {"class": "left", **headings}, rows, last)

    def _histogram(self, summary: RunSummary) -> None:
        self.say("")
        self._rich.print(Text("Values", style="italic"))
        most = max(summary.histogram_counts)
        block, sliver = ("█", "▏") if self._rich.encoding.startswith("utf") else ("#", "|")
        edges = summary.histogram_edges
        last = len(summary.histogram_counts) - 1
        for number, count in enumerate(summary.histogram_counts):
            low = "below" if number == 0 else f"{edges[number]:.2e}"
            high = "or more" if number == last else f"{edges[number + 1]:.2e}"
            bar = block * round(HISTOGRAM_WIDTH * count / most) or (sliver if count else "")
            self.say(f"{low:>10} {high:>10} {count:>9,} {bar}")

    def _samples(self, title: str, lines: Sequence[SampleLine]) -> None:
        self._table(
            title,
            {"value": "right", "label": "left", "predicted": "left", "id": "left"},
            [(f"{line.value:.3e}", line.label_name, line.predicted_name, line.id) for line in lines],
        )

    def _table(
        self, title: str, headings: dict[str, Side], rows: Sequence[tuple[str, ...]], last: str = ""
    ) -> None:
        """Print an empty line, then numbers (right) and names (left).

        Numbers are printed whole. Names lose their middle where a terminal is too narrow for them; in a file
        they have all the room that they need.

        Args:
            title: stands above the table.
            headings: of the columns, each with its side.
            rows: one text per column.
            last: a line below them.
        """
        columns = [[heading, *texts] for heading, *texts in zip(headings, *rows, strict=True)]
        columns = [[printable(text) for text in column] for column in columns]
        widths = [max(map(cell_len, column)) for column in columns]
        if self._rich.is_terminal:
            names = [number for number, side in enumerate(headings.values()) if side == "left"]
            room = self._rich.width - len(GAP) * (len(widths) - 1)
            room -= sum(width for number, width in enumerate(widths) if number not in names)
            for number, width in zip(names, share_room([widths[n] for n in names], room), strict=True):
                widths[number] = width
        self.say("")
        self._rich.print(Text(title, style="italic"))
        for number, row in enumerate(zip(*columns, strict=True)):
            cells = [
                " " * (width - cell_len(text)) + text if side == "right" else fit(text, width)
                for text, width, side in zip(row, widths, headings.values(), strict=True)
            ]
            self._rich.print(Text(GAP.join(cells).rstrip(), style="" if number else "bold"))
        if last:
            self._rich.print(Text(last, style="dim"))


def share_room(widths: Sequence[int], room: int) -> list[int]:
    """Return widths that fit: what is wider than the others gives way first, down to the narrowest name."""
    shared = list(widths)
    while sum(shared) > max(room, NARROWEST_NAME * len(shared)):
        widest = max(range(len(shared)), key=shared.__getitem__)
        shared[widest] -= 1
    return shared


def fit(text: str, width: int) -> str:
    """Return a name in so many cells; one that is too long keeps its beginning and, more of it, its end."""
    if cell_len(text) > width:
        head, tail = text[: (width - 1) // 3], text
        while cell_len(head) + 1 + cell_len(tail) > width:
            tail = tail[1:]
        text = f"{head}…{tail}"
    return text + " " * (width - cell_len(text))


def printable(text: str) -> str:
    """Escape what a terminal would act upon; names of files and classes are data from strangers."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)

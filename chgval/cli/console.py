"""All printing for people. It goes to standard error; standard output belongs to the report."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TextIO, cast

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from chgval.config import SHOWN_SAMPLES
from chgval.progress import by_tenths, tell_record
from chgval.training.records import Record, StepRecord

Side = Literal["left", "right"]

# A terminal shows more of a training the wider it is.
WIDTH_FOR_STATE, WIDTH_FOR_BAR = 72, 90
LINE_WIDTH = 80
# Of a value beside its name, on however narrow a terminal.
LEAST_ROOM = 20
NARROWEST_NAME = 8
GAP = "  "


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
        shown: rows of each list of samples.
        as_json: whether results also go to standard output, as JSON.
    """

    def __init__(
        self,
        command: str = "chgval",
        *,
        quiet: bool = False,
        verbose: bool = False,
        shown: int = SHOWN_SAMPLES,
        as_json: bool = False,
    ) -> None:
        # As a text stream it has what rich asks for; rich itself would end the run with the terminal.
        stream = cast(TextIO, _Unfailing(sys.stderr))
        self._console = RichConsole(file=stream, highlight=False, soft_wrap=True)
        self._loading: Status | None = None
        self.command = command
        self._started = time.perf_counter()
        self.is_quiet = quiet
        self._verbose = verbose and not quiet
        self.shown = shown
        self.as_json = as_json

    @property
    def _rich(self) -> RichConsole:
        """What prints; what turns while nothing is printed ends with the first use."""
        self._stop_loading()
        return self._console

    def _stop_loading(self) -> None:
        if self._loading is not None:
            self._loading.stop()
            self._loading = None

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Show that something happens until the first line: loading PyTorch takes seconds."""
        if self._console.is_terminal and not self.is_quiet:
            self._loading = self._console.status("loading PyTorch")
            self._loading.start()
        elif "torch" not in sys.modules:
            self.say("loading PyTorch")
        try:
            yield
        finally:
            self._stop_loading()

    @property
    def seconds(self) -> float:
        """Time since the command began."""
        return time.perf_counter() - self._started

    @property
    def line_width(self) -> int:
        """How wide lines of prose are: as the terminal, but no wider than is good to read."""
        return min(LINE_WIDTH, self._console.width) if self._console.is_terminal else LINE_WIDTH

    @property
    def encoding(self) -> str:
        """Of the stream."""
        return self._console.encoding

    def print(self, text: Text) -> None:
        """Print text that has a style."""
        self._rich.print(text)

    def _print(self, text: Text) -> None:
        """Print a line: wrapped at spaces on a terminal, whole elsewhere."""
        self._rich.print(text, soft_wrap=not self._rich.is_terminal)

    def say(self, text: str) -> None:
        """Print one line."""
        if not self.is_quiet:
            self._print(Text(printable(text)))

    def say_next(self, command: str) -> None:
        """Print a command to run, in one piece whatever the width: it is to be copied."""
        if not self.is_quiet:
            self._rich.print(Text.assemble(("next: ", "bold"), printable(command)))

    def hand_over(self, result: Mapping[str, object]) -> None:
        """Print a result as JSON on standard output, if that was asked for."""
        if self.as_json:
            self._stop_loading()
            sys.stdout.write(json.dumps(result, ensure_ascii=False, default=_plain, indent=1) + "\n")

    def detail(self, text: str) -> None:
        """Print one line that only --verbose shows."""
        if self._verbose:
            self._print(Text(printable(text), style="dim"))

    def warn(self, text: str) -> None:
        """Print one line about something that the user should look at."""
        if not self.is_quiet:
            self._print(Text.assemble(("warning: ", "yellow"), printable(text)))

    def fail(self, text: str) -> None:
        """Print why the command could not do what it was asked."""
        self._print(Text.assemble(("error: ", "bold red"), printable(text)))

    def settings(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Print names and values in two columns."""
        if not self.is_quiet:
            width = max(len(name) for name, _ in pairs)
            for name, value in pairs:
                lines = [printable(value)]
                if self._rich.is_terminal:
                    room = max(LEAST_ROOM, self._rich.width - width - 2)
                    lines = textwrap.wrap(lines[0], room, break_long_words=False, break_on_hyphens=False)
                for number, line in enumerate(lines):
                    shown = "" if number else name
                    self._print(Text.assemble((f"{shown:<{width}}  ", "bold"), line))

    @contextmanager
    def following(self, total_steps: int) -> Iterator[Callable[[Record], None]]:
        """Show records of a run as they come: a bar on a terminal, else a line per epoch."""
        if self.is_quiet or not self._rich.is_terminal:
            yield lambda record: tell_record(self, record)
            return
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        ]
        if self._rich.width >= WIDTH_FOR_STATE:
            columns.append(TextColumn("{task.fields[state]}"))
        if self._rich.width >= WIDTH_FOR_BAR:
            columns.insert(1, BarColumn(bar_width=None))
        with Progress(*columns, console=self._rich, transient=True) as progress:
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

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show how many are done: a bar on a terminal, else a line for every tenth."""
        if self.is_quiet or not self._rich.is_terminal:
            yield by_tenths(self, what, total)
            return
        columns: list[ProgressColumn] = [
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.description}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        ]
        if self._rich.width >= WIDTH_FOR_BAR:
            columns.insert(1, BarColumn(bar_width=None))
        with Progress(*columns, console=self._rich, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.update(task, completed=done)

    def table(
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


def _plain(value: object) -> object:
    """Return a number of NumPy, or a path, as JSON can have it."""
    if isinstance(value, Path):
        return str(value)
    item = getattr(value, "item", None)
    if item is None:
        raise TypeError(f"{type(value).__name__} is no value of a result")
    return item()


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

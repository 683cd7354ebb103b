"""What a run says on its way: to the listener of this context, by default to Python's logging.

The command line listens with its console (`listening`); a Python caller is not printed at, unless the logger
"chgval" is given a handler.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol

from chgval.training.records import EpochRecord, Evaluation, PlainRecord, Record, SplitRecord, StepRecord

_logger = logging.getLogger("chgval")
_logger.addHandler(logging.NullHandler())


class Listener(Protocol):
    """Whom a run talks to."""

    @property
    def command(self) -> str:
        """What started the run, as its report names it."""
        ...

    def say(self, text: str) -> None:
        """Take one line."""
        ...

    def detail(self, text: str) -> None:
        """Take one line that few want to see."""
        ...

    def warn(self, text: str) -> None:
        """Take one line about something that the user should look at."""
        ...

    def settings(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Take names and values."""
        ...

    def following(self, total_steps: int) -> AbstractContextManager[Callable[[Record], None]]:
        """Return what takes the records of a training of so many steps as they come."""
        ...

    def counting(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Return what takes how many of all are done."""
        ...


class Log:
    """Listens by logging."""

    command = "Python"

    def say(self, text: str) -> None:
        """Log one line."""
        _logger.info("%s", text)

    def detail(self, text: str) -> None:
        """Log one line for debugging."""
        _logger.debug("%s", text)

    def warn(self, text: str) -> None:
        """Log one line as a warning."""
        _logger.warning("%s", text)

    def settings(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Log names and values."""
        for name, value in pairs:
            self.say(f"{name}: {value}")

    @contextmanager
    def following(self, total_steps: int) -> Iterator[Callable[[Record], None]]:  # noqa: ARG002
        """Log a line per epoch, and one for debugging every few steps."""
        yield lambda record: tell_record(self, record)

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Log a line for every tenth."""
        yield by_tenths(self, what, total)


def by_tenths(listener: Listener, what: str, total: int) -> Callable[[int], None]:
    """Return what takes how many of all are done, and says a line for every tenth."""
    said = 0

    def tell(done: int) -> None:
        nonlocal said
        if 10 * done // max(1, total) > said:
            said = 10 * done // max(1, total)
            listener.say(f"{done:,} of {total:,} {what}")

    return tell


_listener: ContextVar[Listener] = ContextVar("chgval_listener", default=Log())  # noqa: B039 (has no state)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let runs in the block talk to this listener."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def command() -> str:
    """Return what started the run, as its report names it."""
    return _listener.get().command


def say(text: str) -> None:
    """Say one line."""
    _listener.get().say(text)


def detail(text: str) -> None:
    """Say one line that few want to see."""
    _listener.get().detail(text)


def warn(text: str) -> None:
    """Say one line about something that the user should look at."""
    _listener.get().warn(text)


def settings(pairs: Sequence[tuple[str, str]]) -> None:
    """Say names and values."""
    _listener.get().settings(pairs)


def following(total_steps: int) -> AbstractContextManager[Callable[[Record], None]]:
    """Return what takes the records of a training of so many steps as they come."""
    return _listener.get().following(total_steps)


def counting(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Return what takes how many of all are done."""
    return _listener.get().counting(what, total)


def tell_record(listener: Listener, record: Record) -> None:
    """Say one line about a record."""
    match record:
        case EpochRecord():
            listener.say(epoch_line(record))
        case StepRecord():
            listener.detail(step_line(record))
        case SplitRecord():
            listener.warn(split_line(record))
        case PlainRecord():
            listener.say(plain_line(record))


def epoch_line(record: EpochRecord) -> str:
    """Return one aligned line about an epoch."""
    width = len(str(record.num_epochs))
    return (
        f"epoch {record.epoch:>{width}}/{record.num_epochs}  loss {record.loss:7.4f}  "
        f"accuracy {record.accuracy:6.1%}  {record.speed:>9,.0f} samples/s  "
        f"{record.seconds:6.1f} s"
    )


def evaluation_line(evaluation: Evaluation) -> str:
    """Return one line about a test."""
    return (
        f"  test  loss {evaluation.loss:7.4f}  accuracy {evaluation.accuracy:6.1%}  calibration error "
        f"{evaluation.calibration_error:.3f}"
    )


def step_line(record: StepRecord) -> str:
    """Return one line about the steps so far."""
    return (
        f"  step {record.step}/{record.num_steps}  loss {record.loss:.4f}  accuracy {record.accuracy:.1%}  "
        f"{record.speed:,.0f} samples/s"
    )


def split_line(record: SplitRecord) -> str:
    """Return one line about batches that do not fit in memory."""
    return (
        f"out of device memory: batches of {record.batch_size:,} are computed in {record.num_parts} parts "
        "from now on; their gradients are added up"
    )


def plain_line(record: PlainRecord) -> str:
    """Return one line about steps that are not CUDA graphs."""
    return f"note: steps are made plainly, as they cannot be captured as CUDA graphs ({record.reason})"

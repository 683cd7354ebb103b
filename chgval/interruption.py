"""Signals that ask a command to end: raised as Interrupted, or deferred until a run has kept its state."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from chgval.system import END_SIGNALS, blocked_signals, ignore_warnings, kept_child_handler, send_again

# Seconds until a signal is sent again that was raised where Python drops exceptions.
SENT_AGAIN_AFTER = 0.01
# Seconds between the looks of a worker whether its parent is still there.
SECONDS_BETWEEN_LOOKS = 1


class Interrupted(BaseException):
    """A signal asked the command to end.

    Like KeyboardInterrupt it is no Exception, so that nothing takes it for a failure of its own.

    Args:
        signum: the signal.
        message: what became of the work so far, for the user.
    """

    def __init__(self, signum: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.signum = signum


class Interruption:
    """Whether a signal has come."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def has_come(self) -> bool:
        """Say whether a signal has come that was deferred."""
        return self.signum is not None


# Signals are the process's: what defers them now, if anything does.
_deferring: list[Interruption] = []


def end_at_signals() -> None:
    """Let a signal that comes while no command runs end the process: at once, without a traceback.

    Such as while Python starts or ends. The exit code is that of an interrupted command.
    """
    for signum in END_SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _end)


@contextmanager
def raising_interruptions() -> Iterator[None]:
    """Raise Interrupted, wherever the program is, when a signal comes."""
    with _handling(_stop), _sending_dropped_signals_again():
        yield


@contextmanager
def deferred_signals() -> Iterator[Interruption]:
    """Note the first signal and raise it when the block has ended by itself; raise a second one at once."""
    interruption = Interruption()

    def note(signum: int, _: FrameType | None) -> None:
        if interruption.has_come():
            raise Interrupted(signum)
        interruption.signum = signum

    _deferring.append(interruption)
    try:
        with _handling(note):
            yield interruption
    finally:
        _deferring.remove(interruption)
    if interruption.signum is not None:
        raise Interrupted(interruption.signum)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted in the block even where signals are deferred: what it does can be done again."""
    if not _deferring:
        yield
        return
    with _handling(_stop):
        if _deferring[-1].signum is not None:
            raise Interrupted(_deferring[-1].signum)
        yield


@contextmanager
def starting_workers() -> Iterator[None]:
    """Start child processes in the block, which no signal ends, not even before they can ignore it.

    Signals to this process wait for the end of the block: it would lose sight of a child that is only half
    started. What happens when a child ends is kept, too: torch would raise that in whatever is being done.
    """
    came: list[int] = []
    try:
        # Children inherit what is blocked. Other threads of this process still take signals.
        with _handling(lambda signum, _: came.append(signum)), blocked_signals(), kept_child_handler():
            yield
    finally:
        for signum in came:
            signal.raise_signal(signum)


def end_with_parent(_: int) -> None:
    """Make a new process a worker: its parent says what signals mean, and it ends with its parent.

    Called as `worker_init_fn`, too.
    """
    # What the parent left behind is not freed here: graphs on a GPU, which a forked process must not touch.
    gc.freeze()
    for signum in END_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    ignore_warnings()  # a process that was started anew does not inherit what is ignored
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    """End this process once its parent is gone, even while it sends what no one takes any more."""
    from multiprocessing import parent_process  # only in workers: it would slow the start of every command

    parent = parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _stop(signum: int, _: FrameType | None) -> None:
    raise Interrupted(signum)


def _end(signum: int, _: FrameType | None) -> None:
    os._exit(128 + signum)


@contextmanager
def _sending_dropped_signals_again() -> Iterator[None]:
    """Send a signal again where Python drops what it raised, as in a finalizer that happened to run."""
    previous = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if isinstance(error, Interrupted):
            threading.Timer(SENT_AGAIN_AFTER, send_again, [error.signum]).start()
        else:
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals that are not ignored, as `nohup` has it, until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what signals do
        return
    previous = {
        signum: signal.signal(signum, handler)
        for signum in END_SIGNALS
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handled in previous.items():
            signal.signal(signum, handled)

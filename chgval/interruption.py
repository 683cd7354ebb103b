"""Signals that ask a command to end: raised as Interrupted, or held back until a run has kept its state."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# Ctrl-C, what a scheduler sends before it kills, and a terminal that closes.
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
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
        """Say whether a signal has come that was held back."""
        return self.signum is not None


# Signals are the process's: what holds them back now, if anything does.
_held: list[Interruption] = []


def end_at_signals() -> None:
    """Let a signal that comes while no command runs end the process: at once, without a traceback.

    Such as while Python starts or ends. The exit code is that of an interrupted command.
    """
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _end)


@contextmanager
def raising_interruptions() -> Iterator[None]:
    """Raise Interrupted, wherever the program is, when a signal comes."""
    with _handling(_stop), _sending_dropped_signals_again():
        yield


@contextmanager
def holding_back() -> Iterator[Interruption]:
    """Note the first signal and raise it when the block has ended by itself; raise a second one at once."""
    interruption = Interruption()

    def note(signum: int, _: FrameType | None) -> None:
        if interruption.has_come():
            raise Interrupted(signum)
        interruption.signum = signum

    _held.append(interruption)
    try:
        with _handling(note):
            yield interruption
    finally:
        _held.remove(interruption)
    if interruption.signum is not None:
        raise Interrupted(interruption.signum)


@contextmanager
def at_once() -> Iterator[None]:
    """Raise Interrupted in the block even where signals are held back: what it does can be done again."""
    if not _held:
        yield
        return
    with _handling(_stop):
        if _held[-1].signum is not None:
            raise Interrupted(_held[-1].signum)
        yield


@contextmanager
def telling_how_to_go_on(state_file: Path | None, command: str, *, resumes: bool) -> Iterator[None]:
    """Say in the message of an interruption what is kept, and how to go on."""
    # What is there before anything was kept is of an earlier run, unless that is gone on with.
    before = None if resumes else _changed_at(state_file)
    try:
        yield
    except Interrupted as interruption:
        if state_file is None or _changed_at(state_file) in (None, before):
            raise
        words = shlex.split(command)
        if "--resume" not in words:
            words.insert(2, "--resume")  # after the command's name: what follows may end in -- and arguments
        command = shlex.join(words)
        message = f"interrupted; what was done so far is kept in {state_file}; go on with: {command}"
        raise Interrupted(interruption.signum, message) from interruption


def _changed_at(path: Path | None) -> int | None:
    """Return when a file was written, in nanoseconds; None where there is none."""
    try:
        return None if path is None else path.stat().st_mtime_ns
    except OSError:
        return None


@contextmanager
def starting_workers() -> Iterator[None]:
    """Start child processes in the block, which no signal ends, not even before they can ignore it.

    Signals to this process wait for the end of the block: it would lose sight of a child that is only half
    started. What happens when a child ends is kept, too: torch would raise that in whatever is being done.
    """
    came: list[int] = []
    try:
        with _handling(lambda signum, _: came.append(signum)):
            # Children inherit what is blocked. Other threads of this process still take signals.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            handled = signal.getsignal(signal.SIGCHLD)
            try:
                yield
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGCHLD, handled)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    finally:
        for signum in came:
            signal.raise_signal(signum)


def obey_parent(_: int) -> None:
    """Leave it to the parent what a signal to all means, and end with the parent (as `worker_init_fn`)."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
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
            main_thread = threading.main_thread().ident
            threading.Timer(SENT_AGAIN_AFTER, signal.pthread_kill, [main_thread, error.signum]).start()
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
        for signum in SIGNALS
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handled in previous.items():
            signal.signal(signum, handled)

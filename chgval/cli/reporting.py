"""How a command ends: errors that a user can cause become one line and an exit code."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from chgval.errors import ChgvalError, SettingsError, first_line
from chgval.interruption import Interrupted, raising_interruptions
from chgval.system import ignore_warnings

if TYPE_CHECKING:
    from chgval.cli.console import Console

EXIT_FAILED, EXIT_USAGE, EXIT_TOO_NOISY = 1, 2, 3


@contextmanager
def reporting(*, quiet: bool, verbose: bool, debug: bool, shown: int, as_json: bool) -> "Iterator[Console]":
    """Print what runs in the block say, and how they fail.

    Args:
        quiet: whether to print errors only.
        verbose: whether to print details too.
        shown: rows of each list of samples.
        as_json: whether results also go to standard output, as JSON.
        debug: whether to show tracebacks of errors.
    """
    from chgval.cli.console import Console  # imported here so that --help stays fast
    from chgval.progress import listening

    ignore_warnings()
    command = shlex.join(["chgval", *sys.argv[1:]])
    console = Console(command, quiet=quiet, verbose=verbose, shown=shown, as_json=as_json)
    try:
        with raising_interruptions(), listening(console):
            yield console
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

    They obey no signal that can be ignored, and Python would wait for them before it ends.
    """
    processes = sys.modules.get("multiprocessing")
    for child in [] if processes is None else processes.active_children():
        child.kill()


def _is_out_of_memory(error: Exception) -> bool:
    """Say whether an error of torch, which for the host's memory has no class of its own, is about memory."""
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, MemoryError) or on_device or "DefaultCPUAllocator" in str(error)

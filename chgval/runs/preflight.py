"""What can be told at once: before torch, which takes seconds to load, and before any data are read."""

from __future__ import annotations

import glob
from pathlib import Path

from chgval.config import ApplyConfig, CommandConfig, FromValues
from chgval.errors import DataError
from chgval.files import check_file, output_errors


def check_at_once(config: CommandConfig, *, writes: bool = True) -> None:
    """Raise what is wrong with paths, as the run would, which looks again.

    Args:
        config: settings of a command.
        writes: whether it writes anything.
    Raises:
        DataError: what it reads is not there.
        OutputError: an output is in the way, or has no folder.
    """
    for source in config.inputs:
        advice = ""
        if isinstance(config, ApplyConfig) and source == config.source:
            advice = " The page that chgval report writes offers it as a download."
        _check_there(source, advice)
    if not writes or config.overwrites or config.resumes:
        return
    read = config.values if isinstance(config, FromValues) and config.reads_values else None
    for path in config.outputs:
        if path == read:
            continue
        with output_errors(path):
            state = config.state_file
            is_unfinished = state is not None and state.exists()
            is_in_the_way = path.is_file() or not path.parent.is_dir()
        is_input = str(path) in config.inputs
        if is_in_the_way and not is_unfinished and not is_input:  # the run says better what is wrong
            check_file(path, overwrite=False)


def _check_there(source: str, advice: str) -> None:
    is_path = source not in ("", "-") and "://" not in source and not source.startswith("builtin:")
    if is_path and not glob.has_magic(source):
        try:
            Path(source).stat()
        except FileNotFoundError as error:
            raise DataError(f"{source}: no such file or folder.{advice}") from error
        except OSError as error:
            raise DataError(f"{source}: cannot be opened ({error.strerror}).") from error
        except ValueError:
            pass  # the run says it, once it has tried

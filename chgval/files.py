"""Outputs that are there whole or not at all."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from chgval.errors import OutputError

# Key of the schema metadata that a report carries, and by which a report among data is known.
METADATA_KEY = b"chgval"
# What files end in that hold the state of unfinished runs.
STATE_ENDING = ".checkpoint"
# What files of features or probabilities end in.
ARRAY_ENDING = ".npy"
# What folders end in that hold the values of each epoch.
EPOCHS_ENDING = ".epochs"
# What is in the folder of a training from its start, and holds its state while it is unfinished.
TRAINING_FILE, TRAINING_STATE_FILE = "training.json", f"training{STATE_ENDING}"
# Metrics of its epochs.
METRICS_FILE = "metrics.parquet"


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError where a file or folder is in the way, or would have no folder to lie in."""
    with output_errors(path):
        if not path.name:
            raise OutputError(f"'{path}': is no name of its own; name a file or folder.")
        if (path.exists() or path.is_symlink()) and not overwrite:
            raise OutputError(f"{path}: exists already; pass --overwrite, or another name.")
        if not path.parent.is_dir():
            raise OutputError(f"{path}: there is no folder {path.parent}; create it first.")


def as_text(name: str) -> str:
    """Return a name that every format can hold: bytes that are no UTF-8 are written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError where a file cannot be written, or something is in the way; leave all as it is."""
    with output_errors(path):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; pass the name of a file.")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path}: is no regular file; pass another name.")
    check_free(path, overwrite=overwrite)
    check_writable(path)


def check_new_folder(path: Path) -> None:
    """Raise OutputError where a folder cannot be made, or holds something already: none is ever replaced."""
    check_free(path, overwrite=True)
    with output_errors(path):
        if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            raise OutputError(f"{path}: exists already, and folders are never replaced; pass another name.")
        check_writable(path)


def check_writable(path: Path) -> None:
    """Raise OutputError where no file can be made beside the path."""
    with output_errors(path), tempfile.TemporaryFile(dir=path.parent):
        pass


def check_apart(path: Path, others: Iterable[Path]) -> None:
    """Raise OutputError where a new file or folder would replace others, or hold them."""
    for other in others:
        if other.resolve().is_relative_to(path.resolve()):
            raise OutputError(f"{path}: {other} is or goes there; pass another name.")


@contextmanager
def locked(*outputs: Path | None) -> Iterator[None]:
    """Hold outputs for this process, so that no other run of chgval writes them meanwhile; None is no output.

    The locks are files beside them, gone with the last of their holders; one that a killed run left behind
    holds nothing.

    Raises:
        OutputError: another run holds one of them, or two are the same.
    """
    from filelock import FileLock, Timeout  # as long as all else that --help imports

    paths = [path for path in outputs if path is not None]
    places = [Path(os.path.realpath(path.parent), path.name) for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise OutputError(f"{path}: is named as two outputs; give each a name of its own.")
    with ExitStack() as held:
        for path in paths:
            if not (path.name and path.parent.is_dir()):
                continue  # nothing can be written there, as will be told
            lock = lock_of(path)
            with output_errors(path):
                try:
                    held.enter_context(FileLock(lock, timeout=0))
                except Timeout as error:
                    raise OutputError(
                        f"{path}: another run is writing it; wait for its end, or pass another name."
                    ) from error
            held.callback(_unlink_if_possible, lock)
        yield


def _unlink_if_possible(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its name only when it was written whole and lies on the disk."""
    with replacing_by_name(path) as part, part.open("wb") as file:
        yield file


@contextmanager
def replacing_by_name(path: Path) -> Iterator[Path]:
    """Name a file to write, which takes the path's name when it was written whole and lies on the disk."""
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)  # it may have vanished since the run began
    try:
        yield part
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder that takes its name, which is free or an empty folder's, only when it is complete.

    A folder that holds the same already is left as it is. Whoever fills the new one forces the files in it to
    the disk, if that is worth the time.

    Raises:
        OutputError: a folder that holds something else has got the name.
    """
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if part.exists():  # left over by a process that was killed
            shutil.rmtree(part)
        part.mkdir()
        yield part
        if path.is_dir() and any(path.iterdir()):
            if not _hold_the_same(filecmp.dircmp(part, path, ignore=[], hide=[])):
                raise OutputError(f"{path}: holds something else by now; pass another name, or take it away.")
            return
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _hold_the_same(folders: filecmp.dircmp[str]) -> bool:
    differences = (folders.left_only, folders.right_only, folders.diff_files, folders.funny_files)
    return not (any(differences) or folders.common_funny) and all(
        map(_hold_the_same, folders.subdirs.values())
    )


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into OutputError; a reader that has gone is none."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written ({reason}); pass another name.") from error


def sync(path: Path) -> None:
    """Have what a file, or a folder as a list of names, holds lie on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, such as those of other machines, take care of folders themselves.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def lock_of(path: Path) -> Path:
    """Return the file that is locked while a run writes the path."""
    return path.with_name(f".{path.name}.lock")


def part_of(path: Path) -> Path:
    """Return the name of an output until it is complete."""
    # Always the same: one run at a time writes there, and what a killed one left is replaced.
    return path.with_name(f".{path.name}.part")

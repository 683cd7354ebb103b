"""What a path, or a glob, names on this machine."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote


def local_path(source: str) -> str | None:
    """Return a path or glob as it is, that of a URI of this machine, and None for other machines."""
    if source.startswith("file://"):
        return unquote(source.removeprefix("file://").removeprefix("localhost"))
    return None if "://" in source else source


def is_folder(source: str) -> bool:
    """Say whether a source is a folder, whatever is odd about its name."""
    return bool(source) and os.path.isdir(source)  # noqa: PTH112 (Path raises for odd names)


def matching(pattern: str) -> list[str]:
    """Return the file of that name, or those that a glob matches, sorted."""
    if Path(pattern).is_file():
        return [pattern]
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 (the pattern may be absolute)
    return sorted(file for file in found if Path(file).is_file())


def before_magic(pattern: str) -> str:
    """Return the folder that a glob starts from."""
    folder, slash, _ = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")
    return folder or slash or "."


def is_part_of(source: str, target: Path, files: Iterable[Path]) -> bool:
    """Say whether a local file or folder is, or would be, among the files that the user named.

    Args:
        source: what the user named.
        target: the file or folder.
        files: that the source consists of.
    """
    path = local_path(source)
    if path is None:
        return False
    if Path(path).exists():
        return target.resolve().is_relative_to(Path(path).resolve())
    pattern, new = str(Path(path).absolute()), (target.absolute(), target.absolute() / "train.parquet")
    matches = (fnmatch.fnmatch(str(f), pattern) if "**" in pattern else f.match(pattern) for f in new)
    return target.resolve() in set(files) or any(matches)

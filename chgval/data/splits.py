"""Which split of a dataset a folder or a file is of, as its name says."""

from __future__ import annotations

import re
from collections.abc import Mapping

SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {word: split for split, words in SPELLINGS.items() for word in words}
# A word in a file name stands between these: train-00000-of-00002.parquet, my_train.parquet.
_DELIMITERS = re.compile(r"[-._ =]+")


def split_of(name: str) -> str | None:
    """Return the split that a folder's name is a spelling of, in any case, with or without a year."""
    return _SPLITS.get(name.lower().rstrip("0123456789"))


def split_in(path: str) -> str | None:
    """Return the split that a word in a path names: of its last part that does, the training one first."""
    for part in reversed(path.replace("\\", "/").split("/")):
        found = {split_of(word) for word in _DELIMITERS.split(part)}
        for split in SPELLINGS:
            if split in found:
                return split
    return None


def named(wanted: str, names: Mapping[str, str]) -> list[str]:
    """Return what is of the wanted split: whose name has that very word, else any spelling of it.

    Args:
        wanted: the split.
        names: of folders, or paths of files, by what is returned of them.
    """
    whole = [key for key, name in names.items() if name.lower() == wanted.lower()]
    if whole:
        return whole
    edge = r"(^|$|[-._ =])"
    very = re.compile(f"{edge}{re.escape(wanted.lower())}{edge}")

    def says(path: str) -> bool:
        for part in reversed(path.lower().replace("\\", "/").split("/")):
            if very.search(part):
                return True
            if split_in(part) is not None:
                return False
        return False

    exact = [key for key, name in names.items() if says(name)]
    split = split_of(wanted)
    return exact or [key for key, name in names.items() if split is not None and split_in(name) == split]

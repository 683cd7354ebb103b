"""Which split of a dataset a folder or a file is of, as its name says."""

from __future__ import annotations

import re

SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {word: split for split, words in SPELLINGS.items() for word in words}
# A word in a file name stands between these: train-00000-of-00002.parquet, my_train.parquet.
_DELIMITERS = re.compile(r"[-._ /\\]+")


def split_of(name: str) -> str | None:
    """Return the split that a folder's name is a spelling of, in any case; None if it is none."""
    return _SPLITS.get(name.lower())


def split_in(path: str) -> str | None:
    """Return the split that a word in a path names, the training one first; None if there is none."""
    words = [word.rstrip("0123456789") for word in _DELIMITERS.split(path.lower())]
    found = {_SPLITS[word] for word in words if word in _SPLITS}
    return next((split for split in SPELLINGS if split in found), None)


def is_split(name: str, wanted: str) -> bool:
    """Say whether a folder's name is the wanted split, in any spelling of it."""
    return name.lower() == wanted.lower() or (split_of(name) or name) == split_of(wanted)


def is_in_split(path: str, wanted: str) -> bool:
    """Say whether a path is of the wanted split: the one it names, or a word of it."""
    return (split_in(path) or "") == split_of(wanted) or wanted.lower() in _DELIMITERS.split(path.lower())

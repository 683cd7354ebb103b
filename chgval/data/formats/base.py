"""What a format of datasets can do, and how it is registered.

Shape legend: N input rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chgval.config import DataConfig, Link
from chgval.data.dataset import Dataset
from chgval.errors import DataError
from chgval.registry import name_of
from chgval.types import IntArray

ADVICE = "it changed since, or was another dataset. Value it anew"


@dataclass(frozen=True, slots=True)
class KnownRows:
    """What is known of a dataset from when it was read, to see whether it is still the same.

    Attributes:
        ids, labels_N: names and classes (-1: unknown) of all rows.
        fingerprint: of the dataset, if that is known.
    """

    ids: Sequence[str]
    labels_N: IntArray
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class ListedRows:
    """All rows of a dataset, without their contents.

    Attributes:
        ids, labels_N: names and classes (-1: unknown) of all rows, as in `Dataset`.
        class_names: in the order of the class indices.
        has_annotators: whether several labelled each row.
    """

    ids: Sequence[str]
    labels_N: IntArray
    class_names: Sequence[str]
    has_annotators: bool = False


@dataclass(frozen=True, slots=True)
class RowChanges:
    """What shall become of every row of a dataset.

    Attributes:
        kept_N: which rows are written.
        new_labels_N: the class that a row gets; -1 leaves it its own.
    """

    kept_N: NDArray[np.bool_]
    new_labels_N: IntArray


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What became of the rows.

    Attributes:
        num_written: rows that the new dataset has.
        vanished: classes that have no rows any more.
        unreadable: files that should have been copied, and could not be read.
        notes: what a person should know about how the dataset was read.
    """

    num_written: int
    vanished: Sequence[str]
    unreadable: Sequence[str]
    notes: Sequence[str]


class Format(ABC):
    """A dataset that a user named, in the one format that it is in.

    Args:
        config: the dataset, and how to read it.
    Attributes:
        is_fallback: whether it takes what no other format has claimed.
    """

    is_fallback = False

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @property
    def source(self) -> str:
        """What the user named."""
        return self.config.source

    @classmethod
    @abstractmethod
    def matches(cls, config: DataConfig) -> bool:
        """Say whether a source is in this format.

        Raises:
            SettingsError: it is, and an option does not fit it.
        """

    @abstractmethod
    def read(self, largest_size: int) -> Dataset:
        """Read all rows.

        Args:
            largest_size: the largest image size to choose where the user gave none.
        Raises:
            DataError: there is nothing to read, or it cannot be read.
        """

    @abstractmethod
    def listed(self) -> ListedRows:
        """Return ids and labels of all rows.

        Raises:
            DataError: there is nothing to read, or it cannot be read.
        """

    @abstractmethod
    def local_files(self) -> set[Path]:
        """Return the files of this machine that it consists of, without links: no output replaces them."""

    @abstractmethod
    def pictures(self, rows: Sequence[int]) -> Iterator[bytes | None]:
        """Yield the encoded image of each of these rows, in their order; None where there is none to read."""

    @abstractmethod
    def check_target(self, target: Path, link: Link) -> None:
        """Raise an error where the dataset could not be written anew under that name, whatever is there.

        Args:
            target: a folder, or a file.
            link: how files of a folder would get there.
        Raises:
            DataError: it has links that lead out of it.
            SettingsError: it cannot be written, or not as that.
            OutputError: the new dataset would be part of this one.
        """

    @abstractmethod
    def check_same(self, known: KnownRows) -> None:
        """Raise DataError where the rows, their ids or their labels are not those that are known of."""

    @abstractmethod
    def write(self, known: KnownRows, changes: RowChanges, target: Path, link: Link) -> Rewritten:
        """Write the dataset anew, in its form; it appears under its name only when it is complete.

        Args:
            known: what it must still be.
            changes: what becomes of its rows.
            target: as `check_target` let it pass.
            link: how files of a folder get there.
        Raises:
            DataError: it cannot be read, is another by now, or has links that lead out of it.
            OutputError: it cannot be written.
        """


# What files end in that a whole dataset can be written to.
FILE_ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")


def is_one_file(target: Path) -> bool:
    """Say whether a dataset is to be written as one file, not as a folder."""
    return target.suffix.lower() in FILE_ENDINGS


REGISTRY: dict[str, type[Format]] = {}


def dataset_format(cls: type[Format]) -> type[Format]:
    """Register a class as the format that is called as its file."""
    REGISTRY[name_of(cls)] = cls
    return cls


def check_rows(source: str, known: KnownRows, ids: Sequence[str] | None, labels_N: IntArray) -> None:
    """Raise DataError where rows are not those that are known of; ids are None if rows have none."""
    if len(labels_N) != len(known.labels_N):
        raise DataError(
            f"{source}: has {len(labels_N):,} rows where the report has {len(known.labels_N):,}; {ADVICE}."
        )
    differs_N = labels_N != known.labels_N
    if ids is not None:
        differs_N |= np.array(ids, dtype=object) != np.array(known.ids, dtype=object)
    if differs_N.any():
        row = int(differs_N.argmax())
        raise DataError(
            f"{source}: row {row:,} ({ids[row] if ids else 'without id'}, class {labels_N[row]}) is not that "
            f"of the report ({known.ids[row]}, class {known.labels_N[row]}); {ADVICE}."
        )


def check_fingerprint(source: str, known: KnownRows, found: str) -> None:
    """Raise DataError where the contents or class names of a dataset are not those that are known of."""
    if known.fingerprint is not None and found != known.fingerprint:
        raise DataError(f"{source}: its contents or class names are not those of the report; {ADVICE}.")


def check_classes(source: str, changes: RowChanges, class_names: Sequence[str]) -> None:
    """Raise DataError where rows shall get a class that the dataset does not have."""
    largest = int(changes.new_labels_N.max(initial=-1))
    if largest >= len(class_names):
        raise DataError(
            f"{source}: the report suggests class {largest:,} where there are {len(class_names):,}; value it "
            "anew."
        )


def rewritten(
    known: KnownRows,
    changes: RowChanges,
    written_N: NDArray[np.bool_],
    class_names: Sequence[str],
    notes: Sequence[str],
    unreadable: Sequence[str],
) -> Rewritten:
    """Return what became of the rows, for `Format.write`."""
    labels_N = np.where(changes.new_labels_N >= 0, changes.new_labels_N, known.labels_N)
    before, after = np.unique(known.labels_N), labels_N[written_N]
    vanished = [class_names[label] for label in np.setdiff1d(before, after) if label >= 0]
    return Rewritten(int(written_N.sum()), vanished, unreadable, notes)

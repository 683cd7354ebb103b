"""What all formats that are tables share: a row per sample, with columns of images, labels and ids."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from chgval.config import Link
from chgval.data.dataset import Dataset
from chgval.data.formats.base import (
    Format,
    KnownRows,
    ListedRows,
    Rewritten,
    RowChanges,
    check_rows,
    is_one_file,
)
from chgval.data.sources import is_part_of
from chgval.data.tables.read import TableRows, open_rows, pictures_of, read_rows, row_ids
from chgval.data.tables.shards import Shards
from chgval.data.tables.write import write_parquet
from chgval.errors import OutputError, SettingsError


class TableFormat(Format):
    """A table. It is written anew as Parquet, with its images in it, unless its format can do better.

    Attributes:
        written_as: what a person is told of that; nothing for Parquet itself.
    """

    written_as = ""

    @abstractmethod
    def open(self) -> tuple[Shards, list[str]]:
        """Find the files and their columns, and say what a person should know of them.

        Raises:
            DataError: there are none, or one cannot be read.
        """

    @abstractmethod
    def files(self) -> list[str]:
        """Return the files of the table that are on this machine."""

    def rows(self) -> TableRows:
        """Read the labels and ids of all rows, without their contents.

        Raises:
            DataError: there are none, or a column is missing or of the wrong type.
        """
        shards, notes = self.open()
        return open_rows(self.source, shards, notes, self.config)

    def read(self, largest_size: int) -> Dataset:
        """Read all rows, with their images or embeddings."""
        return read_rows(self.rows(), self.config, largest_size)

    def listed(self) -> ListedRows:
        """Return all rows."""
        rows = self.rows()
        ids = row_ids(rows, self.config)
        labelled = rows.labelled(ids)
        several = labelled.annotations is not None
        return ListedRows(ids, labelled.labels_N, labelled.class_names, has_annotators=several)

    def local_files(self) -> set[Path]:
        """Return the files of the table."""
        return {Path(file).resolve() for file in self.files()}

    def pictures(self, rows: Sequence[int]) -> Iterator[bytes | None]:
        """Yield what the column of images holds, or names beside its file."""
        yield from pictures_of(self.rows(), self.config, rows)

    def check_target(self, target: Path, link: Link) -> None:
        """See `Format`."""
        if is_one_file(target) and target.suffix != ".parquet":
            raise SettingsError(
                f"{target}: {self.source} is written anew as Parquet; name a folder, or a file that ends in "
                ".parquet."
            )
        if is_part_of(self.source, target, self.local_files()):
            raise OutputError(f"{target}: is part of the dataset {self.source}; pass another place.")

    def check_same(self, known: KnownRows) -> None:
        """See `Format`."""
        self.same_rows(known)

    def same_rows(self, known: KnownRows) -> TableRows:
        """Return the rows, if they are those that are known of; else raise DataError."""
        rows = self.rows()
        labelled = rows.labelled(rows.ids or rows.row_numbers())
        check_rows(self.source, known, rows.ids, labelled.labels_N)
        return rows

    def write(self, known: KnownRows, changes: RowChanges, target: Path, link: Link) -> Rewritten:
        """See `Format`."""
        notes = [self.written_as] if self.written_as else []
        return write_parquet(self.same_rows(known), self.config, known, changes, target, notes)

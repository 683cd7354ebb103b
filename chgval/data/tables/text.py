"""Tables in text files: they are read whole, and written anew as text where that is asked for."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TextIO

import pyarrow as pa

from chgval.config import DataConfig, Link
from chgval.data.formats.base import KnownRows, Rewritten, RowChanges, check_classes, rewritten
from chgval.data.sources import before_magic, is_folder, is_part_of, matching
from chgval.data.tables.columns import original_column
from chgval.data.tables.format import TableFormat
from chgval.data.tables.read import images_of
from chgval.data.tables.shards import Shards, files_of_split, open_shards
from chgval.data.tables.write import check_contents
from chgval.errors import DataError, OutputError, SettingsError
from chgval.files import output_errors, replacing

# UTF-8, with or without the mark at the start that some programs write.
ENCODING = "utf-8-sig"
# A column that says of which split a row is; rows of all splits are read.
SPLIT_COLUMN = "split"


@dataclass(frozen=True, slots=True)
class WholeTables:
    """Reads files whole, once each; see `Reader`.

    Attributes:
        load: reads one file; raises DataError where it cannot be read.
    """

    load: Callable[[str], pa.Table]
    _tables: dict[str, pa.Table] = field(default_factory=dict)

    def columns_and_rows(self, file: str) -> tuple[pa.Schema, int]:
        """See `Reader`."""
        table = self._table(file)
        return table.schema, table.num_rows

    def batches(self, file: str, columns: list[str] | None, rows: int) -> Iterator[pa.RecordBatch]:
        """See `Reader`."""
        table = self._table(file)
        missing = [name for name in columns or () if name not in table.column_names]
        if missing:
            raise DataError(f"{file}: has no column '{missing[0]}', as other files of the dataset have.")
        yield from (table if columns is None else table.select(columns)).to_batches(rows)

    def _table(self, file: str) -> pa.Table:
        if file not in self._tables:
            self._tables[file] = self.load(file)
        return self._tables[file]


@dataclass(frozen=True, slots=True)
class NewLabels:
    """What becomes of the rows of a file of text.

    Attributes:
        kept: whether each row is written.
        classes: class of every row, -1 if it is unknown.
        new: the class that a row gets; -1 leaves it its own.
        class_names: what is written for a class that no row has.
        column: of labels.
        original: column that keeps the label that a row had; None adds none.
    """

    kept: Sequence[bool]
    classes: Sequence[int]
    new: Sequence[int]
    class_names: Sequence[str]
    column: str
    original: str | None


class TextTable(TableFormat):
    """A table of text. It is written anew as it is, to one file, or as Parquet with its images in it.

    Attributes:
        endings: of its files.
    """

    endings: ClassVar[tuple[str, ...]]

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Say whether the source is called as such files are."""
        source = config.source
        return "://" not in source and source.lower().endswith(cls.endings) and not is_folder(source)

    @classmethod
    @abstractmethod
    def load(cls, file: str) -> pa.Table:
        """Read a file.

        Raises:
            DataError: it cannot be read.
        """

    @abstractmethod
    def rewrite(self, source: str, target: TextIO, changes: NewLabels) -> None:
        """Copy the rows of a file that are kept, with their new labels."""

    def files(self) -> list[str]:
        """Return the file, or those that a glob matches."""
        return matching(self.source)

    def open(self) -> tuple[Shards, list[str]]:
        """Read the files."""
        files = self.files()
        if not files:
            raise DataError(f"{self.source}: no such file.")
        base = before_magic(self.source)
        try:
            chosen, notes = files_of_split(self.source, base, files, self.config.split)
        except DataError as error:
            raise DataError(f"{error} A column '{SPLIT_COLUMN}' is not looked at.") from error
        shards = open_shards(WholeTables(self.load), chosen, images_root=self.config.images_root)
        if SPLIT_COLUMN in shards.schema.names:
            notes = [*notes, "rows of all splits are read, whatever the column 'split' says"]
        return shards, notes

    def _has_ending_of_source(self, target: Path) -> bool:
        return target.suffix.lower() == Path(self.source).suffix.lower()

    def check_target(self, target: Path, link: Link) -> None:
        """See `Format`."""
        if not self._has_ending_of_source(target):
            super().check_target(target, link)
        elif len(self.files()) > 1:
            raise SettingsError(f"{target}: {self.source} is several files; name a folder, for Parquet.")
        elif is_part_of(self.source, target, self.local_files()):
            raise OutputError(f"{target}: is the dataset {self.source}; pass another place.")

    def write(self, known: KnownRows, changes: RowChanges, target: Path, link: Link) -> Rewritten:
        """See `Format`."""
        if not self._has_ending_of_source(target):
            return super().write(known, changes, target, link)
        rows = self.same_rows(known)
        labelled = rows.labelled(rows.ids or rows.row_numbers())
        check_classes(self.source, changes, labelled.class_names)
        label = rows.label_columns[0]
        relabels = bool((changes.new_labels_N >= 0).any())
        original = original_column(label)
        adds_original = relabels and original not in rows.shards.schema.names
        new = NewLabels(
            kept=changes.kept_N.tolist(),
            classes=labelled.labels_N.tolist(),
            new=changes.new_labels_N.tolist(),
            class_names=labelled.class_names,
            column=label,
            original=original if adds_original else None,
        )
        with output_errors(target), replacing(target) as file:
            text = io.TextIOWrapper(file, "utf-8", newline="")
            self.rewrite(rows.shards.files[0], text, new)
            text.detach()  # flushes; the file is closed by whoever opened it
            check_contents(rows, self.config, known, labelled)
        notes = list(rows.notes)
        images = images_of(rows, self.config)
        folder = rows.shards.folder_of(self.source)
        if images is not None and folder is not None and folder.resolve() != target.parent.resolve():
            notes.append(f"its files are below {folder}; read it with --images-root {folder}")
        return rewritten(known, changes, changes.kept_N, labelled.class_names, notes, [])

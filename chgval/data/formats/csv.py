"""CSV and TSV: a table of file names and labels, the form of most competitions."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from chgval.data.formats.base import dataset_format
from chgval.data.images import EXTENSIONS
from chgval.data.tables.text import NewLabels, TextTable
from chgval.errors import DataError, first_line

DELIMITERS = (",", "\t", ";", "|")
# Marks the start of text that some programs write.
ENCODING = "utf-8-sig"


@dataset_format
class Csv(TextTable):
    """Rows in lines, the first of which names the columns. Empty fields are unknown."""

    endings: ClassVar[tuple[str, ...]] = (".csv", ".tsv")

    @classmethod
    def load(cls, file: str) -> pa.Table:
        """Read a file. Numbers become numbers only where they would be written as they are."""
        try:
            names, delimiter = _header(file)
            text = pacsv.read_csv(
                file,
                parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    null_values=[""],
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                ),
            )
        except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
            raise DataError(
                f"{file}: cannot be read as CSV ({first_line(error)}); expected UTF-8, and in each line as "
                "many fields as in the first, which names the columns."
            ) from error
        return pa.table([_typed(column) for column in text.columns], text.column_names)

    def rewrite(self, source: str, target: TextIO, changes: NewLabels) -> None:
        """See `TextTable`."""
        names, delimiter = _header(source)
        writer = csv.writer(target, delimiter=delimiter, lineterminator="\n")
        label = names.index(changes.column)
        writer.writerow(names if changes.original is None else [*names, changes.original])
        for fields, kept, new in zip(_rows(source, delimiter), changes.kept, changes.labels, strict=True):
            if kept:
                more = [] if changes.original is None else [fields[label]]
                if new is not None:
                    fields[label] = str(new)
                writer.writerow([*fields, *more])


def _rows(file: str, delimiter: str) -> Iterator[list[str]]:
    with Path(file).open(encoding=ENCODING, newline="") as lines:
        rows = (fields for fields in csv.reader(lines, delimiter=delimiter) if fields)
        next(rows)
        yield from rows


def _header(file: str) -> tuple[list[str], str]:
    """Return the names of the columns, and what stands between them.

    Raises:
        DataError: the first line is a sample.
    """
    with Path(file).open(encoding=ENCODING, newline="") as lines:
        first = lines.readline()
        delimiter = max(DELIMITERS, key=first.count)
        lines.seek(0)
        names = next(csv.reader(lines, delimiter=delimiter), [])
    if not names:
        raise DataError(f"{file}: is empty; expected a first line that names the columns.")
    if any(name.lower().endswith(EXTENSIONS) for name in names):
        raise DataError(
            f"{file}: its first line names no columns, but a file ({names[0]}); put a line such as "
            f"file_name{delimiter}label before it."
        )
    return names, delimiter


def _typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return whole numbers as such if none would be written in another way, and fractions as such."""
    if column.null_count == len(column):
        return column
    try:
        numbers = column.cast(pa.int64())
        if pc.all(pc.equal(numbers.cast(pa.string()), column)).as_py():
            return numbers
        return column  # 007 is a name
    except pa.ArrowInvalid:
        pass
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        return column

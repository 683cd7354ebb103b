"""CSV and TSV: a table of file names and labels, the form of most competitions."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from chgval.data.formats.base import dataset_format
from chgval.data.images import EXTENSIONS
from chgval.data.tables.text import ENCODING, NewLabels, TextTable
from chgval.errors import DataError, first_line

DELIMITERS = (",", "\t", ";", "|")


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
        """See `TextTable`. What is not relabelled is copied letter by letter."""
        names, delimiter = _header(source)
        label = names.index(changes.column)
        records = _records(source, delimiter)
        first, _ = next(records)
        newline = "\r\n" if first.endswith("\r\n") else "\n"
        with Path(source).open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
                target.write("\ufeff")
        target.write(_extended(first, changes.original, delimiter, newline))
        stored = {row: fields[label] for row, (_, fields) in zip(changes.classes, records, strict=True)}
        records = itertools.islice(_records(source, delimiter), 1, None)
        for (text, fields), kept, new in zip(records, changes.kept, changes.new, strict=True):
            if kept:
                given = fields[label] if changes.original is not None else None
                if new >= 0:
                    fields[label] = stored.get(new, changes.class_names[new])
                    text = _as_line(fields, delimiter, newline)
                target.write(_extended(text, given, delimiter, newline))


def _records(file: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the text of each record, and its fields."""
    csv.field_size_limit(2**31 - 1)
    read: list[str] = []

    def noted(lines: TextIO) -> Iterator[str]:
        for line in lines:
            read.append(line)
            yield line

    with Path(file).open(encoding=ENCODING, newline="") as lines:
        for fields in csv.reader(noted(lines), delimiter=delimiter):
            if fields:
                yield "".join(read), fields
            read.clear()


def _as_line(fields: Sequence[str], delimiter: str, newline: str) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=newline).writerow(fields)
    return text.getvalue()


def _extended(text: str, more: str | None, delimiter: str, newline: str) -> str:
    """Return a record with one more field, if there is one."""
    bare = text.rstrip("\r\n")
    return f"{bare}{newline}" if more is None else f"{bare}{delimiter}{_as_line([more], delimiter, newline)}"


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
    # 1.10 may be a version, and digits of long numbers would be lost.
    texts = (text for text in column.to_pylist() if text is not None)
    if all(_is_plain_number(text) for text in texts):
        return column.cast(pa.float64())
    return column


def _is_plain_number(text: str) -> bool:
    try:
        return text == "nan" or (repr(float(text)) == text and "e" not in text)
    except ValueError:
        return False

"""JSON lines, and lists of objects in JSON: a table of file names and labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, TextIO

import pyarrow as pa

from chgval.data.formats.base import dataset_format
from chgval.data.tables.columns import as_column
from chgval.data.tables.text import ENCODING, NewLabels, TextTable
from chgval.errors import DataError, first_line


@dataset_format
class JsonLines(TextTable):
    """An object in each line, or a list of objects. What an object lacks is unknown."""

    endings: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".json")

    @classmethod
    def load(cls, file: str) -> pa.Table:
        """Read a file."""
        rows, _ = _objects(file)
        names = list(dict.fromkeys(name for row in rows for name in row))
        return pa.table({name: as_column(file, name, [row.get(name) for row in rows]) for name in names})

    def rewrite(self, source: str, target: TextIO, changes: NewLabels) -> None:
        """See `TextTable`."""
        rows, is_list = _objects(source)
        kept = []
        stored = {label: row.get(changes.column) for label, row in zip(changes.classes, rows, strict=True)}
        for row, is_kept, new in zip(rows, changes.kept, changes.new, strict=True):
            if is_kept:
                more = {} if changes.original is None else {changes.original: row.get(changes.column)}
                label = stored.get(new, changes.class_names[new])
                kept.append({**row, **({} if new < 0 else {changes.column: label}), **more})
        texts = (json.dumps(row, ensure_ascii=False) for row in kept)
        if is_list:
            target.write("[\n" + ",\n".join(texts) + "\n]\n")
        else:
            target.writelines(f"{text}\n" for text in texts)


def _objects(file: str) -> tuple[list[dict[str, Any]], bool]:
    """Return the objects of a file, and whether they are in a list."""
    try:
        text = Path(file).read_text(ENCODING)
        is_list = text.lstrip().startswith("[")
        texts = [text] if is_list else [line for line in text.split("\n") if line.strip()]
        found = [json.loads(text) for text in texts]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: cannot be read as JSON lines ({first_line(error)}); expected an object in each line, "
            "or a list of objects."
        ) from error
    rows = found[0] if is_list else found
    wrong = next((row for row in rows if not isinstance(row, dict)), None)
    if wrong is not None or not rows:
        what = "nothing" if wrong is None else json.dumps(wrong)[:50]
        raise DataError(f"{file}: holds {what}; expected an object for each sample.")
    return rows, is_list

"""Text in CSV files: spreadsheets run cells as formulas that begin in certain ways."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

# Numbers are no formulas. A text that begins with the mark gets one more, so that all can be read back.
MARK = "'"
_FORMULA = r"^[=+\-@\t\r']"
_NUMBER = r"^[+-]?[0-9]+(\.[0-9]+)?$"
_MARKED = r"^'[=+\-@\t\r']"


def with_marks(table: pa.Table) -> pa.Table:
    """Return a table in which texts that a spreadsheet could run begin with an apostrophe."""

    def marked(column: pa.ChunkedArray) -> pa.ChunkedArray:
        could_run = pc.and_not(
            pc.match_substring_regex(column, _FORMULA), pc.match_substring_regex(column, _NUMBER)
        )
        return pc.if_else(could_run, pc.binary_join_element_wise(MARK, column, ""), column)

    return _map_texts(table, marked)


def without_marks(table: pa.Table) -> pa.Table:
    """Undo `with_marks`."""

    def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
        is_marked = pc.match_substring_regex(column, _MARKED)
        return pc.if_else(is_marked, pc.utf8_slice_codeunits(column, 1), column)

    return _map_texts(table, plain)


def _map_texts(table: pa.Table, change: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> pa.Table:
    for number, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            table = table.set_column(number, field, change(table.column(number)))
    return table

"""What people decided about samples: to keep, relabel or drop them, or that they are unsure.

Shape legend: N input rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from chgval.errors import DataError, first_few
from chgval.reports.files import report_name
from chgval.reports.tables import DECISIONS
from chgval.types import IntArray

KEEP, RELABEL, DROP, UNSURE = WORDS = ("keep", "relabel", "drop", "unsure")
SHOWN_CLASSES = 5
ADVICE = "make the decisions about the dataset as it is now"


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decisions about rows of a dataset.

    Attributes:
        table: as docs/reports.md describes it, with whatever other columns it has, as text.
        word_N: what was decided about each row of the dataset; None where nothing was.
        kept_N: which rows remain.
        new_labels_N: the class that a row gets; -1 leaves it its own.
    """

    table: pa.Table
    word_N: NDArray[np.object_]
    kept_N: NDArray[np.bool_]
    new_labels_N: IntArray

    def counts(self) -> dict[str, int]:
        """Return how often each was decided."""
        return {word: int((self.word_N == word).sum()) for word in WORDS}


def match_decisions(
    table: pa.Table,
    source: str,
    ids: Sequence[str],
    labels_N: IntArray,
    class_names: Sequence[str],
    dataset: str,
) -> Decisions:
    """Find the rows of a dataset that decisions are about.

    Args:
        table: of decisions.
        source: where it was read.
        ids: of all rows of the dataset.
        labels_N: their classes now, shape (N,); -1 where unknown.
        class_names: of the dataset.
        dataset: what messages call it.
    Raises:
        DataError: a decision is none, or about a row that is not there, has another label now, or was
            decided before; a column is no text.
    """
    name = report_name(source)
    table = _with_texts(table, name)
    rows_of: dict[str, list[int]] = {}
    for row, row_id in enumerate(ids):
        rows_of.setdefault(row_id, []).append(row)
    classes = {class_name: label for label, class_name in enumerate(class_names)}
    word_N = np.full(len(ids), None, dtype=object)
    new_labels_N = np.full(len(ids), -1)
    for decision in table.to_pylist():
        if not decision["decision"]:
            continue
        who = decision["id"]
        row = _row_of(decision, rows_of.get(who, []), name, dataset)
        label = None if labels_N[row] < 0 else class_names[labels_N[row]]
        if (decision["label_name"] or None) != label:
            raise DataError(
                f"{name}: {who!r} was labelled {decision['label_name']!r} when it was decided about, and is "
                f"labelled {label!r} in {dataset}; {ADVICE}."
            )
        word, new = decision["decision"], decision["new_label_name"] or None
        if word not in WORDS:
            raise DataError(f"{name}: {who!r} has the decision {word!r}; expected {', '.join(WORDS)}.")
        if word_N[row] is not None:
            raise DataError(f"{name}: {who!r} is decided about twice; leave one of the rows out.")
        if (new is not None) != (word == RELABEL):
            wanted = "needs a new_label_name" if new is None else f"takes no new_label_name ({new!r})"
            raise DataError(f"{name}: {who!r}: the decision to {word} {wanted}.")
        if new is not None and new not in classes:
            known = first_few(class_names, SHOWN_CLASSES)
            raise DataError(f"{name}: {who!r}: {new!r} is no class of {dataset}; it has {known}.")
        word_N[row] = word
        if new is not None:
            new_labels_N[row] = classes[new]
    return Decisions(table, word_N, word_N != DROP, new_labels_N)


def _with_texts(table: pa.Table, name: str) -> pa.Table:
    """Return the table with all of its columns as text, which they are kept as.

    Raises:
        DataError: one holds something else.
    """
    for place, field in enumerate(table.schema):
        if field.name in DECISIONS.schema.names:
            continue
        try:
            table = table.set_column(place, field.name, table.column(place).cast(pa.string()))
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{name}: column '{field.name}' holds {field.type}, which is no text; leave it out."
            ) from error
    return table


def _row_of(decision: Mapping[str, Any], rows: Sequence[int], name: str, dataset: str) -> int:
    """Return the row that a decision is about; its number tells rows of one id apart.

    Raises:
        DataError: there is none, or there are several.
    """
    who, number = decision["id"], str(decision.get("index"))
    if not rows:
        raise DataError(f"{name}: {who!r} is no row of {dataset}; {ADVICE}.")
    if len(rows) == 1:
        return rows[0]
    if number not in map(str, rows):
        raise DataError(
            f"{name}: {len(rows):,} rows of {dataset} are called {who!r}; say which in a column 'index', the "
            f"number of the row from 0 (the first is {rows[0]:,})."
        )
    return int(number)

"""A values report in memory: what every sample of a dataset is worth, and how probably its label is wrong.

Shape legend: N input rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from chgval.config import OutputConfig
from chgval.detection.verdict import notes_on
from chgval.errors import DataError
from chgval.reports.files import (
    check_output,
    in_input_order,
    is_report,
    read_table,
    with_metadata,
    write_table,
)
from chgval.reports.tables import VALUES
from chgval.types import FloatArray, IntArray

if TYPE_CHECKING:
    import pandas as pd


class Report:
    """One row per input row, in input order, and what is known of the run.

        >>> table = pa.table({"index": [0, 1], "id": ["a", "b"], "label": [0, 1], "value": [0.5, None]})
        >>> Report(table, {}).values
        array([0.5, nan])

    Args:
        table: columns as docs/reports.md describes them; `index`, `id` and `label` at least.
        metadata: what is known of the run (settings, versions, class names, fingerprint, verdict).

    Attributes:
        table, metadata: the same.
    """

    def __init__(self, table: pa.Table, metadata: dict[str, Any]) -> None:
        self.table = table
        self.metadata = metadata

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __repr__(self) -> str:
        return f"<chgval.Report of {len(self):,} rows: {', '.join(self.table.column_names)}>"

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a column, shape (N,): numbers with NaN (integers: -1) for null, texts with None.

        Raises:
            DataError: there is no such column.
        """
        if name not in self.table.column_names:
            raise DataError(
                f"no column '{name}' in this report; it has {', '.join(self.table.column_names)}."
            )
        column = self.table[name]
        if pa.types.is_floating(column.type):
            return self.scores(name)
        if pa.types.is_integer(column.type):
            return self.integers(name)
        array: NDArray[Any] = np.array(column.to_pylist(), dtype=object)
        return array

    def scores(self, name: str) -> FloatArray:
        """Return a copy of a column of numbers, float64, NaN for null."""
        scores: FloatArray = pc.fill_null(self.table[name].cast(pa.float64()), np.nan).to_numpy().copy()
        return scores

    def integers(self, name: str) -> IntArray:
        """Return a copy of a column of integers, -1 for null."""
        integers: IntArray = pc.fill_null(self.table[name], -1).to_numpy().copy()
        return integers

    @property
    def values(self) -> FloatArray:
        """Mean Shapley value of every row, shape (N,); NaN where a row has none. Higher is more useful."""
        return self.scores("value")

    @property
    def noise_scores(self) -> FloatArray:
        """Probability that the label of every row is wrong, shape (N,); NaN where nothing is said."""
        return self.scores("noise_score")

    @property
    def class_names(self) -> list[str]:
        """Names of all classes; where the report does not tell, as a CSV file, those that rows have."""
        if "class_names" in self.metadata:
            return list(self.metadata["class_names"])
        known: dict[int, str] = {}
        for labels, names in (("suggested_label", "suggested_name"), ("label", "label_name")):
            if {labels, names} <= set(self.table.column_names):
                label_N, name_N = self.integers(labels), self[names]
                known |= {
                    int(label): str(name_N[row])
                    for label, row in zip(*np.unique(label_N, return_index=True), strict=True)
                }
        return [known.get(label, str(label)) for label in range(max(known, default=-1) + 1)]

    @property
    def verdict(self) -> dict[str, Any]:
        """How far its noise scores can be trusted; empty where the report does not tell, as a CSV file."""
        verdict: dict[str, Any] = self.metadata.get("verdict", {})
        return verdict

    @property
    def dataset(self) -> str | None:
        """The dataset that it is about, as it was named when it was valued; None where that is not known."""
        source = self.metadata.get("settings", {}).get("data", {}).get("source")
        return source if isinstance(source, str) else None

    @property
    def notes(self) -> list[str]:
        """Sentences to read before acting on noise scores; none if all is well."""
        return notes_on(self.verdict)

    def to_arrow(self) -> pa.Table:
        """Return the table, with the metadata in its schema."""
        return with_metadata(self.table, self.metadata)

    def to_pandas(self) -> pd.DataFrame:
        """Return the table as a data frame."""
        return self.table.to_pandas()

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the report: Parquet, CSV, JSON lines or Arrow, by the ending.

        Args:
            path: of the file.
            overwrite: whether it may replace one.
        Raises:
            SettingsError: the ending says no format.
            OutputError: it cannot be written, or is in the way.
        """
        output = OutputConfig(path=str(path), overwrite=overwrite)
        check_output(output)
        write_table(output, self.to_arrow())


def read_report(source: str | Path) -> Report:
    """Read a values report: Parquet, CSV, JSON lines or Arrow; "-" is standard input.

    Args:
        source: a file that `chgval value`, `Report.save` or `Tracker` made.
    Raises:
        DataError: it cannot be read, or is no values report.
    """
    table, metadata = read_table(str(source), kind=VALUES)
    return Report(table, metadata)


def read_whole_report(source: str) -> Report:
    """Read a values report with all of its rows, in input order; "-" is standard input.

    Raises:
        DataError: it cannot be read, is no values report, or lacks rows.
    """
    if not is_report(source):
        raise DataError(f"{source}: is no values report; value the dataset first, with chgval value.")
    table, metadata = read_table(source, kind=VALUES)
    return Report(in_input_order(table, source), metadata)

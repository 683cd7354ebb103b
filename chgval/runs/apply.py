"""`chgval apply`: write a dataset, or its labels, as people decided."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from chgval.config import ApplyConfig, DataConfig
from chgval.data.formats import format_of
from chgval.data.formats.base import KnownRows, ListedRows, RowChanges
from chgval.data.open import check_not_read, check_rewritable
from chgval.errors import DataError
from chgval.files import check_apart, locked
from chgval.reports.decisions import Decisions, match_decisions
from chgval.reports.files import check_output, dataset_of, read_table, write_table
from chgval.reports.tables import DECISIONS, LABELS_SCHEMA
from chgval.runs.rewriting import write_changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What became of a dataset.

    Attributes:
        num_rows, num_written: of the dataset before and after.
        counts: how often each was decided, by keep, relabel, drop and unsure.
    """

    num_rows: int
    num_written: int
    counts: dict[str, int]


def run_apply(config: ApplyConfig) -> Applied:
    """Write the corrected dataset, or its labels, and the decisions beside it.

    Raises:
        ChgvalError: decisions or dataset cannot be read, do not fit each other, or an output is in the way.
    """
    with locked(*config.outputs):
        table, metadata = read_table(config.source, kind=DECISIONS)
        source = format_of(_data_of(config, metadata))
        if config.labels_only:
            check_output(config.labels, *config.inputs)
            check_not_read(source, config.labels)
        else:
            check_apart(config.target, [Path(config.source)])
            check_rewritable(source, config.target, overwrite=config.overwrite, link=config.link or "copy")
        check_output(config.kept_decisions, *config.inputs)
        rows = source.listed()
        decisions = match_decisions(
            table, config.source, rows.ids, rows.labels_N, rows.class_names, source.source
        )
        if rows.has_annotators and (decisions.new_labels_N >= 0).any():
            raise DataError(
                f"{config.source}: relabels rows of {source.source}, each of which has labels of several "
                "annotators; none of them stands for all. Drop or keep such rows."
            )
        if config.labels_only:
            labels = _labels(rows, decisions)
            write_table(config.labels, labels)
            num_written = labels.num_rows
        else:
            changes = RowChanges(decisions.kept_N, decisions.new_labels_N)
            known = KnownRows(rows.ids, rows.labels_N)
            num_written = write_changed(source, known, changes, config.target, config.link or "copy")
        write_table(config.kept_decisions, decisions.table)
        return Applied(num_rows=len(rows.ids), num_written=num_written, counts=decisions.counts())


def _data_of(config: ApplyConfig, metadata: dict[str, Any]) -> DataConfig:
    """Return how to read the dataset: as the user says, or as it was read for the table of decisions."""
    if config.data.names_columns or "settings" not in metadata:
        return config.data
    known = dataset_of(metadata, config.source)
    return dataclasses.replace(known, source=config.dataset, split=config.split or known.split, features=None)


def _labels(rows: ListedRows, decisions: Decisions) -> pa.Table:
    """Return the label of every row that remains, as it was and as it is."""
    names = np.array([*rows.class_names, None], dtype=object)  # index -1 gives None
    new_N = np.where(decisions.new_labels_N >= 0, decisions.new_labels_N, rows.labels_N)
    columns = {
        "id": pa.array(rows.ids, pa.string()),
        "label": names[new_N],
        "original_label": names[rows.labels_N],
        "decision": decisions.word_N,
    }
    return pa.table(columns, schema=LABELS_SCHEMA).filter(pa.array(decisions.kept_N))

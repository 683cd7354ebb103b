"""The columns of all tables, each said once: schemas, `--by` and docs/reports.md follow.

Shape legend: N input rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from chgval.detection.signals import Annotations, Consensus, NoiseSignals
from chgval.types import FloatArray, IntArray
from chgval.valuation.selection import ranks_within
from chgval.valuation.signals import SIGNALS, EpochSignals, RunSignals


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        name, kind: of the column.
        about: what it holds.
        is_score: whether rows can be ranked by it.
        is_known: whether every row has an entry.
    """

    name: str
    kind: pa.DataType
    about: str
    is_score: bool = False
    is_known: bool = False

    @property
    def field(self) -> pa.Field:
        """The column in a schema."""
        return pa.field(self.name, self.kind, nullable=not self.is_known)


INT, FLOAT, TEXT = pa.int64(), pa.float64(), pa.string()

VALUES_COLUMNS = (
    Column("index", INT, "row number in the input, from 0", is_known=True),
    Column("id", TEXT, "path below the folder, or the id column, or the row number", is_known=True),
    Column("label", INT, "given class; -1 if the row has none", is_known=True),
    Column("label_name", TEXT, "its name"),
    Column("value", FLOAT, "mean Shapley value over epochs; higher is more useful", is_score=True),
    Column(
        "value_std",
        FLOAT,
        "standard deviation of the value over epochs; in a merged report, of the runs' values over runs",
        is_score=True,
    ),
    Column("value_stderr", FLOAT, "value_std / sqrt(number of epochs, or of runs in a merged report)"),
    Column("rank", INT, "1 is the highest value; with per-class values, within the class"),
    Column("percentile", FLOAT, "100 is the highest value, 0 the lowest"),
    *(
        Column(f"{signal.name}_mean", FLOAT, f"mean over epochs of: {signal.about}", is_score=True)
        for signal in SIGNALS
    ),
    Column(
        "forgetting_events",
        INT,
        "times the prediction went from right to wrong between epochs",
        is_score=True,
    ),
    Column("num_epochs", INT, "epochs that saw the row", is_known=True),
    Column("predicted_label", INT, "class of the highest averaged probability"),
    Column("predicted_name", TEXT, "its name"),
    Column("predicted_probability", FLOAT, "that probability", is_score=True),
    Column("noise_score", FLOAT, "probability that the label is wrong", is_score=True),
    Column("noise_score_std", FLOAT, "standard deviation of the noise score over noise models"),
    Column("suggested_label", INT, "most probable class other than the given one"),
    Column("suggested_name", TEXT, "its name"),
    Column("suggested_probability", FLOAT, "probability that it is the right one"),
    Column("confident_label", INT, "class that confident learning counts the row in"),
    Column("status", TEXT, "valued, unlabelled or unreadable", is_known=True),
    Column("reason", TEXT, "why a row is unreadable"),
)
VALUES_SCHEMA = pa.schema([column.field for column in VALUES_COLUMNS])
# Begins the column of an annotator's labels.
ANNOTATOR_LABEL = "label_name_of_"
# What `select --by` takes.
RANKED_BY = (*(column.name for column in VALUES_COLUMNS if column.is_score), "random")

EPOCH_SCHEMA = pa.schema(
    [
        pa.field("index", INT, nullable=False),
        pa.field("value", FLOAT),
        *(pa.field(signal.name, pa.float32()) for signal in SIGNALS),
        pa.field("predicted_label", pa.int32()),
    ]
)

SUSPECTS_SCHEMA = pa.schema(
    [
        *(VALUES_SCHEMA.field(name) for name in ("index", "id", "label", "label_name")),
        *(VALUES_SCHEMA.field(name) for name in ("suggested_label", "suggested_name")),
        *(VALUES_SCHEMA.field(name) for name in ("suggested_probability", "noise_score", "noise_score_std")),
        VALUES_SCHEMA.field("value"),
        pa.field("margin", FLOAT),
        pa.field("rank", INT),
        pa.field("flagged", pa.bool_(), nullable=False),
        pa.field("duplicate_of", INT),
    ]
)

MANIFEST_SCHEMA = pa.schema(
    [
        *(VALUES_SCHEMA.field(name) for name in ("index", "id", "label", "value", "rank")),
        pa.field("weight", FLOAT),
        pa.field("kept", pa.bool_(), nullable=False),
    ]
)


ISSUES_COLUMNS = (
    *VALUES_COLUMNS[:4],
    Column("issues", TEXT, "what was found, in words, separated by commas; null for nothing"),
    Column(
        "outlier_factor",
        FLOAT,
        "how much sparser its surroundings are than those of its nearest samples; about 1 is ordinary, from "
        "1.5 on it is an outlier (local outlier factor, Breunig et al. 2000)",
    ),
    Column("copy_of", INT, "row of which it is a copy: the first of all its copies; null for that one"),
    Column("copy_of_id", TEXT, "its id"),
    Column("copy_similarity", FLOAT, "how alike it and its nearest copy are; 1 is equal"),
    Column("conflicts_with", INT, "row of a copy that has another label"),
    Column("test_id", TEXT, "id of the sample of the test set (--against) that it is a copy of"),
    Column("test_similarity", FLOAT, "how alike these are"),
    Column("decision", TEXT, "what could be decided: drop copies but the first, and what is in the test set"),
    Column("new_label_name", TEXT, "null, for people to fill in"),
)
ISSUES_SCHEMA = pa.schema([column.field for column in ISSUES_COLUMNS])

DECISIONS_COLUMNS = (
    VALUES_COLUMNS[1],
    VALUES_COLUMNS[3],
    Column("decision", TEXT, "keep, relabel, drop or unsure; null decides nothing"),
    Column("new_label_name", TEXT, "name of the class that a relabelled row gets"),
)
DECISIONS_SCHEMA = pa.schema([column.field for column in DECISIONS_COLUMNS])

LABELS_SCHEMA = pa.schema(
    [
        VALUES_SCHEMA.field("id"),
        pa.field("label", TEXT),
        pa.field("original_label", TEXT),
        pa.field("decision", TEXT),
    ]
)


@dataclass(frozen=True, slots=True)
class TableKind:
    """A table that a command writes, and others may read.

    Attributes:
        schema: its columns.
        what: it is called in messages.
        command: that writes it.
        others_are_text: whether columns that are not its own are kept as the text that they are.
    """

    schema: pa.Schema
    what: str
    command: str
    others_are_text: bool = False


VALUES = TableKind(VALUES_SCHEMA, "a values report", "value")
SUSPECTS = TableKind(SUSPECTS_SCHEMA, "suspects", "detect-noise")
MANIFEST = TableKind(MANIFEST_SCHEMA, "a subset", "select")
ISSUES = TableKind(ISSUES_SCHEMA, "issues", "detect-issues")
DECISIONS = TableKind(DECISIONS_SCHEMA, "decisions", "report", others_are_text=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRows:
    """The rows that a report is about, wherever they came from.

    Attributes:
        ids: one per row.
        labels_N: given classes, shape (N,); -1 where there is none.
        class_names: of all classes.
        statuses: valued, unlabelled or unreadable.
        reasons: why a row is unreadable, None for others.
        annotations: labels of several annotators, if there are any.
    """

    ids: Sequence[str]
    labels_N: IntArray
    class_names: Sequence[str]
    statuses: Sequence[str]
    reasons: Sequence[str | None]
    annotations: Annotations | None = None


def values_table(
    rows: InputRows, signals: RunSignals, noise: NoiseSignals, *, per_class: bool = False
) -> pa.Table:
    """Return the report: one row per input row, in input order.

    Labels of several annotators add columns: the consensus, and each one's label and score.

    Args:
        rows: the input rows.
        signals: what the run says of them.
        noise: what it says of their labels.
        per_class: whether the values come from one game per class; samples are then ranked within theirs.
    """
    names = np.array([*rows.class_names, None], dtype=object)  # index -1 gives None
    group_N = rows.labels_N if per_class else np.zeros_like(rows.labels_N)
    rank_N = ranks_within(signals.value_N, group_N)
    seen_N = signals.num_epochs_N > 0
    columns = {
        "index": np.arange(len(rows.labels_N)),
        "id": rows.ids,
        "label": rows.labels_N,
        "label_name": names[rows.labels_N],
        "value": or_null(signals.value_N),
        "value_std": or_null(signals.value_std_N),
        "value_stderr": or_null(signals.value_stderr_N),
        "rank": pa.array(rank_N, mask=rank_N == 0),
        "percentile": or_null(_percentiles(rank_N, group_N)),
        **{f"{name}_mean": or_null(mean_N) for name, mean_N in signals.means.items()},
        "forgetting_events": pa.array(signals.forgetting_events_N, mask=~seen_N),
        "num_epochs": signals.num_epochs_N,
        "predicted_label": or_null(signals.predicted_label_N),
        "predicted_name": names[signals.predicted_label_N],
        "predicted_probability": or_null(signals.predicted_probability_N),
        "noise_score": or_null(noise.noise_score_N),
        "noise_score_std": or_null(noise.noise_score_std_N),
        "suggested_label": or_null(noise.suggested_label_N),
        "suggested_name": names[noise.suggested_label_N],
        "suggested_probability": or_null(noise.suggested_probability_N),
        "confident_label": or_null(noise.confident_label_N),
        "status": rows.statuses,
        "reason": rows.reasons,
    }
    schema = VALUES_SCHEMA
    if rows.annotations is not None and noise.consensus is not None:
        added = _annotation_columns(rows.annotations, noise.consensus, names)
        columns |= added
        schema = pa.schema([*schema, *(pa.field(name, column.type) for name, column in added.items())])
    return pa.table(columns, schema=schema)


def _annotation_columns(
    annotations: Annotations, consensus: Consensus, names: NDArray[np.object_]
) -> dict[str, pa.Array]:
    """Return what all annotators say together, and each one's label with how probably it is wrong."""
    columns = {
        "consensus_label": or_null(consensus.label_N),
        "consensus_name": pa.array(names[consensus.label_N], pa.string()),
        "consensus_probability": or_null(consensus.probability_N),
    }
    for name, labels_N, score_N in zip(
        annotations.names, annotations.labels_NA.T, consensus.scores_NA.T, strict=True
    ):
        columns[f"{ANNOTATOR_LABEL}{name}"] = pa.array(names[labels_N], pa.string())
        columns[f"noise_score_of_{name}"] = or_null(score_N)
    return columns


def annotations_of(
    table: pa.Table, class_names: Sequence[str], told_apart: Sequence[str]
) -> Annotations | None:
    """Return the labels of several annotators that a report holds; None if it has none.

    Args:
        table: of the report.
        class_names: of all classes.
        told_apart: the annotators that its verdict tells apart.
    """
    names = [n.removeprefix(ANNOTATOR_LABEL) for n in table.column_names if n.startswith(ANNOTATOR_LABEL)]
    if not names:
        return None
    labels = {name: label for label, name in enumerate(class_names)}
    columns = [
        [labels.get(name, -1) for name in table[f"{ANNOTATOR_LABEL}{who}"].to_pylist()] for who in names
    ]
    return Annotations(tuple(names), np.array(columns).T, are_told_apart=list(told_apart) == names)


def epoch_table(signals: EpochSignals) -> pa.Table:
    """Return one epoch's values and signals: one row per input row."""
    columns = {
        "index": np.arange(len(signals.value_N)),
        "value": or_null(signals.value_N),
        **{name: or_null(score_N.astype(np.float32)) for name, score_N in signals.signals.items()},
        "predicted_label": or_null(signals.predicted_label_N.astype(np.int32)),
    }
    return pa.table(columns, schema=EPOCH_SCHEMA)


def or_null(entry_N: NDArray[np.floating] | NDArray[np.integer]) -> pa.Array:
    """Return a column in which NaN, or a label below 0, is null."""
    unknown_N = entry_N < 0 if np.issubdtype(entry_N.dtype, np.integer) else np.isnan(entry_N)
    return pa.array(entry_N, mask=unknown_N)


def _percentiles(rank_N: IntArray, group_N: IntArray) -> FloatArray:
    """Return 100 for the first rank of each group, 0 for its last, NaN where there is no rank."""
    sizes_N = np.bincount(group_N.clip(0), weights=rank_N > 0)[group_N.clip(0)]
    return np.where(rank_N > 0, 100 * (sizes_N - rank_N) / np.maximum(sizes_N - 1, 1), np.nan)

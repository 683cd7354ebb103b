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
    Column("index", INT, "number of the input row, from 0", is_known=True),
    Column(
        "id",
        TEXT,
        "path below the data folder, value of the id column, path inside the image column, or row number",
        is_known=True,
    ),
    Column("label", INT, "given class, as an index into the class names; -1 if unknown", is_known=True),
    Column("label_name", TEXT, "name of the given class; null if unknown"),
    Column(
        "value",
        FLOAT,
        "mean over epochs of the Shapley value, in squared gradient units; higher is more useful",
        is_score=True,
    ),
    Column(
        "value_std",
        FLOAT,
        "standard deviation of the value over epochs (n - 1), null for one; in a merged report over runs",
        is_score=True,
    ),
    Column(
        "value_stderr",
        FLOAT,
        "`value_std` / sqrt(epochs), in a merged report / sqrt(runs): how far the mean may be off by the "
        "choice of epochs, or of runs",
    ),
    Column("rank", INT, "1 is the highest value, ties by index; with `--per-class` within the class"),
    Column("percentile", FLOAT, "share of the other valued samples that rank behind it, 0 to 100"),
    *(
        Column(f"{signal.name}_mean", FLOAT, f"mean over epochs of: {signal.about}", is_score=True)
        for signal in SIGNALS
    ),
    Column(
        "forgetting_events",
        INT,
        "changes from predicted right to wrong between epochs; 0 also if never right",
        is_score=True,
    ),
    Column("num_epochs", INT, "epochs that saw the sample, in a merged report of all runs", is_known=True),
    Column("predicted_label", INT, "class with the highest averaged probability"),
    Column("predicted_name", TEXT, "its name"),
    Column("predicted_probability", FLOAT, "its averaged probability, 0 to 1", is_score=True),
    Column(
        "noise_score",
        FLOAT,
        "probability that the given label is wrong; higher is more suspicious",
        is_score=True,
    ),
    Column(
        "noise_score_std",
        FLOAT,
        "its standard deviation over noise models that explain the labels about equally well; null also "
        "where nothing can be said",
    ),
    Column("suggested_label", INT, "the most probable class other than the given one"),
    Column("suggested_name", TEXT, "its name"),
    Column("suggested_probability", FLOAT, "probability that the true class is the suggested one"),
    Column(
        "confident_label",
        INT,
        "class that confident learning counts the sample in (arXiv:1911.00068); null for none",
    ),
    Column("status", TEXT, "`valued`; `unlabelled` (label null or -1); `unreadable`", is_known=True),
    Column("reason", TEXT, "why the sample is unreadable"),
)
VALUES_SCHEMA = pa.schema([column.field for column in VALUES_COLUMNS])
# Begins the column of an annotator's labels.
ANNOTATOR_LABEL = "label_name_of_"
# What `select --by` takes.
RANKED_BY = (*(column.name for column in VALUES_COLUMNS if column.is_score), "random")

EPOCH_COLUMNS = (
    VALUES_COLUMNS[0],
    Column("value", FLOAT, "Shapley value in the game of that epoch"),
    *(Column(signal.name, pa.float32(), signal.about) for signal in SIGNALS),
    Column("predicted_label", pa.int32(), "class of the highest logit"),
)
EPOCH_SCHEMA = pa.schema([column.field for column in EPOCH_COLUMNS])


def _of_values(*names: str) -> list[Column]:
    """Return columns of the values report, in this order."""
    return [column for name in names for column in VALUES_COLUMNS if column.name == name]


SUSPECTS_COLUMNS = (
    *_of_values("index", "id", "label", "label_name", "suggested_label", "suggested_name"),
    *_of_values("suggested_probability", "noise_score", "noise_score_std", "value"),
    Column("margin", FLOAT, "`margin_mean` of the report, in logits"),
    Column("rank", INT, "place among all rows with a score; 1 is the most suspicious"),
    Column("flagged", pa.bool_(), "whether the rule flags the row", is_known=True),
    Column("duplicate_of", INT, "row of a copy with another label (`--duplicates`); null for none"),
)
SUSPECTS_SCHEMA = pa.schema([column.field for column in SUSPECTS_COLUMNS])

MANIFEST_COLUMNS = (
    *_of_values("index", "id", "label"),
    Column("value", FLOAT, "what rows are ranked by; null where a row has none"),
    Column(
        "rank",
        INT,
        "1 is kept first; within the class, unless `--global`; null for rows that cannot be kept",
    ),
    Column(
        "weight",
        FLOAT,
        "1, or with `--weigh` the value scaled from 0 (lowest kept) to 1 (highest kept), as in Algorithm 2, "
        "step 10, of the paper; null where not kept",
    ),
    Column("kept", pa.bool_(), "whether the row is kept", is_known=True),
)
MANIFEST_SCHEMA = pa.schema([column.field for column in MANIFEST_COLUMNS])

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
    Column(
        "copy_similarity", FLOAT, "how alike it and its nearest copy are (not always the first); 1 is equal"
    ),
    Column("conflicts_with", INT, "row of a copy that has another label"),
    Column("test_id", TEXT, "id of the sample of the test set (--against) that it is a copy of"),
    Column("test_similarity", FLOAT, "how alike these are"),
    Column(
        "decision",
        TEXT,
        "what could be decided: drop plain copies but the first, and plain ones of the test set; be unsure "
        "about others",
    ),
    Column("new_label_name", TEXT, "null, for people to fill in"),
)
ISSUES_SCHEMA = pa.schema([column.field for column in ISSUES_COLUMNS])

DECISIONS_COLUMNS = (
    *_of_values("id"),
    Column("label_name", TEXT, "the label when it was decided about; another one by now is an error"),
    Column("decision", TEXT, "`keep`, `relabel`, `drop` or `unsure`; null decides nothing"),
    Column("new_label_name", TEXT, "name of the class that a relabelled row gets; null for all others"),
)
DECISIONS_SCHEMA = pa.schema([column.field for column in DECISIONS_COLUMNS])

LABELS_COLUMNS = (
    *_of_values("id"),
    Column("label", TEXT, "name of the class that the row has now"),
    Column("original_label", TEXT, "name of the class that it had"),
    Column("decision", TEXT, "what was decided about it; null for nothing"),
)
LABELS_SCHEMA = pa.schema([column.field for column in LABELS_COLUMNS])


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
# Those that can be told by their columns.
KINDS = (VALUES, SUSPECTS, MANIFEST, ISSUES)
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


def annotators_in(table: pa.Table) -> list[str]:
    """Return the annotators whose labels a report holds."""
    return [n.removeprefix(ANNOTATOR_LABEL) for n in table.column_names if n.startswith(ANNOTATOR_LABEL)]


def annotations_of(
    table: pa.Table, class_names: Sequence[str], told_apart: Sequence[str]
) -> Annotations | None:
    """Return the labels of several annotators that a report holds; None if it has none.

    Args:
        table: of the report.
        class_names: of all classes.
        told_apart: the annotators that its verdict tells apart.
    """
    names = annotators_in(table)
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

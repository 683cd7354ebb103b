"""What a person wants to see of results: picked out of their tables, for the command line to print."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from chgval.detection.signals import NoiseRate
from chgval.reports.report import Report
from chgval.types import FloatArray, IntArray

SHOWN_CLASSES = 20
SHOWN_PAIRS = 5
HISTOGRAM_BINS = 12
# Rows of lists that a caller may show a part of.
MOST_SHOWN = 1000
NO_LABEL = "(no label)"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLine:
    """One sample in a summary. `percentile`: share of all values that are at most its own, 0 to 100."""

    id: str
    label_name: str
    predicted_name: str
    value: float
    percentile: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassLine:
    """One class in a summary. `agreement`: share whose predicted label is the given one, in [0, 1]."""

    name: str
    num_samples: int
    mean_value: float
    agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a person wants to know at the end of a run.

    Attributes:
        classes: one line per class, the largest first where there are too many to show.
        hidden_classes: classes left out of `classes`.
        lowest: the samples of the lowest value, the lowest first.
        histogram_counts, histogram_edges: of the values; one more edge than counts. The first and last bin
            are open.
    """

    classes: list[ClassLine]
    hidden_classes: int
    lowest: list[SampleLine]
    histogram_counts: list[int]
    histogram_edges: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspectLine:
    """One suspect in a summary."""

    id: str
    label_name: str
    suggested_name: str
    noise_score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSummary:
    """What a person wants to know of a dataset's labels.

    Attributes:
        rate: estimated share of wrong labels.
        num_assessed, num_flagged: samples that have a score, and flagged ones.
        classes: name, samples, flagged samples and estimated share of wrong labels of every class, the most
            flagged first.
        hidden_classes: classes left out of `classes`.
        pairs: given name, suggested name and flagged samples, the commonest first.
        suspects: the most suspicious flagged samples, the worst first.
        duplicates: id, given name, the other's given name and its id, of near-duplicates that disagree.
    """

    rate: NoiseRate
    num_assessed: int
    num_flagged: int
    classes: list[tuple[str, int, int, float]]
    hidden_classes: int
    pairs: list[tuple[str, str, int]]
    suspects: list[SuspectLine]
    duplicates: list[tuple[str, str, str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedClass:
    """What is kept of a class."""

    name: str
    num_rows: int
    num_dropped: int
    num_kept: int


def summarise_values(report: Report, shown_samples: int) -> RunSummary:
    """Pick counts per class, the lowest values and a histogram out of a report."""
    value_N, predicted_N, label_N = (
        report.values,
        report.integers("predicted_label"),
        report.integers("label"),
    )
    class_names = report.metadata["class_names"]
    num_classes = len(class_names)
    rows = np.flatnonzero(~np.isnan(value_N))
    order = rows[np.argsort(value_N[rows], kind="stable")]
    labels = label_N[rows]
    values, agrees = value_N[rows], predicted_N[rows] == labels
    counts = np.bincount(labels, minlength=num_classes)
    safe_counts = counts.clip(min=1)
    means = np.bincount(labels, weights=values, minlength=num_classes) / safe_counts
    agreements = np.bincount(labels, weights=agrees, minlength=num_classes) / safe_counts
    shown = range(num_classes)
    if num_classes > SHOWN_CLASSES:
        shown = np.argsort(-counts, kind="stable")[:SHOWN_CLASSES].tolist()
    histogram_counts, edges = histogram(values)

    def lines(rows: IntArray) -> list[SampleLine]:
        return [
            SampleLine(
                id=row["id"],
                label_name=row["label_name"],
                predicted_name=row["predicted_name"] or "",
                value=row["value"],
                percentile=row["percentile"],
            )
            for row in report.table.take(rows).to_pylist()
        ]

    return RunSummary(
        classes=[
            ClassLine(
                name=class_names[label],
                num_samples=int(counts[label]),
                mean_value=float(means[label]),
                agreement=float(agreements[label]),
            )
            for label in shown
        ],
        hidden_classes=num_classes - len(shown),
        lowest=lines(order[:shown_samples]),
        histogram_counts=histogram_counts,
        histogram_edges=edges,
    )


def histogram(values: FloatArray) -> tuple[list[int], list[float]]:
    """Return counts and edges of equal bins from the 2nd to the 98th percentile.

    The first and last bin also hold what lies beyond: a few extreme values would otherwise leave one bin.
    """
    low, high = np.quantile(values, (0.02, 0.98))
    counts, edges = np.histogram(values.clip(low, high), bins=HISTOGRAM_BINS)
    return counts.tolist(), edges.tolist()


def statuses(report: Report) -> dict[str, int]:
    """Return how many rows there are of each status, the valued first."""
    counts = {row["values"]: row["counts"] for row in report.table["status"].value_counts().to_pylist()}
    return {name: counts.get(name, 0) for name in dict.fromkeys(["valued", *sorted(counts)])}


def count_statuses(report: Report) -> str:
    """Return how many rows there are of each status, as text."""
    return ", ".join(f"{count:,} {name}" for name, count in statuses(report).items())


def summarise_noise(
    report: pa.Table,
    score_N: FloatArray,
    flagged_N: NDArray[np.bool_],
    order: IntArray,
    rate: NoiseRate,
    duplicates_N: IntArray | None = None,
) -> NoiseSummary:
    """Pick the noise rate, flags per class, pairs of labels and the worst suspects out of a verdict.

    Args:
        report: `id`, `label_name` and `suggested_name` of all rows.
        score_N: noise scores; NaN where a row has none.
        flagged_N: which rows are flagged.
        order: rows, the most suspicious first.
        rate: estimated share of wrong labels.
        duplicates_N: row of the near-duplicate with another label, -1 for none; None if none were looked for.
    """
    known_N = np.isfinite(score_N)
    scored = pa.table(
        {
            "label_name": report["label_name"],
            "suggested_name": report["suggested_name"],
            "flagged": flagged_N.astype(np.int64),
            "score": score_N,
        }
    ).filter(known_N)
    # Threads of Arrow that still hold NumPy's memory when Python ends abort the process.
    classes = scored.group_by("label_name", use_threads=False).aggregate(
        [("score", "count"), ("flagged", "sum"), ("score", "mean")]
    )
    classes = classes.sort_by([("flagged_sum", "descending"), ("label_name", "ascending")])
    suggested = pc.and_(pc.equal(scored["flagged"], 1), pc.is_valid(scored["suggested_name"]))
    pairs = scored.filter(suggested).group_by(["label_name", "suggested_name"], use_threads=False)
    counted = pairs.aggregate([([], "count_all")]).sort_by(
        [("count_all", "descending"), ("label_name", "ascending"), ("suggested_name", "ascending")]
    )
    worst = order[flagged_N[order]][:MOST_SHOWN]
    names, labels = report["id"], report["label_name"]
    others_N = np.full(len(score_N), -1) if duplicates_N is None else duplicates_N
    doubled = np.flatnonzero(others_N >= 0)[:MOST_SHOWN].tolist()
    return NoiseSummary(
        rate=rate,
        num_assessed=int(known_N.sum()),
        num_flagged=int(flagged_N.sum()),
        classes=[
            (row["label_name"], row["score_count"], row["flagged_sum"], row["score_mean"])
            for row in classes.slice(0, SHOWN_CLASSES).to_pylist()
        ],
        hidden_classes=max(0, classes.num_rows - SHOWN_CLASSES),
        pairs=[tuple(row.values()) for row in counted.slice(0, SHOWN_PAIRS).to_pylist()],
        suspects=[
            SuspectLine(
                id=line["id"],
                label_name=line["label_name"],
                suggested_name=line["suggested_name"] or "",
                noise_score=float(score_N[row]),
            )
            for row, line in zip(worst, report.take(worst).to_pylist(), strict=True)
        ],
        duplicates=[
            (str(names[row]), str(labels[row]), str(labels[other]), str(names[other]))
            for row, other in zip(doubled, others_N[doubled].tolist(), strict=True)
        ],
    )


def summarise_selection(
    report: pa.Table, kept_N: NDArray[np.bool_], dropped_N: NDArray[np.bool_]
) -> list[SelectedClass]:
    """Return what is kept of every class, the largest first.

    Args:
        report: `label_name` of all rows.
        kept_N: which rows are kept.
        dropped_N: which rows were left out as suspects.
    """
    rows = pa.table(
        {"name": report["label_name"], "kept": kept_N.astype(np.int64), "dropped": dropped_N.astype(np.int64)}
    )
    classes = rows.group_by("name", use_threads=False).aggregate(
        [([], "count_all"), ("dropped", "sum"), ("kept", "sum")]
    )
    return [
        SelectedClass(
            name=NO_LABEL if row["name"] is None else row["name"],
            num_rows=row["count_all"],
            num_dropped=row["dropped_sum"],
            num_kept=row["kept_sum"],
        )
        for row in classes.sort_by([("count_all", "descending"), ("name", "ascending")]).to_pylist()
    ]

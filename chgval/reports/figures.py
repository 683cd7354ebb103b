"""The numbers behind the figures of the review page, computed once for whatever draws them.

Shape legend: N rows, T thresholds, C classes, K classes that are shown, E epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from chgval.errors import DataError, first_line
from chgval.types import FloatArray, IntArray

# Thresholds of a noise score, evenly from 0 to 1.
THRESHOLDS = 201
HISTOGRAM_BINS = 40
# Share of the values beyond either end of the histogram, which its outer bins hold.
BEYOND = 0.01
# Classes of the heat map, those with most flags: more cannot be read.
MOST_CONFUSED = 30
# Epochs of a curve; of longer runs, as many evenly spaced ones.
MOST_EPOCHS = 60
# Shares of all values between which the band of a curve lies.
BAND = (0.1, 0.9)


@dataclass(frozen=True, slots=True)
class ThresholdCurve:
    """What flagging from a noise score on would mean.

    Attributes:
        thresholds_T: scores from 0 to 1, in order.
        counts_T: samples of at least that score.
        sums_T: how many of them are wrong, as their scores say: the sum of these.
    """

    thresholds_T: FloatArray
    counts_T: IntArray
    sums_T: FloatArray


def threshold_curve(score_N: FloatArray, cut: float | None = None) -> ThresholdCurve:
    """Return what each threshold would flag, a cut among them; NaN scores count nowhere."""
    thresholds_T = np.union1d(np.arange(THRESHOLDS) / (THRESHOLDS - 1), [] if cut is None else [cut])
    ascending = np.sort(score_N[np.isfinite(score_N)])
    first_T = np.searchsorted(ascending, thresholds_T, side="left")
    sums = np.concatenate([[0.0], np.cumsum(ascending)])
    return ThresholdCurve(thresholds_T, len(ascending) - first_T, sums[-1] - sums[first_T])


@dataclass(frozen=True, slots=True)
class Confusion:
    """Flagged samples by label and suggested label.

    Attributes:
        labels: of the classes that are shown, in their order.
        counts_KK: samples of the label of the row whose suggestion is that of the column.
        num_classes: that have flagged samples, shown or not.
    """

    labels: list[int]
    counts_KK: IntArray
    num_classes: int


def confusion(label_N: IntArray, suggested_N: IntArray, flagged_N: NDArray[np.bool_]) -> Confusion:
    """Count the flagged samples, for the classes that have most of them."""
    known_N = flagged_N & (label_N >= 0) & (suggested_N >= 0)
    given, suggested = label_N[known_N], suggested_N[known_N]
    classes, counts = np.unique(np.concatenate([given, suggested]), return_counts=True)
    labels = np.sort(classes[np.argsort(-counts, kind="stable")[:MOST_CONFUSED]])
    counts_KK = np.zeros((len(labels), len(labels)), dtype=np.int64)
    inside = np.isin(given, labels) & np.isin(suggested, labels)
    places = np.searchsorted(labels, given[inside]), np.searchsorted(labels, suggested[inside])
    np.add.at(counts_KK, places, 1)
    return Confusion(labels.tolist(), counts_KK, len(classes))


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values in equal bins; what lies beyond is in the first and last.

    Attributes:
        edges: of the bins, one more than bins.
        counts: of all samples.
        class_counts: of the samples of each class.
    """

    edges: FloatArray
    counts: IntArray
    class_counts: list[IntArray]


def value_histogram(value_N: FloatArray, label_N: IntArray, num_classes: int) -> Histogram:
    """Count values, all and by class; NaN values count nowhere."""
    known_N = np.isfinite(value_N)
    values, labels = value_N[known_N], label_N[known_N]
    low, high = np.quantile(values, (BEYOND, 1 - BEYOND)) if len(values) else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, HISTOGRAM_BINS + 1)
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, HISTOGRAM_BINS - 1)
    counted = np.bincount(labels * HISTOGRAM_BINS + bins, minlength=num_classes * HISTOGRAM_BINS).reshape(
        num_classes, HISTOGRAM_BINS
    )
    return Histogram(edges, counted.sum(0), list(counted))


def extremes(
    value_N: FloatArray, label_N: IntArray, num_classes: int, count: int
) -> list[tuple[int, IntArray, IntArray]]:
    """Return every class that has values, and its rows of the lowest and of the highest values."""
    order = np.lexsort((value_N, label_N))
    order = order[np.isfinite(value_N[order]) & (label_N[order] >= 0)]
    ends = np.searchsorted(label_N[order], np.arange(num_classes + 1))
    found = []
    for label in range(num_classes):
        rows = order[ends[label] : ends[label + 1]]
        if len(rows):
            half = min(count, (len(rows) + 1) // 2)
            found.append((label, rows[:half], rows[::-1][: min(count, len(rows) - half)]))
    return found


@dataclass(frozen=True, slots=True)
class EpochCurves:
    """Values by epoch.

    Attributes:
        numbers: of the epochs.
        values_EN: of the samples that were asked for; NaN where an epoch has none.
        low, middle, high: of all samples: 10 %, half and 90 % have less.
    """

    numbers: list[int]
    values_EN: FloatArray
    low: FloatArray
    middle: FloatArray
    high: FloatArray


def epoch_curves(folder: Path, rows: IntArray, num_rows: int) -> EpochCurves | None:
    """Read the values of each epoch that lie beside a report; None if there are none.

    Args:
        folder: of the epochs.
        rows: the samples that are asked for.
        num_rows: of the report.
    Raises:
        DataError: they cannot be read, or are those of another report.
    """
    parts = {
        int(name): part
        for part in folder.glob("epoch=*/values.parquet")
        if (name := part.parent.name.removeprefix("epoch=")).isdecimal()
    }
    numbers = sorted(parts)
    if not numbers:
        return None
    places = np.unique(np.linspace(0, len(numbers) - 1, min(len(numbers), MOST_EPOCHS)).round().astype(int))
    numbers = [numbers[place] for place in places]
    read = []
    for number in numbers:
        try:
            value_N = pq.read_table(parts[number], columns=["value"])["value"]
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{parts[number]}: cannot be read ({first_line(error)}); remove {folder} to do without."
            ) from error
        if len(value_N) != num_rows:
            raise DataError(
                f"{folder}: has {len(value_N):,} rows where the report has {num_rows:,}; it is not of this "
                "report. Remove it to do without."
            )
        read.append(value_N.fill_null(np.nan).to_numpy())
    values_EN = np.array(read)
    with np.errstate(invalid="ignore"):
        low, middle, high = np.nanquantile(values_EN, (BAND[0], 0.5, BAND[1]), axis=1)
    return EpochCurves(numbers, values_EN[:, rows], low, middle, high)

"""The numbers behind figures, against plain loops."""

import numpy as np
import pytest

from chgval.errors import DataError
from chgval.reports.figures import confusion, epoch_curves, extremes, threshold_curve, value_histogram
from chgval.reports.tables import epoch_table
from chgval.valuation.signals import SIGNALS, EpochSignals


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_thresholds_count_what_is_flagged_and_wrong(rng):
    score_N = rng.random(300)
    score_N[:20] = np.nan
    score_N[20:25] = [0, 1, 0.5, 0.005, 0.995]
    curve = threshold_curve(score_N)
    for threshold, count, total in zip(curve.thresholds_T, curve.counts_T, curve.sums_T, strict=True):
        flagged = [score for score in score_N if score >= threshold]
        assert count == len(flagged) and total == pytest.approx(sum(flagged), abs=1e-9)


def test_confusion_counts_pairs_of_the_commonest_classes(rng):
    label_N, suggested_N = rng.integers(-1, 50, 3000), rng.integers(-1, 50, 3000)
    label_N[:500] = 7
    flagged_N = rng.random(3000) < 0.7
    found = confusion(label_N, suggested_N, flagged_N)
    assert 7 in found.labels and len(found.labels) == 30 and found.labels == sorted(found.labels)
    assert found.num_classes == 50
    for row, given in enumerate(found.labels):
        for column, suggested in enumerate(found.labels):
            pairs = zip(label_N, suggested_N, flagged_N, strict=True)
            expected = sum(f and (g, s) == (given, suggested) for g, s, f in pairs)
            assert found.counts_KK[row, column] == expected


def test_histograms_hold_every_value_once(rng):
    value_N, label_N = rng.normal(size=1000), rng.integers(0, 4, 1000)
    value_N[:10] = np.nan
    found = value_histogram(value_N, label_N, 5)
    known = np.isfinite(value_N)
    assert found.counts.sum() == 990 and found.class_counts[4].sum() == 0
    for label in range(4):
        clipped = value_N[known & (label_N == label)].clip(found.edges[0], found.edges[-1])
        assert found.class_counts[label].tolist() == np.histogram(clipped, found.edges)[0].tolist()
    same = value_histogram(np.ones(5), np.zeros(5, dtype=int), 1)
    assert same.counts.sum() == 5 and same.edges[0] < 1 < same.edges[-1]


def test_extremes_are_the_ends_of_each_class_and_no_row_is_both(rng):
    value_N, label_N = rng.normal(size=60), rng.integers(-1, 6, 60)
    value_N[label_N == 5] = np.nan
    rows = np.flatnonzero(label_N == 4)
    label_N[rows[3:]] = 0
    found = {label: (low.tolist(), high.tolist()) for label, low, high in extremes(value_N, label_N, 6, 4)}
    assert 5 not in found and len(found[4][0]) == 2 and len(found[4][1]) == 1
    for label, (low, high) in found.items():
        ranked = sorted(np.flatnonzero(label_N == label).tolist(), key=lambda row: value_N[row])
        assert ranked[: len(low)] == low and ranked[::-1][: len(high)] == high
        assert not set(low) & set(high)


def write_epochs(folder, values_EN):
    import pyarrow.parquet as pq

    for number, value_N in enumerate(values_EN, 1):
        unknown = {signal.name: np.full(len(value_N), np.nan) for signal in SIGNALS}
        signals = EpochSignals(value_N=value_N, signals=unknown, predicted_label_N=np.full(len(value_N), -1))
        (folder / f"epoch={number}").mkdir(parents=True)
        pq.write_table(epoch_table(signals), folder / f"epoch={number}/values.parquet")


def test_values_by_epoch_are_those_of_the_files(tmp_path, rng):
    values_EN = rng.normal(size=(90, 30))
    values_EN[3, 5] = np.nan
    write_epochs(tmp_path / "v.epochs", values_EN)
    found = epoch_curves(tmp_path / "v.epochs", np.array([5, 2]), 30)
    assert len(found.numbers) == 60 and (found.numbers[0], found.numbers[-1]) == (1, 90)
    chosen = [number - 1 for number in found.numbers]
    np.testing.assert_array_equal(found.values_EN, values_EN[chosen][:, [5, 2]])
    np.testing.assert_allclose(found.middle, [np.nanmedian(values_EN[e]) for e in chosen])
    assert epoch_curves(tmp_path / "none", np.array([1]), 30) is None
    with pytest.raises(DataError, match="has 30 rows where the report has 31"):
        epoch_curves(tmp_path / "v.epochs", np.array([1]), 31)

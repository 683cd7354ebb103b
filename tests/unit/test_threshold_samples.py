"""Threshold samples against the description in the paper (arXiv:2001.10528, section 3.2)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chgval.data.formats.digits import read_digits
from chgval.errors import DataError
from chgval.runs.threshold_samples import below_threshold, check_enough, threshold_flags, threshold_sets


@given(st.integers(0, 300), st.integers(2, 20), st.integers(0, 5))
def test_the_sets_are_disjoint_and_of_the_size_of_a_class(num_rows, num_classes, seed):
    rows = np.arange(num_rows) * 3
    first, second = threshold_sets(rows, num_classes, seed)
    assert len(first) == len(second) == num_rows // (num_classes + 1)
    assert not set(first) & set(second) and set(first) | set(second) <= set(rows)
    np.testing.assert_array_equal(threshold_sets(rows, num_classes, seed)[0], first)


def test_the_cut_is_the_99th_percentile_and_unknown_margins_are_not_below_it():
    margin_N = np.array([*np.arange(101.0), 98.9, 99.1, np.nan, np.nan])
    flagged_N = below_threshold(margin_N, np.array([*range(101), 104]))
    np.testing.assert_array_equal(np.flatnonzero(flagged_N), [*range(99), 101])


def test_every_sample_is_judged_by_a_run_that_does_not_use_it():
    """Margins say in which run they were taken: only rows of the first set may come from the second."""
    dataset = read_digits()
    sets = []

    def margins_of(name, marked):
        sets.append(np.flatnonzero(marked.labels_N == 10))
        assert marked.num_classes == 11 and name == f"threshold-{len(sets)}"
        margin_N = np.full(len(dataset), -1.0 if len(sets) == 2 else 1.0)
        margin_N[sets[-1]] = 0
        return margin_N

    flagged_N = threshold_flags(dataset, 3, margins_of)
    assert len(sets) == 2 and len(sets[0]) == 1797 // 11
    np.testing.assert_array_equal(np.flatnonzero(flagged_N), np.sort(sets[0]))


def test_too_few_samples_are_told():
    dataset = read_digits()
    dataset.labels_N[10:] = -1
    with pytest.raises(DataError, match="10 samples of 10 classes are too few for --threshold aum"):
        check_enough(dataset)
    with pytest.raises(DataError, match="none of the threshold samples could be read"):
        below_threshold(np.array([np.nan, 1.0]), np.array([0]))

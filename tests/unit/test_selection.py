"""Budgets, ranks and weights against plain versions of themselves."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chgval.valuation.selection import class_quotas, keep_highest, min_max_weights, ranks_within

sizes = st.lists(st.integers(0, 50), min_size=1, max_size=8).map(np.array)
figures = st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(float("nan"))), min_size=1, max_size=40)


@given(sizes, st.data())
def test_quotas_add_up_and_are_the_nearest_to_the_shares(sizes_C, data):
    count = data.draw(st.integers(0, int(sizes_C.sum())))
    quotas_C = class_quotas(sizes_C, count)
    assert quotas_C.sum() == count
    exact_C = count * sizes_C / max(1, sizes_C.sum())
    assert (np.abs(quotas_C - exact_C) < 1).all() and (quotas_C <= sizes_C).all()


def test_remainders_go_to_the_largest_and_ties_to_the_first():
    # 10 of 3 : 3 : 3 : 1 are 3, 3, 3, 1; 7 of 5 : 3 : 2 are 3.5, 2.1, 1.4; 1 of 2 : 2 is 0.5 each.
    np.testing.assert_array_equal(class_quotas(np.array([3, 3, 3, 1]), 10), [3, 3, 3, 1])
    np.testing.assert_array_equal(class_quotas(np.array([5, 3, 2]), 7), [4, 2, 1])
    np.testing.assert_array_equal(class_quotas(np.array([2, 2]), 1), [1, 0])


@given(figures, st.data())
def test_ranks_are_those_of_sorting_each_group(score_N, data):
    num = len(score_N)
    group_N = np.array(data.draw(st.lists(st.integers(0, 3), min_size=num, max_size=num)))
    rank_N = ranks_within(np.array(score_N), group_N)
    for group in range(4):
        known = [i for i in range(num) if group_N[i] == group and not np.isnan(score_N[i])]
        expected = sorted(known, key=lambda i: (-score_N[i], i))
        assert [rank_N[i] for i in expected] == list(range(1, len(expected) + 1))
    assert all(rank_N[i] == 0 for i in range(num) if np.isnan(score_N[i]))


@given(figures, st.data())
def test_what_is_kept_is_the_highest_of_each_group(score_N, data):
    num = len(score_N)
    score_N = np.array(score_N)
    group_N = np.array(data.draw(st.lists(st.integers(0, 3), min_size=num, max_size=num)))
    count = data.draw(st.integers(0, int((~np.isnan(score_N)).sum())))
    kept_N = keep_highest(score_N, group_N, count)
    assert kept_N.sum() == count and not np.isnan(score_N[kept_N]).any()
    for group in range(4):
        inside, outside = (score_N[(group_N == group) & chosen] for chosen in (kept_N, ~kept_N))
        if len(inside) and not np.isnan(outside).all():
            assert inside.min() >= np.nanmax(outside)


def test_weights_run_from_0_to_1_and_equal_values_weigh_1():
    np.testing.assert_allclose(min_max_weights(np.array([2.0, -2.0, 1.0])), [1, 0, 0.75])
    np.testing.assert_array_equal(min_max_weights(np.array([3.0, 3.0])), [1, 1])
    assert min_max_weights(np.array([])).shape == (0,)


def test_a_class_of_no_samples_gets_none():
    assert class_quotas(np.array([0, 0]), 0).tolist() == [0, 0]
    assert class_quotas(np.array([0, 4]), 3).tolist() == [0, 3]

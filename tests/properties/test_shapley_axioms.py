"""Shapley's axioms, as the paper states them (section 2), for any factors."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from chgval.valuation.closed_form import (
    Factors,
    chg_utility,
    chg_values,
    chg_values_per_class,
    coalition_sums,
    hardness_values,
    pull_coefficient,
    spread_coefficient,
)

ENTRIES = st.floats(-100, 100, width=32).map(lambda v: v if abs(v) > 1e-3 else 0.0)


@st.composite
def games(draw, min_samples=1):
    """Factors and a target of any size."""
    n = draw(st.integers(min_samples, 30))
    num_classes, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    has_bias = draw(st.booleans())
    matrix = [
        torch.from_numpy(draw(arrays(np.float64, shape, elements=ENTRIES)))
        for shape in ((n, num_classes), (n, width), (num_classes, width + has_bias))
    ]
    return Factors(matrix[0], matrix[1], has_bias), matrix[2]


def scale(factors, target_CF):
    """A size to measure rounding errors by."""
    sums = coalition_sums(factors)
    return float(1 + sums.squared_norm + target_CF.square().sum())


@given(games())
def test_efficiency(game):
    factors, target_CF = game
    values_N = chg_values(factors, target_CF=target_CF)
    gap = values_N.sum() - chg_utility(coalition_sums(factors), target_CF)
    assert abs(gap) <= 1e-10 * scale(factors, target_CF)


@given(games(), st.data())
def test_symmetry_equal_samples_have_equal_values_in_any_order(game, data):
    factors, target_CF = game
    n = len(factors)
    twin = data.draw(st.integers(0, n - 1))
    order = torch.tensor([*data.draw(st.permutations(range(n))), twin])
    shuffled = Factors(factors.residuals_NC[order], factors.features_ND[order], factors.has_bias)
    values_N = chg_values(shuffled, target_CF=target_CF)
    tolerance = 1e-10 * scale(factors, target_CF)
    original = int((order[:-1] == twin).nonzero())
    assert abs(values_N[original] - values_N[-1]) <= tolerance
    # Put back in the first order, the values do not depend on it.
    with_twin = Factors(
        torch.cat([factors.residuals_NC, factors.residuals_NC[twin : twin + 1]]),
        torch.cat([factors.features_ND, factors.features_ND[twin : twin + 1]]),
        factors.has_bias,
    )
    in_order = chg_values(with_twin, target_CF=target_CF)[order[:-1]]
    assert (in_order - values_N[:-1]).abs().max() <= tolerance


@given(games(), st.floats(-3, 3), st.floats(-3, 3))
def test_linearity_in_the_utility(game, first, second):
    """Any affine combination of two targets' games is the combination of their values.

    With weights that sum to w, w1 U_a + w2 U_b = 2 <m_S, w1 a + w2 b> - w ||m_S||².
    """
    factors, target_CF = game
    other_CF = target_CF.flip(0) * 0.5 + 1
    combined = first * chg_values(factors, target_CF=target_CF) + second * chg_values(
        factors, target_CF=other_CF
    )
    mixed_CF = first * target_CF + second * other_CF
    # phi is linear in a, plus the value of -||m_S||², which has the target 0.
    zero_CF = torch.zeros_like(target_CF)
    quadratic = chg_values(factors, target_CF=zero_CF)
    expected = chg_values(factors, target_CF=mixed_CF) + (first + second - 1) * quadratic
    assert (combined - expected).abs().max() <= 1e-9 * (scale(factors, target_CF) + scale(factors, other_CF))


@given(st.integers(1, 30), st.integers(1, 4))
def test_dummies_of_a_game_without_gradients_are_worth_nothing(n, width):
    """Where every x_i is 0 no sample adds anything to any coalition, whatever the target."""
    factors = Factors(torch.zeros(n, 2, dtype=torch.float64), torch.ones(n, width, dtype=torch.float64))
    values_N = chg_values(factors, target_CF=torch.ones(2, width + 1, dtype=torch.float64))
    assert torch.equal(values_N, torch.zeros(n, dtype=torch.float64))


@given(games(), st.integers(1, 4))
def test_classes_are_efficient_each(game, num_classes):
    factors, target_CF = game
    labels_N = torch.arange(len(factors)) % num_classes
    values_N = chg_values_per_class(factors, labels_N, num_classes)
    for label in labels_N.unique():
        rows = labels_N == label
        members = Factors(factors.residuals_NC[rows], factors.features_ND[rows], factors.has_bias)
        gap = values_N[rows].sum() - chg_utility(coalition_sums(members))
        assert abs(gap) <= 1e-10 * scale(factors, target_CF)


@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1e4)))
def test_hardness_is_efficient_and_grows_with_the_loss(losses_N):
    values_N = hardness_values(torch.from_numpy(losses_N))
    assert abs(values_N.sum() - losses_N.mean()) <= 1e-9 * (1 + losses_N.sum())
    order = losses_N.argsort()
    assert (values_N[order].diff() >= -1e-9).all()


@settings(max_examples=50)
@given(st.integers(1, 10**9))
def test_coefficients_are_finite_and_keep_their_order(n):
    """s_n and t_n are never negative: nearer to the mean, or along the target, is never worth less."""
    assert 0 <= spread_coefficient(n) <= 2 / n
    assert 0 <= pull_coefficient(n) <= 1

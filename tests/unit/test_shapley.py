import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from chgval.errors import FactorError
from chgval.valuation.closed_form import (
    CoalitionSums,
    Factors,
    chg_utility,
    chg_values,
    chg_values_per_class,
    coalition_sums,
    hardness_values,
    harmonic_numbers,
)
from tests import oracles


def random_factors(n, num_classes=3, width=4, *, has_bias=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    residuals = torch.randn(n, num_classes, generator=generator, dtype=dtype)
    features = torch.randn(n, width, generator=generator, dtype=dtype)
    return Factors(residuals, features, has_bias)


def dense(factors):
    """The matrices x_i themselves, flattened: shape (N, C * F)."""
    features = factors.features_ND.double()
    if factors.has_bias:
        features = torch.cat([features, torch.ones(len(factors), 1)], dim=1)
    return torch.einsum("nc,nf->ncf", factors.residuals_NC.double(), features).flatten(1).numpy()


def targets(x_ND, seed):
    """The mean, the origin, a far point and a random one."""
    rng = np.random.default_rng(seed)
    width = x_ND.shape[1]
    return [x_ND.mean(0), np.zeros(width), np.full(width, 30.0), rng.normal(size=width)]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("n", range(1, 9))
def test_closed_form_equals_enumeration_of_all_subsets(n, has_bias):
    factors = random_factors(n, has_bias=has_bias, seed=n)
    x_ND = dense(factors)
    shape = coalition_sums(factors).total_CF.shape
    for target_D in targets(x_ND, n):
        expected = oracles.shapley_by_subsets(n, lambda s, a=target_D: oracles.chg_utility(x_ND[s], a))
        values_N = chg_values(factors, target_CF=torch.tensor(target_D).reshape(shape))
        assert values_N.dtype == torch.float64 and values_N.shape == (n,)
        np.testing.assert_allclose(values_N, expected, rtol=1e-10, atol=1e-10)
    expected = oracles.shapley_by_subsets(n, lambda s: oracles.chg_utility(x_ND[s], x_ND.mean(0)))
    np.testing.assert_allclose(chg_values(factors), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [3, 10, 1000])
def test_closed_form_equals_theorem_1_as_printed(n):
    factors = random_factors(n, seed=n)
    x_ND = dense(factors)
    shape = coalition_sums(factors).total_CF.shape
    for target_D in targets(x_ND, n):
        values_N = chg_values(factors, target_CF=torch.tensor(target_D).reshape(shape))
        np.testing.assert_allclose(values_N, oracles.theorem_1(x_ND, target_D), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("times_loss", [True, False])
def test_factored_equals_dense_equals_autograd(times_loss, has_bias):
    torch.manual_seed(3)
    n, num_classes, width = 40, 5, 7
    head = torch.nn.Linear(width, num_classes, bias=has_bias).double()
    features_ND = torch.randn(n, width, dtype=torch.float64)
    labels_N = torch.randint(num_classes, (n,))
    x_ND = oracles.last_layer_gradients(head, features_ND, labels_N, times_loss=times_loss)

    logits_NC = head(features_ND).detach()
    residuals_NC = logits_NC.softmax(1) - torch.nn.functional.one_hot(labels_N, num_classes)
    if times_loss:
        residuals_NC *= torch.nn.functional.cross_entropy(logits_NC, labels_N, reduction="none")[:, None]
    factors = Factors(residuals_NC, features_ND, has_bias)
    np.testing.assert_allclose(dense(factors), x_ND, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        chg_values(factors), oracles.theorem_1(x_ND, x_ND.mean(0)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_hardness_equals_enumeration_of_all_subsets(n):
    losses_N = np.random.default_rng(n).exponential(size=n)
    expected = oracles.shapley_by_subsets(n, lambda s: oracles.hardness_utility(losses_N[s]))
    np.testing.assert_allclose(hardness_values(torch.tensor(losses_N)), expected, rtol=1e-12, atol=1e-12)


def test_float32_factors_stay_within_1e_5_standard_deviations_at_50_000_samples():
    generator = torch.Generator().manual_seed(1)
    n, num_classes, width = 50_000, 10, 512
    logits_NC = 2 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)
    labels_N = torch.randint(num_classes, (n,), generator=generator)
    # ReLU outputs, as last-layer inputs are: no negative entry, so their sums do not cancel.
    features_ND = torch.randn(n, width, generator=generator, dtype=torch.float64).relu_()
    residuals_NC = logits_NC.softmax(1) - torch.nn.functional.one_hot(labels_N, num_classes)
    residuals_NC *= torch.nn.functional.cross_entropy(logits_NC, labels_N, reduction="none")[:, None]

    exact_N = chg_values(Factors(residuals_NC, features_ND))
    values_N = chg_values(Factors(residuals_NC.float(), features_ND.float()))
    assert values_N.dtype == torch.float64
    assert (values_N - exact_N).abs().max() <= 1e-5 * exact_N.std()


def test_half_precision_factors_are_raised_before_the_products():
    factors = random_factors(300, dtype=torch.bfloat16)
    raised = Factors(factors.residuals_NC.float(), factors.features_ND.float())
    assert torch.equal(chg_values(factors), chg_values(raised))


def test_sums_of_shards_give_the_values_of_the_whole():
    whole = random_factors(10_000, seed=5)  # more rows than one chunk
    shards = [
        Factors(whole.residuals_NC[a:b], whole.features_ND[a:b])
        for a, b in ((0, 1), (1, 6000), (6000, 10_000))
    ]
    sums = coalition_sums(shards[0])
    for shard in shards[1:]:
        sums = sums + coalition_sums(shard)
    merged = torch.cat([chg_values(shard, sums) for shard in shards])
    torch.testing.assert_close(merged, chg_values(whole), rtol=1e-10, atol=1e-13)


def test_each_class_is_a_coalition_of_its_own():
    factors = random_factors(60, seed=2)
    labels_N = torch.randint(4, (60,), generator=torch.Generator().manual_seed(2))
    labels_N[labels_N == 2] = 5  # an empty class, and one beyond it
    labels_N[0] = 4  # a class of one sample
    values_N = chg_values_per_class(factors, labels_N, num_classes=6)
    x_ND = dense(factors)
    for label in labels_N.unique():
        members = (labels_N == label).numpy()
        if members.sum() >= 3:
            expected = oracles.theorem_1(x_ND[members], x_ND[members].mean(0))
        else:
            expected = oracles.shapley_by_subsets(
                members.sum(),
                lambda s, m=members: oracles.chg_utility(x_ND[m][s], x_ND[m].mean(0)),
            )
        np.testing.assert_allclose(values_N[members], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n", [1, 2, 7, 9, 10, 11, 1000, 200_000])
def test_harmonic_numbers_equal_their_sums(n):
    h1 = math.fsum(1 / k for k in range(1, n + 1))
    h2 = math.fsum(1 / k**2 for k in range(1, n + 1))
    np.testing.assert_allclose(harmonic_numbers(n), (h1, h2), rtol=1e-14)


def test_factors_that_do_not_fit_are_named():
    with pytest.raises(FactorError, match=r"\(5, 3\) and features \(4, 2\)"):
        Factors(torch.zeros(5, 3), torch.zeros(4, 2))
    with pytest.raises(FactorError, match=r"torch\.int64"):
        Factors(torch.zeros(5, 3, dtype=torch.int64), torch.zeros(5, 2))
    with pytest.raises(FactorError, match="cpu and features on meta"):
        Factors(torch.zeros(5, 3), torch.zeros(5, 2, device="meta"))
    with pytest.raises(FactorError, match="no samples"):
        chg_values(random_factors(0))
    with pytest.raises(FactorError, match="no samples"):
        hardness_values(torch.zeros(0))
    with pytest.raises(FactorError, match=r"target has shape \(3, 4\); these factors need \(3, 5\)"):
        chg_values(random_factors(6), target_CF=torch.zeros(3, 4))
    with pytest.raises(FactorError, match="sums has shape"):
        chg_values(random_factors(6), CoalitionSums(6, torch.zeros(2, 2), torch.zeros(())))
    with pytest.raises(FactorError, match="2 labels for 6 samples"):
        chg_values_per_class(random_factors(6), torch.zeros(2, dtype=torch.int64), 3)


def test_utility_of_the_whole_is_the_one_of_the_definition():
    factors = random_factors(9)
    x_ND = dense(factors)
    sums = coalition_sums(factors)
    assert chg_utility(sums).item() == pytest.approx(oracles.chg_utility(x_ND, x_ND.mean(0)), rel=1e-12)
    target_D = np.linspace(-1, 1, x_ND.shape[1])
    target_CF = torch.tensor(target_D).reshape(sums.total_CF.shape)
    assert chg_utility(sums, target_CF).item() == pytest.approx(
        oracles.chg_utility(x_ND, target_D), rel=1e-12
    )


@pytest.mark.parametrize("way", ["legacy", "by backend"])
def test_a_program_that_wants_fast_products_gets_the_same_values(way):
    """As TF32, which keeps three digits: the values are those of float64."""
    if way == "by backend" and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has no precisions of single backends")
    generator = torch.Generator().manual_seed(0)
    residuals_NC, features_ND = (
        torch.randn(200, 4, generator=generator),
        torch.rand(200, 9, generator=generator),
    )
    exact = chg_values(Factors(residuals_NC.double(), features_ND.double()))
    rough = chg_values(Factors(residuals_NC, features_ND))
    script = f"""
import torch
from chgval.valuation.closed_form import Factors, chg_values
generator = torch.Generator().manual_seed(0)
factors = Factors(torch.randn(200, 4, generator=generator), torch.rand(200, 9, generator=generator))
{SETTINGS_OF_PRODUCTS[way]}
print(chg_values(factors).tolist())
"""
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    np.testing.assert_allclose(json.loads(printed), exact, rtol=1e-12)
    assert not np.allclose(rough, exact, rtol=1e-12, atol=0)  # else this would show nothing


# The options change the process for good, so each is set in one of its own.
SETTINGS_OF_PRODUCTS = {
    "legacy": "torch.set_float32_matmul_precision('high')",
    "by backend": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
}

"""Every strategy against an independent, slower version of itself.

Shape legend: N samples, C classes, D last-layer inputs, K chosen samples.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import orthogonal_mp
from torch.nn import functional

from chgval.detection.scores import score_labels
from chgval.training.strategies import REGISTRY, Predictions, Question
from chgval.training.strategies.gradmatch import REGULARISATION, matching_pursuit
from tests.oracles import chg_utility, hardness_utility, last_layer_gradients, shapley_by_subsets

CHOOSING = sorted(REGISTRY)


def make_pass(n, num_classes=3, width=4, seed=0, *, has_bias=True):
    g = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(width, num_classes, bias=has_bias)
    torch.nn.init.normal_(head.weight, generator=g)
    features_ND = torch.randn(n, width, generator=g).relu()
    labels_N = torch.randint(num_classes, (n,), generator=g)
    if has_bias:
        torch.nn.init.normal_(head.bias, generator=g)
    with torch.no_grad():
        return Predictions(head(features_ND), features_ND, labels_N, has_bias), head


def ask(name, samples, count, held=None, memory=None, **changed):
    settings = {
        "labels_N": samples.labels_N,
        "num_classes": samples.logits_NC.shape[1],
        "count": count,
        "epoch": 5,
        "num_epochs": 10,
        "batch_size": 8,
        "lr": 0.5,
        "generator": torch.Generator().manual_seed(1),
        "predict_samples": lambda: samples,
        "predict_averaged": lambda: samples,
        "predict_held": lambda: held,
        "memory": {} if memory is None else memory,
    }
    return REGISTRY[name].choose(Question(**{**settings, **changed}))


def quotas(labels_N, count):
    """Samples of each class: a proportional share rounded down, and one more for the largest remainders."""
    sizes = [int((labels_N == c).sum()) for c in range(int(labels_N.max()) + 1)]
    shares = [Fraction(count * size, len(labels_N)) for size in sizes]
    whole = [int(share) for share in shares]
    while sum(whole) < count:
        rest = [share - have for share, have in zip(shares, whole, strict=True)]
        whole[rest.index(max(rest))] += 1
    return whole


def highest_of_classes(figures, labels_N, count):
    kept = []
    for label, quota in enumerate(quotas(labels_N, count)):
        members = [i for i in range(len(labels_N)) if labels_N[i] == label]
        kept += sorted(members, key=lambda i: (-figures[i], i))[:quota]
    return sorted(kept)


def test_every_strategy_that_can_be_named_is_there():
    assert set(REGISTRY) == set(CHOOSING)
    assert {n for n in CHOOSING if not REGISTRY[n].keeps_shares} == {"glister", "gradmatch", "infobatch"}


@pytest.mark.parametrize("name", CHOOSING)
@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 40), share=st.floats(0.01, 1), num_classes=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_budget_is_met_exactly(name, n, share, num_classes, seed):
    samples, _ = make_pass(n, num_classes, seed=seed)
    held, _ = make_pass(7, num_classes, seed=seed + 1)
    count = max(2, round(share * n))
    choice = ask(name, samples, count, held)
    positions = choice.positions_K.tolist()
    assert positions == sorted(set(positions)) and set(positions) <= set(range(n)) and len(positions) == count
    if REGISTRY[name].keeps_shares:
        of_class = samples.labels_N[positions].bincount(minlength=int(samples.labels_N.max()) + 1)
        assert of_class.tolist() == quotas(samples.labels_N, count)
    again = ask(name, samples, count, held)
    assert torch.equal(choice.positions_K, again.positions_K)
    if choice.weights_K is not None:
        assert choice.weights_K.shape == (count,) and torch.isfinite(choice.weights_K).all()
        assert (choice.weights_K >= 0).all()


@pytest.mark.parametrize(("name", "times_loss"), [("chg", True), ("gradient", False)])
def test_values_are_those_of_all_coalitions_of_a_class_and_weights_those_of_the_kept(name, times_loss):
    """Algorithm 2, steps 5 to 10, by enumeration."""
    samples, head = make_pass(14, num_classes=2, width=2)
    x_ND = last_layer_gradients(head, samples.features_ND, samples.labels_N, times_loss=times_loss)
    values = np.zeros(14)
    for label in range(2):
        members = np.flatnonzero(samples.labels_N.numpy() == label)
        part, mean = x_ND[members], x_ND[members].mean(0)
        values[members] = shapley_by_subsets(
            len(members), lambda s, part=part, mean=mean: chg_utility(part[list(s)], mean)
        )
    # Two samples are equal: not the last bits of the enumeration, but their positions shall decide.
    kept = highest_of_classes(values.round(12), samples.labels_N, 6)
    choice = ask(name, samples, 6)
    assert choice.positions_K.tolist() == kept

    among, mean = x_ND[kept], x_ND[kept].mean(0)
    values_K = shapley_by_subsets(6, lambda s: chg_utility(among[list(s)], mean))
    expected = (values_K - values_K.min()) / (values_K.max() - values_K.min())
    np.testing.assert_allclose(choice.weights_K.numpy(), expected, atol=1e-5)


def test_hardness_is_the_value_of_the_mean_loss():
    samples, _ = make_pass(12)
    losses = (
        -samples.logits_NC.double().log_softmax(1).gather(1, samples.labels_N[:, None]).squeeze(1).numpy()
    )
    kept = highest_of_classes(losses, samples.labels_N, 5)
    choice = ask("hardness", samples, 5)
    assert choice.positions_K.tolist() == kept
    values_K = shapley_by_subsets(5, lambda s: hardness_utility(losses[kept][list(s)]))
    expected = (values_K - values_K.min()) / (values_K.max() - values_K.min())
    np.testing.assert_allclose(choice.weights_K.numpy(), expected, atol=1e-5)


def test_el2n_is_the_length_of_the_error():
    samples, _ = make_pass(20)
    error = samples.logits_NC.softmax(1) - functional.one_hot(samples.labels_N, 3)
    choice = ask("el2n", samples, 8)
    assert choice.positions_K.tolist() == highest_of_classes(error.norm(dim=1), samples.labels_N, 8)
    assert choice.weights_K is None


def test_random_is_drawn_once_and_adaptive_random_each_time():
    samples, _ = make_pass(60)
    g, memory = torch.Generator().manual_seed(0), {}
    fixed = [ask("random", samples, 20, memory=memory, generator=g).positions_K for _ in range(2)]
    anew = [ask("adaptive-random", samples, 20, generator=g).positions_K for _ in range(2)]
    assert torch.equal(*fixed) and not torch.equal(*anew)
    for positions in [*fixed, *anew]:
        assert samples.labels_N[positions].bincount().tolist() == quotas(samples.labels_N, 20)


def test_infobatch_has_the_loss_of_all_samples_on_average():
    """What is kept, with its weights, has the sum of losses that all samples have."""
    samples, _ = make_pass(30, seed=4)
    losses_N = functional.cross_entropy(samples.logits_NC, samples.labels_N, reduction="none")
    num_above = int((losses_N >= losses_N.mean()).sum())
    count = num_above + 6
    g, sums = torch.Generator().manual_seed(0), []
    for _ in range(3000):
        choice = ask("infobatch", samples, count, generator=g)
        assert set((losses_N >= losses_N.mean()).nonzero().squeeze(1).tolist()) <= set(
            choice.positions_K.tolist()
        )
        sums.append((losses_N[choice.positions_K] * choice.weights_K).sum().item())
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - losses_N.sum().item()) < 4 * error


def test_auto_draws_from_all_but_the_worst_scores_of_its_averaged_passes():
    """Two passes averaged by hand; the noise scores are those of `chgval detect-noise`."""
    g = torch.Generator().manual_seed(2)
    labels_N = torch.arange(80) % 3
    clear_NC = 4.0 * functional.one_hot(labels_N, 3)
    features_ND = clear_NC + torch.randn(80, 3, generator=g)
    labels_N[::5] = (labels_N[::5] + 1) % 3
    first, second = (
        Predictions(clear_NC + torch.randn(80, 3, generator=g), features_ND.clone(), labels_N)
        for _ in range(2)
    )
    # These are suspicious in the first pass, and open in the second.
    first.logits_NC[6:9] = 3 * first.logits_NC[6:9].roll(1, dims=1)
    first.features_ND[6:9] = 3 * first.features_ND[6:9].roll(1, dims=1)
    second.logits_NC[6:9] *= 0.2
    first_NC, second_NC = (samples.logits_NC.softmax(1) for samples in (first, second))
    # In the end all of the estimated noise is left out: as many samples as the scores add up to.
    left, left_by_second = (
        set(np.argsort(score_N)[: 80 - int(score_N.sum())].tolist())
        for score_N in (
            score_labels(labels_N.numpy(), seen_NC.numpy(), second.features_ND, quick=True).noise_score_N
            for seen_NC in ((0.8 * first_NC + second_NC) / 1.8, second_NC)
        )
    )
    assert 40 < len(left) < 78 and left != left_by_second
    assert (np.bincount(labels_N[sorted(left)], minlength=3) >= quotas(labels_N, 24)).all()

    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(35):
        memory: dict[str, torch.Tensor] = {}
        at_first = ask("auto", first, 24, memory=memory, epoch=1, generator=generator)
        assert not memory and at_first.weights_K is None
        # Only the pass of the averaged weights is made.
        later = {"memory": memory, "generator": generator, "predict_samples": None}
        ask("auto", first, 24, epoch=5, **later)
        drawn.append((at_first, ask("auto", second, 24, epoch=8, **later)))
    assert {int(p) for first_choice, _ in drawn for p in first_choice.positions_K} == set(range(80))
    assert {int(p) for _, last_choice in drawn for p in last_choice.positions_K} == left


@pytest.mark.parametrize("has_bias", [True, False])
def test_glister_makes_the_steps_that_autograd_makes(has_bias):
    samples, head = make_pass(45, seed=2, has_bias=has_bias)
    held, _ = make_pass(25, seed=3, has_bias=has_bias)
    with torch.no_grad():
        held = Predictions(head(held.features_ND), held.features_ND, held.labels_N, has_bias)

    def gradient(features, labels, reduction):
        loss = functional.cross_entropy(head(features), labels, reduction=reduction)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(head.parameters()))])

    each = [gradient(samples.features_ND[i : i + 1], samples.labels_N[i : i + 1], "sum") for i in range(45)]
    chosen: list[int] = []
    for size in [3, 3] + [2] * 13:
        held_gradient = gradient(held.features_ND, held.labels_N, "mean")
        left = [i for i in range(45) if i not in chosen]
        part = sorted(left, key=lambda i: -float(each[i] @ held_gradient))[:size]
        chosen += part
        step = sum(each[i] for i in part) * 0.5
        with torch.no_grad():
            for parameter, change in zip(
                head.parameters(), step.split([p.numel() for p in head.parameters()]), strict=True
            ):
                parameter -= change.view_as(parameter)
    assert ask("glister", samples, 32, held).positions_K.tolist() == sorted(chosen)


def test_the_pursuit_is_the_textbook_one_where_all_weights_are_positive():
    rng = np.random.default_rng(0)
    atoms_BK = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    weights_B = np.zeros(12)
    weights_B[[1, 4, 7, 10]] = [3.0, 1.0, 0.5, 2.0]
    chosen, weights = matching_pursuit(atoms_BK, weights_B @ atoms_BK, 3, regularisation=1e-12)
    expected_B = orthogonal_mp(atoms_BK.T, weights_B @ atoms_BK, n_nonzero_coefs=3)
    assert chosen.tolist() == [1, 10, 4] and set(chosen) == set(np.flatnonzero(expected_B))
    np.testing.assert_allclose(weights, expected_B[chosen], atol=1e-9)


def test_the_pursuit_fits_weights_of_0_or_more_with_a_penalty():
    """Each step against a general-purpose optimiser under bounds."""
    rng = np.random.default_rng(1)
    atoms_BK, target_K = rng.normal(size=(9, 5)), rng.normal(size=5)
    chosen: list[int] = []
    weights = np.zeros(0)
    for _ in range(4):
        correlations = atoms_BK @ (target_K - weights @ atoms_BK[chosen])
        chosen.append(max((b for b in range(9) if b not in chosen), key=lambda b: correlations[b]))

        def objective(w):
            return ((w @ atoms_BK[chosen] - target_K) ** 2).sum() + REGULARISATION * (w**2).sum()

        bounds = [(0, None)] * len(chosen)
        weights = minimize(objective, np.ones(len(chosen)), bounds=bounds, tol=1e-14).x
    got_chosen, got_weights = matching_pursuit(atoms_BK, target_K, 4)
    assert got_chosen.tolist() == chosen
    np.testing.assert_allclose(got_weights, weights, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_gradmatch_chooses_among_batches_by_the_gradients_that_autograd_gives(seed):
    """42 samples in batches of 8: the last has 2, and what is chosen last is cut or filled up to 18."""
    samples, head = make_pass(42, seed=seed)

    def gradient(positions):
        loss = functional.cross_entropy(head(samples.features_ND[positions]), samples.labels_N[positions])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(head.parameters()))]).numpy()

    order = torch.randperm(42, generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [order[start : start + 8] for start in range(0, 42, 8)]
    atoms = np.stack([gradient(batch) for batch in batches]).astype(np.float64)
    chosen, weights = matching_pursuit(atoms, gradient(list(range(42))).astype(np.float64), 3)
    expected = {}
    for b, weight in zip(chosen, weights, strict=True):
        expected.update({i: weight * 8 / len(batches[b]) for i in batches[b]})
    expected = dict(list(expected.items())[:18])
    mean = sum(expected.values()) / len(expected)
    for i in order:
        if len(expected) < 18:
            expected.setdefault(i, mean)
    choice = ask("gradmatch", samples, 18, generator=torch.Generator().manual_seed(seed))
    assert choice.positions_K.tolist() == sorted(expected)
    np.testing.assert_allclose(
        choice.weights_K.numpy(), [expected[i] for i in sorted(expected)], rtol=1e-3, atol=1e-5
    )

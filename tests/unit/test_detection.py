import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from chgval.data.annotations import majority
from chgval.detection import noise_model, scores
from chgval.detection.calibration import calibrated_by, confident_labels, estimate_rate
from chgval.detection.evidence import LeftOutGaussians, best_scale
from chgval.detection.noise_model import Even, Given, Table, fit_noise_model, log_probability
from chgval.detection.rules import REGISTRY as RULES
from chgval.detection.rules import Judged
from chgval.detection.rules.auto import automatic_cut
from chgval.detection.scores import score_labels
from chgval.detection.settings import SETTINGS
from chgval.detection.signals import Annotations
from chgval.detection.verdict import annotators_shown, notes_on, verdict_of
from tests import oracles

NAN = float("nan")
C = 5


def world(rate, *, seed=0, n=3000, distance=2.6, pairs=False, width=8):
    """Features from class Gaussians that overlap, true classes, and labels from known confusions."""
    rng = np.random.default_rng(seed)
    true_N = rng.integers(0, C, n)
    means_CD = np.eye(C, width) * distance
    roots_ND = rng.normal(size=(n, width)) + means_CD[true_N]
    offsets_N = np.where(true_N % 2 == 0, 1, C - 1) if pairs else rng.integers(1, C, n)
    labels_N = np.where(rng.random(n) < rate, (true_N + offsets_N) % C, true_N)
    features_ND = (np.sign(roots_ND) * roots_ND**2).astype(np.float32)
    return torch.from_numpy(features_ND), labels_N, true_N


def averaged(seed, n, c=4):
    """Probabilities of a model that often predicts the label."""
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, c, n)
    labels_N[:c] = np.arange(c)
    probabilities_NC = rng.dirichlet(np.full(c, 0.4), n) + 0.6 * np.eye(c)[labels_N] * rng.random((n, 1))
    return (probabilities_NC / probabilities_NC.sum(1, keepdims=True)).astype(np.float32), labels_N


def uniform(n):
    """What a model says that knows nothing."""
    return np.full((n, C), 1 / C, np.float32)


@pytest.mark.parametrize("shrinkage", [0.1, 0.6])
@pytest.mark.parametrize("weighted", [False, True])
def test_gaussians_without_a_sample_are_those_of_a_fit_without_it(shrinkage, weighted):
    rng = np.random.default_rng(3)
    labels_N = np.r_[np.arange(3), np.arange(3), rng.integers(0, 3, 34)]
    features_ND = rng.normal(size=(40, 6)) * 3 + labels_N[:, None]
    weights_N = rng.random(40) if weighted else np.ones(40)
    gaussians = LeftOutGaussians(torch.from_numpy(features_ND), torch.from_numpy(labels_N), 3)
    fitted = gaussians.fit(torch.from_numpy(weights_N).float())
    actual_NC = fitted.log_likelihoods(torch.arange(40), shrinkage).double().numpy()
    expected_NC = oracles.left_out_log_likelihoods(features_ND, labels_N, weights_N, 3, shrinkage)
    np.testing.assert_allclose(
        actual_NC - actual_NC.max(1, keepdims=True),
        expected_NC - expected_NC.max(1, keepdims=True),
        atol=2e-4,
    )


def test_gaussians_do_not_know_the_label_they_are_asked_about():
    """Features that say nothing predict no label, however many there are."""
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 4, 400)
    features_ND = torch.from_numpy(rng.normal(size=(400, 300)))
    logs_NC = LeftOutGaussians(features_ND, torch.from_numpy(labels_N), 4).log_probabilities()
    assert (logs_NC.argmax(1) == labels_N).mean() == pytest.approx(0.25, abs=0.07)
    np.testing.assert_allclose(np.exp(logs_NC).sum(1), 1, atol=1e-5)


def test_classes_of_one_sample_and_constant_features_have_finite_evidence():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    features_ND = torch.arange(7.0)[:, None].repeat(1, 3) + torch.tensor([[0.0, 1.0, 5.0]])
    logs_NC = LeftOutGaussians(features_ND, labels, 4).log_probabilities()
    assert np.isfinite(logs_NC[:, :3]).all() and not np.isnan(logs_NC).any()
    assert logs_NC[6, 2] == pytest.approx(logs_NC[6, :2].max())  # the only one of its class
    logs_NC = LeftOutGaussians(torch.ones(7, 3), labels, 4).log_probabilities()
    assert not np.isnan(logs_NC).any()


def test_the_best_scale_is_the_best_of_many():
    probabilities_NC, labels_N = averaged(0, 300)
    logs_NC = np.log(probabilities_NC)

    def loss(scale):
        scaled_NC = scale * logs_NC
        return (np.log(np.exp(scaled_NC).sum(1)) - scaled_NC[np.arange(300), labels_N]).mean()

    scale, least = best_scale(logs_NC, labels_N)
    assert least == pytest.approx(loss(scale), rel=1e-5)
    assert all(least <= loss(other) + 1e-6 for other in np.geomspace(0.05, 20, 200))


@pytest.mark.parametrize("affinity", [0.0, 0.3])
@pytest.mark.parametrize("kind", [Table, Even])
def test_the_posterior_is_bayes_rule_sample_by_sample(kind, affinity):
    rng = np.random.default_rng(1)
    logs_CS = np.log(rng.dirichlet(np.ones(4), 20)).T.astype(np.float32)
    labels_S = rng.integers(0, 4, 20)
    bias_C = rng.normal(size=4).astype(np.float32)
    odds_CC = rng.dirichlet(np.ones(4), 4).astype(np.float32)
    confusions = Table(odds_CC, None, None, 0.0)
    if kind is Even:
        right_C = rng.uniform(0.5, 0.9, 4).astype(np.float32)
        confusions = Even(right_C, (1 - right_C) / 3, 0.0)
        odds_CC = np.diag(right_C) + (1 - np.eye(4)) * confusions.wrong_C[:, None]
    model = noise_model.NoiseModel(1.7, affinity, bias_C, [confusions], 0.0)
    actual_CS = model.posterior(logs_CS, Given.by_one(labels_S))
    for sample in range(20):
        true_C = np.exp(1.7 * logs_CS[:, sample] + bias_C)
        true_C /= true_C.sum()
        joint_C = true_C * oracles.label_probability(true_C, labels_S[sample], odds_CC, affinity)
        np.testing.assert_allclose(actual_CS[:, sample], joint_C / joint_C.sum(), atol=1e-5)


def test_labels_of_several_annotators_count_together_as_bayes_rule_has_it():
    """Two annotators with confusions of their own, and two that share theirs; many gave no label."""
    rng = np.random.default_rng(3)
    logs_CS = np.log(rng.dirichlet(np.ones(4), 60)).T.astype(np.float32)
    labels_AS = rng.integers(0, 4, (4, 60))
    labels_AS[:, 1:][rng.random((4, 59)) < 0.4] = -1
    odds_GCC = rng.dirichlet(np.ones(4), (3, 4)).astype(np.float32)
    groups_A = np.array([0, 1, 2, 2])
    tables = [Table(odds_CC, None, None, 0.0) for odds_CC in odds_GCC]
    model = noise_model.NoiseModel(1.3, 0.2, np.zeros(4, np.float32), tables, 0.0)
    actual_CS = model.posterior(logs_CS, Given(labels_AS, groups_A))
    for sample in range(60):
        true_C = np.exp(1.3 * logs_CS[:, sample])
        true_C /= true_C.sum()
        joint_C = true_C.copy()
        independent = 1 / (1 + SETTINGS.correlation * ((labels_AS[:, sample] >= 0).sum() - 1))
        for label, group in zip(labels_AS[:, sample], groups_A, strict=True):
            if label >= 0:
                joint_C *= oracles.label_probability(true_C, label, odds_GCC[group], 0.2) ** independent
        np.testing.assert_allclose(actual_CS[:, sample], joint_C / joint_C.sum(), atol=1e-5)


@pytest.mark.parametrize("affinity", [0.0, 0.2])
def test_a_fit_finds_the_confusions_that_made_the_labels(affinity):
    """Labels drawn, class by class, with odds that are known."""
    rng = np.random.default_rng(0)
    true_SC = rng.dirichlet(np.full(4, 0.15), 12_000).clip(1e-6)
    true_SC /= true_SC.sum(1, keepdims=True)
    true_S = (true_SC.cumsum(1) > rng.random((12_000, 1))).argmax(1)
    odds_CC = np.array([[0.8, 0.2, 0, 0], [0.05, 0.9, 0.05, 0], [0, 0, 1, 0], [0.1, 0.1, 0.1, 0.7]])
    weights_SC = odds_CC[true_S] * true_SC**affinity
    shown_SC = weights_SC / weights_SC.sum(1, keepdims=True)
    labels_S = (shown_SC.cumsum(1) > rng.random((12_000, 1))).argmax(1)
    logs_CS = np.log(true_SC).T.astype(np.float32)
    model = fit_noise_model(logs_CS, Given.by_one(labels_S), 1.0, affinity)
    np.testing.assert_allclose(model.confusions[0].odds_CC, odds_CC, atol=0.03)
    # And the true sharpening and affinity explain the labels best.
    for sharpening, other in ((1.3, affinity), (0.8, affinity), (1.0, affinity + 0.3)):
        assert (
            fit_noise_model(logs_CS, Given.by_one(labels_S), sharpening, other).log_evidence
            < model.log_evidence
        )


def test_noise_that_is_even_is_found_the_short_way_too(monkeypatch):
    """In memory of the order C, against the matrix of confusions."""
    features_ND, labels_N, _ = world(0.2)
    logs_CS = LeftOutGaussians(features_ND, torch.from_numpy(labels_N), C).log_probabilities().T.copy()
    given = Given.by_one(labels_N)
    table = fit_noise_model(logs_CS, given, 1.3, 0.1)
    monkeypatch.setattr(noise_model, "SETTINGS", dataclasses.replace(SETTINGS, most_paired=C - 1))
    even = fit_noise_model(logs_CS, given, 1.3, 0.1)
    assert isinstance(even.confusions[0], Even)
    difference_CS = table.posterior(logs_CS, given) - even.posterior(logs_CS, given)
    assert np.abs(difference_CS).mean() < 0.005


@settings(max_examples=100)
@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.floats(0.1, 20), min_size=3, max_size=3))
def test_the_evidence_is_that_of_drawing_one_after_another(draws, prior):
    """Polya's urn: each draw is as probable as its class's share of what is in the urn by then."""
    urn, expected = np.array(prior), 0.0
    for draw in draws:
        expected += np.log(urn[draw] / urn.sum())
        urn[draw] += 1
    counts_CK = np.bincount(np.array(draws, dtype=int), minlength=3)[None].astype(float)
    assert log_probability(counts_CK, np.array([prior])) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_a_known_world_is_read_right(rate, pairs):
    """Scores are calibrated, the interval holds the rate, and corrections are mostly right."""
    features_ND, labels_N, true_N = world(rate, pairs=pairs)
    signals = score_labels(labels_N, uniform(len(labels_N)), features_ND)
    score_N, wrong_N = signals.noise_score_N, labels_N != true_N
    found = estimate_rate(score_N, signals.noise_score_std_N)
    assert found.low <= wrong_N.mean() <= found.high
    assert found.rate == pytest.approx(wrong_N.mean(), rel=0.15)
    for low in np.arange(0, 1, 0.25):
        among = (score_N >= low) & (score_N < low + 0.25)
        if among.sum() > 100:
            assert wrong_N[among].mean() == pytest.approx(score_N[among].mean(), abs=0.1)
    caught = (score_N >= automatic_cut(score_N)) & wrong_N
    right_N = signals.suggested_label_N == true_N
    claimed_N = signals.suggested_probability_N / np.maximum(score_N, 1e-9)
    assert right_N[caught].mean() == pytest.approx(claimed_N[caught].mean(), abs=0.08)
    assert right_N[caught].mean() > 0.75
    assert (signals.suggested_label_N != labels_N).all()


@pytest.mark.parametrize("distance", [1.5, 2.6, 5.0])
def test_labels_without_noise_are_hardly_flagged(distance):
    """However much the classes overlap."""
    features_ND, labels_N, _ = world(0.0, distance=distance)
    signals = score_labels(labels_N, uniform(len(labels_N)), features_ND)
    assert signals.noise_score_N.mean() <= 0.03
    assert (signals.noise_score_N >= automatic_cut(signals.noise_score_N)).mean() <= 0.005


@pytest.mark.parametrize("width", [1, 64])
def test_labels_of_what_cannot_be_told_apart_are_not_flagged(width):
    """Identical samples, and features that say nothing: no verdict, and a sentence that says so."""
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 2, 60)
    features = torch.ones(60, 8) if width == 1 else torch.from_numpy(rng.normal(size=(60, width)))
    signals = score_labels(labels_N, np.full((60, 2), 0.5, np.float32), features)
    assert not (signals.noise_score_N >= automatic_cut(signals.noise_score_N)).any()
    assert signals.explained < SETTINGS.least_explained
    assert estimate_rate(signals.noise_score_N, signals.noise_score_std_N).high == 1.0
    (note,) = notes_on(verdict_of(signals, labels_N, labels_N, ["a", "b"]))
    assert note.startswith("nothing can be said")


def test_what_the_run_knows_beside_the_features_ranks_labels_better():
    """Probabilities that are sure of the true class lift the ranking, and the rate stays."""
    features_ND, labels_N, true_N = world(0.2, distance=1.8)
    rng = np.random.default_rng(1)
    knowing_NC = uniform(len(labels_N)) + 0.4 * np.eye(C)[true_N] + 0.2 * rng.random((len(labels_N), C))
    knowing_NC = (knowing_NC / knowing_NC.sum(1, keepdims=True)).astype(np.float32)
    wrong_N = labels_N != true_N
    without, with_it = (
        score_labels(labels_N, probabilities_NC, features_ND).noise_score_N
        for probabilities_NC in (uniform(len(labels_N)), knowing_NC)
    )
    worst = round(wrong_N.sum())
    assert wrong_N[np.argsort(-with_it)[:worst]].mean() > wrong_N[np.argsort(-without)[:worst]].mean() + 0.1
    assert with_it.mean() == pytest.approx(without.mean(), abs=0.005)


def test_a_network_that_predicts_wrong_labels_has_learned_them_by_heart():
    features_ND, labels_N, true_N = world(0.2, distance=4.0)
    for predicted_N, memorised in ((labels_N, 1.0), (true_N, 0.0)):
        averaged_NC = (0.1 * uniform(len(labels_N)) + 0.9 * np.eye(C)[predicted_N]).astype(np.float32)
        signals = score_labels(labels_N, averaged_NC, features_ND, features_ND)
        assert signals.memorised == pytest.approx(memorised, abs=0.1)
        notes = notes_on(verdict_of(signals, labels_N, true_N, "abcde"))
        assert [note.startswith("the network has learned") for note in notes] == [True] * round(memorised)


def test_a_network_that_predicts_right_labels_has_learned_nothing_by_heart():
    """Where no label is wrong there is none to learn by heart, however sure the network is."""
    features_ND, labels_N, _ = world(0.0)
    averaged_NC = (0.1 * uniform(len(labels_N)) + 0.9 * np.eye(C)[labels_N]).astype(np.float32)
    signals = score_labels(labels_N, averaged_NC, features_ND, features_ND)
    assert signals.memorised == 0
    assert notes_on(verdict_of(signals, labels_N, labels_N, "abcde")) == []


def test_that_an_estimate_says_little_is_told():
    """Models that disagree: the interval is two of their deviations to either side, and two of the count."""
    labels_N = np.arange(400) % 2
    for deviation, is_told in ((0.01, False), (0.08, True)):
        signals = dataclasses.replace(
            scores.NoiseSignals.unknown(400),
            explained=0.5,
            noise_score_N=np.full(400, 0.2),
            noise_score_std_N=np.full(400, deviation),
        )
        verdict = verdict_of(signals, labels_N, labels_N, ["a", "b"])
        margin = 2 * np.sqrt(deviation**2 + 0.2 * 0.8 / 400)
        assert verdict["rate"]["high"] == pytest.approx(0.2 + margin)
        told = [f"anything from {max(0, 0.2 - margin):.0%} to {0.2 + margin:.0%} of the labels"] * is_told
        assert [note[: len(told[0])] for note in notes_on(verdict)] == told


def test_classes_that_are_never_predicted_are_named():
    signals = dataclasses.replace(scores.NoiseSignals.unknown(4), explained=0.5)
    (note,) = notes_on(verdict_of(signals, np.array([0, 1, 2, -1]), np.array([0, 0, 0, -1]), ["a", "b", "c"]))
    assert note.startswith("never predicted: b, c.")
    assert notes_on({}) == []


def test_the_order_of_samples_and_unknown_ones_make_no_difference():
    features_ND, labels_N, _ = world(0.2, n=500)
    averaged_NC = np.random.default_rng(2).dirichlet(np.ones(C), 500).astype(np.float32)
    alone = score_labels(labels_N, averaged_NC, features_ND)
    order = np.random.default_rng(1).permutation(500)
    mixed = score_labels(
        np.concatenate([[0, 1, 2], labels_N[order], [-1, -1]]),
        np.concatenate([np.full((3, C), NAN, np.float32), averaged_NC[order], averaged_NC[:2]]),
        torch.cat([torch.full((3, 8), NAN), features_ND[order], features_ND[:2]]),
    )
    np.testing.assert_allclose(mixed.noise_score_N[3:-2], alone.noise_score_N[order], atol=0.01)
    for rows in (slice(0, 3), slice(-2, None)):
        for score_N in (mixed.noise_score_N, mixed.noise_score_std_N, mixed.suggested_probability_N):
            assert np.isnan(score_N[rows]).all()
        assert (mixed.suggested_label_N[rows] == -1).all() and (mixed.confident_label_N[rows] == -1).all()


def test_tiny_and_lopsided_inputs_have_finite_scores():
    for probabilities, labels in (
        ([[1.0, 0.0]], [0]),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 1]),
        ([[0.0, 1.0, 0.0]] * 4, [0, 0, 0, 0]),  # classes 1 and 2 have no samples
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]] * 20 + [[0.0, 0.0, 1.0]], [0, 1] * 20 + [2]),
    ):
        features_ND = torch.tensor(probabilities) * 9
        signals = score_labels(np.array(labels), np.array(probabilities, np.float32), features_ND)
        assert np.isfinite(signals.noise_score_N).all()
        assert ((signals.noise_score_N >= 0) & (signals.noise_score_N <= 1)).all()


def test_memory_is_what_is_told_beforehand():
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 300, 6000)
    features_ND = 4 * torch.eye(300)[torch.from_numpy(labels_N)] + torch.randn(6000, 300)
    averaged_NC = np.full((6000, 300), 1 / 300, np.float32)
    tracemalloc.start()  # sees what NumPy takes, not PyTorch
    score_labels(labels_N, averaged_NC, features_ND)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.5 < peak / scores.memory_bytes(6000, 300, 0) < 1.1


def test_confident_labels_flag_what_cleanlab_flags():
    filters = pytest.importorskip("cleanlab.filter", reason="cleanlab is not installed")
    for seed in range(5):
        probabilities_NC, labels_N = averaged(seed, n=1000)
        confident_N = confident_labels(probabilities_NC, labels_N)
        ours = (confident_N >= 0) & (confident_N != labels_N)
        theirs = filters.find_label_issues(
            labels_N, probabilities_NC.astype(np.float64), filter_by="confident_learning", n_jobs=1
        )
        np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=200)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_automatic_cut_is_the_best_of_all(scores):
    """Against every cut: expected F1 is highest, and half of the flags or more are expected to be right."""
    score_N = np.array(scores)
    cut = automatic_cut(score_N)
    candidates = {}
    for candidate in score_N:
        flagged = score_N >= candidate
        if score_N[flagged].mean() >= 0.5:
            candidates[candidate] = 2 * score_N[flagged].sum() / (flagged.sum() + score_N.sum())
    if not candidates:
        assert not (score_N >= cut).any()
    else:
        assert candidates[cut] == pytest.approx(max(candidates.values()))


def test_the_rates_interval_is_two_deviations_wide():
    rate = estimate_rate(np.array([0.0, 0.5, 1.0] * 100), np.array([0.0, 0.3, 0.0] * 100))
    margin = 2 * np.sqrt(0.1**2 + 0.5 * 0.5 / 300)
    assert (rate.low, rate.rate, rate.high) == pytest.approx((0.5 - margin, 0.5, 0.5 + margin))
    unknown = estimate_rate(np.array([0.0, 0.0]), np.array([NAN, NAN]))
    assert (unknown.low, unknown.rate, unknown.high) == (0.0, 0.0, 1.0)


def test_scores_by_another_figure_are_the_means_of_samples_alike_in_it():
    """Against scikit-learn's isotonic regression: its steps and their sums, and an order within them."""
    from sklearn.isotonic import IsotonicRegression

    rng = np.random.default_rng(0)
    value_N = rng.normal(size=500).round(2)  # with ties
    score_N = (1 / (1 + np.exp(3 * value_N)) + 0.3 * rng.random(500)).clip(0, 1)
    calibrated_N = calibrated_by(value_N, score_N)
    order = np.argsort(value_N, kind="stable")
    assert (np.diff(calibrated_N[order]) <= 1e-12).all()
    steps_N = IsotonicRegression(increasing=False).fit_transform(value_N, score_N)
    for step in np.unique(steps_N):
        assert calibrated_N[steps_N == step].mean() == pytest.approx(step)
    assert len(np.unique(calibrated_N)) > 3 * len(np.unique(steps_N))
    # A few wrong labels among many right ones stay few.
    few_N = np.r_[np.ones(3), np.zeros(20_000)]
    assert calibrated_by(-few_N, few_N).sum() == pytest.approx(3)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_features_of_any_scale_and_rows_in_any_order_are_judged_alike(scale):
    """One large feature that says nothing, and labels that go round in the order of the rows."""
    features_ND, labels_N, true_N = world(0.2, n=4 * C * 800)
    order = np.lexsort((labels_N, np.arange(len(labels_N)) - np.searchsorted(np.sort(labels_N), labels_N)))
    noise_N1 = scale * torch.randn(len(labels_N), 1, generator=torch.Generator().manual_seed(0))
    wide_ND = torch.cat([features_ND * torch.logspace(-2, 2, 8), noise_N1], dim=1)
    expected = score_labels(labels_N, uniform(len(labels_N)), torch.cat([features_ND, noise_N1 / scale], 1))
    found = score_labels(labels_N[order], uniform(len(labels_N)), wide_ND[order])
    wrong = (labels_N != true_N).mean()
    assert expected.noise_score_N.mean() == pytest.approx(wrong, rel=0.1)
    assert found.noise_score_N.mean() == pytest.approx(expected.noise_score_N.mean(), abs=0.005)
    assert (found.suggested_label_N != labels_N[order]).all()


def test_rows_without_finite_features_are_left_out():
    features_ND, labels_N, _ = world(0.2, n=400)
    features_ND[7, 2], features_ND[8, 0] = torch.inf, torch.nan
    signals = score_labels(labels_N, uniform(400), features_ND)
    assert np.flatnonzero(np.isnan(signals.noise_score_N)).tolist() == [7, 8]


def test_named_rules_find_the_lower_cluster_and_the_higher_losses():
    rng = np.random.default_rng(0)
    wrong_N = rng.random(2000) < 0.1
    value_N = rng.normal(np.where(wrong_N, -5, 0), 1)
    nothing_N = np.zeros(2000, dtype=int)
    judged = Judged(
        score_K=value_N, value_K=value_N, loss_K=-value_N, label_K=nothing_N, confident_label_K=nothing_N
    )
    np.testing.assert_array_equal(RULES["chg"].flag(judged), value_N < -2.5)
    assert (RULES["gmm"].flag(judged) == wrong_N).mean() > 0.98


def crowd(rates, share=1.0, *, seed=0, n=3000):
    """A world in which annotators of these rates each gave a share of the labels, at random."""
    features_ND, _, true_N = world(0.0, seed=seed, n=n)
    rng = np.random.default_rng(seed + 1)
    wrong_NA = rng.random((n, len(rates))) < rates
    labels_NA = np.where(
        wrong_NA, (true_N[:, None] + rng.integers(1, C, wrong_NA.shape)) % C, true_N[:, None]
    )
    labels_NA[rng.random(wrong_NA.shape) > share] = -1
    return features_ND, labels_NA, true_N


def best_consensus(labels_NA, true_N, rates, *, distance=2.6):
    """The most probable classes to somebody who knows how the world was made (as `world` and `crowd` do)."""
    features_ND = world(0.0, n=len(true_N))[0].double().numpy()
    roots_ND = np.sign(features_ND) * np.sqrt(np.abs(features_ND))
    logs_NC = -((roots_ND[:, None] - np.eye(C, 8) * distance) ** 2).sum(2) / 2
    for labels_N, rate in zip(labels_NA.T, rates, strict=True):
        said = labels_N >= 0
        agrees_NC = labels_N[said, None] == np.arange(C)
        logs_NC[said] += np.where(agrees_NC, np.log(1 - rate), np.log(rate / (C - 1)))
    return logs_NC.argmax(1)


@pytest.mark.parametrize(
    ("rates", "share"), [((0.05, 0.2, 0.4), 1.0), ((0.1, 0.1, 0.2, 0.3, 0.5), 0.4), ((0.3,) * 40, 0.05)]
)
def test_a_consensus_is_about_as_good_as_that_of_somebody_who_knows_all(rates, share):
    """Annotators of many labels, of some, and 40 of so few that they are judged together."""
    features_ND, labels_NA, true_N = crowd(rates, share)
    names = tuple(map(str, range(len(rates))))
    annotations = Annotations(names, labels_NA, are_told_apart=True)
    labels_N = majority(annotations)
    has = labels_N >= 0
    signals = score_labels(labels_N, uniform(len(labels_N)), features_ND, None, annotations)
    consensus = signals.consensus
    right_N = consensus.label_N == true_N
    best = (best_consensus(labels_NA, true_N, rates) == true_N)[has].mean()
    assert right_N[has].mean() > best - 0.01 > (labels_N == true_N)[has].mean()
    assert consensus.probability_N[has].mean() == pytest.approx(right_N[has].mean(), abs=0.015)
    assert np.nanmean(signals.noise_score_N) == pytest.approx((labels_N != true_N)[has].mean(), abs=0.015)
    found_A = np.nanmean(consensus.scores_NA, 0)
    if share > 0.1:
        np.testing.assert_allclose(found_A, rates, atol=0.03)
    assert np.nanmean(consensus.scores_NA) == pytest.approx(
        (labels_NA != true_N[:, None])[labels_NA >= 0].mean(), abs=0.02
    )
    assert np.isnan(consensus.scores_NA[labels_NA < 0]).all()
    # What is said of the label that was trained on is said of it in the table of all labels too.
    rows, annotators = np.nonzero((labels_NA == labels_N[:, None]) & has[:, None])
    scores = consensus.scores_NA[rows, annotators]
    np.testing.assert_allclose(scores, signals.noise_score_N[rows], atol=1e-6)
    assert (consensus.label_N[~has] == -1).all() and np.isnan(consensus.probability_N[~has]).all()


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_a_single_annotator_is_judged_as_if_there_were_none(rate):
    features_ND, labels_N, _ = world(rate, n=600)
    averaged_NC = np.random.default_rng(2).dirichlet(np.ones(C), 600).astype(np.float32)
    alone = score_labels(labels_N, averaged_NC, features_ND)
    annotations = Annotations(("a",), labels_N[:, None], are_told_apart=True)
    counted = score_labels(labels_N, averaged_NC, features_ND, None, annotations)
    np.testing.assert_array_equal(counted.noise_score_N, alone.noise_score_N)
    np.testing.assert_array_equal(counted.suggested_label_N, alone.suggested_label_N)
    np.testing.assert_array_equal(counted.suggested_probability_N, alone.suggested_probability_N)
    np.testing.assert_allclose(counted.consensus.scores_NA[:, 0], alone.noise_score_N, atol=1e-6)


def test_suggestions_do_not_hang_on_scores_that_are_zero(monkeypatch):
    """Where nothing is suspected at all, the most probable other class is suggested all the same."""
    features_ND, labels_N, _ = world(0.0, n=600)
    annotations = Annotations(("a", "b"), np.stack([labels_N, labels_N], 1), are_told_apart=True)
    found = score_labels(labels_N, uniform(600), features_ND, None, annotations)
    zeros = (np.zeros(600), np.zeros(600))
    monkeypatch.setattr(scores._Mixture, "scores", lambda *_: zeros)
    unsuspected = score_labels(labels_N, uniform(600), features_ND, None, annotations)
    np.testing.assert_array_equal(unsuspected.suggested_label_N, found.suggested_label_N)
    assert len(np.unique(unsuspected.suggested_label_N)) == C


def test_annotators_of_few_labels_are_one_group():
    """Whose labels are all counted, each with the sample that it was given to."""
    rng = np.random.default_rng(0)
    labels_NA = rng.integers(0, 3, (40, 5))
    labels_NA[9:, 1] = labels_NA[8:, 3] = labels_NA[:33, 4] = -1  # 9, 8 and 7 labels; 3 * 3 are many
    known = np.arange(2, 40)
    annotations = Annotations(tuple("abcde"), labels_NA, are_told_apart=True)
    given = scores._given(annotations, known, 3)
    assert given.groups_A.tolist() == [0, 1, 2, 2]
    np.testing.assert_array_equal(given.labels_AS[:2], labels_NA[known][:, [0, 2]].T)
    samples, labels = given.of_group(2)
    few_NA = labels_NA[known][:, [1, 3, 4]]
    expected = [(n, label) for n, row in enumerate(few_NA) for label in row if label >= 0]
    assert sorted(zip(samples.tolist(), labels.tolist(), strict=True)) == sorted(expected)
    samples, labels = given.of_group(0)
    np.testing.assert_array_equal(np.arange(38)[samples], np.arange(38))
    np.testing.assert_array_equal(labels, labels_NA[known, 0])
    alike = scores._given(Annotations(tuple("abcde"), labels_NA, are_told_apart=False), known, 3)
    assert set(alike.groups_A) == {0} and (alike.labels_AS >= 0).sum() == (labels_NA[known] >= 0).sum()


def test_annotators_are_listed_by_what_they_cost():
    told = [("a", 1000, 0.2), ("b", 1, 1.0), ("c", 500, 0.5), ("d", 800, 0.0), ("e", 0, None)]
    verdict = {"annotators": [dict(zip(("name", "labels", "wrong"), one, strict=True)) for one in told]}
    assert [row[2] for row in annotators_shown(verdict)] == ["c", "a", "b", "d"]
    assert annotators_shown(verdict)[0] == ("50.0%", "500", "c")
    assert annotators_shown({}) == []


def test_annotators_that_are_not_told_apart_may_come_in_any_order():
    features_ND, labels_NA, _ = crowd((0.2, 0.2, 0.3), 0.8, n=600)
    shuffled_NA = np.random.default_rng(5).permuted(labels_NA, axis=1)
    one, other = (
        Annotations(("a", "b", "c"), given, are_told_apart=False) for given in (labels_NA, shuffled_NA)
    )
    labels_N = majority(one)
    first = score_labels(labels_N, uniform(600), features_ND, None, one)
    second = score_labels(labels_N, uniform(600), features_ND, None, other)
    np.testing.assert_allclose(first.noise_score_N, second.noise_score_N, atol=1e-6)
    np.testing.assert_array_equal(first.consensus.label_N, second.consensus.label_N)


def test_labels_are_ranked_at_least_as_well_as_cleanlab_ranks_those_of_several_annotators():
    peer = pytest.importorskip("cleanlab.multiannotator", reason="cleanlab is not installed")
    features_ND, labels_NA, true_N = crowd((0.1, 0.2, 0.35), n=1500)
    annotations = Annotations(("a", "b", "c"), labels_NA, are_told_apart=True)
    labels_N = majority(annotations)
    signals = score_labels(labels_N, uniform(1500), features_ND, None, annotations)
    left_out_NC = np.exp(LeftOutGaussians(features_ND, torch.from_numpy(labels_N), C).log_probabilities())
    theirs = peer.get_label_quality_multiannotator(labels_NA, left_out_NC, verbose=False)
    wrong_NA = labels_NA != true_N[:, None]
    quality_NA = theirs["detailed_label_quality"].to_numpy()
    ours = roc_auc_score(wrong_NA.ravel(), signals.consensus.scores_NA.ravel())
    assert ours >= roc_auc_score(wrong_NA.ravel(), -quality_NA.ravel())
    said_N = theirs["label_quality"]["consensus_label"].to_numpy()
    assert (signals.consensus.label_N == true_N).mean() >= (said_N == true_N).mean()


def test_identical_samples_say_nothing_of_annotators_either():
    rng = np.random.default_rng(0)
    annotations = Annotations(("a", "b"), rng.integers(0, C, (200, 2)), are_told_apart=True)
    labels_N = majority(annotations)
    signals = score_labels(labels_N, uniform(200), torch.ones(200, 4), None, annotations)
    np.testing.assert_array_equal(signals.consensus.label_N, labels_N)
    assert np.isnan(signals.consensus.probability_N).all() and np.isnan(signals.consensus.scores_NA).all()
    told = verdict_of(signals, labels_N, labels_N, "abcde", annotations)["annotators"]
    assert [(who["labels"], who["wrong"]) for who in told] == [(200, None)] * 2

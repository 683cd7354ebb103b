import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chgval import noise
from chgval.noise import (
    automatic_cut,
    calibrated_by,
    confident_labels,
    estimate_rate,
    expected_softness,
    log_evidence,
    mixture_flags,
    pooled_confusions,
    read_noise,
    sharpened,
    two_means_flags,
)
from tests import oracles

NAN = float("nan")


def world(rate, *, seed=0, n=6000, c=6, ambiguity=0.6, pairs=False):
    """True classes drawn from known posteriors, labels from known confusions, probabilities half as sharp.

    What `read_noise` is given is the true posterior to the power of SOFTNESS_OF_15_EPOCHS: exactly what it
    takes averaged probabilities for.
    """
    rng = np.random.default_rng(seed)
    posterior_NC = rng.dirichlet(np.full(c, ambiguity / c), n)
    true_N = (posterior_NC.cumsum(1) > rng.random((n, 1))).argmax(1)
    wrong_N = rng.random(n) < rate
    offsets_N = np.where(true_N % 2 == 0, 1, c - 1) if pairs else rng.integers(1, c, n)
    labels_N = np.where(wrong_N, (true_N + offsets_N) % c, true_N)
    powers_NC = np.maximum(posterior_NC, 1e-9) ** noise.SOFTNESS_OF_15_EPOCHS
    return (powers_NC / powers_NC.sum(1, keepdims=True)).astype(np.float32), labels_N, true_N


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_a_known_world_is_read_right(rate, pairs):
    """Where the model holds, scores are calibrated, the rate is right and corrections mostly are."""
    probabilities_NC, labels_N, true_N = world(rate, pairs=pairs)
    signals = read_noise(probabilities_NC, labels_N, 15)
    score_N, wrong_N = signals.noise_score_N, labels_N != true_N
    assert estimate_rate(score_N).rate == pytest.approx(rate, abs=0.02)
    for low in np.arange(0, 1, 0.2):
        among = (score_N >= low) & (score_N < low + 0.2)
        if among.sum() > 200:
            assert wrong_N[among].mean() == pytest.approx(score_N[among].mean(), abs=0.08)
    flagged = score_N >= automatic_cut(score_N)
    # Of the labels that are wrong, corrections are right as often as the probabilities say.
    claimed_N = signals.suggested_probability_N / np.maximum(score_N, 1e-9)
    right_N = signals.suggested_label_N == true_N
    caught = flagged & wrong_N
    assert (
        right_N[caught].mean() == pytest.approx(claimed_N[caught].mean(), abs=0.05)
        and right_N[caught].mean() > 0.75
    )
    assert (signals.suggested_label_N != labels_N).all()


def test_labels_without_noise_are_hardly_flagged():
    probabilities_NC, labels_N, _ = world(0.0)
    score_N = read_noise(probabilities_NC, labels_N, 15).noise_score_N
    assert (score_N >= automatic_cut(score_N)).mean() <= 0.005


@pytest.mark.parametrize("pairs", [False, True])
def test_scores_equal_a_plain_expectation_maximisation(pairs):
    """The grouped products against the same model written one sample at a time."""
    probabilities_NC, labels_N, _ = world(0.2, n=300, c=4, pairs=pairs)
    signals = read_noise(probabilities_NC, labels_N, 15)
    expected_NC = oracles.posterior_by_expectation_maximisation(
        np.asarray(sharpened(probabilities_NC, expected_softness(300, 15)), np.float64),
        probabilities_NC,
        labels_N,
        steps=noise.STEPS,
        strengths=noise.PRIOR_STRENGTHS,
        overstated=noise.STRENGTH_OVERSTATED,
    )
    rows = np.arange(len(labels_N))
    np.testing.assert_allclose(signals.noise_score_N, 1 - expected_NC[rows, labels_N], atol=2e-5)
    expected_NC[rows, labels_N] = -1
    np.testing.assert_array_equal(signals.suggested_label_N, expected_NC.argmax(1))
    np.testing.assert_allclose(signals.suggested_probability_N, expected_NC.max(1), atol=2e-5)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.floats(0.1, 20), min_size=3, max_size=3))
def test_the_evidence_is_that_of_drawing_one_after_another(draws, prior):
    """Polya's urn: each draw is as probable as its class's share of what is in the urn by then."""
    urn, expected = np.array(prior), 0.0
    for draw in draws:
        expected += np.log(urn[draw] / urn.sum())
        urn[draw] += 1
    counts_CK = np.bincount(np.array(draws, dtype=int), minlength=3)[None].astype(float)
    assert log_evidence(counts_CK, np.array(prior)) == pytest.approx(expected, abs=1e-9)


def test_confusions_are_pooled_as_far_as_the_classes_agree():
    """Even noise: a rare class's own few samples are outweighed. Pairs: each class keeps its partner."""
    rng = np.random.default_rng(0)
    sizes_C = np.array([40, 1000, 1000, 1000, 1000, 1000])
    even_C = np.full(6, 0.04) + np.eye(6) * 0.76
    counts_CC = np.array([rng.multinomial(size, even_C[row]) for row, size in enumerate(sizes_C)], float)
    pooled_CC = pooled_confusions(counts_CC)
    np.testing.assert_allclose(pooled_CC, even_C, atol=0.02)
    own_CC = counts_CC / counts_CC.sum(1, keepdims=True)
    assert np.abs(pooled_CC - even_C)[0].max() < np.abs(own_CC - even_C)[0].max() / 3

    partners_CC = np.eye(6) * 0.8 + np.eye(6)[[1, 0, 3, 2, 5, 4]] * 0.2
    counts_CC = np.array([rng.multinomial(size, partners_CC[row]) for row, size in enumerate(sizes_C)], float)
    np.testing.assert_allclose(pooled_confusions(counts_CC + 1e-12)[1:], partners_CC[1:], atol=0.03)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 1.5))
def test_sharpening_keeps_the_class_means_and_the_order_within_pairs_of_classes(seed, softness):
    rng = np.random.default_rng(seed)
    plain_NC = rng.dirichlet([5.0, 1.0, 0.3], 200).astype(np.float32)
    sharp_NC = sharpened(plain_NC, softness)
    np.testing.assert_allclose(sharp_NC.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(sharp_NC.mean(0), plain_NC.mean(0), rtol=0.02, atol=1e-4)
    usual = (plain_NC > 1e-6).all(1) & (sharp_NC > 1e-6).all(1)  # the odds of the others are not in floats
    odds_N, plain_odds_N = (np.log(p[usual, 0] / p[usual, 1]) for p in (sharp_NC, plain_NC))
    np.testing.assert_allclose(
        odds_N - odds_N.mean(), (plain_odds_N - plain_odds_N.mean()) / softness, atol=1e-2
    )


def test_sharpening_a_model_that_is_sure_of_one_class_throughout_stays_finite():
    """The powers of the other class are too small for float32; no factor can give back its mean."""
    unsure_N = np.logspace(-12, -7, 9, dtype=np.float32)
    plain_NC = np.stack([unsure_N, 1 - unsure_N], axis=1)
    with np.errstate(over="raise", invalid="raise"):
        sharp_NC = sharpened(plain_NC, 0.13)
    np.testing.assert_allclose(sharp_NC, plain_NC, atol=1e-6)


def test_the_order_of_samples_and_unknown_ones_make_no_difference():
    probabilities_NC, labels_N, _ = world(0.2, n=500)
    alone = read_noise(probabilities_NC, labels_N, 15)
    order = np.random.default_rng(1).permutation(500)
    mixed_NC = np.concatenate(
        [np.full((3, 6), NAN, np.float32), probabilities_NC[order], probabilities_NC[:2]]
    )
    mixed_N = np.concatenate([[0, 1, 2], labels_N[order], [-1, -1]])
    mixed = read_noise(mixed_NC, mixed_N, 15)
    np.testing.assert_allclose(mixed.noise_score_N[3:-2], alone.noise_score_N[order], atol=1e-5)
    for rows in (slice(0, 3), slice(-2, None)):
        assert (
            np.isnan(mixed.noise_score_N[rows]).all() and np.isnan(mixed.suggested_probability_N[rows]).all()
        )
        assert (mixed.suggested_label_N[rows] == -1).all() and (mixed.confident_label_N[rows] == -1).all()


def test_tiny_and_lopsided_inputs_have_finite_scores():
    for probabilities, labels in (
        ([[1.0, 0.0]], [0]),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 1]),
        ([[0.0, 1.0, 0.0]] * 4, [0, 0, 0, 0]),  # classes 1 and 2 have no samples
    ):
        signals = read_noise(np.array(probabilities, np.float32), np.array(labels), 1)
        assert np.isfinite(signals.noise_score_N).all()
        assert ((signals.noise_score_N >= 0) & (signals.noise_score_N <= 1)).all()


def test_confident_labels_flag_what_cleanlab_flags():
    filters = pytest.importorskip("cleanlab.filter", reason="cleanlab is not installed")
    for seed in range(5):
        probabilities_NC, labels_N, _ = world(0.2, seed=seed, n=1000)
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


def test_the_rates_interval_is_that_of_odds_off_by_two():
    rate = estimate_rate(np.array([0.0, 0.5, 1.0]))
    assert (rate.low, rate.rate, rate.high) == pytest.approx(((0 + 1 / 3 + 1) / 3, 0.5, (0 + 2 / 3 + 1) / 3))


def test_scores_by_value_fall_with_the_value_and_keep_their_mean():
    rng = np.random.default_rng(0)
    value_N, score_N = rng.normal(size=500), rng.random(500)
    calibrated_N = calibrated_by(value_N, score_N)
    assert (np.diff(calibrated_N[np.argsort(value_N)]) <= 1e-12).all()
    assert calibrated_N.mean() == pytest.approx(score_N.mean())


def test_named_rules_find_the_lower_cluster_and_the_higher_losses():
    rng = np.random.default_rng(0)
    wrong_N = rng.random(2000) < 0.1
    value_N = rng.normal(np.where(wrong_N, -5, 0), 1)
    np.testing.assert_array_equal(two_means_flags(value_N), value_N < -2.5)
    assert (mixture_flags(-value_N) == wrong_N).mean() > 0.98


def test_many_classes_are_read_as_few_whose_wrong_labels_are_spread_evenly(monkeypatch):
    """The short way, in memory of the order C, against matrices of confusions that are filled evenly."""
    rng = np.random.default_rng(0)
    labels_N = np.sort(rng.integers(0, 7, 400))
    labels_N[:7] = np.arange(7)
    probabilities_NC = rng.dirichlet(np.full(7, 0.3), size=400)
    probabilities_NC[np.arange(400), labels_N] += rng.random(400)
    probabilities_NC = (probabilities_NC / probabilities_NC.sum(1, keepdims=True)).astype(np.float32)

    def evenly(counts_CC):
        right_C, total_C = counts_CC.diagonal(), counts_CC.sum(1)
        right_or_wrong_C2 = np.stack([right_C, total_C - right_C], axis=1)
        rates_C2 = noise._backed(right_or_wrong_C2, right_or_wrong_C2.sum(0) / counts_CC.sum())
        matrix_CC = np.repeat(rates_C2[:, 1:] / 6, 7, axis=1)
        np.fill_diagonal(matrix_CC, rates_C2[:, 0])
        return matrix_CC

    with monkeypatch.context() as patch:
        patch.setattr(noise, "pooled_confusions", evenly)
        expected = read_noise(probabilities_NC, labels_N, 15)
    monkeypatch.setattr(noise, "MOST_PAIRED", 6)
    found = read_noise(probabilities_NC, labels_N, 15)
    np.testing.assert_allclose(found.noise_score_N, expected.noise_score_N, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.suggested_probability_N, expected.suggested_probability_N, rtol=1e-3)

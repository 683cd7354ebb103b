"""Which labels are probably wrong: read from averaged class probabilities, and cut into flags.

docs/detection.md says how, and what else was tried.

Shape legend: N samples, C classes.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from chgval.records import FloatArray, IntArray, NoiseRate, NoiseSignals

Probabilities = NDArray[np.float32]

# Averaged probabilities are less sure of the true class than the images deserve: they are means over changing
# weights and augmentations, of a model that was trained on the noise too. Raising them to 1 / softness mends
# that. The more often a model has seen a label, the more of it is in the probabilities, and the sharper they
# must become before the label is weighed against them; and the fewer samples there are, the more a model
# learns each by heart.
SOFTNESS_OF_15_EPOCHS = 0.5
SOFTNESS_POWER = 0.25
MANY_SAMPLES = 10_000
FEW_SAMPLES_POWER = 0.1
# Where hardly any sample is ambiguous, nothing can be mistaken for noise, and sharper is better: below this
# mean ambiguity (1 - highest probability, sharpened) the softness falls with its square root.
AMBIGUITY = 0.1
SMALLEST_AMBIGUITY = 0.01
# What a clean dataset's ambiguous images look like, noise looks like too. The share of predictions that are
# sure enough to tell, by how much the whole may be noisier than they are, and by how much the softness may
# rise so that it is not.
SURE_SHARE = 0.2
LARGEST_EXCESS = 2.2
LARGEST_SOFTENING = 1.5
# Imaginary samples per class that may back what all classes share; the data choose one of these.
PRIOR_STRENGTHS = np.array([0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 3e3, 3e4])
# Classes whose counts are examined for that, evenly spread: what all share shows in some.
MOST_EXAMINED = 100
# With more classes than this, it is not asked which ones are mistaken for which, only how often.
MOST_PAIRED = 1000
# Counts of expectations vary less than those of samples would, and so claim more in common than there is.
STRENGTH_OVERSTATED = 3.0
# Expectation maximisation starts from even confusions at this rate.
FIRST_NOISE = 0.2
STEPS = 60
# Rounds in which sharpened probabilities are given back the class means that they had.
MEAN_ROUNDS = 20
MEAN_TOLERANCE = 1e-4
LARGEST_FACTOR = 1e30
BISECTIONS = 6
# The interval of the noise rate: every score's odds off by this factor, either way.
ODDS_FACTOR = 2.0
# Flags shall be right at least this often.
LEAST_PRECISION = 0.5
SMALLEST_PROBABILITY = 1e-12


def read_noise(probabilities_NC: Probabilities, labels_N: IntArray, num_epochs: int) -> NoiseSignals:
    """Return how probably each label is wrong, and what it should be.

    The sharpened probabilities are taken for those of the true class, before the label is known; a matrix of
    confusions (true class to given label), fitted to the labels by expectation maximisation, says what the
    label adds (docs/detection.md).

    Args:
        probabilities_NC: averaged probabilities, shape (N, C); NaN where a sample was not seen.
        labels_N: given classes, shape (N,); -1 where unknown.
        num_epochs: how often the model was trained on each label.
    """
    known_N = (labels_N >= 0) & np.isfinite(probabilities_NC[:, 0])
    score_N, suggested_probability_N = np.full((2, len(labels_N)), np.nan)
    suggested_N, confident_N = np.full((2, len(labels_N)), -1)
    if known_N.any():
        order = np.flatnonzero(known_N)[np.argsort(labels_N[known_N], kind="stable")]
        groups = _Groups(probabilities_NC[order], labels_N[order])
        posterior_NC = groups.posterior(expected_softness(len(order), num_epochs))
        own_N = _of_label(posterior_NC, groups.labels_N)
        # As 1 - own, the smallest scores would be rounded to 0, and samples of them could not be ranked.
        np.put_along_axis(posterior_NC, groups.labels_N[:, None], 0.0, axis=1)
        others_N = posterior_NC.sum(1, dtype=np.float64)
        score_N[order] = others_N / (others_N + own_N)
        np.put_along_axis(posterior_NC, groups.labels_N[:, None], -1.0, axis=1)
        suggested_N[order] = posterior_NC.argmax(1)
        suggested_probability_N[order] = posterior_NC.max(1)
        confident_N[order] = confident_labels(groups.probabilities_NC, groups.labels_N)
    return NoiseSignals(
        noise_score_N=score_N.clip(0, 1),
        suggested_label_N=suggested_N,
        suggested_probability_N=suggested_probability_N,
        confident_label_N=confident_N,
    )


def expected_softness(num_samples: int, num_epochs: int) -> float:
    """Return the power by which averaged probabilities are flatter than those that the images deserve."""
    by_epochs: float = (15 / num_epochs) ** SOFTNESS_POWER
    by_samples: float = min(1.0, num_samples / MANY_SAMPLES) ** FEW_SAMPLES_POWER
    return SOFTNESS_OF_15_EPOCHS * by_epochs * by_samples


class _Groups:
    """Samples sorted by their given label, so that everything about one label is a slice.

    Args:
        probabilities_NC: of known samples, finite.
        labels_N: their labels, ascending.
    """

    def __init__(self, probabilities_NC: Probabilities, labels_N: IntArray) -> None:
        self.probabilities_NC = probabilities_NC
        self.labels_N = labels_N
        edges = np.searchsorted(labels_N, np.arange(probabilities_NC.shape[1] + 1))
        self._slices = [slice(*pair) for pair in itertools.pairwise(edges)]
        sureness_N = probabilities_NC.max(1)
        num_sure = max(1, round(SURE_SHARE * len(labels_N)))
        self._sure_N = np.argsort(-sureness_N, kind="stable")[:num_sure]
        # Confusions are learned from the sure samples most: ambiguity passes for confusion among the others.
        # The weights fall from 1 to 0 within each predicted class, so that every class is learned about.
        predicted_N = probabilities_NC.argmax(1)
        order = np.lexsort((-sureness_N, predicted_N))
        sizes_C = np.bincount(predicted_N, minlength=probabilities_NC.shape[1])
        places_N = np.arange(len(order)) - np.repeat(sizes_C.cumsum() - sizes_C, sizes_C)
        self._weights_N = np.empty(len(order), dtype=np.float32)
        self._weights_N[order] = 1 - (places_N + 0.5) / np.repeat(sizes_C, sizes_C)

    def posterior(self, softness: float) -> NDArray[np.float32]:
        """Return the probabilities of the true class once the label is known, shape (N, C).

        The softness is the one given, unless the samples that are not sure would then be noisier than the
        sure ones by more than LARGEST_EXCESS: what is that uneven is ambiguity, not noise. Where hardly any
        sample is ambiguous it is noise nevertheless: a wrong label that a model half learned by heart is one
        that it is not sure of.
        """
        prior_NC = sharpened(self.probabilities_NC, softness)
        ambiguity = 1 - float(prior_NC.max(1).mean())
        if ambiguity < AMBIGUITY:
            softness *= (max(ambiguity, SMALLEST_AMBIGUITY) / AMBIGUITY) ** 0.5
            return self._fit(sharpened(self.probabilities_NC, softness))[0]
        posterior_NC, excess = self._fit(prior_NC)
        if excess <= 0:
            return posterior_NC
        low, high = np.log(softness), np.log(LARGEST_SOFTENING * softness)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            posterior_NC, excess = self._fit(sharpened(self.probabilities_NC, np.exp(middle)))
            low, high = (middle, high) if excess > 0 else (low, middle)
        return posterior_NC

    def _fit(self, prior_NC: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Return the posterior, and by how much its noise is more than the sure samples allow."""
        if prior_NC.shape[1] <= MOST_PAIRED:
            posterior_NC = prior_NC * self._confusions(prior_NC).T[self.labels_N]
        else:
            right_C, wrong_C = self._even_confusions(prior_NC)
            posterior_NC = prior_NC * wrong_C
            own_N = _of_label(prior_NC, self.labels_N) * right_C[self.labels_N]
            np.put_along_axis(posterior_NC, self.labels_N[:, None], own_N[:, None].astype(np.float32), axis=1)
        posterior_NC /= posterior_NC.sum(1, keepdims=True)
        score_N = 1 - _of_label(posterior_NC, self.labels_N)
        return posterior_NC, float(score_N.mean() - LARGEST_EXCESS * score_N[self._sure_N].mean())

    def _confusions(self, prior_NC: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the probability of each given label (column) for each true class (row): STEPS of EM."""
        num_classes = prior_NC.shape[1]
        confusions_CC = np.full((num_classes, num_classes), FIRST_NOISE / max(1, num_classes - 1))
        np.fill_diagonal(confusions_CC, 1 - FIRST_NOISE)
        for _ in range(STEPS):
            counts_CC = np.empty((num_classes, num_classes))
            for label, rows in enumerate(self._slices):
                of_label_C = confusions_CC[:, label].astype(np.float32)
                evidence_B = np.maximum(prior_NC[rows] @ of_label_C, SMALLEST_PROBABILITY)
                counts_CC[:, label] = of_label_C * (prior_NC[rows].T @ (self._weights_N[rows] / evidence_B))
            confusions_CC = pooled_confusions(counts_CC + SMALLEST_PROBABILITY)
        return confusions_CC.astype(np.float32)

    def _even_confusions(
        self, prior_NC: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return, for each true class, the probability of its own label and of each other one.

        The same as `_confusions` where wrong labels are spread evenly, but in memory of the order C.
        """
        num_classes = prior_NC.shape[1]
        own_N = _of_label(prior_NC, self.labels_N)
        right_C = np.full(num_classes, 1 - FIRST_NOISE)
        wrong_C = np.full(num_classes, FIRST_NOISE / (num_classes - 1))
        for _ in range(STEPS):
            difference_N = (right_C - wrong_C)[self.labels_N]
            evidence_N = prior_NC @ wrong_C.astype(np.float32) + own_N * difference_N
            shares_N = self._weights_N / np.maximum(evidence_N, SMALLEST_PROBABILITY)
            own_C = np.bincount(self.labels_N, own_N * shares_N, minlength=num_classes)
            others_C = np.maximum(prior_NC.T @ shares_N.astype(np.float32) - own_C, 0)
            counts_C2 = np.stack([right_C * own_C, wrong_C * others_C], axis=1) + SMALLEST_PROBABILITY
            rates_C2 = _backed(counts_C2, counts_C2.sum(0) / counts_C2.sum())
            right_C, wrong_C = rates_C2[:, 0], rates_C2[:, 1] / (num_classes - 1)
        return right_C.astype(np.float32), wrong_C.astype(np.float32)


def pooled_confusions(counts_CC: FloatArray) -> FloatArray:
    """Return rates of confusion, shape (C, C), rows summing to 1, from counts of true class (row) and label.

    What little a class's own samples tell is backed by what all classes share: how often a label is wrong,
    and, separately, that wrong labels are spread evenly over the other classes. How much either is worth
    against a class's own counts differs from noise to noise, and so is taken from the counts (`_backed`).
    """
    num_classes = len(counts_CC)
    if num_classes == 1:
        return np.ones((1, 1))
    off_diagonal_CC = ~np.eye(num_classes, dtype=bool)
    wrong_CR = counts_CC[off_diagonal_CC].reshape(num_classes, num_classes - 1)
    right_or_wrong_C2 = np.stack([counts_CC.diagonal(), wrong_CR.sum(1)], axis=1)
    shares_CR = _backed(wrong_CR, np.full(num_classes - 1, 1 / (num_classes - 1)))
    rates_C2 = _backed(right_or_wrong_C2, right_or_wrong_C2.sum(0) / counts_CC.sum())
    confusions_CC = np.diag(rates_C2[:, 0])
    confusions_CC[off_diagonal_CC] = (shares_CR * rates_C2[:, 1:]).ravel()
    return confusions_CC


def _backed(counts_CK: FloatArray, common_K: FloatArray) -> FloatArray:
    """Return each row's shares, shape (C, K), backed by imaginary samples in the common shares.

    Their number is the one under which the counts are most probable, if the rows' shares are drawn from a
    Dirichlet distribution around the common ones (empirical Bayes), over STRENGTH_OVERSTATED.
    """
    examined_CK = counts_CK[:: -(-len(counts_CK) // MOST_EXAMINED)]
    evidence = [
        log_evidence(examined_CK, STRENGTH_OVERSTATED * strength * common_K) for strength in PRIOR_STRENGTHS
    ]
    backed_CK = counts_CK + PRIOR_STRENGTHS[np.argmax(evidence)] * common_K
    shares_CK: FloatArray = backed_CK / backed_CK.sum(1, keepdims=True)
    return shares_CK


def log_evidence(counts_CK: FloatArray, prior_K: FloatArray) -> float:
    """Return the log-probability of rows of counts, in a given order, under a Dirichlet-multinomial.

    Args:
        counts_CK: each row a sequence of draws, counted; need not be whole.
        prior_K: parameters of the Dirichlet distribution, shape (K,), greater than 0.
    """
    from scipy.special import gammaln

    totals = gammaln(prior_K.sum()) - gammaln(prior_K.sum() + counts_CK.sum(1))
    return float(totals.sum() + (gammaln(prior_K + counts_CK) - gammaln(prior_K)).sum())


def sharpened(probabilities_NC: Probabilities, softness: float) -> NDArray[np.float32]:
    """Return probabilities raised to 1 / softness, with the class means that they had, shape (N, C).

    Raised alone, they would take from rare classes, of which a model is never as sure, and give to common
    ones. A factor per class, raked until the means fit, gives that back.
    """
    logs_NC = np.log(np.maximum(probabilities_NC, SMALLEST_PROBABILITY)) / softness
    logs_NC -= logs_NC.max(1, keepdims=True)
    powers_NC = np.exp(logs_NC)
    means_C = np.maximum(probabilities_NC.mean(0, dtype=np.float64), SMALLEST_PROBABILITY)
    factors_C = np.ones_like(means_C)
    for _ in range(MEAN_ROUNDS):
        sharp_NC: NDArray[np.float32] = powers_NC * factors_C.astype(np.float32)
        sharp_NC /= sharp_NC.sum(1, keepdims=True)
        ratios_C = means_C / np.maximum(sharp_NC.mean(0, dtype=np.float64), SMALLEST_PROBABILITY)
        if np.abs(ratios_C - 1).max() < MEAN_TOLERANCE:
            break
        # Within what float32 can hold: a class that nothing resembles would otherwise be raised without end.
        factors_C = (factors_C * ratios_C).clip(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return sharp_NC


def confident_labels(probabilities_NC: Probabilities, labels_N: IntArray) -> IntArray:
    """Return the class that each sample confidently belongs to, -1 for none (arXiv:1911.00068, equation 1).

    A class is in question if its probability is at least the mean that samples labelled so give it; of
    several the most probable one is taken. A sample that is predicted as it is labelled belongs there, as
    cleanlab has it too.

    Args:
        probabilities_NC: shape (N, C).
        labels_N: given classes, shape (N,), 0 or more.
    """
    num_classes = probabilities_NC.shape[1]
    counts_C = np.bincount(labels_N, minlength=num_classes)
    sums_C = np.bincount(labels_N, _of_label(probabilities_NC, labels_N), minlength=num_classes)
    thresholds_C = np.where(counts_C > 0, sums_C / counts_C.clip(min=1), np.inf)
    in_question_NC = probabilities_NC >= thresholds_C - 1e-6
    confident_N = np.where(in_question_NC, probabilities_NC, -1.0).argmax(1)
    confident_N = np.where(in_question_NC.any(1), confident_N, -1)
    return np.where(probabilities_NC.argmax(1) == labels_N, labels_N, confident_N)


def estimate_rate(score_N: FloatArray) -> NoiseRate:
    """Return the share of wrong labels that calibrated scores imply (NaN where there are none)."""
    odds_N = score_N / np.maximum(1 - score_N, SMALLEST_PROBABILITY)
    low_N, high_N = (odds_N * factor / (1 + odds_N * factor) for factor in (1 / ODDS_FACTOR, ODDS_FACTOR))
    return NoiseRate(rate=float(score_N.mean()), low=float(low_N.mean()), high=float(high_N.mean()))


def automatic_cut(score_N: FloatArray) -> float:
    """Return the score from which on samples are flagged; infinite if none should be.

    It is the cut of the highest expected F1 among those whose flags are expected to be right at least half of
    the time: on a clean dataset that leaves hardly any.
    """
    total = score_N.sum()
    if not total:
        return np.inf
    # The best F1 flags what exceeds half of it (Lipton et al. 2014, arXiv:1402.1892, theorem 1): iterated
    # from 0, cut and F1 rise to it without sorting all scores.
    f1, last = 0.0, -1.0
    while f1 > last:
        flagged_N = score_N[score_N > f1 / 2]
        last, f1 = f1, 2 * flagged_N.sum() / (len(flagged_N) + total)
    # Short of the best, F1 rises with every flag: as many as the precision allows.
    descending_N = np.sort(flagged_N)[::-1]
    allowed_N = descending_N.cumsum() >= LEAST_PRECISION * np.arange(1, len(descending_N) + 1)
    allowed_N[:-1] &= descending_N[1:] < descending_N[:-1]  # equal scores are flagged together
    return float(descending_N[allowed_N].min(initial=np.inf))


def calibrated_by(order_N: FloatArray, score_N: FloatArray) -> FloatArray:
    """Return scores that depend on another figure alone: the mean score of samples that are alike in it.

    Args:
        order_N: the figure; the lower, the more suspicious.
        score_N: calibrated scores.
    """
    from sklearn.isotonic import isotonic_regression

    order = np.argsort(order_N, kind="stable")
    calibrated_N = np.empty_like(score_N)
    calibrated_N[order] = isotonic_regression(score_N[order], increasing=False)
    return calibrated_N


def two_means_flags(value_N: FloatArray) -> NDArray[np.bool_]:
    """Flag the lower of two clusters of values, as OpenDataVal cuts values for its noisy-sample F1.

    Source: Jiang et al. 2023 (arXiv:2306.10577). It always flags somebody.
    """
    from sklearn.cluster import KMeans

    clusters = KMeans(2, n_init=1, init=np.quantile(value_N, [[0.0], [1.0]])).fit(value_N[:, None])
    flags_N: NDArray[np.bool_] = clusters.labels_ == clusters.cluster_centers_[:, 0].argmin()
    return flags_N


def mixture_flags(loss_N: FloatArray) -> NDArray[np.bool_]:
    """Flag the samples that belong to the higher of two normal distributions of the loss.

    Source: Li et al. 2020 (arXiv:2002.07394), section 3.1. It always flags somebody.
    """
    from sklearn.mixture import GaussianMixture

    means = np.quantile(loss_N, [[0.1], [0.9]])
    mixture = GaussianMixture(2, means_init=means, random_state=0).fit(loss_N[:, None])
    flags_N: NDArray[np.bool_] = mixture.predict(loss_N[:, None]) == mixture.means_[:, 0].argmax()
    return flags_N


def _of_label(figures_NC: NDArray[np.float32], labels_N: IntArray) -> FloatArray:
    """Return each row's figure of its label, shape (N,)."""
    return np.take_along_axis(figures_NC, labels_N[:, None], axis=1)[:, 0].astype(np.float64)

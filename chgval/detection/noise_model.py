"""Noise models: how true classes become given labels, fitted to evidence that has not seen the label.

The evidence says how much a sample looks like each class. A noise model sharpens that into the probabilities
of its true class, and says how readily each true class is labelled as each other one. Both are fitted to the
labels. Where several annotators gave labels, each has confusions of their own.

Shape legend: S samples, C classes, A annotators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chgval.detection.settings import SETTINGS
from chgval.types import FloatArray, IntArray

Floats = NDArray[np.float32]
# Where a count or a probability would be 0.
TINY = 1e-9


@dataclass(frozen=True, slots=True)
class NoiseModel:
    """How true classes become labels.

    Given the evidence p(j|x), the true class has the probability c_j ~ p(j|x)^sharpening b_j, and a sample of
    true class j gets label k with odds T_jk c_k^affinity. Of n annotators each counts as 1 / (1 + (n - 1) r)
    of one that is independent of the others, for a correlation r (the design effect of Kish 1965).

    Attributes:
        sharpening, affinity: the powers.
        log_bias_C: natural logarithm of b.
        confusions: T, of each group of annotators who are alike.
        log_evidence: natural logarithm of the probability of the labels it was fitted to, less what its
            freedom is worth.
    """

    sharpening: float
    affinity: float
    log_bias_C: Floats
    confusions: Sequence[Confusions]
    log_evidence: float

    def posterior(self, logs_CS: Floats, given: Given) -> Floats:
        """Return the probabilities of the true class once the labels are known, shape (C, S).

        Args:
            logs_CS: the evidence, natural logarithms of probabilities.
            given: the labels.
        """
        true_CS, powers_CS = _priors(logs_CS, self.sharpening, self.affinity, self.log_bias_C)
        return _seen(true_CS, powers_CS, self.confusions, given)[0]


@dataclass(frozen=True, slots=True)
class Given:
    """Who gave which label.

    Attributes:
        labels_AS: given classes, shape (A, S); -1 where an annotator gave none.
        groups_A: the group that each annotator belongs to, from 0; those of one group confuse alike.
    """

    labels_AS: IntArray
    groups_A: IntArray

    @classmethod
    def by_one(cls, labels_S: IntArray) -> Given:
        """Return what a single annotator gave."""
        return cls(labels_S[None], np.zeros(1, dtype=np.int64))

    def of(self, samples: IntArray | slice) -> Given:
        """Return the labels of some of the samples."""
        return Given(self.labels_AS[:, samples], self.groups_A)

    def of_group(self, group: int) -> tuple[IntArray | slice, IntArray]:
        """Return samples, each as often as the group labelled it, and these labels."""
        labels_AS = self.labels_AS[self.groups_A == group]
        if len(labels_AS) == 1 and labels_AS.min(initial=0) >= 0:
            return slice(None), labels_AS[0]
        annotators, samples = np.nonzero(labels_AS >= 0)
        return samples, labels_AS[annotators, samples]


def fit_noise_model(
    logs_CS: Floats, given: Given, sharpening: float, affinity: float, *, clean: bool = False
) -> NoiseModel:
    """Fit the confusions and the frequencies of the true classes, by expectation maximisation.

    Args:
        logs_CS: evidence that has not seen the labels, natural logarithms of probabilities.
        given: the labels.
        sharpening: see NoiseModel.
        affinity: see NoiseModel.
        clean: whether there is no noise at all, and only the frequencies are fitted.
    """
    num_classes = len(logs_CS)
    start: Confusions
    if clean:
        start = Clean()
    elif num_classes <= SETTINGS.most_paired:
        start = Table.start(num_classes)
    else:
        start = Even.start(num_classes)
    groups = [given.of_group(group) for group in range(given.groups_A.max() + 1)]
    confusions = [start] * len(groups)
    log_bias_C = np.zeros(num_classes, dtype=np.float32)
    last = -np.inf
    for step in range(SETTINGS.steps):
        true_CS, powers_CS = _priors(logs_CS, sharpening, affinity, log_bias_C)
        joint_CS, log_likelihood = _seen(true_CS, powers_CS, confusions, given)
        is_refit = step % SETTINGS.refits == 0
        confusions = [
            table.updated(joint_CS[:, s], true_CS[:, s], powers_CS[:, s], labels, is_refit=is_refit)
            for table, (s, labels) in zip(confusions, groups, strict=True)
        ]
        log_bias_C += np.log((joint_CS.sum(1) + 1) / (true_CS.sum(1) + 1))
        log_bias_C -= log_bias_C.mean()
        if abs(log_likelihood - last) < SETTINGS.tolerance * logs_CS.shape[1]:
            break
        last = log_likelihood
    freedom = sum(table.freedom for table in confusions)
    return NoiseModel(sharpening, affinity, log_bias_C, confusions, log_likelihood - freedom)


def _seen(
    true_CS: Floats, powers_CS: Floats, confusions: Sequence[Confusions], given: Given
) -> tuple[Floats, float]:
    """Return the probabilities of the true class given the labels, and the labels' log-likelihood."""
    joint_CS = true_CS.copy()
    log_likelihood = 0.0
    count_S = (given.labels_AS >= 0).sum(0)
    power_S = (1 / (1 + (count_S - 1).clip(min=0) * SETTINGS.correlation)).astype(np.float32)
    for labels_S, group in zip(given.labels_AS, given.groups_A, strict=True):
        known: IntArray | slice = (
            slice(None) if labels_S.min(initial=0) >= 0 else np.flatnonzero(labels_S >= 0)
        )
        label_CK = confusions[group].of_label(powers_CS[:, known], labels_S[known])
        if len(given.labels_AS) > 1:
            label_CK **= power_S[known]
        label_CK *= joint_CS[:, known]
        # One annotator after the other: the product of many would vanish.
        evidence_K = np.maximum(label_CK.sum(0), TINY)
        joint_CS[:, known] = label_CK / evidence_K
        log_likelihood += float(np.log(evidence_K).sum(dtype=np.float64))
    return joint_CS, log_likelihood


def _priors(logs_CS: Floats, sharpening: float, affinity: float, log_bias_C: Floats) -> tuple[Floats, Floats]:
    """Return the probabilities of the true class before the label is known, and their affinity powers."""
    log_true_CS = np.float32(sharpening) * logs_CS + log_bias_C[:, None]
    log_true_CS -= log_true_CS.max(0)
    true_CS = np.exp(log_true_CS)
    sums_S = true_CS.sum(0)
    true_CS /= sums_S
    if affinity == 0:
        return true_CS, np.ones_like(true_CS)
    log_true_CS -= np.log(sums_S)
    return true_CS, np.exp(np.float32(affinity) * log_true_CS)


@dataclass(frozen=True, slots=True)
class Clean:
    """Confusions of which there are none: every label is that of the true class. Methods as in Table."""

    freedom: float = 0.0

    def of_label(self, powers_CS: Floats, labels_S: IntArray) -> Floats:  # noqa: D102
        shown_CS = np.zeros_like(powers_CS)
        shown_CS[labels_S, np.arange(len(labels_S))] = 1.0
        return shown_CS

    def updated(  # noqa: D102
        self, joint_CS: Floats, true_CS: Floats, powers_CS: Floats, labels_S: IntArray, *, is_refit: bool
    ) -> Clean:
        del joint_CS, true_CS, powers_CS, labels_S, is_refit
        return self


@dataclass(frozen=True, slots=True)
class Table:
    """Odds of every label (column) for every true class (row), shape (C, C), rows summing to 1.

    What little a class's own samples tell is backed by what all classes share: how often a label is wrong,
    and that wrong labels are spread evenly over the other classes, or go where the evidence itself is unsure.

    Attributes:
        odds_CC: T.
        shares_prior, rates_prior: imaginary counts of wrong labels, and of right and wrong ones.
        freedom: how much less probable the counts are if the odds are not known beforehand, in nats
            (Cheeseman and Stutz 1996: completed counts under their Dirichlet distribution).
    """

    odds_CC: Floats
    shares_prior: _Prior | None
    rates_prior: _Prior | None
    freedom: float

    @classmethod
    def start(cls, num_classes: int) -> Table:
        """Return even confusions at the first noise."""
        odds_CC = np.full((num_classes, num_classes), SETTINGS.first_noise / (num_classes - 1), np.float32)
        np.fill_diagonal(odds_CC, 1 - SETTINGS.first_noise)
        return cls(odds_CC, None, None, 0.0)

    def of_label(self, powers_CS: Floats, labels_S: IntArray) -> Floats:
        """Return the probability of each sample's label for every true class, shape (C, S).

        Args:
            powers_CS: probabilities of the true class, to the power of the affinity.
            labels_S: given classes.
        """
        own_S = powers_CS[labels_S, np.arange(len(labels_S))]
        shown_CS: Floats = self.odds_CC[:, labels_S] * own_S / (self.odds_CC @ powers_CS)
        return shown_CS

    def updated(
        self, joint_CS: Floats, true_CS: Floats, powers_CS: Floats, labels_S: IntArray, *, is_refit: bool
    ) -> Table:
        """Return the confusions after one step of expectation maximisation.

        Args:
            joint_CS: probabilities of the true class given the label.
            true_CS: the same without it.
            powers_CS: as in `of_label`.
            labels_S: given classes.
            is_refit: whether to choose anew how much all classes share.
        """
        num_classes = len(self.odds_CC)
        given_CS = np.zeros_like(joint_CS)
        given_CS[labels_S, np.arange(len(labels_S))] = 1.0
        counts_CC = (joint_CS @ given_CS.T).astype(np.float64) + TINY
        off_diagonal_CC = ~np.eye(num_classes, dtype=bool)
        wrong_CR = counts_CC[off_diagonal_CC].reshape(num_classes, num_classes - 1)
        rates_C2 = np.stack([counts_CC.diagonal(), wrong_CR.sum(1)], axis=1)
        shares_prior, rates_prior = self.shares_prior, self.rates_prior
        if is_refit or shares_prior is None or rates_prior is None:
            even_CR = np.full_like(wrong_CR, 1 / (num_classes - 1))
            unsure_CC = (joint_CS @ true_CS.T).astype(np.float64) + TINY
            unsure_CR = unsure_CC[off_diagonal_CC].reshape(num_classes, num_classes - 1)
            unsure_CR /= unsure_CR.sum(1, keepdims=True)
            shares_prior = _Prior.choose(wrong_CR, [even_CR, unsure_CR, (even_CR + unsure_CR) / 2])
            rates_prior = _common_prior(rates_C2)
        shares_CR, shares_freedom = shares_prior.back(wrong_CR)
        backed_C2, rates_freedom = rates_prior.back(rates_C2)
        wanted_CC = np.diag(backed_C2[:, 0])
        wanted_CC[off_diagonal_CC] = (shares_CR * backed_C2[:, 1:]).ravel()
        # Odds that make the samples' mean probabilities of labels those (iterative scaling).
        inverse_CS = joint_CS / (self.odds_CC @ powers_CS)
        expected_CC = (inverse_CS @ powers_CS.T) * self.odds_CC / np.maximum(joint_CS.sum(1), TINY)[:, None]
        odds_CC = self.odds_CC * wanted_CC / np.maximum(expected_CC, TINY)
        odds_CC = (odds_CC / odds_CC.sum(1, keepdims=True)).astype(np.float32)
        return Table(odds_CC, shares_prior, rates_prior, shares_freedom + rates_freedom)


@dataclass(frozen=True, slots=True)
class Even:
    """Odds of each class's own label, and of any other one: wrong labels are spread evenly.

    The same as Table where that is so, in memory of the order C.

    Attributes:
        right_C, wrong_C: T_jj, and T_jk of any k other than j; right_C + (C - 1) wrong_C is 1.
        freedom: as in Table.
    """

    right_C: Floats
    wrong_C: Floats
    freedom: float

    @classmethod
    def start(cls, num_classes: int) -> Even:
        """Return even confusions at the first noise."""
        right_C = np.full(num_classes, 1 - SETTINGS.first_noise, np.float32)
        return cls(right_C, (1 - right_C) / np.float32(num_classes - 1), 0.0)

    def of_label(self, powers_CS: Floats, labels_S: IntArray) -> Floats:
        """Return the probability of each sample's label for every true class, shape (C, S)."""
        own = (labels_S, np.arange(len(labels_S)))
        totals_CS = self._totals(powers_CS)
        shown_CS: Floats = self.wrong_C[:, None] * powers_CS[own] / totals_CS
        shown_CS[own] = self.right_C[labels_S] * powers_CS[own] / totals_CS[own]
        return shown_CS

    def updated(
        self, joint_CS: Floats, true_CS: Floats, powers_CS: Floats, labels_S: IntArray, *, is_refit: bool
    ) -> Even:
        """Return the confusions after one step; see Table."""
        del true_CS, is_refit
        num_classes = len(self.right_C)
        totals_C = joint_CS.sum(1, dtype=np.float64) + 2 * TINY
        own_joint_S = joint_CS[labels_S, np.arange(len(labels_S))]
        right_counts_C = np.bincount(labels_S, own_joint_S, minlength=num_classes) + TINY
        rates_C2 = np.stack([right_counts_C, np.maximum(totals_C - right_counts_C, TINY)], axis=1)
        backed_C2, freedom = _common_prior(rates_C2).back(rates_C2)
        shown_CS = self.right_C[:, None] * powers_CS / self._totals(powers_CS)
        expected_right_C = (joint_CS * shown_CS).sum(1) / totals_C
        right_C = self.right_C * backed_C2[:, 0] / np.maximum(expected_right_C, TINY)
        wrong_C = self.wrong_C * backed_C2[:, 1] / np.maximum(1 - expected_right_C, TINY)
        sums_C = right_C + (num_classes - 1) * wrong_C
        return Even((right_C / sums_C).astype(np.float32), (wrong_C / sums_C).astype(np.float32), freedom)

    def _totals(self, powers_CS: Floats) -> Floats:
        totals_CS: Floats = self.wrong_C[:, None] * powers_CS.sum(0)
        totals_CS += (self.right_C - self.wrong_C)[:, None] * powers_CS
        return totals_CS


Confusions = Table | Even | Clean


def num_odds(num_classes: int) -> int:
    """Return how many numbers the confusions of so many classes have."""
    return num_classes**2 if num_classes <= SETTINGS.most_paired else 2 * num_classes


@dataclass(frozen=True, slots=True)
class _Prior:
    """A Dirichlet distribution of the shares in each row of counts: imaginary counts, shape (C, K)."""

    counts_CK: FloatArray

    @classmethod
    def choose(cls, counts_CK: FloatArray, means: Sequence[FloatArray]) -> _Prior:
        """Return the one under which the counts are most probable (empirical Bayes).

        Args:
            counts_CK: may be expectations, not whole.
            means: candidates of the shares, shape (C, K) each; how much they weigh is chosen too.
        """
        candidates = [strength * mean for mean in means for strength in SETTINGS.strengths]
        return cls(max(candidates, key=lambda prior_CK: log_probability(counts_CK, prior_CK)))

    def back(self, counts_CK: FloatArray) -> tuple[FloatArray, float]:
        """Return the shares of counts and imaginary counts together, and what that freedom is worth."""
        backed_CK = counts_CK + self.counts_CK
        shares_CK: FloatArray = backed_CK / backed_CK.sum(1, keepdims=True)
        known = float((counts_CK * np.log(shares_CK)).sum())
        return shares_CK, known - log_probability(counts_CK, self.counts_CK)


def _common_prior(rates_C2: FloatArray) -> _Prior:
    common_2 = rates_C2.sum(0) / rates_C2.sum()
    return _Prior.choose(rates_C2, [np.broadcast_to(common_2, rates_C2.shape)])


def log_probability(counts_CK: FloatArray, prior_CK: FloatArray) -> float:
    """Return the log-probability of rows of counts, in a given order, under a Dirichlet-multinomial.

    Args:
        counts_CK: each row a sequence of draws, counted; need not be whole.
        prior_CK: parameters of each row's Dirichlet distribution, greater than 0.
    """
    from scipy.special import gammaln

    prior_CK = np.maximum(prior_CK, TINY)
    totals_C = prior_CK.sum(1)
    totals = gammaln(totals_C) - gammaln(totals_C + counts_CK.sum(1))
    return float(totals.sum() + (gammaln(prior_CK + counts_CK) - gammaln(prior_CK)).sum())

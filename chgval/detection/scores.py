"""How probably each label is wrong, and what it should be: evidence and noise models put together.

docs/detection.md says how, docs/research/detection.md what else was tried.

Shape legend: N samples, K of them known, C classes, D features, A annotators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chgval.detection.calibration import calibrated_by, confident_labels
from chgval.detection.evidence import (
    LOWEST_LOG,
    LeftOutGaussians,
    best_scale,
    judged_rows,
    rows_of_every_class,
)
from chgval.detection.noise_model import Floats, Given, NoiseModel, fit_noise_model, num_odds
from chgval.detection.settings import SETTINGS
from chgval.detection.signals import Annotations, Consensus, NoiseSignals
from chgval.types import FloatArray, IntArray

# Rows times classes worked on at a time.
CHUNK_ENTRIES = 1_000_000
SMALLEST_PROBABILITY = 1e-12


def score_labels(
    labels_N: IntArray,
    averaged_NC: Floats,
    unseen_ND: Tensor | None,
    seen_ND: Tensor | None = None,
    annotations: Annotations | None = None,
    *,
    quick: bool = False,
) -> NoiseSignals:
    """Return how probably each label is wrong, and what it should be.

    Class Gaussians of all other samples say what a sample looks like to something that has not seen its
    label. Noise models are fitted to that, and their average says how many labels are wrong. Which ones they
    are is said by all evidence together; a score is the mean of what the noise models say of samples alike in
    that.

    Args:
        labels_N: given classes, shape (N,); -1 where unknown.
        averaged_NC: averaged probabilities of the run, shape (N, C); NaN where a sample was not seen.
        unseen_ND: last-layer inputs of a view that was not trained on, or embeddings, shape (N, D); None if
            the probabilities themselves are by models that were not trained on their samples.
        seen_ND: last-layer inputs of a view that was trained on, shape (N, E); None where there are none.
        annotations: what several annotators said, if they did; the given classes are then their majority.
        quick: whether to fit the Gaussians once, and fewer noise models: four times as fast, for a run that
            asks again and again. Of many classes that is so in any case.
    """
    from scipy.special import entr

    signals = NoiseSignals.unknown(len(labels_N))
    known_N = (labels_N >= 0) & np.isfinite(averaged_NC).all(1)
    for features_ND in (unseen_ND, seen_ND):
        if features_ND is not None:
            known_N &= features_ND.isfinite().all(1).numpy()
    known = np.flatnonzero(known_N)
    if not len(known):
        return signals
    labels_K, averaged_KC = labels_N[known], averaged_NC[known]
    signals.confident_label_N[known] = confident_labels(averaged_KC, labels_K)
    num_classes = averaged_NC.shape[1]
    quick = quick or num_classes > SETTINGS.most_paired
    entropy = float(entr(np.bincount(labels_K) / len(labels_K)).sum())
    signals.noise_score_N[known] = 0.0
    given = Given.by_one(labels_K)
    if annotations is not None:
        given = _given(annotations, known, num_classes)
        signals.consensus = _consensus_of(labels_N, known, annotations)
    if entropy == 0:  # one class only: nothing can be mistaken
        return signals

    rows, labels = torch.from_numpy(known), torch.from_numpy(labels_K)
    unseen = None if unseen_ND is None else LeftOutGaussians(unseen_ND[rows], labels, num_classes)
    if unseen is None:
        unseen_CK = _scaled(averaged_KC, labels_K).clip(min=LOWEST_LOG)
    else:
        unseen_CK = unseen.log_probabilities().T.copy()
    signals.explained = max(0.0, 1 - _mean_loss(unseen_CK, labels_K) / entropy)
    if signals.explained < SETTINGS.least_explained:
        return signals
    weights_K: Tensor | None = None
    for _ in range(0 if quick or unseen is None else SETTINGS.rounds - 1):
        mixture = _Mixture.fit(unseen_CK, labels_K, given, quick=True)
        doubt_K = _doubt(mixture.posterior(unseen_CK, given), labels_K)
        weights_K = torch.from_numpy(np.maximum(1 - doubt_K, SETTINGS.least_weight))
        if unseen is not None:
            unseen_CK = unseen.log_probabilities(weights_K).T.copy()
    mixture = _Mixture.fit(unseen_CK, labels_K, given, quick=quick)

    evidence = [unseen_CK] if unseen is None else [unseen_CK, _scaled(averaged_KC, labels_K)]
    if seen_ND is not None:
        seen = LeftOutGaussians(seen_ND[rows], labels, num_classes)
        evidence.append(seen.log_probabilities(weights_K).T.copy())
    posterior_CK = mixture.posterior(_blend(evidence, labels_K), given)
    doubt_K = _doubt(posterior_CK, labels_K)
    score_K, std_K = mixture.scores(unseen_CK, labels_K, given, -doubt_K)
    signals.noise_score_N[known], signals.noise_score_std_N[known] = score_K, std_K
    if seen_ND is not None:
        likely_wrong_K = score_K >= 0.5
        learned = (averaged_KC.argmax(1) == labels_K)[likely_wrong_K].sum()
        # Beside two imaginary ones that were not learned: a single suspect says little.
        signals.memorised = float(learned / (likely_wrong_K.sum() + 2))
    columns = np.arange(len(labels_K))
    posterior_CK[labels_K, columns] = -1.0  # another class is suggested even where all others are 0
    suggested_K = posterior_CK.argmax(0)
    share_K = posterior_CK[suggested_K, columns] / np.maximum(doubt_K, SMALLEST_PROBABILITY)
    signals.suggested_label_N[known] = suggested_K
    signals.suggested_probability_N[known] = (score_K * share_K).clip(0, 1)
    if annotations is not None:
        # The scores are calibrated; the posterior says what is the truth where a label is wrong.
        posterior_CK *= (score_K / np.maximum(doubt_K, SMALLEST_PROBABILITY)).astype(np.float32)
        posterior_CK[labels_K, columns] = 1 - score_K
        signals.consensus = _consensus_of(labels_N, known, annotations, posterior_CK)
    return signals


def _given(annotations: Annotations, known: IntArray, num_classes: int) -> Given:
    """Return the labels of the known samples; annotators of few labels count as one group."""
    labels_AK = annotations.labels_NA[known].T
    # A group of its own takes as many labels as confusions have numbers.
    is_alone_A = annotations.are_told_apart & ((labels_AK >= 0).sum(1) >= num_odds(num_classes))
    # The order of those who are alike does not matter: in as few rows as can be.
    alike_AK = -np.sort(-labels_AK[~is_alone_A], axis=0)
    alike_AK = alike_AK[(alike_AK >= 0).any(1)]
    groups_A = np.r_[np.arange(is_alone_A.sum()), np.full(len(alike_AK), is_alone_A.sum())]
    return Given(np.concatenate([labels_AK[is_alone_A], alike_AK]), groups_A)


def _consensus_of(
    labels_N: IntArray, known: IntArray, annotations: Annotations, probabilities_CK: Floats | None = None
) -> Consensus:
    """Return what labels of several annotators say together; without probabilities, what most of them say."""
    label_N = np.full(len(labels_N), -1)
    probability_N = np.full(len(labels_N), np.nan)
    scores_NA = np.full(annotations.labels_NA.shape, np.nan)
    label_N[known] = labels_N[known]
    if probabilities_CK is not None:
        label_N[known] = probabilities_CK.argmax(0)
        probability_N[known] = probabilities_CK.max(0)
        samples, annotators = np.nonzero(annotations.labels_NA[known] >= 0)
        given = annotations.labels_NA[known[samples], annotators]
        scores_NA[known[samples], annotators] = 1 - probabilities_CK[given, samples]
    return Consensus(label_N=label_N, probability_N=probability_N, scores_NA=scores_NA)


def memory_bytes(num_samples: int, num_classes: int, num_features: int) -> int:
    """Return about how much memory `score_labels` takes at its peak, besides what it is given.

    At four sizes, from 100,000 x 2 x 512 to 20,000 x 1,000 x 128, it took 0.76 to 0.87 times as much.
    """
    float32 = 4
    return float32 * (num_samples * (8 * num_classes + 5 * num_features) + 16 * CHUNK_ENTRIES)


@dataclass(frozen=True, slots=True)
class _Mixture:
    """Noise models that explain the labels about equally well.

    Attributes:
        models: the models.
        shares_M: how probable each is; what is missing from 1 is how probable it is that no label is wrong.
    """

    models: list[NoiseModel]
    shares_M: FloatArray

    @classmethod
    def fit(cls, logs_CK: Floats, labels_K: IntArray, given: Given, *, quick: bool) -> _Mixture:
        """Fit a noise model of each sharpening and affinity to some of the rows, and weigh them.

        Quick is one affinity, and only the most probable models.
        """
        affinities = SETTINGS.affinities[1:2] if quick else SETTINGS.affinities
        most = min(SETTINGS.fitted_rows, SETTINGS.fitted_entries // (len(logs_CK) * len(given.labels_AS)))
        fitted = rows_of_every_class(labels_K, most)
        logs_CS, given = np.ascontiguousarray(logs_CK[:, fitted]), given.of(fitted)
        models = [
            fit_noise_model(logs_CS, given, sharpening, affinity)
            for affinity in affinities
            for sharpening in SETTINGS.sharpenings
        ]
        clean = fit_noise_model(logs_CS, given, 1.0, 0.0, clean=True)
        logs_M = SETTINGS.tempering * np.array([model.log_evidence for model in [*models, clean]])
        shares_M = np.exp(logs_M - logs_M.max())
        shares_M[-1] *= SETTINGS.clean_share * len(models)
        shares_M /= shares_M.sum()
        clean_share = shares_M[-1]
        kept = np.argsort(-shares_M[:-1])[: SETTINGS.quick_models if quick else None]
        kept = kept[shares_M[kept] >= SETTINGS.smallest_share * shares_M[kept[0]]]
        kept_M = shares_M[kept]
        return cls([models[number] for number in kept], kept_M * (1 - clean_share) / kept_M.sum())

    def posterior(self, logs_CK: Floats, given: Given) -> Floats:
        """Return the probabilities of the true class, if labels are wrong at all, shape (C, K)."""
        posterior_CK = np.zeros_like(logs_CK)
        shares_M = self.shares_M / self.shares_M.sum()
        chunk = max(1, CHUNK_ENTRIES // len(logs_CK))
        for start in range(0, logs_CK.shape[1], chunk):
            rows = slice(start, start + chunk)
            logs_CB = np.ascontiguousarray(logs_CK[:, rows])
            for model, share in zip(self.models, shares_M, strict=True):
                posterior_CK[:, rows] += np.float32(share) * model.posterior(logs_CB, given.of(rows))
        return posterior_CK

    def scores(
        self, logs_CK: Floats, labels_K: IntArray, given: Given, order_K: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return the probability that each label is wrong, and its standard deviation over the models.

        Args:
            logs_CK: evidence that has not seen the labels.
            labels_K: the labels that are scored.
            given: all that is given.
            order_K: what samples are ordered by, the most suspicious lowest.
        """
        alone = [_Mixture([model], np.ones(1)) for model in self.models]
        score_MK = np.stack(
            [calibrated_by(order_K, _doubt(one.posterior(logs_CK, given), labels_K)) for one in alone]
        )
        score_K = (self.shares_M @ score_MK).clip(0, 1)
        # Where all labels are right, all scores are 0.
        variance_K = self.shares_M @ (score_MK - score_K) ** 2 + (1 - self.shares_M.sum()) * score_K**2
        return score_K, np.sqrt(variance_K)


def _blend(evidence: Sequence[Floats], labels_K: IntArray) -> Floats:
    """Return the weighted mean of log-probabilities of every class, shape (C, K).

    The first has not seen the labels. What is better at predicting them has learned them by heart, what is
    worse knows less; both count less.
    """
    losses = np.array([_mean_loss(logs_CK, labels_K) for logs_CK in evidence])
    ratios = np.maximum(losses, SMALLEST_PROBABILITY) / max(losses[0], SMALLEST_PROBABILITY)
    trust = np.minimum(ratios, 1 / ratios) ** SETTINGS.trust_power
    trust /= trust.sum()
    blended_CK = np.zeros_like(evidence[0])
    for share, logs_CK in zip(trust, evidence, strict=True):
        blended_CK += np.float32(share) * logs_CK
    return blended_CK


def _scaled(averaged_KC: Floats, labels_K: IntArray) -> Floats:
    """Return logarithms of averaged probabilities, scaled so that labels are most probable, shape (C, K)."""
    from scipy.special import log_softmax

    logs_KC = np.log(np.maximum(averaged_KC, SMALLEST_PROBABILITY))
    judged = judged_rows(labels_K, averaged_KC.shape[1])
    scale, _ = best_scale(logs_KC[judged], labels_K[judged])
    scaled_CK: Floats = log_softmax(np.float32(scale) * logs_KC.T, axis=0)
    return scaled_CK


def _doubt(posterior_CK: Floats, labels_K: IntArray) -> FloatArray:
    """Set the entries of the labels to 0, and return the probability of all other classes, shape (K,).

    As 1 - that of the label, the smallest would be rounded to 0, and samples of them could not be ranked.
    """
    posterior_CK[labels_K, np.arange(len(labels_K))] = 0.0
    doubt_K: FloatArray = posterior_CK.sum(0, dtype=np.float64)
    return doubt_K


def _mean_loss(logs_CK: Floats, labels_K: IntArray) -> float:
    return -float(logs_CK[labels_K, np.arange(len(labels_K))].mean(dtype=np.float64))

"""Scores in another order, the noise rate that scores imply, and labels that probabilities are confident of.

Shape legend: N samples, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chgval.detection.settings import SETTINGS
from chgval.detection.signals import NoiseRate
from chgval.types import FloatArray, IntArray


def confident_labels(probabilities_NC: NDArray[np.float32], labels_N: IntArray) -> IntArray:
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
    own_N = np.take_along_axis(probabilities_NC, labels_N[:, None], axis=1)[:, 0].astype(np.float64)
    sums_C = np.bincount(labels_N, own_N, minlength=num_classes)
    thresholds_C = np.where(counts_C > 0, sums_C / counts_C.clip(min=1), np.inf)
    in_question_NC = probabilities_NC >= thresholds_C - 1e-6
    confident_N = np.where(in_question_NC, probabilities_NC, -1.0).argmax(1)
    confident_N = np.where(in_question_NC.any(1), confident_N, -1)
    return np.where(probabilities_NC.argmax(1) == labels_N, labels_N, confident_N)


def estimate_rate(score_N: FloatArray, std_N: FloatArray) -> NoiseRate:
    """Return the share of wrong labels that scores imply, and its interval.

    The interval is what noise models that explain the labels about equally well say of the rate, and the
    error of counting: two standard deviations to either side.

    Args:
        score_N: probabilities that labels are wrong.
        std_N: their standard deviations over noise models; NaN where nothing can be said.
    """
    rate = float(score_N.mean())
    if np.isnan(std_N).any():
        return NoiseRate(rate=rate, low=0.0, high=1.0)
    # Besides what the models disagree on: the rate is counted on so many samples.
    margin = SETTINGS.deviations * float(np.sqrt(std_N.mean() ** 2 + rate * (1 - rate) / len(score_N)))
    return NoiseRate(rate=rate, low=max(0.0, rate - margin), high=min(1.0, rate + margin))


def calibrated_by(order_N: FloatArray, score_N: FloatArray) -> FloatArray:
    """Return scores in the order of another score: the mean score of samples that are alike in it.

    Isotonic regression, which keeps the sum of the scores. Its steps are tilted about their middles, by at
    most half the way to their neighbours, so that the order within them stays.

    Args:
        order_N: the other score; the lower, the more suspicious.
        score_N: calibrated scores.
    """
    from scipy.optimize import isotonic_regression

    _, places_N, counts_U = np.unique(order_N, return_inverse=True, return_counts=True)
    means_U = np.bincount(places_N, score_N) / counts_U
    steps_U = isotonic_regression(means_U, weights=counts_U, increasing=False).x
    step_of_U = np.cumsum(np.r_[True, steps_U[1:] != steps_U[:-1]]) - 1
    values_S = steps_U[np.flatnonzero(np.r_[True, np.diff(step_of_U) > 0])]
    gaps_S = -np.diff(values_S)
    tilts_S = np.minimum(np.r_[np.inf, gaps_S], np.r_[gaps_S, np.inf]) / 2
    tilts_S = np.minimum(tilts_S, np.minimum(values_S, 1 - values_S)).clip(min=0)
    # From -1 at the first sample of a step to 1 at its last, counted in samples.
    middles_U = np.cumsum(counts_U) - counts_U / 2
    sizes_S = np.bincount(step_of_U, counts_U)
    starts_S = np.cumsum(sizes_S) - sizes_S
    along_U = 2 * (middles_U - starts_S[step_of_U]) / sizes_S[step_of_U] - 1
    calibrated_N: FloatArray = (values_S[step_of_U] - tilts_S[step_of_U] * along_U)[places_N]
    return calibrated_N

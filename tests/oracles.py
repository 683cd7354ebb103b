"""Slow, obvious versions of what chgval computes. This module never imports chgval."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def chg_utility(x_ND: Array, target_D: Array) -> float:
    """U(S) = ||a||² - ||mean_S x - a||², U(empty) = 0 (paper, section 3.2)."""
    if len(x_ND) == 0:
        return 0.0
    return float(target_D @ target_D - np.sum((x_ND.mean(0) - target_D) ** 2))


def hardness_utility(losses_N: Array) -> float:
    return float(losses_N.mean()) if len(losses_N) else 0.0


def shapley_by_subsets(num_players, utility) -> Array:
    """Definition 1 of the paper: every marginal contribution to every subset."""
    values = np.zeros(num_players)
    for player in range(num_players):
        others = [p for p in range(num_players) if p != player]
        for size in range(num_players):
            weight = 1 / (num_players * comb(num_players - 1, size))
            for subset in combinations(others, size):
                values[player] += weight * (utility([*subset, player]) - utility(list(subset)))
    return values


def theorem_1(x_ND: Array, target_D: Array) -> Array:
    """Equation 3 of the paper, term by term as printed; needs three samples or more."""
    n = len(x_ND)
    k = np.arange(1, n + 1, dtype=np.float64)
    h1, h2 = (1 / k).sum(), (1 / k**2).sum()
    h1_from_2, h2_from_2 = h1 - 1, h2 - 1
    total = x_ND.sum(0)
    own = (x_ND**2).sum(1)
    pairs = n * (n - 1) * (n - 2)
    return (
        (-h2 / n + (2 * h1 - 3 * h2 + 1 / n) / (n * (n - 1)) + 2 * (2 * h1 - 2 * h2 - 1 + 1 / n) / pairs)
        * own
        - 2 * (h1 - h2 - 1 / n + 1 / n**2) / ((n - 1) * (n - 2)) * (x_ND @ total)
        + (2 * h1 - 2 * h2 - 1 + 1 / n) / pairs * (total @ total)
        + ((h2 - 1 / n) / (n * (n - 1)) - (2 * h1_from_2 - 2 * h2_from_2 - 1 + 1 / n) / pairs) * own.sum()
        + 2 * (h1 - 1 / n) / (n - 1) * (x_ND @ target_D)
        - 2 * (h1 - 1) / (n * (n - 1)) * (total @ target_D)
    )


def last_layer_gradients(
    head: torch.nn.Linear, features_ND: torch.Tensor, labels_N: torch.Tensor, *, times_loss: bool
) -> Array:
    """Gradient of every sample's cross entropy with respect to the layer, one autograd call per sample.

    Shape (N, C * (D + 1)): the weight's gradient with the bias's as its last column, flattened.
    """
    rows = []
    for feature_D, label in zip(features_ND, labels_N, strict=True):
        loss = torch.nn.functional.cross_entropy(head(feature_D)[None], label[None])
        gradients = torch.autograd.grad(loss, [p for p in (head.weight, head.bias) if p is not None])
        matrix = torch.cat([g.reshape(head.out_features, -1) for g in gradients], dim=1)
        rows.append((matrix * (loss.detach() if times_loss else 1)).flatten())
    return torch.stack(rows).double().numpy()


def label_probability(true_C, label, odds_CC, affinity):
    """Return the probability of a label for every true class: odds times powers, class by class."""
    shown = np.zeros(len(true_C))
    for true in range(len(true_C)):
        weights = [odds_CC[true, k] * true_C[k] ** affinity for k in range(len(true_C))]
        shown[true] = weights[label] / sum(weights)
    return shown


def left_out_log_likelihoods(features_ND, labels_N, weights_N, num_classes, shrinkage):
    """Log-likelihood plus log-frequency of each class, up to a constant: one fit without each sample.

    The shrinkage target is that of all samples; so are mean and deviation that features are scaled by.
    """
    roots_ND = np.sign(features_ND) * np.sqrt(np.abs(features_ND))
    roots_ND = (roots_ND - roots_ND.mean(0)) / roots_ND.std(0)
    width = roots_ND.shape[1]

    def fit(rows):
        counts_C = np.array([weights_N[rows][labels_N[rows] == c].sum() for c in range(num_classes)])
        means_CD = np.array(
            [
                (weights_N[rows, None] * roots_ND[rows])[labels_N[rows] == c].sum(0) / counts_C[c]
                for c in range(num_classes)
            ]
        )
        scatter_DD = np.zeros((width, width))
        for row in rows:
            residual_D = roots_ND[row] - means_CD[labels_N[row]]
            scatter_DD += weights_N[row] * np.outer(residual_D, residual_D)
        return counts_C, means_CD, scatter_DD

    everyone = np.arange(len(labels_N))
    target_DD = np.trace(fit(everyone)[2]) / width * np.eye(width)
    logs_NC = np.zeros((len(labels_N), num_classes))
    for left_out in everyone:
        counts_C, means_CD, scatter_DD = fit(everyone[everyone != left_out])
        inverse_DD = np.linalg.inv((1 - shrinkage) * scatter_DD + shrinkage * target_DD)
        for c in range(num_classes):
            away_D = roots_ND[left_out] - means_CD[c]
            distance = away_D @ inverse_DD @ away_D * (weights_N.sum() - num_classes)
            logs_NC[left_out, c] = np.log(counts_C[c]) - distance / 2
    return logs_NC

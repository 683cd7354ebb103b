"""Slow, obvious versions of what chgval computes. This module never imports chgval."""

from __future__ import annotations

from itertools import combinations
from math import comb, lgamma

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


def posterior_by_expectation_maximisation(prior_NC, averaged_NC, labels_N, *, steps, strengths, overstated):
    """Posterior of the true class under confusions fitted to the labels, one sample at a time.

    prior_NC are the probabilities before the label is known; averaged_NC say how sure each sample is: among
    those predicted alike, weights fall evenly from the surest to the least sure.
    """
    n, c = prior_NC.shape
    predicted_N, sure_N = averaged_NC.argmax(1), averaged_NC.max(1)
    weight_N = np.empty(n)
    for label in range(c):
        members = sorted((i for i in range(n) if predicted_N[i] == label), key=lambda i: (-sure_N[i], i))
        for place, i in enumerate(members):
            weight_N[i] = 1 - (place + 0.5) / len(members)

    confusions = np.where(np.eye(c) == 1, 0.8, 0.2 / (c - 1))
    for _ in range(steps):
        counts = np.zeros((c, c))
        for i in range(n):
            joint = prior_NC[i] * confusions[:, labels_N[i]]
            counts[:, labels_N[i]] += weight_N[i] * joint / joint.sum()
        noise = 1 - np.trace(counts) / counts.sum()
        others = [[counts[j, k] for k in range(c) if k != j] for j in range(c)]
        rights = [[counts[j, j], sum(others[j])] for j in range(c)]
        shares = backed_shares(others, [1 / (c - 1)] * (c - 1), strengths, overstated)
        rates = backed_shares(rights, [1 - noise, noise], strengths, overstated)
        for j in range(c):
            wrong = [rates[j][1] * share for share in shares[j]]
            confusions[j] = [*wrong[:j], rates[j][0], *wrong[j:]]
    posterior = prior_NC * confusions[:, labels_N].T
    return posterior / posterior.sum(1, keepdims=True)


def backed_shares(rows, common, strengths, overstated):
    """Shares of each row of counts, backed by imaginary samples; how many, the Dirichlet evidence says."""

    def evidence(strength):
        total = 0.0
        for row in rows:
            total += lgamma(strength) - lgamma(strength + sum(row))
            for count, share in zip(row, common, strict=True):
                total += lgamma(strength * share + count) - lgamma(strength * share)
        return total

    best = max(strengths, key=lambda strength: evidence(overstated * strength))
    return [
        [(count + best * share) / (sum(row) + best) for count, share in zip(row, common, strict=True)]
        for row in rows
    ]

"""Greedy choice of what lowers the held-out loss (Killamsetty et al. 2021, arXiv:2012.10630)."""

import numpy as np
import torch
from torch import Tensor

from chgval.selection import keep_highest
from chgval.strategies.base import Choice, Pass, Question, strategy

# The greedy choice is made in so many parts, with the held-out gradient computed anew after each.
NUM_PARTS = 15


@strategy("glister")
def choose(question: Question) -> Choice:
    """Add, part by part, the samples of each class whose step lowers the held-out loss most.

    A sample's gain is the first-order decrease of the held-out loss after a gradient step on it. After each
    part the last layer makes the steps of training on it, and held-out gradients are computed anew.
    """
    samples, held = question.samples, question.run_held_pass()
    factors = samples.factors(times_loss=False)
    labels_N = question.labels_N.numpy()
    open_N = np.ones(len(labels_N), dtype=bool)
    held_logits_HC = held.logits_NC.clone()
    sizes = np.full(min(NUM_PARTS, question.count), question.count // min(NUM_PARTS, question.count))
    sizes[: question.count - sizes.sum()] += 1
    for size in sizes:
        gains_N = factors.inner_products(held_gradient(held, held_logits_HC)).double().numpy()
        left = np.flatnonzero(open_N)
        part = left[keep_highest(gains_N[left], labels_N[left], size)]
        open_N[part] = False
        step_CF = factors.residuals_NC[part].T @ with_bias(samples, torch.from_numpy(part))
        held_logits_HC -= question.lr / question.batch_size * with_bias(held) @ step_CF.T
    return Choice(torch.from_numpy(np.flatnonzero(~open_N)))


def held_gradient(held: Pass, logits_HC: Tensor) -> Tensor:
    """Return the mean last-layer gradient of the held-out loss at these logits, shape (C, F)."""
    residuals_HC = logits_HC.softmax(1)
    residuals_HC[torch.arange(len(held.labels_N)), held.labels_N] -= 1
    return residuals_HC.T @ with_bias(held) / len(held.labels_N)


def with_bias(samples: Pass, positions: Tensor | slice = slice(None)) -> Tensor:
    """Return last-layer inputs, with the constant 1 that a bias is the weight of, shape (N, F)."""
    features_ND = samples.features_ND[positions]
    if not samples.has_bias:
        return features_ND
    return torch.cat([features_ND, features_ND.new_ones(len(features_ND), 1)], dim=1)

"""Greedy choice of what lowers the held-out loss (Killamsetty et al. 2021, arXiv:2012.10630)."""

import torch
from torch import Tensor

from chgval.strategies.base import Choice, Pass, Question, strategy

# The greedy choice is made in so many parts, with the held-out gradient computed anew after each.
NUM_PARTS = 15


@strategy("glister", needs_holdout=True)
def choose(question: Question) -> Choice:
    """Add, part by part, the samples whose step lowers the held-out loss most.

    A sample's gain is the first-order decrease of the held-out loss after a gradient step on it. After each
    part the last layer takes that step, with what was chosen, and held-out gradients are computed anew.
    """
    samples, held = question.samples, question.run_held_pass()
    factors = samples.factors(times_loss=False)
    open_N = torch.ones(len(question.labels_N), dtype=torch.bool)
    held_logits_HC = held.logits_NC.clone()
    sizes = torch.full((min(NUM_PARTS, question.count),), question.count // min(NUM_PARTS, question.count))
    sizes[: question.count - int(sizes.sum())] += 1
    for size in sizes.tolist():
        gains_N = factors.inner_products(held_gradient(held, held_logits_HC)).where(open_N, -torch.inf)
        part = gains_N.topk(size).indices
        open_N[part] = False
        step_CF = factors.residuals_NC[part].T @ with_bias(samples, part)
        held_logits_HC -= question.lr / size * with_bias(held) @ step_CF.T
    return Choice((~open_N).nonzero().squeeze(1))


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

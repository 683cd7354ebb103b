"""Greedy choice of what lowers the held-out loss (Killamsetty et al. 2021, arXiv:2012.10630)."""

import dataclasses

import numpy as np
import torch

from chgval.selection import class_quotas, ranks_within
from chgval.shapley import coalition_sums
from chgval.strategies.base import Choice, Question, strategy

# The greedy choice is made in so many parts, with the held-out gradient computed anew after each.
NUM_PARTS = 15


@strategy("glister")
def choose(question: Question) -> Choice:
    """Add, in up to 15 parts, the samples of each class whose step lowers the held-out loss most.

    A sample's gain is the first-order decrease of the held-out loss after a gradient step on it. After each
    part the last layer makes the steps of training on it, and held-out gradients are computed anew.
    """
    samples, held = question.samples, question.run_held_pass()
    factors = samples.factors(times_loss=False)
    labels_N = question.labels_N.numpy()
    quotas_C = class_quotas(np.bincount(labels_N, minlength=question.num_classes), question.count)
    taken_N = np.zeros(len(labels_N), dtype=bool)
    for part in range(1, NUM_PARTS + 1):
        held_gradient_CF = coalition_sums(held.factors(times_loss=False)).mean_CF
        gains_N = factors.inner_products(held_gradient_CF).numpy()
        gains_N[taken_N] = np.nan
        taken_C = np.bincount(labels_N[taken_N], minlength=question.num_classes)
        rank_N = ranks_within(gains_N, labels_N)
        chosen_N = (rank_N > 0) & (rank_N <= (part * quotas_C // NUM_PARTS - taken_C)[labels_N])
        if not chosen_N.any():
            continue
        taken_N |= chosen_N
        gradients_CF = coalition_sums(factors.at(torch.from_numpy(np.flatnonzero(chosen_N)))).total_CF
        change_HC = held.last_layer(question.lr / question.batch_size * gradients_CF)
        held = dataclasses.replace(held, logits_NC=held.logits_NC - change_HC)
    return Choice(torch.from_numpy(np.flatnonzero(taken_N)))

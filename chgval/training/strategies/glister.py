"""Greedy choice of what lowers the held-out loss (Killamsetty et al. 2021, arXiv:2012.10630)."""

import dataclasses

import torch

from chgval.training.strategies.base import Choice, Question, strategy
from chgval.valuation.closed_form import coalition_sums

# The greedy choice is made in so many parts, with the held-out gradient computed anew after each.
NUM_PARTS = 15


@strategy(keeps_shares=False, needs_holdout=True)
def choose(question: Question) -> Choice:
    """Add, part by part, the samples whose gradients lower the held-out loss most.

    A sample's gain is the first-order decrease of the held-out loss in a step along its gradient (Taylor
    approximation). Before each part, held-out gradients are those after one step of the last layer, of the
    present learning rate, along the summed gradients of all samples so far.
    """
    factors = question.predictions().factors(times_loss=False)
    held = question.predict_held().to(factors.residuals_NC.device)
    chosen_K = torch.zeros(0, dtype=torch.int64, device=held.labels_N.device)
    for part in torch.arange(question.count).tensor_split(min(NUM_PARTS, question.count)):
        held_gradient_CF = coalition_sums(held.factors(times_loss=False)).mean_CF
        gains_N = factors.inner_products(held_gradient_CF)
        gains_N[chosen_K] = -torch.inf
        new_K = gains_N.argsort(descending=True, stable=True)[: len(part)]
        chosen_K = torch.cat([chosen_K, new_K])
        step_CF = question.lr * coalition_sums(factors.at(new_K)).total_CF
        held = dataclasses.replace(held, logits_NC=held.logits_NC - held.last_layer(step_CF))
    return Choice(chosen_K.sort().values.cpu())

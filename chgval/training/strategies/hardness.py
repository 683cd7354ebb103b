"""Shapley values of the mean loss (paper, Table 2, Hardness Shapley)."""

import torch

from chgval.training.strategies.base import Choice, Question, strategy
from chgval.valuation.closed_form import hardness_values
from chgval.valuation.selection import min_max_weights


@strategy()
def choose(question: Question) -> Choice:
    """Keep the highest losses of each class, as values have that order, and weigh them by their values."""
    losses_N = question.predictions().losses_N
    kept_K = question.highest_of_each_class(losses_N)
    weights_K = torch.from_numpy(min_max_weights(hardness_values(losses_N[kept_K]).cpu().numpy()))
    return Choice(kept_K, weights_K)

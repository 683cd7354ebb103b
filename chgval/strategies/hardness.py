"""Shapley values of the mean loss (paper, Table 2, Hardness Shapley)."""

import torch

from chgval.selection import min_max_weights
from chgval.shapley import hardness_values
from chgval.strategies.base import Choice, Question, strategy


@strategy("hardness")
def choose(question: Question) -> Choice:
    """Keep the highest losses of each class, as values have that order, and weigh them by their values."""
    losses_N = question.samples.losses_N
    kept_K = question.highest_of_each_class(losses_N)
    weights_K = torch.from_numpy(min_max_weights(hardness_values(losses_N[kept_K]).numpy()))
    return Choice(kept_K, weights_K)

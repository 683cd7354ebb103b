"""CHG Shapley values, as published (paper, Algorithm 2)."""

import torch

from chgval.training.strategies.base import Choice, Question, strategy
from chgval.valuation.closed_form import chg_values, chg_values_per_class
from chgval.valuation.selection import min_max_weights


@strategy()
def choose(question: Question) -> Choice:
    """Keep the highest values of each class, and weigh them by their values among those kept."""
    return highest_values(question, times_loss=True)


def highest_values(question: Question, *, times_loss: bool) -> Choice:
    """Choose by values of gradients, multiplied by the loss or not (steps 5 to 10)."""
    samples = question.predictions()
    factors = samples.factors(times_loss=times_loss)
    values_N = chg_values_per_class(factors, samples.labels_N, question.num_classes)
    kept_K = question.highest_of_each_class(values_N)
    weights_K = torch.from_numpy(min_max_weights(chg_values(factors.at(kept_K)).cpu().numpy()))
    return Choice(kept_K, weights_K)

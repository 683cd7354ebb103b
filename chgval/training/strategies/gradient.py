"""Shapley values of gradients without the loss (paper, Table 2, Gradient Shapley)."""

from chgval.training.strategies.base import Choice, Question, strategy
from chgval.training.strategies.chg import highest_values


@strategy()
def choose(question: Question) -> Choice:
    """Keep the highest values of each class, and weigh them by their values among those kept."""
    return highest_values(question, times_loss=False)

"""Shapley values of gradients without the loss (paper, Table 2, Gradient Shapley)."""

from chgval.strategies.base import Choice, Question, strategy
from chgval.strategies.chg import highest_values


@strategy("gradient")
def choose(question: Question) -> Choice:
    """Keep the highest values of each class, and weigh them by their values among those kept."""
    return highest_values(question, times_loss=False)

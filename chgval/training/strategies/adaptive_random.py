"""A random part, drawn anew each time."""

from chgval.training.strategies.base import Choice, Question, strategy


@strategy()
def choose(question: Question) -> Choice:
    """Draw anew within each class."""
    return Choice(question.at_random())

"""A random part, drawn anew each time."""

from chgval.strategies.base import Choice, Question, strategy


@strategy("adaptive-random")
def choose(question: Question) -> Choice:
    """Draw anew within each class."""
    return Choice(question.at_random())

"""A random part, drawn once."""

from chgval.training.strategies.base import Choice, Question, strategy


@strategy()
def choose(question: Question) -> Choice:
    """Draw once within each class, and keep that."""
    if "drawn" not in question.memory:
        question.memory["drawn"] = question.at_random()
    return Choice(question.memory["drawn"])

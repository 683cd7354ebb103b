"""Error norms (Paul et al. 2021, arXiv:2107.07075)."""

from chgval.training.strategies.base import Choice, Question, strategy


@strategy()
def choose(question: Question) -> Choice:
    """Keep the samples of each class whose predictions are furthest from their labels."""
    return Choice(question.highest_of_each_class(question.predictions().residuals_NC.square().sum(1)))

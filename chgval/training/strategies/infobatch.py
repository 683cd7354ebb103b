"""Unbiased pruning of what is learned already (Qin et al. 2024, arXiv:2303.04947)."""

import torch

from chgval.training.strategies.base import Choice, Question, strategy


@strategy(keeps_shares=False)
def choose(question: Question) -> Choice:
    """Keep the losses above the mean, and of the others as many as there is room for, at random.

    Those weigh as much more as there are fewer of them, so that the expected gradient stays that of all
    samples. Where the losses above the mean alone exceed the budget, they are drawn from, and others are not.
    """
    losses_N = question.predictions().losses_N.cpu()
    draw_N = torch.rand(len(losses_N), generator=question.generator)
    above_N = losses_N >= losses_N.mean()
    num_above, num_below = int(above_N.sum()), int((~above_N).sum())
    positions_K = (draw_N + above_N).topk(question.count).indices.sort().values
    room = max(1, question.count - num_above)
    weights_K = torch.where(above_N[positions_K], 1.0, num_below / room)
    return Choice(positions_K, weights_K)

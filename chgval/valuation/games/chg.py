"""Conduct of Hardness and Gradient: gradients multiplied by the loss (paper, section 3.2)."""

from torch import Tensor

from chgval.valuation.closed_form import CoalitionSums, Factors, chg_values
from chgval.valuation.games.base import game


@game(times_loss=True)
def values(factors: Factors, _: Tensor, sums: CoalitionSums | None) -> Tensor:
    """Return CHG Shapley values."""
    return chg_values(factors, sums)

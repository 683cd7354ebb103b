"""Gradients alone (paper, Table 2)."""

from torch import Tensor

from chgval.valuation.closed_form import CoalitionSums, Factors, chg_values
from chgval.valuation.games.base import game


@game()
def values(factors: Factors, _: Tensor, sums: CoalitionSums | None) -> Tensor:
    """Return Gradient Shapley values."""
    return chg_values(factors, sums)

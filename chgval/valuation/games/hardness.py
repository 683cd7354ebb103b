"""Losses alone (paper, Table 2)."""

from torch import Tensor

from chgval.valuation.closed_form import CoalitionSums, Factors, hardness_values
from chgval.valuation.games.base import game


@game(has_sums=False)
def values(_: Factors, losses_N: Tensor, __: CoalitionSums | None) -> Tensor:
    """Return Hardness Shapley values."""
    return hardness_values(losses_N)

"""Batches whose weighted gradients match the mean gradient (Killamsetty et al. 2021, arXiv:2103.00123)."""

import numpy as np
import torch

from chgval.training.strategies.base import Choice, Question, strategy
from chgval.types import FloatArray, IntArray
from chgval.valuation.closed_form import coalition_sums

# Of the squared weights, in the fit of each step.
REGULARISATION = 0.5


@strategy(keeps_shares=False)
def choose(question: Question) -> Choice:
    """Cut the samples into random batches, and choose among these by orthogonal matching pursuit.

    The samples of a batch share its weight. The last batch is cut where the budget ends; what is left of it
    keeps its weights.
    """
    num_samples = len(question.labels_N)
    order_N = torch.randperm(num_samples, generator=question.generator)
    batches = torch.split(order_N, min(question.batch_size, question.count))
    factors = question.predictions().factors(times_loss=False)
    atoms_BK = torch.stack([coalition_sums(factors.at(batch)).mean_CF.flatten() for batch in batches])
    target_K = coalition_sums(factors).mean_CF.flatten()
    size = len(batches[0])
    chosen, weights = matching_pursuit(
        atoms_BK.cpu().numpy(), target_K.cpu().numpy(), -(-question.count // size)
    )
    positions_K = torch.cat([batches[b] for b in chosen])
    # The gradient of a batch is a mean: in a shorter one each sample stands for more of it.
    weights_K = torch.cat(
        [
            torch.full((len(batches[b]),), weight * size / len(batches[b]))
            for b, weight in zip(chosen, weights, strict=True)
        ]
    )
    # The short last batch may have been chosen: then there is room for what comes next in line.
    missing = question.count - len(positions_K)
    if missing > 0:
        rest = order_N[~torch.isin(order_N, positions_K)][:missing]
        positions_K = torch.cat([positions_K, rest])
        weights_K = torch.cat([weights_K, weights_K.mean().repeat(len(rest))])
    positions_K, weights_K = positions_K[: question.count], weights_K[: question.count]
    ascending = positions_K.argsort()
    return Choice(positions_K[ascending], weights_K[ascending])


def matching_pursuit(
    atoms_BK: FloatArray, target_K: FloatArray, num_wanted: int, regularisation: float = REGULARISATION
) -> tuple[IntArray, FloatArray]:
    """Choose atoms one by one, and fit the target with weights of 0 or more (GradMatch, Algorithm 2).

    Args:
        atoms_BK: shape (B, K).
        target_K: what their weighted sum shall be, shape (K,).
        num_wanted: how many atoms to choose, at most B.
        regularisation: of the squared weights, above 0.
    Returns:
        The chosen atoms in the order of their choice, and the weight of each.
    """
    from scipy.linalg import solve_triangular
    from scipy.optimize import nnls

    # Everything is said in inner products: a fit is as large as the atoms chosen, not as their length.
    products_BB, targets_B = atoms_BK @ atoms_BK.T, atoms_BK @ target_K
    chosen: list[int] = []
    weights: FloatArray = np.zeros(0)
    for _ in range(min(num_wanted, len(atoms_BK))):
        gains_B = targets_B - products_BB[:, chosen] @ weights
        gains_B[chosen] = -np.inf
        chosen.append(int(gains_B.argmax()))
        # Ridge regression with weights of 0 or more, as least squares on a square root of its matrix.
        matrix = products_BB[np.ix_(chosen, chosen)] + regularisation * np.eye(len(chosen))
        root = np.linalg.cholesky(matrix)
        weights = nnls(root.T, solve_triangular(root, targets_B[chosen], lower=True))[0]
    return np.array(chosen, dtype=np.int64), weights

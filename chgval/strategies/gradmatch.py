"""Batches whose weighted gradients match the mean gradient (Killamsetty et al. 2021, arXiv:2103.00123)."""

import numpy as np
import torch
from scipy.optimize import nnls

from chgval.records import FloatArray, IntArray
from chgval.strategies.base import Choice, Question, strategy
from chgval.strategies.glister import with_bias

# Of the squared weights, in the fit of each step.
REGULARISATION = 0.5


@strategy("gradmatch")
def choose(question: Question) -> Choice:
    """Cut the samples into random batches, and choose among these by orthogonal matching pursuit.

    All samples of a batch get its weight. The last batch is cut where the budget ends.
    """
    num_samples = len(question.labels_N)
    order_N = torch.randperm(num_samples, generator=question.generator)
    batches = torch.split(order_N, min(question.batch_size, question.count))
    samples = question.samples
    residuals_NC, inputs_NF = samples.residuals_NC, with_bias(samples)
    atoms_BK = torch.stack([(residuals_NC[b].T @ inputs_NF[b]).flatten() / len(b) for b in batches])
    target_K = (residuals_NC.T @ inputs_NF).flatten() / num_samples
    num_wanted = -(-question.count // len(batches[0]))
    chosen, weights = matching_pursuit(atoms_BK.double().numpy(), target_K.double().numpy(), num_wanted)
    positions_K = torch.cat([batches[b] for b in chosen])
    weights_K = torch.cat([torch.full((len(batches[b]),), w) for b, w in zip(chosen, weights, strict=True)])
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
        regularisation: of the squared weights.
    Returns:
        The chosen atoms in the order of their choice, and the weight of each.
    """
    chosen: list[int] = []
    weights: FloatArray = np.zeros(0)
    residual_K = target_K
    for _ in range(min(num_wanted, len(atoms_BK))):
        gains_B = atoms_BK @ residual_K
        gains_B[chosen] = -np.inf
        chosen.append(int(gains_B.argmax()))
        atoms = atoms_BK[chosen]
        # Ridge regression as least squares: one more equation per weight.
        rows = np.vstack([atoms.T, np.sqrt(regularisation) * np.eye(len(chosen))])
        weights = nnls(rows, np.concatenate([target_K, np.zeros(len(chosen))]))[0]
        residual_K = target_K - weights @ atoms
    return np.array(chosen, dtype=np.int64), weights

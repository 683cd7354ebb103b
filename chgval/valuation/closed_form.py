"""Closed-form Shapley values of the CHG utility, from rank-one factors.

A coalition S of samples has the utility U(S) = ||a||² - ||mean_S x - a||², U(empty) = 0 (paper, section 3.2):
how well the coalition's mean gradient points at the target a. The Shapley value of every sample under U has
a closed form (paper, Theorem 1, equation 3). This module computes the same values from the centred form
derived in docs/method.md, which is defined for every n >= 1 and does not cancel between huge terms.

For the last linear layer of a classifier, x_i = r_i (h_i, 1)^T with the residual r_i (softmax minus
one-hot, times the loss for CHG) and the layer's input h_i. The C x (D+1) matrix x_i is never built: every
inner product that the closed form needs factors.

Shape legend: N samples, C classes, D last-layer inputs, F = D + 1 with the bias column (F = D without).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from chgval.errors import FactorError

# Rows worked on at a time: small enough that a chunk stays in cache while it is reduced in float64 (which is
# what keeps float64 reductions nearly free), large enough that the matrix products run at full speed.
CHUNK_ROWS = 4096
# A GPU has no such cache, and starts each operation for microseconds: so many numbers at a time.
DEVICE_CHUNK_NUMBERS = 2**25
EULER_GAMMA = 0.5772156649015329
# B_2, B_4, ...: enough for float64 from n + 1 = FEWEST_FOR_SERIES + 1 on.
BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)
FEWEST_FOR_SERIES = 10


def chunks(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield the rows that are worked on at a time.

    Args:
        num_rows: how many there are.
        width: numbers of a row.
        device: where they are.
    """
    size = CHUNK_ROWS if device.type == "cpu" else max(CHUNK_ROWS, DEVICE_CHUNK_NUMBERS // max(1, width))
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


@dataclass(frozen=True)
class Factors:
    """Last-layer gradients x_i = r_i (h_i, 1)^T of N samples, kept as their factors.

    Attributes:
        residuals_NC: shape (N, C), gradient of the sample's (weighted) loss with respect to its logits.
        features_ND: shape (N, D), input of the last linear layer.
        has_bias: whether the layer has a bias, so that h_i carries a constant 1 (never stored).

    Raises:
        FactorError: the shapes, types or devices of the two do not fit each other.
    """

    residuals_NC: Tensor
    features_ND: Tensor
    has_bias: bool = True

    def __post_init__(self) -> None:
        residuals, features = self.residuals_NC, self.features_ND
        if residuals.ndim != 2 or features.ndim != 2 or len(residuals) != len(features):
            raise FactorError(
                f"residuals {tuple(residuals.shape)} and features {tuple(features.shape)} must be matrices "
                "with one row per sample; pass (N, C) and (N, D)."
            )
        if residuals.device != features.device:
            raise FactorError(
                f"residuals are on {residuals.device} and features on {features.device}; "
                "move both to one device."
            )
        if not (residuals.is_floating_point() and features.is_floating_point()):
            raise FactorError(
                f"residuals ({residuals.dtype}) and features ({features.dtype}) must be floating point."
            )

    def __len__(self) -> int:
        return len(self.residuals_NC)

    @property
    def product_dtype(self) -> torch.dtype:
        """Type of the matrix products: float64 if either factor is, else float32 (half types are raised).

        Where this process lets products of float32 be less precise (TF32), they are taken in float64.
        """
        if torch.float64 in (self.residuals_NC.dtype, self.features_ND.dtype) or not _is_float32_exact():
            return torch.float64
        return torch.float32

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (residuals, features) of some rows at a time, in the type of the products."""
        width = max(self.residuals_NC.shape[1], self.features_ND.shape[1])
        for rows in chunks(len(self), width, self.residuals_NC.device):
            yield (
                self.residuals_NC[rows].to(self.product_dtype),
                self.features_ND[rows].to(self.product_dtype),
            )

    def at(self, positions_K: Tensor) -> Factors:
        """Return those of some samples, in the order of their positions."""
        return Factors(self.residuals_NC[positions_K], self.features_ND[positions_K], self.has_bias)

    def inner_products(self, matrix_CF: Tensor) -> Tensor:
        """Return <matrix, x_i> for every sample: float64, shape (N,)."""
        width = self.features_ND.shape[1]
        weight_CD = matrix_CF[:, :width].to(self.product_dtype)
        dots = []
        for residuals_BC, features_BD in self.chunks():
            scores_BC = (features_BD @ weight_CD.T).double()
            if self.has_bias:
                scores_BC += matrix_CF[:, width].double()
            dots.append(scores_BC.mul_(residuals_BC).sum(1))
        return torch.cat(dots) if dots else self.residuals_NC.new_zeros(0, dtype=torch.float64)

    @cached_property
    def squared_norms_N(self) -> Tensor:
        """||x_i||² = ||r_i||² (||h_i||² + 1): float64, shape (N,)."""
        squares_of = _RowSquares()
        norms = [
            squares_of(residuals_BC) * (squares_of(features_BD) + int(self.has_bias))
            for residuals_BC, features_BD in self.chunks()
        ]
        return torch.cat(norms) if norms else self.residuals_NC.new_zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class CoalitionSums:
    """All that the closed form needs to know of the whole coalition; sums of disjoint shards add.

    Attributes:
        num_samples: n, the number of players.
        total_CF: X = sum of x_i, float64, shape (C, F).
        squared_norm: Q = sum of ||x_i||², float64, shape ().
    """

    num_samples: int
    total_CF: Tensor
    squared_norm: Tensor

    def __add__(self, other: CoalitionSums) -> CoalitionSums:
        return CoalitionSums(
            self.num_samples + other.num_samples,
            self.total_CF + other.total_CF,
            self.squared_norm + other.squared_norm,
        )

    @property
    def mean_CF(self) -> Tensor:
        """Mean gradient m = X / n: the target of Algorithm 1."""
        return self.total_CF / self.num_samples


def coalition_sums(factors: Factors) -> CoalitionSums:
    """Return n, X and Q of the samples in `factors`.

    Products are taken in the factors' own type over chunks of rows, and added up in float64.
    """
    num_classes, width = factors.residuals_NC.shape[1], factors.features_ND.shape[1]
    total_CF = factors.residuals_NC.new_zeros(
        (num_classes, width + int(factors.has_bias)), dtype=torch.float64
    )
    for residuals_BC, features_BD in factors.chunks():
        total_CF[:, :width] += residuals_BC.T @ features_BD
        if factors.has_bias:
            total_CF[:, width] += residuals_BC.double().sum(0)
    return CoalitionSums(len(factors), total_CF, factors.squared_norms_N.sum())


def chg_utility(sums: CoalitionSums, target_CF: Tensor | None = None) -> Tensor:
    """Return U(N), the utility of the whole coalition, float64, shape (): what all values sum to.

    Args:
        sums: the coalition.
        target_CF: a, shape (C, F). Default: the mean gradient, for which U(N) = ||m||².
    """
    mean_CF = sums.mean_CF
    target_CF = mean_CF if target_CF is None else target_CF.double()
    return target_CF.square().sum() - (mean_CF - target_CF).square().sum()


def chg_values(
    factors: Factors, sums: CoalitionSums | None = None, target_CF: Tensor | None = None
) -> Tensor:
    """Return the exact Shapley value of every sample in `factors` under the CHG utility.

    Loss-weighted residuals give the CHG Shapley value, plain residuals the Gradient Shapley value.

    Args:
        factors: the samples to value.
        sums: the coalition that they are part of. Default: the coalition of exactly these samples. A shard
            passes the sums of all shards.
        target_CF: a, shape (C, F). Default: the coalition's mean, as in Algorithm 1.
    Returns:
        float64, shape (N,), in squared gradient units; higher is more useful. Over a whole coalition the
        values sum to `chg_utility`.
    Raises:
        FactorError: there are no samples, or `sums` or `target_CF` do not fit the factors.
    Source: Cai, arXiv:2406.11730, Theorem 1 (equation 3), in the centred form of docs/method.md.
    """
    sums = coalition_sums(factors) if sums is None else sums
    n = sums.num_samples
    if n < 1:
        raise FactorError("the coalition has no samples; a Shapley value needs at least one.")
    mean_CF = sums.mean_CF
    expected = (factors.residuals_NC.shape[1], factors.features_ND.shape[1] + int(factors.has_bias))
    for name, matrix in (("sums", mean_CF), ("target", mean_CF if target_CF is None else target_CF)):
        if tuple(matrix.shape) != expected:
            raise FactorError(f"{name} has shape {tuple(matrix.shape)}; these factors need {expected}.")

    spread, pull = spread_coefficient(n), pull_coefficient(n)
    # Both products of the formula, <m, x_j> in the squared distance and <a - m, x_j>, are linear in x_j,
    # so they are taken as one.
    direction_CF = 2 * spread * mean_CF
    offset = mean_CF.square().sum() / n + spread * sums.squared_norm / n - direction_CF.mul(mean_CF).sum()
    if target_CF is not None:
        delta_CF = target_CF.double() - mean_CF
        direction_CF = direction_CF + 2 * pull * delta_CF
        offset = offset + 2 * (1 / n - pull) * delta_CF.mul(mean_CF).sum()
    return offset - spread * factors.squared_norms_N + factors.inner_products(direction_CF)


def chg_values_per_class(factors: Factors, labels_N: Tensor, num_classes: int) -> Tensor:
    """Return CHG values in which every class is a coalition of its own (paper, "Per-Class Approximations").

    Args:
        factors: the samples to value.
        labels_N: class of every sample, int64, shape (N,).
        num_classes: labels lie in [0, num_classes).
    Returns:
        float64, shape (N,). The values of each class sum to that class's utility.
    """
    if len(labels_N) != len(factors):
        raise FactorError(f"{len(labels_N)} labels for {len(factors)} samples; pass one label per sample.")
    values_N = factors.residuals_NC.new_zeros(len(factors), dtype=torch.float64)
    for rows in rows_of_classes(labels_N, num_classes):
        if len(rows):
            members = Factors(factors.residuals_NC[rows], factors.features_ND[rows], factors.has_bias)
            values_N[rows] = chg_values(members)
    return values_N


def rows_of_classes(labels_N: Tensor, num_classes: int) -> tuple[Tensor, ...]:
    """Return the rows of every class, in order; labels lie in [0, num_classes)."""
    counts = torch.bincount(labels_N, minlength=num_classes).tolist()
    rows: tuple[Tensor, ...] = torch.split(labels_N.argsort(stable=True), counts)
    return rows


def hardness_values(losses_N: Tensor) -> Tensor:
    """Return the exact Shapley value of every sample under the Hardness utility, U(S) = mean of S's losses.

    Args:
        losses_N: shape (N,), floating point.
    Returns:
        float64, shape (N,), in loss units; sums to the mean loss.
    Raises:
        FactorError: there are no samples.
    Source: paper, section 3.2 (Hardness score) and appendix B (the part of U that is linear in x).
    """
    n = len(losses_N)
    if n < 1:
        raise FactorError("the coalition has no samples; a Shapley value needs at least one.")
    losses_N = losses_N.double()
    mean = losses_N.mean()
    return mean / n + pull_coefficient(n) * (losses_N - mean)


def spread_coefficient(n: int) -> float:
    """Return s_n, the weight of a sample's squared distance to the mean (docs/method.md); n s_n -> pi²/6."""
    if n < 3:
        return 0.0
    h1, h2 = harmonic_numbers(n)
    return (
        h2 / n
        - (2 * h1 - 3 * h2 + 1 / n) / (n * (n - 1))
        - 2 * (2 * h1 - 2 * h2 - 1 + 1 / n) / (n * (n - 1) * (n - 2))
    )


def pull_coefficient(n: int) -> float:
    """Return t_n, the weight of a sample's product with the target (docs/method.md)."""
    if n < 2:
        return 0.0
    return (harmonic_numbers(n)[0] - 1 / n) / (n - 1)


def harmonic_numbers(n: int) -> tuple[float, float]:
    """Return (sum of 1/k, sum of 1/k²) for k = 1..n, in constant time for any n.

    Source: DLMF 5.11.2 (https://dlmf.nist.gov/5.11.E2) at n + 1, and its derivative.
    """
    if n < FEWEST_FOR_SERIES:
        return sum(1 / k for k in range(1, n + 1)), sum(1 / k**2 for k in range(1, n + 1))
    x = n + 1.0
    first, second = 0.0, 0.0  # Horner's scheme in 1/x²
    for order in range(len(BERNOULLI), 0, -1):
        bernoulli = BERNOULLI[order - 1]
        first = first / x**2 + bernoulli / (2 * order)
        second = second / x**2 + bernoulli
    digamma = math.log(x) - 0.5 / x - first / x**2
    trigamma = 1 / x + 0.5 / x**2 + second / x**3
    return digamma + EULER_GAMMA, math.pi**2 / 6 - trigamma


def _is_float32_exact() -> bool:
    """Say whether matrix products of float32 are as precise as it: a program may want faster ones."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # was set for single backends, which this function cannot say
        return False


class _RowSquares:
    """Squared norms of rows, in float64."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.float64)

    def __call__(self, matrix_BK: Tensor) -> Tensor:
        if matrix_BK.device.type != "cpu":
            norms_B: Tensor = torch.linalg.vector_norm(matrix_BK, dim=1, dtype=torch.float64)
            return norms_B.square_()
        # One buffer for all chunks: allocating anew for each makes the process grow by more than the factors.
        if len(self._buffer) < matrix_BK.numel():
            self._buffer = torch.empty(matrix_BK.numel(), dtype=torch.float64)
        squares_BK = self._buffer[: matrix_BK.numel()].view(matrix_BK.shape)
        return squares_BK.copy_(matrix_BK).square_().sum(1)

"""What all other samples say of a sample's class: class Gaussians that leave the sample out, in closed form.

Probabilities of a network that was trained on a label say little about that label. These are fitted to the
labels of all other samples, so they say what they would say of a sample that nobody has labelled.

Shape legend: N samples, B rows of one chunk, C classes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chgval.detection.settings import SETTINGS

# Rows, and rows times classes, on which shrinkage and scale are chosen; and what is worked on at a time.
JUDGED_ROWS = 3_000
JUDGED_ENTRIES = 1_000_000
CHUNK_ROWS = 8_192
CHUNK_ENTRIES = 10_000_000
# No class is less probable than this, about 1e-9: powers of it must still be numbers.
LOWEST_LOG = -20.0
# Standard deviation of a feature that varies, as a share of its mean.
LEAST_DEVIATION = 1e-6
# Variance that a class has at least, as a share of that of all samples, so that identical ones have some.
LEAST_VARIANCE = 1e-6
# Of a sample's leverage: its own share of the covariance is taken out, but never all of it.
SMALLEST_REST = 1e-3


class LeftOutGaussians:
    """Predicts each sample's class from the labels of all others, in one fit.

    Linear discriminant analysis on the signed square roots of the features (which makes the skewed outputs
    of a ReLU more normal), each scaled to variance 1. Mean, covariance and frequency of a sample's own class
    are those without the sample: a rank-one change, so nothing is fitted twice. The covariance is shrunk
    towards its mean variance, by the share under which the labels are most probable, and the
    log-probabilities are scaled so that they are, too.

    Args:
        features_ND: any floating type, shape (N, D).
        labels_N: given classes, int64, shape (N,), 0 or more.
        num_classes: C.
    """

    def __init__(self, features_ND: Tensor, labels_N: Tensor, num_classes: int) -> None:
        roots_ND = features_ND.float()
        roots_ND = roots_ND.sign().mul_(roots_ND.abs().sqrt_())
        means_D = roots_ND.mean(0)
        roots_ND.sub_(means_D)
        deviations_D = roots_ND.square().mean(0).sqrt()
        # What varies less than float32 can say is constant.
        is_constant_D = deviations_D <= LEAST_DEVIATION * means_D.abs()
        self._roots_ND = roots_ND.div_(deviations_D.where(~is_constant_D, torch.inf))
        self._labels_N = labels_N
        self._num_classes = num_classes

    def log_probabilities(self, weights_N: Tensor | None = None) -> NDArray[np.float32]:
        """Return natural logarithms of probabilities, shape (N, C).

        A class has no opinion of its only sample: it is then as probable as the most probable other one.

        Args:
            weights_N: how much each sample counts for the others, from 0 to 1, shape (N,); None counts all
                alike.
        """
        labels_N = self._labels_N
        fitted = self.fit(torch.ones(len(labels_N)) if weights_N is None else weights_N.float())
        judged = torch.from_numpy(judged_rows(labels_N.numpy(), self._num_classes))
        choices = []
        for shrinkage in SETTINGS.shrinkages:
            logs_BC = fitted.log_likelihoods(judged, shrinkage)
            scale, loss = best_scale(logs_BC.numpy(), labels_N[judged].numpy())
            choices.append((loss, scale, shrinkage))
        _, scale, shrinkage = min(choices)
        chunk = max(1, min(CHUNK_ROWS, CHUNK_ENTRIES // self._num_classes))
        chunks = torch.split(torch.arange(len(labels_N)), chunk)
        scaled = [
            (scale * fitted.log_likelihoods(rows, shrinkage)).log_softmax(1).clamp(min=LOWEST_LOG)
            for rows in chunks
        ]
        logs_NC: NDArray[np.float32] = torch.cat(scaled).numpy()
        return logs_NC

    def fit(self, weights_N: Tensor) -> _Fitted:
        """Fit the Gaussians of all samples, so weighted."""
        roots_ND, labels_N = self._roots_ND, self._labels_N
        width = roots_ND.shape[1]
        counts_C = torch.zeros(self._num_classes).index_add_(0, labels_N, weights_N)
        means_CD = torch.zeros(self._num_classes, width)
        means_CD.index_add_(0, labels_N, roots_ND * weights_N[:, None])
        means_CD /= counts_C.clamp(min=1e-9)[:, None]
        scatter_DD = torch.zeros(width, width, dtype=torch.float64)
        for start in range(0, len(labels_N), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            residuals_BD = roots_ND[rows] - means_CD[labels_N[rows]]
            residuals_BD *= weights_N[rows, None].sqrt()
            scatter_DD += residuals_BD.T @ residuals_BD
        variances_D, vectors_DD = torch.linalg.eigh(scatter_DD)
        vectors_DD = vectors_DD.float()
        return _Fitted(
            rotated_ND=roots_ND @ vectors_DD,
            means_CD=means_CD @ vectors_DD,
            variances_D=variances_D.clamp(min=0).float() + LEAST_VARIANCE * roots_ND.square().sum(0).mean(),
            labels_N=labels_N,
            weights_N=weights_N,
            counts_C=counts_C,
        )


def best_scale(logs_NC: NDArray[np.float32], labels_N: NDArray[np.int64]) -> tuple[float, float]:
    """Return the factor of log-likelihoods under which labels are most probable, and their mean loss then.

    Args:
        logs_NC: natural logarithms, up to a constant per row, shape (N, C).
        labels_N: shape (N,).
    """
    from scipy.optimize import minimize_scalar

    # Class by class: sums over a short last axis are slow.
    logs_CN = np.ascontiguousarray((logs_NC - logs_NC.max(1, keepdims=True)).T)
    own_N = logs_CN[labels_N, np.arange(len(labels_N))]

    def loss(log_scale: float) -> float:
        scale = np.float32(np.exp(log_scale))
        return float((np.log(np.exp(scale * logs_CN).sum(0)) - scale * own_N).mean())

    best = minimize_scalar(loss, bounds=(-8.0, 4.0), method="bounded")
    return float(np.exp(best.x)), float(best.fun)


def judged_rows(labels_N: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Return the rows on which shrinkage and scale are chosen, evenly from every class."""
    return rows_of_every_class(labels_N, min(JUDGED_ROWS, JUDGED_ENTRIES // num_classes))


def rows_of_every_class(labels_N: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most so many rows, at least one, of each class as many as its share; sorted by label.

    Args:
        labels_N: given classes, shape (N,).
        most: rows to return, if there are as many.
    """
    places = np.linspace(0, len(labels_N) - 1, max(1, min(len(labels_N), most))).round().astype(np.int64)
    rows: NDArray[np.int64] = np.argsort(labels_N, kind="stable")[places]
    return rows


@dataclass(frozen=True, slots=True)
class _Fitted:
    """Class Gaussians of one covariance, in the coordinates of its eigenvectors.

    Attributes:
        rotated_ND, means_CD: samples and class means, about the mean of all.
        variances_D: eigenvalues of the scatter within classes, not yet divided by the degrees of freedom.
        weights_N, counts_C: how much each sample counts, and their sums by class.
    """

    rotated_ND: Tensor
    means_CD: Tensor
    variances_D: Tensor
    labels_N: Tensor
    weights_N: Tensor
    counts_C: Tensor

    def log_likelihoods(self, rows: Tensor, shrinkage: float) -> Tensor:
        """Return log-likelihood and log-frequency of each class, up to a constant per row, shape (B, C)."""
        labels_B, weights_B = self.labels_N[rows], self.weights_N[rows]
        own_B1 = labels_B[:, None]
        counts_B = self.counts_C[labels_B]
        rest_B = counts_B - weights_B
        alone_B = rest_B <= 1e-6 * counts_B
        rest_B = rest_B.where(~alone_B, 1)
        mean_variance = self.variances_D.mean()
        if mean_variance == 0:  # all features are constant: only frequencies tell
            distances_BC = torch.zeros(len(rows), len(self.counts_C))
        else:
            scales_D = ((1 - shrinkage) * self.variances_D + shrinkage * mean_variance).rsqrt()
            samples_BD, means_CD = self.rotated_ND[rows] * scales_D, self.means_CD * scales_D
            products_BC = samples_BD @ means_CD.T
            squares_B1 = samples_BD.square().sum(1, keepdim=True)
            # To each class mean, squared, and against the way to the sample's own one.
            distances_BC = squares_B1 - 2 * products_BC + means_CD.square().sum(1)
            own_products_B1 = products_BC.gather(1, own_B1)
            along_BC = squares_B1 - own_products_B1 - products_BC + means_CD[labels_B] @ means_CD.T
            own_B = distances_BC.gather(1, own_B1).squeeze(1)
            # Without the sample its class mean moves away by this factor, and the scatter loses this much.
            away_B = (counts_B / rest_B).where(~alone_B, 1)
            lost_B = (1 - shrinkage) * weights_B * away_B
            along_BC.scatter_(1, own_B1, (own_B * away_B)[:, None])
            distances_BC.scatter_(1, own_B1, (own_B * away_B**2)[:, None])
            remains_B = (1 - lost_B * own_B).clamp(min=SMALLEST_REST)
            distances_BC += (lost_B / remains_B)[:, None] * along_BC.square()
            distances_BC *= (self.weights_N.sum() - (self.counts_C > 0).sum()).clamp(min=1)
        frequencies_BC = self.counts_C.clamp(min=1e-9).log().expand(len(rows), -1).clone()
        frequencies_BC.scatter_(1, own_B1, rest_B.log()[:, None])
        logs_BC = frequencies_BC - distances_BC / 2
        others_B = logs_BC.scatter(1, own_B1, -torch.inf).amax(1)
        own_logs_B = logs_BC.gather(1, own_B1).squeeze(1)
        own_logs_B = torch.where(alone_B & others_B.isfinite(), others_B, own_logs_B)
        return logs_BC.scatter(1, own_B1, own_logs_B[:, None])

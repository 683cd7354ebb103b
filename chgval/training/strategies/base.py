"""What every strategy is given and returns, and the arithmetic that they share.

Shape legend: N training samples (positions 0 to N - 1, whatever rows of the dataset they are), C classes, D
last-layer inputs, F = D + 1 with the bias column, K chosen samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from chgval.registry import name_of
from chgval.types import FloatArray, IntArray
from chgval.valuation.closed_form import Factors
from chgval.valuation.selection import keep_highest


@dataclass(frozen=True)
class Predictions:
    """What a model, the present or the averaged one, says of samples, without training; on its device.

    Attributes:
        logits_NC: shape (N, C).
        features_ND: inputs of the last linear layer, shape (N, D).
        labels_N: shape (N,).
        has_bias: whether that layer has a bias.
    """

    logits_NC: Tensor
    features_ND: Tensor
    labels_N: Tensor
    has_bias: bool = True

    def to(self, device: torch.device) -> Predictions:
        """Return the same on a device."""
        return Predictions(
            self.logits_NC.to(device), self.features_ND.to(device), self.labels_N.to(device), self.has_bias
        )

    @cached_property
    def residuals_NC(self) -> Tensor:
        """Softmax minus one-hot: the gradient of each sample's loss with respect to its logits."""
        residuals_NC = self.logits_NC.softmax(1)
        return residuals_NC - functional.one_hot(self.labels_N, residuals_NC.shape[1])

    @cached_property
    def losses_N(self) -> Tensor:
        """Cross entropy of each sample, in nats."""
        return functional.cross_entropy(self.logits_NC, self.labels_N, reduction="none")

    def last_layer(self, weight_CF: Tensor) -> Tensor:
        """Return what a last layer of these weights, its bias last, makes of the samples, shape (N, C)."""
        width = self.features_ND.shape[1]
        weight_CF = weight_CF.to(self.features_ND.dtype)
        return functional.linear(
            self.features_ND, weight_CF[:, :width], weight_CF[:, width] if self.has_bias else None
        )

    def factors(self, *, times_loss: bool) -> Factors:
        """Return the last-layer gradients of all samples, multiplied by their loss or not."""
        residuals_NC = self.residuals_NC * self.losses_N[:, None] if times_loss else self.residuals_NC
        return Factors(residuals_NC, self.features_ND, self.has_bias)


@dataclass
class Question:
    """What a strategy is asked: which samples to train on until the next question.

    Attributes:
        labels_N: class of each training sample, int64, on the host.
        num_classes: C.
        count: how many samples to choose.
        epoch, num_epochs: which epoch is about to begin (from 1), and how many there are.
        batch_size: of the training.
        lr: present learning rate.
        generator: all randomness comes from it.
        predict_samples: runs the model over the training samples.
        predict_averaged: does so with the moving average of the weights, where that is kept.
        predict_held: runs the model over held-out samples, where there are some.
        memory: what the strategy keeps from one question to the next; empty again once samples have turned
            out to be unreadable, as positions are others then.
    """

    labels_N: Tensor
    num_classes: int
    count: int
    epoch: int
    num_epochs: int
    batch_size: int
    lr: float
    generator: torch.Generator
    predict_samples: Callable[[], Predictions]
    predict_averaged: Callable[[], Predictions]
    predict_held: Callable[[], Predictions]
    memory: dict[str, Tensor] = field(default_factory=dict)
    _predictions: Predictions | None = None

    def predictions(self) -> Predictions:
        """Run the model over the training samples; asked again, return the same."""
        if self._predictions is None:
            self._predictions = self.predict_samples()
        return self._predictions

    def highest_of_each_class(self, score_N: Tensor) -> Tensor:
        """Return the positions of the `count` samples with the highest scores within their class."""
        scores: FloatArray = score_N.double().cpu().numpy()
        labels: IntArray = self.labels_N.numpy()
        return torch.from_numpy(np.flatnonzero(keep_highest(scores, labels, self.count)))

    def at_random(self) -> Tensor:
        """Return the positions of `count` samples, drawn within each class."""
        return self.highest_of_each_class(torch.rand(len(self.labels_N), generator=self.generator))


@dataclass(frozen=True, slots=True)
class Choice:
    """What to train on: positions of K samples, ascending, and their weights (None: all alike).

    Both are on the host.
    """

    positions_K: Tensor
    weights_K: Tensor | None = None


ChoiceFunction = Callable[[Question], Choice]


@dataclass(frozen=True, slots=True)
class Strategy:
    """A registered strategy.

    Attributes:
        choose: answers the question.
        averages_weights: whether it wants passes with the moving average of the weights.
        keeps_shares: whether every class has its share in what is chosen.
        needs_holdout: whether it compares with held-out samples.
    """

    choose: ChoiceFunction
    averages_weights: bool = False
    keeps_shares: bool = True
    needs_holdout: bool = False


REGISTRY: dict[str, Strategy] = {}


def strategy(
    *, averages_weights: bool = False, keeps_shares: bool = True, needs_holdout: bool = False
) -> Callable[[ChoiceFunction], ChoiceFunction]:
    """Register a function as the strategy that is called as its file."""

    def register(choose: ChoiceFunction) -> ChoiceFunction:
        REGISTRY[name_of(choose)] = Strategy(choose, averages_weights, keeps_shares, needs_holdout)
        return choose

    return register

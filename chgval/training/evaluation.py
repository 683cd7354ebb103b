"""What a model predicts for samples, and how right that is.

Shape legend: N samples, C classes, B rows of one batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from chgval.data.loader import Loader
from chgval.errors import DataError, NonFiniteError
from chgval.training.loop import forward_all
from chgval.training.records import Evaluation
from chgval.types import FloatArray, IntArray

CALIBRATION_BINS = 15
# Predictions stay on the device for so many batches: copying each would make every step wait.
BATCHES_BETWEEN_COPIES = 16


def evaluate(model: nn.Module, loader: Loader, labels_N: IntArray, num_classes: int) -> Evaluation:
    """Show a model every sample of a loader once, and compare with the labels.

    Args:
        model: returns (logits, last-layer inputs).
        loader: of the samples.
        labels_N: class of every row of the dataset that the loader is of; -1 for rows that it leaves out.
        num_classes: C.
    Raises:
        DataError, NonFiniteError: see `predict`.
    """
    rows_N, logits_NC, _ = predict(model, loader, with_features=False)
    labels = torch.from_numpy(labels_N)[rows_N]
    confidence_N, predicted_N = logits_NC.softmax(1).max(1)
    right_N = (predicted_N == labels).double().numpy()
    counts_C = np.bincount(labels, minlength=num_classes)
    right_C = np.bincount(labels, weights=right_N, minlength=num_classes)
    with np.errstate(invalid="ignore"):
        accuracies_C = right_C / counts_C
    return Evaluation(
        num_samples=len(labels),
        accuracy=float(right_N.mean()),
        loss=functional.cross_entropy(logits_NC, labels).item(),
        calibration_error=calibration_error(confidence_N.double().numpy(), right_N),
        class_accuracies=accuracies_C.tolist(),
    )


def predict(
    model: nn.Module,
    loader: Loader,
    *,
    with_features: bool = True,
    view: Callable[[Tensor], Tensor] | None = None,
    stays_on_device: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Show a model every sample of a loader once.

    Args:
        model: returns (logits, last-layer inputs).
        loader: of the samples.
        with_features: whether last-layer inputs are kept; without, none of their columns is.
        view: what to show of a batch of inputs; None shows them as they are.
        stays_on_device: whether logits and last-layer inputs are left where the model is.
    Returns:
        Rows (N,), on the host, logits (N, C) and last-layer inputs (N, D) of what can be read.
    Raises:
        DataError: nothing can be read.
        NonFiniteError: a prediction is NaN or infinite.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(indices_B: Tensor, logits_BC: Tensor, features_BD: Tensor) -> None:
        kept_BD = features_BD.float() if with_features else features_BD[:, :0]
        waiting.append((indices_B, logits_BC.float(), kept_BD))
        if len(waiting) == BATCHES_BETWEEN_COPIES:
            copy()

    def copy() -> None:
        together = [torch.cat(tensors) for tensors in zip(*waiting, strict=True)]
        rows, logits, features = together if stays_on_device else [tensor.cpu() for tensor in together]
        parts.append((rows, logits, features))
        waiting.clear()

    forward_all(model, loader, take, view=view)
    if waiting:
        copy()
    if not parts:
        raise DataError("none of the images could be decoded; check the files.")
    rows_N, logits_NC, features_ND = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if not logits_NC.isfinite().all():
        raise NonFiniteError(
            "the model predicts NaN or infinite logits; try a lower --lr, or check --mean and --std."
        )
    return rows_N.cpu(), logits_NC, features_ND


def calibration_error(confidence_N: FloatArray, right_N: FloatArray) -> float:
    """Return the expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3)."""
    bin_N = (confidence_N * CALIBRATION_BINS).astype(int).clip(0, CALIBRATION_BINS - 1)
    gaps = np.bincount(bin_N, confidence_N - right_N, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence_N))

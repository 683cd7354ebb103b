"""Noise scores of labels whose probabilities somebody else has computed, without training.

Shape legend: N samples, C classes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from chgval.detection.calibration import estimate_rate
from chgval.detection.rules.auto import automatic_cut
from chgval.detection.scores import score_labels
from chgval.detection.signals import NoiseRate
from chgval.detection.verdict import notes_on, verdict_of
from chgval.errors import DataError
from chgval.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelIssues:
    """What is wrong with labels. As a NumPy array it is the mask of flagged samples.

    Attributes:
        is_issue: which samples are flagged, shape (N,).
        noise_scores: probability that each label is wrong; NaN where nothing is said.
        suggested_labels: most probable class other than the given one; -1 where nothing is said.
        suggested_probabilities: probability that it is the right one.
        rate: estimated share of wrong labels, with an interval that holds it in nine of ten datasets.
        notes: sentences to read before acting on it; none if all is well.
    """

    is_issue: NDArray[np.bool_]
    noise_scores: FloatArray
    suggested_labels: IntArray
    suggested_probabilities: FloatArray
    rate: NoiseRate
    notes: list[str]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        found_N = np.asarray(self.is_issue, dtype=dtype)  # NumPy 1 has no copy=None
        return found_N.copy() if copy else found_N

    def __len__(self) -> int:
        return len(self.is_issue)

    def ranked(self) -> IntArray:
        """Return the flagged samples, the most suspicious first."""
        flagged = np.flatnonzero(self.is_issue)
        ranked: IntArray = flagged[np.argsort(-self.noise_scores[flagged], kind="stable")]
        return ranked


def find_label_issues(
    labels: ArrayLike, pred_probs: ArrayLike, *, features: ArrayLike | torch.Tensor | None = None
) -> LabelIssues:
    """Find labels that are probably wrong, from probabilities that are there already.

    Takes what cleanlab's function of this name takes.

        >>> labels = np.arange(300) % 3
        >>> pred_probs = 0.05 + 0.85 * np.eye(3)[labels]
        >>> labels[:5] = (labels[:5] + 1) % 3
        >>> sorted(find_label_issues(labels, pred_probs).ranked().tolist())
        [0, 1, 2, 3, 4]

    Args:
        labels: given classes, integers from 0, shape (N,); -1 where unknown.
        pred_probs: probabilities of every class, shape (N, C), of models that were not trained on the sample
            (as by cross-validation). With `features` they may be of any model.
        features: embeddings, or last-layer inputs of a model, shape (N, D); what the labels of all other
            samples say of each is then taken as evidence too.
    Raises:
        DataError: shapes do not fit each other, or labels or probabilities are none.
    """
    labels_N, probabilities_NC, features_ND = _checked(labels, pred_probs, features)
    noise = score_labels(labels_N, probabilities_NC, features_ND)
    score_N = noise.noise_score_N
    known_N = np.isfinite(score_N)
    if not known_N.any():
        raise DataError("labels: none of the samples has a label and probabilities; there is nothing to say.")
    flagged_N = np.zeros(len(score_N), dtype=bool)
    flagged_N[known_N] = score_N[known_N] >= automatic_cut(score_N[known_N])
    predicted_N = np.where(known_N, np.nan_to_num(probabilities_NC).argmax(1), -1)
    names = [str(label) for label in range(probabilities_NC.shape[1])]
    return LabelIssues(
        is_issue=flagged_N,
        noise_scores=score_N,
        suggested_labels=noise.suggested_label_N,
        suggested_probabilities=noise.suggested_probability_N,
        rate=estimate_rate(score_N[known_N], noise.noise_score_std_N[known_N]),
        notes=notes_on(verdict_of(noise, labels_N, predicted_N, names)),
    )


def _checked(
    labels: ArrayLike, pred_probs: ArrayLike, features: ArrayLike | torch.Tensor | None
) -> tuple[IntArray, NDArray[np.float32], torch.Tensor | None]:
    """Return what `find_label_issues` is given as arrays that fit each other; unknown labels are -1.

    Raises:
        DataError: they do not.
    """
    labels_N: IntArray = np.asarray(labels)
    probabilities_NC = np.asarray(pred_probs, dtype=np.float32)
    if labels_N.ndim != 1 or not np.issubdtype(labels_N.dtype, np.integer):
        raise DataError(
            f"labels: {labels_N.dtype} of shape {labels_N.shape}; pass integers from 0, one per sample."
        )
    if probabilities_NC.ndim != 2 or len(probabilities_NC) != len(labels_N) or probabilities_NC.shape[1] < 2:
        raise DataError(
            f"pred_probs: shape {probabilities_NC.shape} for {len(labels_N):,} labels; pass one row per "
            "sample, with a column for each of at least two classes."
        )
    labels_N = labels_N.astype(np.int64)
    num_classes = probabilities_NC.shape[1]
    if labels_N.max(initial=-1) >= num_classes:
        raise DataError(
            f"labels: class {labels_N.max()} where pred_probs have {num_classes} columns; count classes "
            "from 0."
        )
    sums_N = probabilities_NC.sum(1)
    if (probabilities_NC < 0).any() or not np.allclose(sums_N[np.isfinite(sums_N)], 1, atol=1e-3):
        raise DataError("pred_probs: rows must be probabilities that sum to 1; pass softmax of logits.")
    features_ND = None
    if features is not None:
        is_tensor = isinstance(features, torch.Tensor)
        features_ND = torch.as_tensor(features if is_tensor else np.array(features)).detach().float().cpu()
    if features_ND is not None and (features_ND.ndim != 2 or len(features_ND) != len(labels_N)):
        raise DataError(
            f"features: shape {tuple(features_ND.shape)} for {len(labels_N):,} labels; pass one row per "
            "sample."
        )
    return np.where(labels_N < 0, -1, labels_N), probabilities_NC, features_ND

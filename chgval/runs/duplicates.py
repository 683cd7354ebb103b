"""Near-duplicates whose labels disagree: of each such pair at least one label is wrong.

Shape legend: N samples, D last-layer inputs, H and W sides of a thumbnail, P = H W.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from chgval.data.dataset import Dataset, Embeddings
from chgval.errors import SettingsError
from chgval.runs.session import Run
from chgval.training.models import SplitModel
from chgval.types import IntArray

# Neighbours of either kind that are looked at closely.
NUM_CANDIDATES = 5
# Sides of the thumbnails that say how an image is laid out, and what its details are.
LAYOUT_SIZE, DETAIL_SIZE = 8, 16
# Details are what differs from the mean of so many pixels around: smooth backgrounds are alike everywhere.
DETAIL_WINDOW = 5
# Correlation of the details from which on two images are one.
LEAST_CORRELATION = 0.9


def check_images(dataset: Dataset) -> None:
    """Raise SettingsError where the samples are embeddings, or images too small to have details."""
    if isinstance(dataset.content, Embeddings) or dataset.input_size < DETAIL_SIZE:
        raise SettingsError(
            f"--duplicates: needs images of at least {DETAIL_SIZE} pixels, which {dataset.source} has not."
        )


def find_duplicates(run: Run, model: SplitModel) -> IntArray:
    """Return, for every row, the row of its nearest near-duplicate with another label; -1 for none.

    Candidates are the nearest neighbours of other labels by last-layer inputs (of the averaged weights), and
    those by layout, both blind to mirroring. They are duplicates if their details agree, mirrored or not.

    Args:
        run: a run that has been trained, on images that `check_images` lets pass.
        model: with the average of its weights.
    """
    rows, features_ND, thumbnails_NHW = _describe(run, model)
    labels_N = run.dataset.labels_N[rows]
    symmetric_NHW = thumbnails_NHW + thumbnails_NHW.flip(2)
    layouts_NP = functional.adaptive_avg_pool2d(symmetric_NHW, LAYOUT_SIZE).flatten(1)
    layouts_NP -= layouts_NP.mean(1, keepdim=True)
    details_NHW = thumbnails_NHW - _local_mean(thumbnails_NHW)
    details_NP, mirrored_NP = _unit(details_NHW), _unit(details_NHW.flip(2))

    points = (_unit(features_ND - features_ND.mean(0)), _unit(layouts_NP))
    candidates_NK = np.hstack([_nearest_of_other_labels(part.numpy(), labels_N) for part in points])
    best_N = np.full(len(rows), LEAST_CORRELATION)
    duplicates_N = np.full(len(run.dataset), -1)
    for candidate_N in candidates_NK.T:
        others_NP = details_NP[candidate_N]
        straight_N, flipped_N = (details_NP * others_NP).sum(1), (mirrored_NP * others_NP).sum(1)
        correlation_N = torch.maximum(straight_N, flipped_N).numpy()
        better_N = correlation_N >= best_N
        best_N[better_N] = correlation_N[better_N]
        duplicates_N[rows[better_N]] = rows[candidate_N[better_N]]
    return duplicates_N


def _nearest_of_other_labels(points_NK: NDArray[np.float32], labels_N: IntArray) -> IntArray:
    """Return the positions of every sample's nearest neighbours of other labels, the nearest first."""
    from sklearn.neighbors import NearestNeighbors

    least = len(labels_N) - np.unique(labels_N, return_counts=True)[1].max(initial=0)
    nearest_NK = np.zeros((len(labels_N), min(NUM_CANDIDATES, least)), dtype=np.int64)
    if nearest_NK.size:
        for label in np.unique(labels_N):
            members, others = np.flatnonzero(labels_N == label), np.flatnonzero(labels_N != label)
            neighbours = NearestNeighbors(n_neighbors=nearest_NK.shape[1], algorithm="brute")
            found = neighbours.fit(points_NK[others]).kneighbors(points_NK[members], return_distance=False)
            nearest_NK[members] = others[found]
    return nearest_NK


def _describe(run: Run, model: SplitModel) -> tuple[IntArray, Tensor, Tensor]:
    """Return the rows that can be read, last-layer inputs plus those of the mirror image, and thumbnails."""
    rows, features, thumbnails = [], [], []
    model.eval()
    with torch.inference_mode():
        for batch in run.loader.plain_batches():
            inputs_B = batch.inputs_B
            features.append((model(inputs_B)[1].float() + model(inputs_B.flip(3))[1].float()).cpu())
            thumbnails.append(functional.adaptive_avg_pool2d(inputs_B.mean(1).float().cpu(), DETAIL_SIZE))
            rows.append(batch.indices_B.cpu())
    return torch.cat(rows).numpy(), torch.cat(features), torch.cat(thumbnails)


def _local_mean(images_NHW: Tensor) -> Tensor:
    return functional.avg_pool2d(
        images_NHW, DETAIL_WINDOW, stride=1, padding=DETAIL_WINDOW // 2, count_include_pad=False
    )


def _unit(vectors_N: Tensor) -> Tensor:
    """Return vectors, or images as vectors, scaled to length 1."""
    return functional.normalize(vectors_N.flatten(1), dim=1)

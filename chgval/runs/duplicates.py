"""Near-duplicates whose labels disagree: of each such pair at least one label is wrong.

Shape legend: N samples, D last-layer inputs, H and W sides of a thumbnail, P = H W.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from chgval.data.dataset import Dataset, Embeddings
from chgval.errors import SettingsError
from chgval.records import IntArray
from chgval.runs.value import Run

# Neighbours that are looked at closely.
NUM_CANDIDATES = 5
# Sides of the thumbnails that say how an image is laid out, and what its details are.
LAYOUT_SIZE, DETAIL_SIZE = 8, 16
# Details are what differs from the mean of so many pixels around: smooth backgrounds are alike everywhere.
DETAIL_WINDOW = 5
# Correlation of the details from which on two images are one.
LEAST_CORRELATION = 0.8


def check_images(dataset: Dataset) -> None:
    """Raise SettingsError where the samples are embeddings, or images too small to have details."""
    if isinstance(dataset.content, Embeddings) or dataset.input_size < DETAIL_SIZE:
        raise SettingsError(
            f"--duplicates: needs images of at least {DETAIL_SIZE} pixels, which {dataset.source} has not."
        )


def find_duplicates(run: Run) -> IntArray:
    """Return, for every row, the row of its nearest near-duplicate with another label; -1 for none.

    Candidates are the nearest neighbours by last-layer inputs (of the averaged weights) and layout, both
    blind to mirroring. They are duplicates if their details agree, mirrored or not.

    Args:
        run: a run that has been trained, on images that `check_images` lets pass.
    """
    from sklearn.neighbors import NearestNeighbors

    rows, features_ND, thumbnails_NHW = _describe(run)
    labels_N = run.dataset.labels_N[rows]
    symmetric_NHW = thumbnails_NHW + thumbnails_NHW.flip(2)
    layouts_NP = functional.adaptive_avg_pool2d(symmetric_NHW, LAYOUT_SIZE).flatten(1)
    layouts_NP -= layouts_NP.mean(1, keepdim=True)
    points_NK = torch.cat([_unit(features_ND - features_ND.mean(0)), _unit(layouts_NP)], dim=1)
    details_NHW = thumbnails_NHW - _local_mean(thumbnails_NHW)
    details_NP, mirrored_NP = _unit(details_NHW), _unit(details_NHW.flip(2))

    neighbours = NearestNeighbors(n_neighbors=min(NUM_CANDIDATES, len(rows) - 1), algorithm="brute")
    candidates_NK = neighbours.fit(points_NK.numpy()).kneighbors(return_distance=False)
    best_N = np.full(len(rows), LEAST_CORRELATION)
    duplicates_N = np.full(len(run.dataset), -1)
    for candidate_N in candidates_NK.T:
        others_NP = details_NP[candidate_N]
        straight_N, flipped_N = (details_NP * others_NP).sum(1), (mirrored_NP * others_NP).sum(1)
        correlation_N = torch.maximum(straight_N, flipped_N).numpy()
        better_N = (correlation_N >= best_N) & (labels_N[candidate_N] != labels_N)
        best_N[better_N] = correlation_N[better_N]
        duplicates_N[rows[better_N]] = rows[candidate_N[better_N]]
    return duplicates_N


def _describe(run: Run) -> tuple[IntArray, Tensor, Tensor]:
    """Return the rows that can be read, last-layer inputs plus those of the mirror image, and thumbnails."""
    if run.average is None:
        raise ValueError("duplicates are found by the averaged weights, which this run has none of")
    rows, features, thumbnails = [], [], []
    model = run.average.model.eval()
    with torch.inference_mode():
        for batch in run.loader.plain_batches():
            inputs_B = batch.inputs_B
            features.append((model(inputs_B)[1].float() + model(inputs_B.flip(3))[1].float()).cpu())
            thumbnails.append(functional.adaptive_avg_pool2d(inputs_B.mean(1).float(), DETAIL_SIZE).cpu())
            rows.append(batch.indices_B.cpu())
    return torch.cat(rows).numpy(), torch.cat(features), torch.cat(thumbnails)


def _local_mean(images_NHW: Tensor) -> Tensor:
    return functional.avg_pool2d(
        images_NHW, DETAIL_WINDOW, stride=1, padding=DETAIL_WINDOW // 2, count_include_pad=False
    )


def _unit(vectors_N: Tensor) -> Tensor:
    """Return vectors, or images as vectors, scaled to length 1."""
    return functional.normalize(vectors_N.flatten(1), dim=1)

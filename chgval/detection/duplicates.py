"""Near-duplicates: images that are copies of each other, also mirrored, encoded anew or cropped.

Candidates are found by how images are laid out. They are copies if their details agree, wherever the one
lies in the other; smooth backgrounds are alike everywhere, and count little.

Shape legend: N images, P pairs, T side of a thumbnail, L numbers of a layout, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from chgval.types import FloatArray, IntArray

# Sides, in pixels, of the grey thumbnails that images are compared by, and of those that say how one is laid
# out.
THUMBNAIL_SIDE, LAYOUT_SIDE = 24, 8
# Images of shorter sides have no details: they are copies only if they are equal.
LEAST_SIDE = 16
# Images laid out most like another that are looked at closely, and the cosine that they have at least.
NUM_CANDIDATES, LEAST_LAYOUT = 4, 0.85
# A part of an image is looked for at these shares of its side, at so many places along it, and compared in
# these sides, in pixels. They reach down to 3/4, and no place is over 4 % of the side from one of them.
CROPS = {1.0: (1, (24,)), 0.92: (2, (22, 23, 21)), 0.84: (3, (20, 21, 19)), 0.77: (4, (18, 19, 17))}
# Details are what differs from the mean of so many pixels around.
DETAIL_WINDOW = 5
# Correlations, of the details and of the whole, that copies have at least; and of the details in the first
# side that is tried, below which no other is.
LEAST_DETAILS, LEAST_WHOLE, LEAST_AT_FIRST = 0.8, 0.85, 0.4
# Where all pictures are alike, as of hands before a wall, copies must be alike beyond that. How alike
# pictures are is said by their third nearest, which of few is a copy; where that is symmetric around the
# median, so many times its distance from the lower quartile is where Tukey's far outliers begin. So much is
# enough in any case.
NEAREST_THAT_IS_NONE, FAR_BEYOND, ENOUGH = 3, 7, 0.95
# Features are near-duplicates if they are nearer than this share of the median distance to the nearest: that
# of cleanlab's Datalab (its near_duplicate threshold).
NEAR_SHARE = 0.13
CHUNK_PAIRS = 4096


@dataclass(frozen=True, slots=True)
class Thumbnails:
    """Images, grey and small.

    Attributes:
        grey_NTT: uint8, shape (N, T, T), whatever their own shape was.
        is_known_N: whether the image could be read.
        has_details_N: whether it was large enough to have some.
    """

    grey_NTT: NDArray[np.uint8]
    is_known_N: NDArray[np.bool_]
    has_details_N: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows that are copies of each other, each pair once.

    Attributes:
        first_P, second_P: the rows, in one dataset the lower first; of two datasets, one of each.
        similarity_P: correlation of their details, or cosine of their features; 1 is equal.
    """

    first_P: IntArray
    second_P: IntArray
    similarity_P: FloatArray


def copies_within(thumbnails: Thumbnails) -> tuple[Pairs, float]:
    """Return the pairs of images of one dataset that are copies, and the similarity that these have at least.

    Args:
        thumbnails: of the dataset.
    """
    # Equal ones are one image: there may be more of them than there are candidates.
    known = np.flatnonzero(thumbnails.is_known_N)
    pixels_NP = thumbnails.grey_NTT[known].reshape(len(known), THUMBNAIL_SIDE**2)
    _, firsts, which = np.unique(pixels_NP, axis=0, return_index=True, return_inverse=True)
    first_of = known[firsts][which.reshape(-1)]
    is_copy = first_of != known
    equal = Pairs(first_of[is_copy], known[is_copy], np.ones(int(is_copy.sum())))
    rows = np.sort(known[firsts])
    rows = rows[thumbnails.has_details_N[rows]]
    grey_NHW = _floats(thumbnails, rows)
    found, whole_P = _alike(grey_NHW, grey_NHW, is_one=True)
    least = _least(found, len(rows))
    similar = _placed(_only_copies(found, whole_P, least), rows, rows)
    return _each_once([equal, similar], is_one=True), least


def copies_between(thumbnails: Thumbnails, others: Thumbnails, least: float) -> Pairs:
    """Return the pairs of an image of one dataset and its copy in another.

    Args:
        thumbnails: of the one.
        others: of the other.
        least: similarity that copies within the first have at least.
    """
    rows, other_rows = (np.flatnonzero(part.is_known_N & part.has_details_N) for part in (thumbnails, others))
    grey_NHW, other_NHW = _floats(thumbnails, rows), _floats(others, other_rows)
    found = _placed(_only_copies(*_alike(grey_NHW, other_NHW), least), rows, other_rows)
    back = _placed(_only_copies(*_alike(other_NHW, grey_NHW), least), other_rows, rows)
    turned = Pairs(back.second_P, back.first_P, back.similarity_P)
    return _each_once([_equal_between(thumbnails, others), found, turned])


def near_within(features_ND: NDArray[np.floating]) -> Pairs:
    """Return the pairs of features of one dataset that are nearer than others by far; NaN is in none."""
    return _near(features_ND, None)


def near_between(features_ND: NDArray[np.floating], others_MD: NDArray[np.floating]) -> Pairs:
    """Return the pairs of features of two datasets that are nearer than others by far."""
    return _near(features_ND, others_MD)


def groups_of(pairs: Pairs, num_rows: int) -> IntArray:
    """Return, for each row, the first row of the group of copies that it is in; -1 for none."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(pairs.first_P)), (pairs.first_P, pairs.second_P)), (num_rows, num_rows))
    _, group_N = connected_components(links, directed=False)
    _, first_row, which_N, size = np.unique(
        group_N, return_index=True, return_inverse=True, return_counts=True
    )
    firsts_N: IntArray = np.where(size[which_N] > 1, first_row[which_N], -1)
    return firsts_N


def other_labels(group_N: IntArray, labels_N: IntArray) -> IntArray:
    """Return, for each row, the first row of its group that has another label; -1 for none.

    Args:
        group_N: of `groups_of`.
        labels_N: given classes; -1 for none.
    """
    other_N = np.full(len(group_N), -1)
    rows = np.flatnonzero((group_N >= 0) & (labels_N >= 0))
    rows = rows[np.lexsort((rows, group_N[rows]))]
    for members in np.split(rows, np.flatnonzero(np.diff(group_N[rows])) + 1):
        labels = labels_N[members]
        for label in np.unique(labels):
            others = members[labels != label]
            if len(others):
                other_N[members[labels == label]] = others[0]
    return other_N


def _alike(images_NHW: Tensor, others_MHW: Tensor, *, is_one: bool = False) -> tuple[Pairs, FloatArray]:
    """Return pairs of an image and another that is laid out as it, or a part of it, is.

    Args:
        images_NHW: thumbnails.
        others_MHW: the same.
        is_one: whether both are the same dataset, and no image is paired with itself.
    Returns:
        The pairs, each once for every scale, with the correlations of their details; and those of the whole,
        shape (P,).
    """
    found, wholes = [], [np.zeros(0)]
    if not len(images_NHW) or not len(others_MHW):
        return _joined([]), np.zeros(0)
    with _one_thread():
        layouts_ML = _layouts(others_MHW)
        for scale, (num_places, sides) in CROPS.items():
            along = np.linspace(scale - 1, 1 - scale, num_places).tolist()
            near = [
                _candidates(_layouts(_cropped(images_NHW, scale, shift)), layouts_ML, is_one)
                for shift in itertools.product(along, along)
            ]
            first_P, second_P = np.unique(np.concatenate(near), axis=0).T
            for start in range(0, len(first_P), CHUNK_PAIRS):
                first, second = (part[start : start + CHUNK_PAIRS] for part in (first_P, second_P))
                details, whole = _agreement(images_NHW[first], others_MHW[second], sides)
                found.append(Pairs(first, second, details))
                wholes.append(whole)
    return _joined(found), np.concatenate(wholes)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: of many small steps, threads beside a busy machine wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _least(pairs: Pairs, num_images: int) -> float:
    """Return the similarity that copies have at least, where pairs of one dataset are alike as these are."""
    pairs = _each_once([pairs], is_one=True)
    rows = np.concatenate([pairs.first_P, pairs.second_P])
    similarity = np.concatenate([pairs.similarity_P, pairs.similarity_P])
    order = np.lexsort((-similarity, rows))
    ends = np.searchsorted(rows[order], np.arange(num_images + 1))
    at_N = ends[:-1] + NEAREST_THAT_IS_NONE - 1
    has_N = at_N < ends[1:]
    if not has_N.any():
        return LEAST_DETAILS
    third_N = np.zeros(num_images)
    third_N[has_N] = similarity[order[at_N[has_N]]]
    # Fisher's transform: correlations near 1 are not crowded.
    lower, median = np.quantile(np.arctanh(third_N.clip(0, 0.999999)), (0.25, 0.5))
    return float(np.clip(np.tanh(median + FAR_BEYOND * (median - lower)), LEAST_DETAILS, ENOUGH))


def _only_copies(pairs: Pairs, whole_P: FloatArray, least: float) -> Pairs:
    is_copy = (pairs.similarity_P >= least) & (whole_P >= LEAST_WHOLE)
    return Pairs(pairs.first_P[is_copy], pairs.second_P[is_copy], pairs.similarity_P[is_copy])


def _candidates(queries_NL: NDArray[np.float32], layouts_ML: NDArray[np.float32], is_one: bool) -> IntArray:
    """Return pairs of a query and one of its nearest layouts, shape (P, 2)."""
    from sklearn.neighbors import NearestNeighbors

    count = min(NUM_CANDIDATES + is_one, len(layouts_ML))
    neighbours = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(layouts_ML)
    distance_NK, near_NK = neighbours.kneighbors(queries_NL)
    row_NK = np.repeat(np.arange(len(queries_NL))[:, None], count, axis=1)
    is_near_NK = 1 - distance_NK**2 / 2 >= LEAST_LAYOUT
    if is_one:
        is_near_NK &= row_NK != near_NK
    return np.stack([row_NK[is_near_NK], near_NK[is_near_NK]], axis=1)


def _layouts(images_NHW: Tensor) -> NDArray[np.float32]:
    """Return how images are laid out, the same for their mirror images, as vectors of length 1."""
    layouts_NL = functional.adaptive_avg_pool2d(images_NHW + images_NHW.flip(2), LAYOUT_SIDE).flatten(1)
    layouts: NDArray[np.float32] = functional.normalize(
        layouts_NL - layouts_NL.mean(1, keepdim=True), dim=1
    ).numpy()
    return layouts


def _cropped(images_NHW: Tensor, scale: float, shift: tuple[float, float]) -> Tensor:
    """Return parts of images, in their size.

    Args:
        images_NHW: thumbnails.
        scale: side of the part, as a share.
        shift: of its centre from that of the image, across and down, in halves of the side.
    """
    if scale == 1:
        return images_NHW
    move = torch.tensor([[scale, 0, shift[0]], [0, scale, shift[1]]])
    size = [1, 1, THUMBNAIL_SIDE, THUMBNAIL_SIDE]
    grid = functional.affine_grid(move[None], size, align_corners=False)
    return functional.grid_sample(images_NHW[None], grid, padding_mode="border", align_corners=False)[0]


def _agreement(
    images_PHW: Tensor, others_PHW: Tensor, sides: tuple[int, ...]
) -> tuple[FloatArray, FloatArray]:
    """Return how far others agree with a part of images, mirrored or not: in their details, and as a whole.

    Args:
        images_PHW: thumbnails.
        others_PHW: thumbnails, of the whole of which a part of the image may be a copy.
        sides: that the part may have, in pixels; the first says whether the others are tried.
    """
    details_P, whole_P = torch.zeros(len(images_PHW)), torch.zeros(len(images_PHW))
    rows = torch.arange(len(images_PHW))
    for place, side in enumerate(sides):
        if place == 1:
            rows = torch.nonzero(details_P >= LEAST_AT_FIRST).squeeze(1)
        if not len(rows):
            break
        images, others = images_PHW[rows], others_PHW[rows]
        if side < THUMBNAIL_SIDE:
            others = functional.interpolate(others[None], (side, side), mode="bilinear", antialias=True)[0]
        details, other_details = _details(images), _details(others)
        for mirrored in (False, True):
            turned, turned_details = (part.flip(2) if mirrored else part for part in (others, other_details))
            best, where = _correlations(details, turned_details).max(1)
            of_whole = _correlations(images, turned).gather(1, where[:, None]).squeeze(1)
            is_better = best > details_P[rows]
            details_P[rows] = torch.where(is_better, best, details_P[rows])
            whole_P[rows] = torch.where(is_better, of_whole, whole_P[rows])
    return details_P.double().clamp(max=1).numpy(), whole_P.double().numpy()


def _correlations(images_PHW: Tensor, parts_PHW: Tensor) -> Tensor:
    """Return the correlation of each part with its image, at every place in it, shape (P, places)."""
    side = parts_PHW.shape[1]
    parts = functional.normalize((parts_PHW - parts_PHW.mean((1, 2), keepdim=True)).flatten(1), dim=1)
    places = torch.arange(images_PHW.shape[1] - side + 1)[:, None]
    within = torch.arange(images_PHW.shape[1])
    inside = ((within >= places) & (within < places + side)).float()  # sums over windows, as products
    sums = inside @ images_PHW @ inside.T
    squares = inside @ images_PHW.square() @ inside.T
    spread = (squares - sums.square() / side**2).clamp(min=1e-6).sqrt()
    products = functional.conv2d(images_PHW[None], parts.view(-1, 1, side, side), groups=len(parts))[0]
    return (products / spread).flatten(1)


def _details(images_NHW: Tensor) -> Tensor:
    """Return what differs from the mean of the pixels around."""
    at = torch.arange(images_NHW.shape[1])
    near = ((at[:, None] - at).abs() <= DETAIL_WINDOW // 2).float()
    near /= near.sum(1, keepdim=True)
    return images_NHW - near @ images_NHW @ near.T  # as a product many times faster than by pooling


def _equal_between(thumbnails: Thumbnails, others: Thumbnails) -> Pairs:
    places: dict[bytes, list[int]] = {}
    for row in np.flatnonzero(others.is_known_N).tolist():
        places.setdefault(others.grey_NTT[row].tobytes(), []).append(row)
    found = [
        (row, other)
        for row in np.flatnonzero(thumbnails.is_known_N).tolist()
        for other in places.get(thumbnails.grey_NTT[row].tobytes(), [])
    ]
    first_P, second_P = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return Pairs(first_P, second_P, np.ones(len(first_P)))


def _near(features_ND: NDArray[np.floating], others_MD: NDArray[np.floating] | None) -> Pairs:
    from sklearn.neighbors import NearestNeighbors

    rows = np.flatnonzero(np.isfinite(features_ND).all(1))
    other_rows = rows if others_MD is None else np.flatnonzero(np.isfinite(others_MD).all(1))
    mean_D = features_ND[rows].mean(0, dtype=np.float64) if len(rows) else 0.0

    def directions(vectors_ND: NDArray[np.floating]) -> NDArray[np.float64]:
        centred = vectors_ND.astype(np.float64) - mean_D
        unit: NDArray[np.float64] = centred / np.maximum(
            np.linalg.norm(centred, axis=1, keepdims=True), 1e-12
        )
        return unit

    unit_ND = directions(features_ND[rows])
    unit_MD = unit_ND if others_MD is None else directions(others_MD[other_rows])
    if len(rows) < 2 or not len(other_rows):
        return _joined([])
    own = NearestNeighbors(n_neighbors=min(NUM_CANDIDATES + 1, len(rows)), algorithm="brute").fit(unit_ND)
    distance_NK, near_NK = own.kneighbors(unit_ND)
    least = NEAR_SHARE * np.median(distance_NK[:, 1])
    if others_MD is not None:
        count = min(NUM_CANDIDATES, len(other_rows))
        found = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(unit_MD)
        distance_NK, near_NK = found.kneighbors(unit_ND)
    place, column = np.nonzero(distance_NK <= least)
    first_P, second_P = rows[place], other_rows[near_NK[place, column]]
    pairs = Pairs(first_P, second_P, 1 - distance_NK[place, column] ** 2 / 2)
    if others_MD is None:
        differs = first_P != second_P
        pairs = Pairs(first_P[differs], second_P[differs], pairs.similarity_P[differs])
    return _each_once([pairs], is_one=others_MD is None)


def _floats(thumbnails: Thumbnails, rows: IntArray) -> Tensor:
    return torch.from_numpy(thumbnails.grey_NTT[rows]).float()


def _placed(pairs: Pairs, rows: IntArray, other_rows: IntArray) -> Pairs:
    """Return pairs of rows for pairs of places among them."""
    return Pairs(rows[pairs.first_P], other_rows[pairs.second_P], pairs.similarity_P)


def _joined(found: list[Pairs]) -> Pairs:
    if not found:
        return Pairs(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))
    return Pairs(
        np.concatenate([pairs.first_P for pairs in found]),
        np.concatenate([pairs.second_P for pairs in found]),
        np.concatenate([pairs.similarity_P for pairs in found]),
    )


def _each_once(found: list[Pairs], *, is_one: bool = False) -> Pairs:
    """Return each pair once, with its highest similarity, sorted; in one dataset the lower row first."""
    pairs = _joined(found)
    first_P, second_P = pairs.first_P, pairs.second_P
    if is_one:
        first_P, second_P = np.minimum(first_P, second_P), np.maximum(first_P, second_P)
    order = np.lexsort((-pairs.similarity_P, second_P, first_P))
    rows_P2 = np.stack([first_P, second_P], axis=1)[order]
    is_new = np.append(True, (np.diff(rows_P2, axis=0) != 0).any(1))[: len(order)]
    chosen = order[is_new]
    return Pairs(first_P[chosen], second_P[chosen], pairs.similarity_P[chosen])

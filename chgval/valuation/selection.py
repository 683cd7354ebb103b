"""Which samples to keep: budgets per class, the highest of each, and weights for those kept.

Shape legend: N samples, C classes, K kept samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chgval.types import FloatArray, IntArray


def class_quotas(sizes_C: IntArray, count: int) -> IntArray:
    """Share out a count among classes in proportion to their sizes, exactly (largest remainders).

    Args:
        sizes_C: samples of each class, shape (C,).
        count: how many to keep; at most as many as there are.
    Returns:
        How many to keep of each class, shape (C,): sums to the count, and exceeds no size. Of equal
        remainders the class with the lower index gets the sample.
    """
    total = max(1, int(sizes_C.sum()))
    quotas_C, remainders_C = np.divmod(count * sizes_C, total)
    quotas_C[np.argsort(-remainders_C, kind="stable")[: count - quotas_C.sum()]] += 1
    return quotas_C


def ranks_within(score_N: FloatArray, group_N: IntArray) -> IntArray:
    """Rank samples within their group, 1 for the highest score; 0 where it is NaN, ties by index."""
    known = np.flatnonzero(~np.isnan(score_N))
    order = known[np.lexsort((-score_N[known], group_N[known]))]
    sizes = np.bincount(group_N[order])
    starts = np.repeat(sizes.cumsum() - sizes, sizes)
    rank_N = np.zeros(len(score_N), dtype=np.int64)
    rank_N[order] = np.arange(1, len(order) + 1) - starts
    return rank_N


def keep_highest(score_N: FloatArray, group_N: IntArray, count: int) -> NDArray[np.bool_]:
    """Keep the samples with the highest scores of each group, in proportion to the groups' sizes.

    Args:
        score_N: what samples are ranked by, shape (N,); those with NaN are never kept, nor counted.
        group_N: the group of each, from 0, shape (N,); one group ranks all against each other.
        count: how many to keep; at most as many as have a score.
    """
    rank_N = ranks_within(score_N, group_N)
    quotas_G = class_quotas(
        np.bincount(group_N[rank_N > 0], minlength=int(group_N.max(initial=0)) + 1), count
    )
    kept_N: NDArray[np.bool_] = (rank_N > 0) & (rank_N <= quotas_G[group_N])
    return kept_N


def min_max_weights(value_K: FloatArray) -> FloatArray:
    """Scale values to weights from 0 for the lowest to 1 for the highest (paper, Algorithm 2, step 10).

    Values that are all equal weigh 1.
    """
    if not len(value_K):
        return value_K
    low, high = value_K.min(), value_K.max()
    return (value_K - low) / (high - low) if high > low else np.ones_like(value_K)

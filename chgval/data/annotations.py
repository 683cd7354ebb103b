"""The label that a run trains on where several annotators gave one.

Shape legend: N rows, A annotators.
"""

from __future__ import annotations

import numpy as np

from chgval.detection.signals import Annotations
from chgval.types import IntArray


def majority(annotations: Annotations) -> IntArray:
    """Return the class that most annotators gave, shape (N,); -1 where nobody gave one.

    Of classes that are given equally often it is that of the annotators who agree more with the others in all
    rows; then the one named first.
    """
    labels_NA = annotations.labels_NA
    rows, annotators = np.nonzero(labels_NA >= 0)
    if not len(rows):
        return np.full(len(labels_NA), -1)
    given = labels_NA[rows, annotators]
    _, choices, votes = np.unique(
        rows * (given.max() + 1) + given, return_inverse=True, return_counts=True
    )  # a choice is a class in a row
    others = np.bincount(rows, minlength=len(labels_NA))[rows] - 1
    agreement_A = np.ones(labels_NA.shape[1])
    if annotations.are_told_apart:
        agreeing_A = np.bincount(annotators, votes[choices] - 1, len(agreement_A))
        agreement_A = agreeing_A / np.bincount(annotators, others, len(agreement_A)).clip(min=1)
    trust = np.bincount(choices, agreement_A[annotators])
    order = np.lexsort((annotators, -trust[choices], -votes[choices], rows))
    first = order[np.unique(rows[order], return_index=True)[1]]
    labels_N = np.full(len(labels_NA), -1)
    labels_N[rows[first]] = given[first]
    return labels_N

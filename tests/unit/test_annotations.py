"""Labels of several annotators: what most of them say."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chgval.data.annotations import majority
from chgval.detection.signals import Annotations


def majority_row_by_row(labels_NA, *, are_told_apart):
    """The slow way: how often each annotator agrees with others, then the votes row by row."""
    agreement = []
    for annotator in range(labels_NA.shape[1]):
        agrees = [
            labels_NA[row, annotator] == labels_NA[row, other]
            for row in range(len(labels_NA))
            for other in range(labels_NA.shape[1])
            if other != annotator and labels_NA[row, annotator] >= 0 and labels_NA[row, other] >= 0
        ]
        agreement.append(sum(agrees) / max(1, len(agrees)) if are_told_apart else 1)
    chosen = []
    for row in labels_NA:
        votes = Counter(row[row >= 0].tolist())
        first = {label: row.tolist().index(label) for label in votes}
        trust = {label: sum(np.array(agreement)[row == label]) for label in votes}
        best = sorted(votes, key=lambda label: (-votes[label], -round(trust[label], 9), first[label]))
        chosen.append(best[0] if best else -1)
    return chosen


@pytest.mark.parametrize("are_told_apart", [True, False])
@settings(max_examples=100)
@given(labels=st.lists(st.lists(st.integers(-1, 3), min_size=3, max_size=3), min_size=1, max_size=12))
def test_the_majority_is_that_of_each_row(are_told_apart, labels):
    labels_NA = np.array(labels)
    found_N = majority(Annotations(("a", "b", "c"), labels_NA, are_told_apart))
    assert found_N.tolist() == majority_row_by_row(labels_NA, are_told_apart=are_told_apart)


def test_who_agrees_with_others_decides_a_tie():
    labels_NA = np.array([[0, 1, -1], [2, 1, 1], [0, 1, 1], [-1, 0, 0], [-1, -1, -1]])
    told_apart = Annotations(("a", "b", "c"), labels_NA, are_told_apart=True)
    assert majority(told_apart).tolist() == [1, 1, 1, 0, -1]
    alike = Annotations(("a", "b", "c"), labels_NA, are_told_apart=False)
    assert majority(alike).tolist() == [0, 1, 1, 0, -1]

"""The nearest surely labelled samples, against plain loops."""

import numpy as np

from chgval.detection.neighbours import nearest_sure, surest_rows


def test_the_surest_are_the_less_suspicious_half_of_a_class():
    label_N = np.array([0, 0, 0, 0, 0, 1, 0])
    score_N = np.array([0.5, 0.1, np.nan, 0.3, 0.2, 0.0, 0.9])
    assert surest_rows(label_N, score_N, 0).tolist() == [1, 3, 4]
    assert surest_rows(label_N, score_N, 2).tolist() == []


def test_neighbours_are_the_surest_in_the_nearest_directions():
    rng = np.random.default_rng(0)
    features_ND, label_N, score_N = rng.normal(size=(80, 5)) + 3, rng.integers(0, 3, 80), rng.random(80)
    features_ND[[4, 9]] = np.nan
    rows, label_R = np.arange(0, 80, 2), np.where(np.arange(40) % 7, label_N[::2], -1)
    label_R[5:9] = 1
    found = nearest_sure(features_ND.astype(np.float16), label_N, score_N, rows, label_R, 3)
    centred = features_ND - np.nanmean(features_ND, axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    for row, label, near in zip(rows, label_R, found, strict=True):
        ranked = sorted(np.flatnonzero(label_N == label), key=lambda other: score_N[other])
        sure = [other for other in ranked[: (len(ranked) + 1) // 2] if other != row and other not in (4, 9)]
        expected = sorted(sure, key=lambda other: -(unit[other] @ unit[row]))[:3]
        assert near.tolist() == ([-1] * 3 if row in (4,) or label < 0 else expected)


def test_too_few_neighbours_leave_places_empty():
    features_ND = np.eye(4, dtype=np.float32)
    found = nearest_sure(
        features_ND, np.array([0, 0, 0, 1]), np.zeros(4), np.array([3, 0]), np.array([0, 1]), 3
    )
    assert sorted(found[0].tolist())[0] == -1 and (found[0] >= 0).sum() == 2
    assert found[1].tolist() == [3, -1, -1]

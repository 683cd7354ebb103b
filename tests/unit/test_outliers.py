"""Outliers, against the definition of the local outlier factor."""

import numpy as np

from chgval.detection.outliers import LEAST_FACTOR, outlier_factors


def plain_factors(points, count):
    """Breunig et al. 2000, definitions 3 to 7, sample by sample."""
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1, kind="stable")[:, :count]
    radius = np.sort(distance, axis=1)[:, count - 1]
    density = np.array(
        [
            1 / np.mean([max(radius[other], distance[row, other]) for other in near[row]])
            for row in range(len(points))
        ]
    )
    return np.array([density[near[row]].mean() / density[row] for row in range(len(points))])


def test_factors_are_those_of_the_paper_on_directions_of_roots():
    rng = np.random.default_rng(0)
    features_ND = np.concatenate([rng.gamma(1, 1, (120, 6)), rng.gamma(1, 1, (6, 6)) * [30, 1, 1, 1, 1, 1]])
    features_ND[3] = np.nan
    features_ND[:, 5] *= -1
    found = outlier_factors(features_ND.astype(np.float16))
    known = np.isfinite(features_ND).all(1)
    rounded = features_ND[known].astype(np.float16).astype(float)
    roots = np.sign(rounded) * np.sqrt(np.abs(rounded))
    roots /= np.linalg.norm(roots, axis=1, keepdims=True)
    np.testing.assert_allclose(found[known], plain_factors(roots, 12), rtol=1e-3)
    assert np.isnan(found[3])


def test_strangers_of_one_kind_are_found():
    rng = np.random.default_rng(0)
    classes = rng.normal(size=(5, 20)) ** 2
    features_ND = classes[np.arange(1000) % 5] * rng.gamma(4, 0.25, (1000, 20))
    strange = rng.permutation(1000)[:30]
    features_ND[strange] = rng.gamma(2, 1, (1, 20)) * rng.gamma(6, 0.2, (30, 20)) * (np.arange(20) > 12)
    found = np.flatnonzero(outlier_factors(features_ND) >= LEAST_FACTOR)
    assert np.isin(strange, found).mean() > 0.9 and np.isin(found, strange).mean() > 0.9


def test_few_samples_have_none():
    assert np.isnan(outlier_factors(np.ones((5, 2)))).all()

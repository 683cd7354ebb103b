"""Copies: planted as people make them, among images of their own; and of features."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from chgval.data.decode import grey_square
from chgval.detection.duplicates import (
    LEAST_SIDE,
    THUMBNAIL_SIDE,
    Pairs,
    Thumbnails,
    copies_between,
    copies_within,
    groups_of,
    near_between,
    near_within,
    other_labels,
)
from tests.pictures import make_blobs

SIZE = 48
NUM_ORIGINALS = 60


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def cropped(share, at):
    def crop(image):
        side = round(share * SIZE)
        left, top = (round(place * (SIZE - side)) for place in at)
        return encoded(image.crop((left, top, left + side, top + side)))

    return crop


COPIES = {
    "same file": encoded,
    "mirrored": lambda image: encoded(ImageOps.mirror(image)),
    "re-encoded": lambda image: encoded(image, "jpeg", quality=50),
    "darker": lambda image: encoded(ImageEnhance.Brightness(image).enhance(0.7)),
    "larger": lambda image: encoded(image.resize((96, 96), Image.Resampling.BICUBIC)),
    "cropped in the middle": cropped(0.9, (0.5, 0.5)),
    "cropped at a corner": cropped(0.85, (1, 0)),
    "cropped a lot": cropped(0.77, (0.2, 0.7)),
    "cropped and mirrored": lambda image: cropped(0.85, (0.3, 1))(ImageOps.mirror(image)),
}


def thumbnails(images):
    made = [
        (np.zeros((24, 24), np.uint8), 0) if i is None else grey_square(i, THUMBNAIL_SIDE) for i in images
    ]
    return Thumbnails(
        np.stack([grey for grey, _ in made]),
        np.array([image is not None for image in images]),
        np.array([side >= LEAST_SIDE for _, side in made]),
    )


@pytest.fixture(scope="module")
def originals():
    return [make_blobs(seed, SIZE) for seed in range(NUM_ORIGINALS)]


def pairs_of(pairs):
    return set(zip(pairs.first_P.tolist(), pairs.second_P.tolist(), strict=True))


def test_copies_of_all_kinds_are_found_and_nothing_else(originals):
    images = [encoded(image) for image in originals]
    images += [copy(originals[row]) for row, copy in enumerate(COPIES.values())]
    # Copies of one picture: more than there are candidates.
    images += [encoded(originals[-1])] * 12
    images.append(None)
    found, least = copies_within(thumbnails(images))
    assert least == 0.8
    group_N = groups_of(found, len(images))
    crowd = NUM_ORIGINALS + len(COPIES)
    expected = np.full(len(images), -1)
    for row in range(len(COPIES)):
        expected[[row, NUM_ORIGINALS + row]] = row
    expected[[NUM_ORIGINALS - 1, *range(crowd, crowd + 12)]] = NUM_ORIGINALS - 1
    np.testing.assert_array_equal(group_N, expected)
    assert (found.first_P < found.second_P).all() and (
        (found.similarity_P >= 0.8) & (found.similarity_P <= 1)
    ).all()


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_in_another_dataset_is_found_whichever_is_the_part(originals, name):
    images = thumbnails([encoded(image) for image in originals])
    row = list(COPIES).index(name) + 10
    others = thumbnails([encoded(make_blobs(1000, SIZE)), COPIES[name](originals[row]), None])
    assert pairs_of(copies_between(images, others, 0.8)) == {(row, 1)}
    assert pairs_of(copies_between(others, images, 0.8)) == {(1, row)}


def test_where_all_pictures_are_alike_copies_must_be_alike_beyond_that():
    """One scene, with as much of its own in each picture as makes them alike to about 0.85."""
    rng = np.random.default_rng(0)
    scene = np.asarray(make_blobs(0, SIZE), dtype=float)

    def picture(seed):
        own = np.asarray(make_blobs(seed, SIZE), dtype=float)
        return Image.fromarray((scene + 0.35 * (own - 128)).clip(0, 255).astype(np.uint8))

    pictures = [picture(seed) for seed in range(1, 81)]
    images = [encoded(image) for image in pictures]
    images += [encoded(ImageOps.mirror(pictures[row])) for row in range(5)]
    images += [encoded(pictures[row], "jpeg", quality=70) for row in range(5, 10)]
    found, least = copies_within(thumbnails(images))
    assert 0.85 < least <= 0.95
    planted = {(row, 80 + row) for row in range(10)}
    assert planted <= pairs_of(found) and len(pairs_of(found)) < 14
    order = rng.permutation(80)[:20]
    others = thumbnails([encoded(picture(seed)) for seed in range(200, 210)] + [images[order[0]]])
    assert pairs_of(copies_between(thumbnails(images), others, least)) >= {(int(order[0]), 10)}
    assert len(pairs_of(copies_between(thumbnails(images), others, least))) <= 2


def test_tiny_images_are_copies_only_if_they_are_equal():
    rng = np.random.default_rng(0)
    tiny = [Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)) for _ in range(4)]
    images = thumbnails([encoded(image) for image in [*tiny, tiny[2], ImageOps.mirror(tiny[1])]])
    assert pairs_of(copies_within(images)[0]) == {(2, 4)}
    assert pairs_of(copies_between(images, images, 0.8)) == {(n, n) for n in range(6)} | {(2, 4), (4, 2)}


def test_groups_and_other_labels_are_those_of_a_search(originals):
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 50, (2, 30))
    labels_N = rng.integers(-1, 3, 50)
    group_N = groups_of(Pairs(first, second, np.ones(30)), 50)
    links = {
        frozenset(pair) for pair in zip(first.tolist(), second.tolist(), strict=True) if pair[0] != pair[1]
    }
    reached = {row: {row} for row in range(50)}
    for _ in range(50):
        for one, other in links:
            reached[one] |= reached[other]
            reached[other] |= reached[one]
    for row, members in reached.items():
        assert group_N[row] == (min(members) if len(members) > 1 else -1)
    others = other_labels(group_N, labels_N)
    for row, members in reached.items():
        differing = [m for m in sorted(members) if labels_N[m] >= 0 and labels_N[m] != labels_N[row]]
        assert others[row] == (differing[0] if labels_N[row] >= 0 and differing else -1)


def test_near_features_are_those_within_a_share_of_the_median_distance():
    rng = np.random.default_rng(0)
    features_ND = rng.normal(size=(80, 16))
    features_ND[70:75] = features_ND[:5] + rng.normal(0, 0.01, (5, 16))
    features_ND[79] = np.nan
    centred = features_ND[:79] - features_ND[:79].mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    distance = np.linalg.norm(unit[:, None] - unit[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    least = 0.13 * np.median(distance.min(1))
    expected = {(a, b) for a, b in itertools.combinations(range(79), 2) if distance[a, b] <= least}
    assert pairs_of(near_within(features_ND)) == expected == {(n, 70 + n) for n in range(5)}
    others_MD = np.concatenate([rng.normal(size=(9, 16)), features_ND[[20, 30]]])
    assert pairs_of(near_between(features_ND, others_MD)) == {(20, 9), (30, 10)}


def test_there_may_be_nothing_to_compare():
    none = thumbnails([None, None])
    assert not pairs_of(copies_within(none)[0]) and not pairs_of(copies_between(none, none, 0.8))
    assert not pairs_of(near_within(np.full((3, 2), np.nan)))

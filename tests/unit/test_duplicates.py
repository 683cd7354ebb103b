"""Near-duplicates with other labels: planted copies, as people make them, among images of their own."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance, ImageOps

from chgval.config import DataConfig, TrainConfig, ValueConfig
from chgval.errors import SettingsError
from chgval.runs.duplicates import check_images, find_duplicates
from chgval.runs.session import make_valuing, prepare, read_dataset
from tests.pictures import make_blobs

SIZE = 32
NUM_ORIGINALS = 60


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


COPIES = {
    "same file": encoded,
    "mirrored": lambda image: encoded(ImageOps.mirror(image)),
    "re-encoded": lambda image: encoded(image, "jpeg", quality=50),
    "darker": lambda image: encoded(ImageEnhance.Brightness(image).enhance(0.7)),
    "larger": lambda image: encoded(image.resize((64, 64), Image.Resampling.BICUBIC)),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What is found in originals of even rows' class 0 and odd rows' class 1, and two copies of some each."""
    path = tmp_path_factory.mktemp("duplicates") / "data.parquet"
    originals = [make_blobs(seed, SIZE) for seed in range(NUM_ORIGINALS)]
    images, labels = [encoded(image) for image in originals], [row % 2 for row in range(NUM_ORIGINALS)]
    for row, copy in enumerate(COPIES.values()):
        images += [copy(originals[row]), copy(originals[row + 20])]
        labels += [1 - row % 2, row % 2]  # the first copy has the other label, the second the same
    # Twelve copies of one picture: more of one label than there are candidates, and one of the other.
    images += [encoded(originals[NUM_ORIGINALS - 1])] * 12
    labels += [1] * 11 + [0]
    images.append(b"no image")
    labels.append(0)
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    config = ValueConfig(data=DataConfig(source=str(path)), train=TrainConfig(epochs=2))
    run = prepare(config.data, config.train, read_dataset(config.data, config.train))
    _, average, trainer = make_valuing(run, config)
    for _ in trainer.records():
        pass
    return find_duplicates(run, average.model)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_with_another_label_is_found_from_both_sides(found, name):
    row = list(COPIES).index(name)
    copy = NUM_ORIGINALS + 2 * row
    assert (found[copy], found[row]) == (row, copy)


def test_all_of_many_copies_are_found(found):
    crowd = NUM_ORIGINALS + 2 * len(COPIES)
    assert found[NUM_ORIGINALS - 1] == crowd + 11 and (found[crowd : crowd + 11] == crowd + 11).all()
    assert found[crowd + 11] in {NUM_ORIGINALS - 1, *range(crowd, crowd + 11)}


def test_nothing_else_is_found(found):
    """Neither copies with the same label, nor other images, nor what cannot be read."""
    planted = {*range(len(COPIES)), *range(NUM_ORIGINALS, NUM_ORIGINALS + 2 * len(COPIES), 2)}
    crowd = NUM_ORIGINALS + 2 * len(COPIES)
    assert len(found) == crowd + 13
    assert set(np.flatnonzero(found >= 0)) == planted | {NUM_ORIGINALS - 1, *range(crowd, crowd + 12)}


def test_what_has_no_details_is_refused():
    with pytest.raises(SettingsError, match="images of at least 16 pixels, which builtin:digits has not"):
        check_images(read_dataset(DataConfig(source="builtin:digits"), TrainConfig()))

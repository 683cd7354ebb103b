"""What every format can do: the picture of any row, and its own files."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from chgval.config import DataConfig
from chgval.data.formats import format_of
from chgval.data.formats.base import REGISTRY, Format
from chgval.errors import DataError
from tests.pictures import make_image

ROWS = [5, 0, 5, 3]


def pixels_of(encoded):
    return np.asarray(PILImage.open(io.BytesIO(encoded)).convert("RGB"))


def test_pictures_of_a_folder_are_its_files(image_folder):
    source = format_of(DataConfig(source=str(image_folder)))
    ids = source.read(64).ids
    expected = [(image_folder / ids[row]).read_bytes() for row in ROWS]
    assert list(source.pictures(ROWS)) == expected
    (image_folder / "cat" / "000.png").rename(image_folder / "away.png")
    try:
        assert next(source.pictures([0, 1])) is None
    finally:
        (image_folder / "away.png").rename(image_folder / "cat" / "000.png")


def test_pictures_of_parquet_are_what_hugging_face_wrote(tmp_path):
    """In shards of two rows: bytes in the file, and a row without a picture."""
    images = [make_image(row % 2, row) for row in range(6)]
    images[3] = None
    features = Features({"image": Image(), "label": Value("int64")})
    dataset = Dataset.from_dict({"image": images, "label": [0, 1] * 3}, features=features)
    for shard in range(3):
        dataset.shard(3, shard, contiguous=True).to_parquet(tmp_path / f"train-{shard}.parquet")
    source = format_of(DataConfig(source=str(tmp_path)))
    found = list(source.pictures(ROWS))
    assert found[3] is None
    for encoded, row in zip(found[:3], ROWS[:3], strict=True):
        np.testing.assert_array_equal(pixels_of(encoded), np.asarray(images[row]))
    assert source.local_files() == {(tmp_path / f"train-{shard}.parquet").resolve() for shard in range(3)}


def test_pictures_of_the_digits_are_their_pixels():
    source = format_of(DataConfig(source="builtin:digits"))
    content = source.read(64).content
    for encoded, row in zip(source.pictures(ROWS), ROWS, strict=True):
        np.testing.assert_array_equal(pixels_of(encoded).transpose(2, 0, 1), content.pixels_N3SS[row])


def test_embeddings_have_no_pictures(tmp_path):
    pq.write_table(pa.table({"e": [[0.0], [1.0]], "label": [0, 1]}), tmp_path / "e.parquet")
    source = format_of(DataConfig(source=str(tmp_path / "e.parquet"), features_column="e"))
    assert list(source.pictures([1, 0])) == [None, None]


def test_formats_are_found_by_their_files():
    assert sorted(REGISTRY) == [
        *("csv", "digits", "image-folder", "json-lines", "metadata-folder", "parquet"),
        *("save-to-disk", "webdataset"),
    ]
    assert all(issubclass(found, Format) for found in REGISTRY.values())
    with pytest.raises(DataError, match="absent: no such file or folder"):
        format_of(DataConfig(source="absent"))


def test_a_folder_is_walked_once(image_folder, monkeypatch):
    """However often its rows are asked for: trees on a network's disk take minutes."""
    import chgval.data.formats.image_folder as module

    walks = []
    listed = module.list_image_folder

    def counted(root, split):
        walks.append(root)
        return listed(root, split)

    monkeypatch.setattr(module, "list_image_folder", counted)
    source = format_of(DataConfig(source=str(image_folder)))
    source.read(64)
    source.local_files()
    list(source.pictures([0]))
    assert len(walks) == 1

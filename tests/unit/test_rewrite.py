"""Datasets that are written anew, as other programs read them."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from chgval.config import DataConfig
from chgval.data.formats import format_of
from chgval.data.formats.base import KnownRows, RowChanges
from chgval.data.open import check_rewritable, open_dataset
from chgval.data.tables import write as module
from chgval.errors import DataError, OutputError, SettingsError
from tests.pictures import make_image, write_folder

SIZE = 12


def rewrite(data, known, changes, target, link="copy"):
    return format_of(data).write(known, changes, target, link)


def check_rewritable_of(data, target, **options):
    check_rewritable(format_of(data), target, **options)


def changes_of(data, dropped=(), relabelled=None):
    """What is known of the dataset as the program itself reads it, and changes to it."""
    dataset = open_dataset(data, SIZE)
    kept_N = ~np.isin(np.arange(len(dataset)), list(dropped))
    new_labels_N = np.full(len(dataset), -1)
    for row, label in (relabelled or {}).items():
        new_labels_N[row] = label
    known = KnownRows(dataset.ids, dataset.labels_N, dataset.fingerprint)
    return known, RowChanges(kept_N, new_labels_N)


def png(label, seed):
    file = io.BytesIO()
    make_image(label, seed, SIZE).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", per_class=4)


@pytest.fixture
def hugging_face(tmp_path):
    """Eight rows in two files, written by Hugging Face datasets, with a column that means nothing to us."""
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["cat", "dog", "cow"]),
        caption=datasets.Value("string"),
    )
    root = tmp_path / "hub"
    root.mkdir()
    for shard in range(2):
        rows = [
            {"image": {"bytes": png(i % 2, i), "path": f"{i}.png"}, "label": i % 2, "caption": f"number {i}"}
            for i in range(4 * shard, 4 * shard + 4)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(root / f"train-{shard}.parquet")
    return root


def test_a_folder_is_copied_without_the_dropped_and_with_the_relabelled(folder, tmp_path):
    data = DataConfig(source=str(folder))
    # A name that the relabelled image would have had, and one in a folder of its own.
    (folder / "dog" / "003.was-cat.png").write_bytes(png(1, 77))
    (folder / "cat" / "deep").mkdir()
    (folder / "cat" / "deep" / "x.png").write_bytes(png(0, 78))
    ids = open_dataset(data, SIZE).ids
    moved = {ids.index("cat/003.png"): 1, ids.index("cat/deep/x.png"): 1}
    result = rewrite(data, *changes_of(data, [ids.index("dog/000.png")], moved), tmp_path / "new")

    assert (result.num_written, result.vanished, result.unreadable) == (9, [], [])
    theirs = ImageFolder(tmp_path / "new")
    names = sorted(str(path).removeprefix(f"{tmp_path}/new/") for path, _ in theirs.samples)
    assert names == [
        "cat/000.png", "cat/001.png", "cat/002.png",
        "dog/001.png", "dog/002.png", "dog/003.png", "dog/003.was-cat-too.png", "dog/003.was-cat.png",
        "dog/deep/x.was-cat.png",
    ]  # fmt: skip
    for old, new in [
        ("cat/003.png", "dog/003.was-cat-too.png"),
        ("dog/003.was-cat.png", "dog/003.was-cat.png"),
    ]:
        assert (folder / old).read_bytes() == (tmp_path / "new" / new).read_bytes()
    listed = pacsv.read_csv(tmp_path / "new" / "relabelled.csv").to_pylist()
    assert listed[0] == {
        "file_name": "dog/003.was-cat-too.png", "label_name": "dog",
        "original_file_name": "cat/003.png", "original_label_name": "cat",
    }  # fmt: skip
    assert len(listed) == 2 and len(open_dataset(DataConfig(source=str(tmp_path / "new")), SIZE)) == 9


def test_classes_that_vanish_and_files_that_cannot_be_read_are_told(folder, tmp_path):
    data = DataConfig(source=str(folder))
    (folder / "dog" / "000.png").unlink()
    (folder / "dog" / "000.png").symlink_to("nowhere")
    result = rewrite(data, *changes_of(data, [0, 1, 2, 3]), tmp_path / "new")
    assert (result.num_written, result.vanished, result.unreadable) == (3, ["cat"], ["dog/000.png"])
    assert ImageFolder(tmp_path / "new").classes == ["dog"]


def test_parquet_keeps_schema_metadata_and_order_for_hugging_face(hugging_face, tmp_path):
    data = DataConfig(source=str(hugging_face))
    rewrite(data, *changes_of(data, [2, 5], {0: 2, 7: 0}), tmp_path / "new")
    before = datasets.load_dataset(str(hugging_face), split="train")
    after = datasets.load_dataset(str(tmp_path / "new"), split="train")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["train-00000-of-00001.parquet"]
    assert after.features == {**before.features, "original_label": before.features["label"]}
    kept = [0, 1, 3, 4, 6, 7]
    assert after["caption"][:] == [f"number {row}" for row in kept]
    assert after["label"][:] == [2, 1, 1, 0, 0, 0]
    assert after["original_label"][:] == [0, 1, 1, 0, 0, 1]
    for row, image in zip(kept, after["image"], strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(make_image(row % 2, row, SIZE)))


def test_without_relabelling_one_file_has_the_very_schema(hugging_face, tmp_path):
    data = DataConfig(source=str(hugging_face))
    rewrite(data, *changes_of(data, [0]), tmp_path / "new.parquet")
    old, new = (pq.read_schema(path) for path in (hugging_face / "train-0.parquet", tmp_path / "new.parquet"))
    assert new.equals(old, check_metadata=True)
    file = pq.ParquetFile(tmp_path / "new.parquet")
    columns = [file.metadata.row_group(0).column(number) for number in range(4)]
    codecs = {column.path_in_schema: column.compression for column in columns}
    assert codecs == {
        "image.bytes": "UNCOMPRESSED", "image.path": "UNCOMPRESSED", "label": "SNAPPY", "caption": "SNAPPY",
    }  # fmt: skip
    assert "RLE_DICTIONARY" not in columns[0].encodings


def test_originals_of_an_earlier_cleaning_stay(hugging_face, tmp_path):
    data = DataConfig(source=str(hugging_face))
    rewrite(data, *changes_of(data, [], {0: 1}), tmp_path / "once.parquet")
    once = DataConfig(source=str(tmp_path / "once.parquet"))
    rewrite(once, *changes_of(once, [], {0: 2, 1: 2}), tmp_path / "twice.parquet")
    twice = pq.read_table(tmp_path / "twice.parquet")
    assert twice["original_label"].to_pylist() == [0, 1] * 4
    assert twice["label"].to_pylist()[:3] == [2, 2, 0]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["dog", "cat", None, "cat"], pa.string()),
        (["dog", "cat", None, "cat"], pa.dictionary(pa.int8(), pa.string())),
        ([7, 3, -1, 3], pa.int16()),
        ([7.0, 3.0, float("nan"), 3.0], pa.float32()),
        ([True, False, None, False], pa.bool_()),
    ],
)
def test_a_new_label_is_written_as_the_files_write_labels(tmp_path, labels, kind):
    table = pa.table(
        {
            "y": pa.array(labels, kind),
            "image": [png(0, seed) for seed in range(4)],
            "id": ["a", "b", "c", "d"],
        }
    )
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=2)
    data = DataConfig(source=str(tmp_path / "data.parquet"))
    rewrite(data, *changes_of(data, [3], {0: 0, 1: 1}), tmp_path / "new.parquet")
    new = pq.read_table(tmp_path / "new.parquet")
    # Not always the kind that was written: older Arrow has dictionaries with indices of one size only.
    kind = pq.read_schema(tmp_path / "data.parquet").field("y").type
    assert new.schema.field("y").type == new.schema.field("original_y").type == kind
    expected = pa.array([labels[1], labels[0], labels[2]], kind)
    assert str(new["y"].combine_chunks()) == str(pa.chunked_array([expected]).combine_chunks())
    assert str(new["original_y"].to_pylist()) == str(labels[:3])


def test_images_that_lie_beside_the_file_are_embedded(tmp_path):
    (tmp_path / "old").mkdir()
    for row in range(4):
        (tmp_path / "old" / f"{row}.png").write_bytes(png(row % 2, row))
    paths = [{"bytes": None, "path": f"{row}.png"} for row in range(4)] + [{"bytes": None, "path": "no.png"}]
    table = pa.table({"image": paths, "label": [0, 1, 0, 1, 1]})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(table.set_column(0, "image", pa.array(paths, kind)), tmp_path / "old" / "data.parquet")
    data = DataConfig(source=str(tmp_path / "old" / "data.parquet"))
    rewrite(data, *changes_of(data, [1]), tmp_path / "new.parquet")
    images = pq.read_table(tmp_path / "new.parquet")["image"].to_pylist()
    assert images[1] == {"bytes": png(0, 2), "path": "2.png"} and images[3] == {
        "bytes": None,
        "path": "no.png",
    }


def test_large_datasets_get_several_row_groups_and_files(hugging_face, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IMAGE_ROWS", 1)
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", 600)
    monkeypatch.setattr(module, "SHARD_BYTES", 1200)
    data = DataConfig(source=str(hugging_face))
    rewrite(data, *changes_of(data, [3]), tmp_path / "new")
    files = sorted((tmp_path / "new").iterdir())
    assert len(files) > 1
    assert [file.name for file in files] == [
        f"train-{number:05d}-of-{len(files):05d}.parquet" for number in range(len(files))
    ]
    captions = [row for file in files for row in pq.read_table(file)["caption"].to_pylist()]
    assert captions == [f"number {row}" for row in (0, 1, 2, 4, 5, 6, 7)]
    assert all(pq.read_metadata(file).num_rows for file in files)


def test_nothing_kept_is_an_empty_file_of_the_same_schema(hugging_face, tmp_path):
    data = DataConfig(source=str(hugging_face))
    result = rewrite(data, *changes_of(data, range(8)), tmp_path / "new.parquet")
    assert result.num_written == 0 and result.vanished == ["cat", "dog"]
    assert pq.read_table(tmp_path / "new.parquet").num_rows == 0


def test_another_dataset_is_refused_and_nothing_is_written(folder, hugging_face, tmp_path):
    data = DataConfig(source=str(folder))
    changes = changes_of(data)
    (folder / "cat" / "003.png").rename(folder / "cat" / "004.png")
    with pytest.raises(
        DataError, match=r"row 3 \(cat/004.png, class 0\) is not that of the report \(cat/003"
    ):
        rewrite(data, *changes, tmp_path / "new")
    (folder / "cat" / "004.png").unlink()
    with pytest.raises(DataError, match="has 7 rows where the report has 8"):
        rewrite(data, *changes, tmp_path / "new")
    with pytest.raises(DataError, match=r"(its contents or class names|row 1 )"):
        rewrite(DataConfig(source=str(hugging_face)), *changes, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "images"]


def test_images_in_another_order_are_noticed_although_the_labels_agree(hugging_face, tmp_path):
    data = DataConfig(source=str(hugging_face))
    known, changes = changes_of(data, [0])
    table = pq.read_table(hugging_face / "train-0.parquet")
    pq.write_table(table.take([2, 1, 0, 3]), hugging_face / "train-0.parquet")
    format_of(data).check_same(known)  # labels and row numbers say nothing
    for target in ("new", "new.parquet"):
        with pytest.raises(DataError, match="its contents or class names are not those of the report"):
            rewrite(data, known, changes, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_files_that_do_not_fit_each_other_are_told_and_leave_nothing(hugging_face, tmp_path):
    data = DataConfig(source=str(hugging_face))
    known = changes_of(data)
    other = pq.read_table(hugging_face / "train-1.parquet")
    position = other.schema.get_field_index("caption")
    pq.write_table(
        other.set_column(position, "caption", pa.array([[1]] * 4)), hugging_face / "train-1.parquet"
    )
    for target in ("new", "new.parquet"):
        with pytest.raises(DataError, match="the files do not fit each other"):
            rewrite(data, *known, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_columns_that_some_files_lack_or_hold_nulls_in_are_kept(hugging_face, tmp_path):
    data = DataConfig(source=str(hugging_face))
    first = pq.read_table(hugging_face / "train-0.parquet").drop("caption")
    first = first.append_column("note", pa.nulls(4))
    pq.write_table(first, hugging_face / "train-0.parquet")
    second = pq.read_table(hugging_face / "train-1.parquet").append_column("note", pa.array(list("abcd")))
    pq.write_table(second, hugging_face / "train-1.parquet")
    rewrite(data, *changes_of(data, [0, 5]), tmp_path / "new.parquet")
    new = pq.read_table(tmp_path / "new.parquet")
    assert new["caption"].to_pylist() == [None, None, None, "number 4", "number 6", "number 7"]
    assert new["note"].to_pylist() == [None, None, None, "a", "c", "d"]


@pytest.mark.parametrize("labels", [[["bee"], ["ant"], None, ["bee"]], [[7], [3], [], [7]]])
def test_lists_of_one_label_are_relabelled_as_lists(tmp_path, labels):
    table = pa.table({"x": [[0.0], [1.0], [2.0], [3.0]], "votes": labels})
    pq.write_table(table, tmp_path / "data.parquet")
    data = DataConfig(source=str(tmp_path / "data.parquet"), features_column="x", label_columns=("votes",))
    rewrite(data, *changes_of(data, [], {0: 0}), tmp_path / "new.parquet")
    new = pq.read_table(tmp_path / "new.parquet")
    assert new["votes"].to_pylist() == [labels[1], *labels[1:]]
    assert new["original_votes"].to_pylist() == labels


def test_a_relabelled_dataset_is_read_back_with_its_own_labels(tmp_path):
    features = datasets.Features(
        image=datasets.Image(),
        species=datasets.ClassLabel(names=["cat", "dog"]),
        category=datasets.Value("string"),
        original_species=datasets.Value("string"),
    )
    rows = [
        {"image": {"bytes": png(i % 2, i), "path": None}, "species": i % 2, "category": f"c{i}",
         "original_species": "x"}
        for i in range(4)
    ]  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    data = DataConfig(source=str(tmp_path / "data.parquet"))
    rewrite(data, *changes_of(data, [], {0: 1}), tmp_path / "new.parquet")
    again = open_dataset(DataConfig(source=str(tmp_path / "new.parquet")), SIZE)
    assert again.class_names == ["cat", "dog"] and again.labels_N.tolist() == [1, 1, 0, 1]
    new = pq.read_table(tmp_path / "new.parquet")
    assert new["original_species"].to_pylist() == ["x"] * 4
    assert new["original_species_"].to_pylist() == [0, 1, 0, 1]


def test_where_nothing_may_be_written_is_told_before(folder, hugging_face, tmp_path):
    images, shards = DataConfig(source=str(folder)), DataConfig(source=str(hugging_face))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.parquet").touch()
    (tmp_path / "spark.parquet").mkdir()
    for data, target, error, message in [
        (DataConfig(source="builtin:digits"), "new", SettingsError, "is built in"),
        (images, "new.parquet", SettingsError, "name a folder"),
        (images, "images/new", OutputError, "is part of the dataset"),
        (shards, "hub", OutputError, "is part of the dataset"),
        (shards, "full", OutputError, "folders are never replaced"),
        (shards, "old.parquet", OutputError, "exists already"),
        (shards, "no/such/new", OutputError, "there is no folder"),
        (DataConfig(source=str(tmp_path / "no")), "new", DataError, "no such file"),
        (DataConfig(source=f"{hugging_face}/*.parquet"), "hub/train-0.parquet", OutputError, "is part of"),
        (DataConfig(source=f"{hugging_face}/*.parquet"), "hub/clean.parquet", OutputError, "is part of"),
        (
            DataConfig(source=f"file://{hugging_face}/train-0.parquet"),
            "hub/train-0.parquet",
            OutputError,
            "is",
        ),
        (shards, "spark.parquet", OutputError, "is a folder"),
    ]:
        with pytest.raises(error, match=message):
            check_rewritable_of(data, tmp_path / target, overwrite=False)
    with pytest.raises(OutputError, match="is a folder"):
        check_rewritable_of(shards, tmp_path / "spark.parquet", overwrite=True)
    with pytest.raises(OutputError, match="is no name of its own"):
        check_rewritable_of(images, Path(), overwrite=False)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "cat").symlink_to(folder / "cat")
    with pytest.raises(OutputError, match="is part of"):
        check_rewritable_of(DataConfig(source=str(linked)), folder / "cat" / "new", overwrite=False)
    before = sorted(tmp_path.rglob("*"))
    check_rewritable_of(images, tmp_path / "empty", overwrite=False)
    check_rewritable_of(shards, tmp_path / "old.parquet", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    rewrite(images, *changes_of(images), tmp_path / "empty")
    assert len(ImageFolder(tmp_path / "empty")) == 8


def test_metadata_that_are_not_ours_survive(tmp_path):
    table = pa.table({"image": [png(0, 1), png(1, 2)], "label": [0, 1]})
    notes = {"huggingface": json.dumps({"info": {"features": {"other": {}}}}), "author": "somebody"}
    pq.write_table(table.replace_schema_metadata(notes), tmp_path / "data.parquet")
    data = DataConfig(source=str(tmp_path / "data.parquet"))
    rewrite(data, *changes_of(data, [], {0: 1}), tmp_path / "new.parquet")
    metadata = pq.read_schema(tmp_path / "new.parquet").metadata
    assert metadata[b"author"] == b"somebody" and metadata[b"huggingface"] == notes["huggingface"].encode()


def test_images_come_through_untouched(folder, tmp_path):
    (folder / "cat" / "odd.jpg").write_bytes(b"no image at all")
    data = DataConfig(source=str(folder))
    rewrite(data, *changes_of(data), tmp_path / "new")
    for file in (tmp_path / "new").rglob("*.*"):
        assert file.read_bytes() == (folder / file.relative_to(tmp_path / "new")).read_bytes()
    with Image.open(tmp_path / "new" / "cat" / "000.png") as image:
        assert image.size == (SIZE, SIZE)


def test_names_of_many_bytes_stay_within_what_a_file_system_takes(tmp_path):
    """Of relabelled images: the name has characters of three bytes, and so has the class it came from."""
    root = tmp_path / "images"
    for label, name in enumerate(("猫" * 80, "dog")):
        (root / name).mkdir(parents=True)
        for number in range(3):
            (root / name / f"{number}{'像' * 80}.png").write_bytes(png(label, number))
    data = DataConfig(source=str(root))
    ids = open_dataset(data, SIZE).ids
    first = next(row for row, name in enumerate(ids) if name.startswith("猫"))
    result = rewrite(data, *changes_of(data, [], {first: 0}), tmp_path / "new")
    assert result.num_written == 6
    moved = next((tmp_path / "new" / "dog").glob("*.was-*"))
    assert moved.name == f"0{'像' * 16}.was-{'猫' * 16}.png"

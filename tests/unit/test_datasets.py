"""Reading what people have: folders, Parquet as Hugging Face writes it, embeddings, and bad input."""

import decimal
import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata

import datasets as hf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image
from torchvision.datasets import ImageFolder

from chgval.config import DataConfig
from chgval.data.dataset import Embeddings, LargeImages, PixelImages, class_indices
from chgval.data.images import choose_size
from chgval.data.open import open_dataset
from chgval.errors import DataError, SettingsError
from tests.pictures import CLASS_NAMES, make_image, write_folder


def read(source, **settings):
    largest_size = settings.pop("largest_size", 64)
    return open_dataset(DataConfig(source=str(source), **settings), largest_size)


def png(label=0, seed=0, size=12):
    buffer = io.BytesIO()
    make_image(label, seed, size).save(buffer, "PNG")
    return buffer.getvalue()


def write_rows(path, labels, *, images=None, metadata=None, **columns):
    """A Parquet file with an image struct, labels, and other columns."""
    images = [{"bytes": png(0, n), "path": None} for n in range(len(labels))] if images is None else images
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, struct), "label": labels, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(table.replace_schema_metadata(metadata), path)
    return path


def write_table(table, path):
    try:
        pq.write_table(table, path)
    except pa.ArrowNotImplementedError as error:
        pytest.skip(f"this Arrow cannot write what shall be read ({error})")


# --- folders ---------------------------------------------------------------------------------------------


def test_folder_has_the_order_of_torchvisions_image_folder(tmp_path):
    for name in ("class10", "class2", "Zebra", "ant"):
        (tmp_path / name / "nested").mkdir(parents=True)
        for file in ("b.png", "a.png", "nested/c.PNG"):
            make_image(0, 1).save(tmp_path / name / file)
        (tmp_path / name / "notes.txt").write_text("not an image")
    reference = torchvision.datasets.ImageFolder(tmp_path)
    dataset = read(tmp_path)
    assert list(dataset.class_names) == reference.classes == ["Zebra", "ant", "class10", "class2"]
    assert [str(tmp_path / name) for name in dataset.ids] == [path for path, _ in reference.samples]
    assert dataset.labels_N.tolist() == reference.targets


def test_pixels_of_a_folder_are_those_of_the_files(image_folder):
    dataset = read(image_folder)
    assert isinstance(dataset.content, PixelImages)
    assert dataset.content.pixels_N3SS.shape == (40, 3, 12, 12)
    for row in (0, 25):
        expected = np.asarray(Image.open(image_folder / dataset.ids[row])).transpose(2, 0, 1)
        np.testing.assert_array_equal(dataset.content.pixels_N3SS[row], expected)


def test_a_train_folder_is_taken_and_said(tmp_path):
    write_folder(tmp_path / "train", 2)
    write_folder(tmp_path / "test", 3)
    dataset = read(tmp_path)
    assert len(dataset) == 4 and dataset.ids[0] == "cat/000.png"
    assert "train" in dataset.notes[0]


def test_train_is_a_class_where_other_classes_stand_beside_it(tmp_path):
    for name in ("bus", "car", "train"):
        (tmp_path / name / "2020").mkdir(parents=True)
        make_image(0, 1).save(tmp_path / name / "2020/a.png")
    dataset = read(tmp_path)
    assert list(dataset.class_names) == ["bus", "car", "train"]
    assert dataset.notes == ["train is taken for a class; --split train reads it alone"]


@pytest.mark.parametrize(
    ("training", "other"),
    [("Training", "Testing"), ("Train", "Test"), ("training", "extra"), ("train", "VAL")],
)
def test_splits_in_any_spelling_are_no_classes(tmp_path, training, other):
    for split in (training, other, "evaluation" if other == "extra" else "holdout"):
        write_folder(tmp_path / split, 2)
    dataset = read(tmp_path)
    assert list(dataset.class_names) == CLASS_NAMES and len(dataset) == 4
    assert dataset.root == str(tmp_path / training)
    assert f"reading {tmp_path / training} only (beside it: " in dataset.notes[0]
    assert read(tmp_path, split=other.lower()).root == str(tmp_path / other)


def test_years_and_exact_names_of_splits(tmp_path):
    for split in ("train2017", "test", "eval"):
        write_folder(tmp_path / "folder" / split, 2)
        write_rows(tmp_path / "files" / f"{split}.parquet", [0, 1], file_name=[split, split])
    assert read(tmp_path / "folder").root == str(tmp_path / "folder" / "train2017")
    assert set(read(tmp_path / "files").ids) == {"train2017"}
    for split in ("test", "eval"):
        assert read(tmp_path / "folder", split=split).root == str(tmp_path / "folder" / split)
        dataset = read(tmp_path / "files", split=split, id_column="file_name")
        assert set(dataset.ids) == {split} and len(dataset) == 2


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("split=train/0", "split=test/0"),
        ("train_test_split/train", "train_test_split/test"),
        ("train_sft-0", "test_sft-0"),
    ],
)
def test_the_last_part_of_a_path_says_which_split(tmp_path, train, test):
    for name, rows in ((train, 3), (test, 2)):
        write_rows(tmp_path / f"{name}.parquet", [0, 1, 0][:rows])
    assert len(read(tmp_path)) == 3 and len(read(tmp_path, split="test")) == 2


def test_a_compound_split_can_be_chosen(tmp_path):
    for name, rows in (("train_sft", 3), ("train_gen", 2)):
        write_rows(tmp_path / f"{name}-00000-of-00001.parquet", [0, 1, 0][:rows])
    assert len(read(tmp_path, split="train_sft")) == 3 and len(read(tmp_path, split="train_gen")) == 2


def test_images_as_bytes_here_and_as_names_there_are_an_error(tmp_path):
    pq.write_table(pa.table({"image": [png(), png()], "label": [0, 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "label": [0, 1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"disagree about the type of 'image': .*a\.parquet has binary"):
        read(tmp_path)


def test_splits_without_class_folders_or_without_one_for_training_are_an_error(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        make_image(0, 1).save(tmp_path / "flat" / split / "0.png")
    with pytest.raises(DataError, match=r"test, train are splits, .* expected .*train/<class>/<image>"):
        read(tmp_path / "flat")
    for split in ("test", "val"):
        write_folder(tmp_path / "tests" / split, 2)
    with pytest.raises(DataError, match=r"the splits test, val, and not one for training; pass --split test"):
        read(tmp_path / "tests")
    assert len(read(tmp_path / "tests", split="validation")) == 4
    with pytest.raises(DataError, match=r"--split extra: none of its folders is that; there is test, val"):
        read(tmp_path / "tests", split="extra")


def test_what_systems_leave_behind_is_left_out_and_said(tmp_path):
    """Hidden files and folders at any depth, and what file servers and archives add."""
    write_folder(tmp_path, 2)
    picture = (tmp_path / "cat" / "000.png").read_bytes()
    for name in (".ipynb_checkpoints/0.png", "@eaDir/0.png/thumb.jpg", ".Trash-1000/files/1.png", "._0.png"):
        for folder in ("cat", "dog/deeper"):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture)
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "cat" / "._0.png").write_bytes(picture)
    dataset = read(tmp_path)
    assert dataset.ids == ["cat/000.png", "cat/001.png", "dog/000.png", "dog/001.png"]
    assert dataset.notes[0] == (
        "9 hidden files and folders are left out (.Trash-1000, ._0.png, .ipynb_checkpoints, ...)"
    )
    theirs = len(ImageFolder(tmp_path))
    assert dataset.notes[1:] == [
        f"positions are not those of torchvision's ImageFolder, which lists {theirs - 4} others"
    ]


def test_images_of_all_endings_are_read_and_other_files_are_counted(tmp_path):
    write_folder(tmp_path, 2)
    Image.init()
    kinds = {"avif": "AVIF", "jp2": "JPEG2000", "tga": "TGA", "jpe": "JPEG", "apng": "PNG"}
    kinds = {ending: kind for ending, kind in kinds.items() if kind in Image.SAVE}  # older Pillow lacks AVIF
    for ending, kind in kinds.items():
        make_image(0, 7).save(tmp_path / "dog" / f"x.{ending}", kind)
    for name in ("a.heic", "b.heic", "none"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    make_image(0, 1).save(tmp_path / "loose.png")
    dataset = read(tmp_path)
    assert len(dataset) == 4 + len(kinds) and not dataset.problems
    assert dataset.notes == [
        "3 files in class folders have no ending of images and are left out (.heic 2, none 1)",
        "1 images outside of class folders are left out",
        f"positions are not those of torchvision's ImageFolder, which lacks {len(kinds)} of these images",
    ]
    assert len(ImageFolder(tmp_path)) == 4


def test_names_that_look_the_same_and_labels_that_are_ids_are_said(tmp_path):
    for name in (unicodedata.normalize("NFC", "caf\u00e9"), unicodedata.normalize("NFD", "caf\u00e9"), "tea"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        make_image(0, 1).save(tmp_path / "folder" / name / "0.png")
    note = r"classes 'cafe\u0301' and 'caf\xe9' look the same; they differ in spaces or in Unicode's spelling"
    assert read(tmp_path / "folder").notes == [note]
    path = write_rows(tmp_path / "ids.parquet", [f"img_{row}" for row in range(30)])
    assert "labels that tell samples apart, such as ids, are no classes" in read(path).notes[0]
    path = write_rows(tmp_path / "empty.parquet", ["", "a", "b", ""])
    assert read(path).notes == ["2 labels are empty text, a class of its own; unknown labels are null"]


def test_folders_without_images_are_no_classes_and_said(tmp_path):
    write_folder(tmp_path, 2)
    (tmp_path / "__pycache__").mkdir()
    dataset = read(tmp_path)
    assert list(dataset.class_names) == CLASS_NAMES and dataset.labels_N.tolist() == [0, 0, 1, 1]
    assert "__pycache__" in dataset.notes[0]


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_left_out(tmp_path, monkeypatch):
    for folder in ("cat/a", "cat/b", "dog"):
        (tmp_path / folder).mkdir(parents=True)
        make_image(0, 0).save(tmp_path / folder / "1.png")
    scandir = os.scandir

    def without_rights(path="."):  # as for another user: who runs tests as root may list everything
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", without_rights)
    with pytest.raises(DataError, match=r"cat/b: cannot be listed \(Permission denied\)"):
        read(tmp_path)


def test_links_into_a_circle_do_not_multiply_rows(tmp_path):
    root = write_folder(tmp_path / "images", 4)
    (root / "cat/loop").symlink_to(root / "cat")
    (root / "dog/up").symlink_to(root / "dog", target_is_directory=True)
    assert len(read(root)) == 8


def test_a_stray_parquet_file_does_not_make_a_folder_of_images_something_else(tmp_path):
    root = write_folder(tmp_path / "images", 2)
    pq.write_table(pa.table({"file_name": ["cat/000.png"]}), root / "metadata.parquet")
    pq.write_table(pa.table({"file_name": ["000.png"]}), root / "cat/metadata.parquet")
    assert len(read(root)) == 4


def test_a_folder_whose_name_looks_like_a_glob(tmp_path):
    assert len(read(write_folder(tmp_path / "photos[1]", 2))) == 4


def test_hidden_folders_are_no_classes(tmp_path):
    write_folder(tmp_path, 2)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert list(read(tmp_path).class_names) == CLASS_NAMES


def test_large_images_stay_encoded(tmp_path):
    root = write_folder(tmp_path / "images", 3, size=100)
    dataset = read(root, largest_size=224)
    assert isinstance(dataset.content, LargeImages) and dataset.input_size == 96
    assert dataset.content.encoded.read(1) == (root / dataset.ids[1]).read_bytes()
    assert read(root).input_size == 64  # where only small ones may be chosen they are shrunk
    assert read(root, image_size=40).input_size == 40


@pytest.mark.parametrize(
    ("sides", "largest", "expected"),
    [
        ([32], 224, 32),
        ([28, 28, 90], 224, 28),
        ([500], 224, 224),
        ([150], 224, 128),
        ([500], 64, 64),
        ([], 64, 64),
    ],
)
def test_image_size_is_the_median_side(sides, largest, expected):
    assert choose_size([png(size=side) for side in sides], largest, 10**6) == expected


# --- Parquet ---------------------------------------------------------------------------------------------


def hf_dataset(labels=(0, 1, -1, 1), **features):
    return hf.Dataset.from_dict(
        {"img": [make_image(max(label, 0), n) for n, label in enumerate(labels)], "label": list(labels)},
        features=hf.Features({"img": hf.Image(), "label": hf.ClassLabel(names=["cat", "dog"]), **features}),
    )


def test_a_file_written_by_hugging_face_datasets(tmp_path):
    source = hf_dataset()
    source.to_parquet(tmp_path / "data.parquet")
    dataset = read(tmp_path / "data.parquet")
    assert list(dataset.class_names) == ["cat", "dog"]
    assert dataset.labels_N.tolist() == [0, 1, -1, 1]
    assert dataset.statuses() == ["valued", "valued", "unlabelled", "valued"]
    for row, image in enumerate(source["img"]):
        np.testing.assert_array_equal(dataset.content.pixels_N3SS[row], np.asarray(image).transpose(2, 0, 1))


def test_shards_of_the_training_split_are_read_in_order_and_said(tmp_path):
    for shard in (1, 0):
        write_rows(
            tmp_path / f"data/train-{shard:05d}-of-00002.parquet", [0, 1], id=[f"{shard}a", f"{shard}b"]
        )
    write_rows(tmp_path / "data/test-00000-of-00001.parquet", [1, 1], id=["x", "y"])
    dataset = read(tmp_path)
    assert dataset.ids == ["0a", "0b", "1a", "1b"]
    assert "training split only (2 files; not 1 others, such as test-" in dataset.notes[0]
    assert read(tmp_path / "data/*.parquet").ids == dataset.ids
    everything = read(tmp_path / "data/t[er]*-0000[01]*.parquet")
    assert everything.ids == dataset.ids


@pytest.mark.parametrize("source", ["sp", "./sp", "sp/", "sp/../sp", "sp/*/*.parquet", "./s[p]/*/*.parquet"])
def test_splits_in_folders_are_seen_however_the_source_is_named(tmp_path, monkeypatch, source):
    write_rows(tmp_path / "sp/train/0.parquet", [0, 1])
    write_rows(tmp_path / "sp/test/0.parquet", [0, 1, 1])
    monkeypatch.chdir(tmp_path)
    assert len(read(source)) == 2
    monkeypatch.chdir(tmp_path / "sp")
    assert len(read(".")) == 2


def test_images_of_shards_in_several_folders_are_those_beside_each(tmp_path):
    for number, name in enumerate("ab"):
        images = [{"bytes": None, "path": "0.png"}, {"bytes": png(), "path": None}]
        write_rows(tmp_path / name / "x.parquet", [0, 1], images=images)
        make_image(0, 50 + number).save(tmp_path / name / "0.png")
    pixels = read(tmp_path).content.pixels_N3SS
    for row, seed in ((0, 50), (2, 51)):
        np.testing.assert_array_equal(pixels[row], np.asarray(make_image(0, seed)).transpose(2, 0, 1))


def test_a_glob_without_splits_reads_all_and_a_uri_reads_the_same(tmp_path):
    for shard in range(3):
        write_rows(tmp_path / f"part-{shard}.parquet", [0, 1], id=[f"{shard}a", f"{shard}b"])
    assert len(read(tmp_path / "part-[01].parquet")) == 4
    assert read(f"file://{tmp_path}").ids == read(tmp_path).ids
    assert read(f"file://{tmp_path}/part-*.parquet").ids == read(tmp_path).ids
    assert len(read(f"file://{tmp_path}/part-1.parquet")) == 2


def test_a_reports_own_parts_are_not_data(tmp_path):
    write_rows(tmp_path / "data.parquet", [0, 1])
    write_rows(tmp_path / "values.epochs/epoch=1/values.parquet", [0, 1, 1], metadata={b"chgval": b"{}"})
    assert len(read(tmp_path)) == len(read(f"{tmp_path}/**/*.parquet")) == 2
    write_rows(tmp_path / "night.epochs/more.parquet", [0, 1, 1])  # is somebody else's
    assert len(read(tmp_path)) == 5


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["b", "a", None, "b"], ["a", "b"], [1, 0, -1, 1]),
        (pa.array([30, 4, -1, 30]), ["4", "30"], [1, 0, -1, 1]),
        (pa.array([1.0, 0.0, None, float("nan")]), ["0", "1"], [1, 0, -1, -1]),
        (pa.array([True, False, None, True]), ["False", "True"], [1, 0, -1, 1]),
        (pa.array(["b", "a", None, "b"]).dictionary_encode(), ["a", "b"], [1, 0, -1, 1]),
    ],
    ids=["strings", "integers", "floats", "booleans", "dictionary"],
)
def test_labels_of_any_type_become_sorted_classes(tmp_path, labels, names, expected):
    dataset = read(write_rows(tmp_path / "d.parquet", labels))
    assert list(dataset.class_names) == names and dataset.labels_N.tolist() == expected


def test_string_labels_with_class_names_are_looked_up():
    labels, names = class_indices([["dog", None, "cat"]], ["cat", "dog"], "d", ["0", "1", "2"])
    assert labels.tolist() == [[1], [-1], [0]] and names == ["cat", "dog"]


def test_labels_of_several_annotators_are_read_from_columns_and_from_lists(tmp_path):
    a, b, c = ["x", "y", None, "z"], ["x", "w", None, None], ["y", "w", None, "z"]
    lists = [["x", "x", "y"], ["y", None, "w", "w"], None, ["z", "z"]]
    path = write_rows(tmp_path / "d.parquet", a, b=b, c=c, lists=lists)
    dataset = read(path, label_columns=("label", "b", "c"))
    assert list(dataset.class_names) == ["w", "x", "y", "z"]
    assert dataset.labels_N.tolist() == [1, 0, -1, 3]
    assert dataset.annotations.names == ("label", "b", "c") and dataset.annotations.are_told_apart
    assert dataset.annotations.labels_NA.tolist() == [[1, 1, 2], [2, 0, 0], [-1, -1, -1], [3, -1, 3]]
    assert dataset.notes == ["labels of 3 annotators (label, b, c); training on the majority"]
    pooled = read(path, label_columns=("lists",))
    assert pooled.labels_N.tolist() == [1, 0, -1, 3]
    assert pooled.annotations.names == ("lists_1", "lists_2", "lists_3", "lists_4")
    assert not pooled.annotations.are_told_apart
    expected = [[1, 1, 2, -1], [2, -1, 0, 0], [-1, -1, -1, -1], [3, 3, -1, -1]]
    assert pooled.annotations.labels_NA.tolist() == expected
    assert pooled.notes == ["labels of up to 4 annotators a row (lists); training on the majority"]
    assert read(path).annotations is None
    assert len({read(path).fingerprint, dataset.fingerprint, pooled.fingerprint}) == 3


@pytest.mark.parametrize(
    "hint",
    [
        {"feature": {"names": ["ant", "cat", "dog"], "_type": "ClassLabel"}, "_type": "List"},
        {"feature": {"names": ["ant", "cat", "dog"], "_type": "ClassLabel"}, "_type": "Sequence"},
        [{"names": ["ant", "cat", "dog"], "_type": "ClassLabel"}],
    ],
    ids=["list", "sequence", "python-list"],
)
def test_lists_of_class_labels_keep_their_names(tmp_path, hint):
    metadata = {"huggingface": json.dumps({"info": {"features": {"lists": hint}}})}
    path = write_rows(tmp_path / "d.parquet", [0, 1], lists=[[1, 2, 2], [1]], metadata=metadata)
    dataset = read(path, label_columns=("lists",))
    assert list(dataset.class_names) == ["ant", "cat", "dog"] and dataset.labels_N.tolist() == [2, 1]
    path = write_rows(tmp_path / "e.parquet", [0, 1], lists=[[1, 2, 2], [3]], metadata=metadata)
    with pytest.raises(DataError, match="label 3, outside the class list of 3 names"):
        read(path, label_columns=("lists",))


def test_columns_of_annotators_may_be_empty_and_lists_may_hold_one_label(tmp_path):
    nothing = pa.nulls(3)
    path = write_rows(tmp_path / "d.parquet", [0, 1, 0], b=[1, 1, 0], c=nothing, lists=[["x"], ["y"], []])
    dataset = read(path, label_columns=("label", "c", "b"))
    assert dataset.annotations.labels_NA.tolist() == [[0, -1, 1], [1, -1, 1], [0, -1, 0]]
    single = read(path, label_columns=("lists",))
    assert single.annotations is None and single.labels_N.tolist() == [0, 1, -1]
    with pytest.raises(DataError, match="column 'c' holds null; --label-column needs"):
        read(path, label_columns=("c",))
    with pytest.raises(DataError, match="column '' not found"):
        read(path, label_columns=("",))
    path = write_rows(tmp_path / "e.parquet", [["x", "y"], ["y", "y"]])
    with pytest.raises(DataError, match="if several annotators gave these, pass --label-column label"):
        read(path)


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int8()), pa.list_(pa.int64(), 2)])
def test_lists_of_numbers_of_any_kind_hold_labels(tmp_path, kind):
    lists = pa.array([[3, 5], [5, 5], None, [-1, 3]], kind)
    dataset = read(write_rows(tmp_path / "d.parquet", [0, 1, 0, 1], lists=lists), label_columns=("lists",))
    assert list(dataset.class_names) == ["3", "5"]
    assert dataset.annotations.labels_NA.tolist() == [[0, 1], [1, 1], [-1, -1], [-1, 0]]


def test_class_names_of_annotators_must_be_the_same(tmp_path):
    def described(**names):
        features = {column: {"names": classes, "_type": "ClassLabel"} for column, classes in names.items()}
        return {"huggingface": json.dumps({"info": {"features": features}})}

    metadata = described(label=["x", "y"], b=["x", "y"], c=["y", "x"])
    path = write_rows(tmp_path / "d.parquet", [0, 1], b=[1, 1], c=[0, 1], text=["x", "y"], metadata=metadata)
    assert list(read(path, label_columns=("label", "b")).class_names) == ["x", "y"]
    with pytest.raises(DataError, match="columns label, c do not name the same classes"):
        read(path, label_columns=("label", "c"))
    with pytest.raises(DataError, match=r"'label' int64, 'text' string cannot hold the same classes"):
        read(path, label_columns=("label", "text"))
    booleans = write_rows(tmp_path / "e.parquet", [True, False], b=[0, 1])
    with pytest.raises(DataError, match=r"'label' bool, 'b' int64 cannot hold the same classes"):
        read(booleans, label_columns=("label", "b"))
    with pytest.raises(SettingsError, match="--label-column b b: names a column twice"):
        read(path, label_columns=("b", "b"))


def test_older_metadata_with_more_keys_is_understood(tmp_path):
    features = {"label": {"names": ["x", "y"], "id": None, "num_classes": 2, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}, "fingerprint": "abc"})}
    assert list(read(write_rows(tmp_path / "d.parquet", [0, 1], metadata=metadata)).class_names) == ["x", "y"]


def test_columns_are_found_by_type_not_by_name_alone(tmp_path):
    """A column called label that holds images (segmentation masks) is not the label."""
    struct = pa.struct([("path", pa.string()), ("bytes", pa.binary())])  # the older order of the fields
    images = pa.array([{"bytes": png(0, n), "path": f"{n}.png"} for n in range(3)], struct)
    table = pa.table({"label": images, "category": [0, 1, 1], "image": [png(), png(), png()]})
    pq.write_table(table, tmp_path / "d.parquet")
    dataset = read(tmp_path / "d.parquet")
    assert dataset.labels_N.tolist() == [0, 1, 1]
    assert dataset.ids == ["0", "1", "2"]  # the plain binary column `image` has no paths
    assert read(tmp_path / "d.parquet", image_column="label").ids == ["0.png", "1.png", "2.png"]


def test_ids_come_from_paths_where_they_tell_rows_apart(tmp_path):
    images = [{"bytes": png(0, n), "path": name} for n, name in enumerate(["a.png", "a.png", "b.png"])]
    path = write_rows(tmp_path / "d.parquet", [0, 1, 1], images=images, key=["k1", "k2", "k3"])
    assert read(path).ids == ["0", "1", "2"]
    assert read(path, id_column="key").ids == ["k1", "k2", "k3"]


def test_shards_whose_columns_differ_are_an_error_that_names_the_file(tmp_path):
    write_rows(tmp_path / "a.parquet", [0, 1])
    write_rows(tmp_path / "b.parquet", ["cat", "dog"])
    with pytest.raises(DataError, match=r"type of 'label': .*a\.parquet has int64, .*b\.parquet has string"):
        read(tmp_path)
    pq.write_table(pa.table({"image": [png()], "target": [0]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: reading label failed"):
        read(tmp_path)


def test_images_that_were_not_embedded_are_opened_beside_the_file(tmp_path):
    make_image(1, 5).save(tmp_path / "beside.png")
    images = [
        {"bytes": png(), "path": None},
        {"bytes": None, "path": "beside.png"},
        {"bytes": None, "path": "no.png"},
    ]
    dataset = read(write_rows(tmp_path / "d.parquet", [0, 1, 1], images=images))
    np.testing.assert_array_equal(
        dataset.content.pixels_N3SS[1], np.asarray(make_image(1, 5)).transpose(2, 0, 1)
    )
    assert dataset.problems == {2: "no.png: No such file or directory"}


def test_memory_stays_bounded_whatever_the_row_group(tmp_path):
    """A row group of 80 MB of images, in pages of some megabytes, never lies in memory whole."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 200_000), dtype=np.uint8)
    good = png()
    images = [{"bytes": good + row.tobytes(), "path": None} for row in noise]
    table = pa.table({"image": images, "label": [0, 1] * 200})
    pq.write_table(table, tmp_path / "d.parquet", write_batch_size=10, data_page_size=2**20)
    assert pq.ParquetFile(tmp_path / "d.parquet").num_row_groups == 1
    measure = (
        "import pyarrow as pa; pa.set_memory_pool(pa.system_memory_pool())\n"
        "from chgval.config import DataConfig; from chgval.data.open import open_dataset\n"
        "dataset = open_dataset(DataConfig(source='d.parquet'), 64)\n"
        "print(len(dataset.usable_rows()), pa.default_memory_pool().max_memory())"
    )
    output = subprocess.check_output([sys.executable, "-c", measure], cwd=tmp_path, text=True)
    usable, peak = map(int, output.split())
    assert usable == 400 and 1e6 < peak < 25e6


def test_class_lists_of_files_are_the_same_or_an_error(tmp_path):
    """A number must not mean two classes; a list that goes on another has all of its names."""

    def described(names):
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        return {"huggingface": json.dumps({"info": {"features": features}})}

    write_rows(tmp_path / "more/a.parquet", [0, 1, 2], metadata=described(["ant", "bee", "cow"]))
    write_rows(tmp_path / "more/b.parquet", [3, 1, 2], metadata=described(["ant", "bee", "cow", "dog"]))
    dataset = read(tmp_path / "more")
    assert [dataset.class_names[label] for label in dataset.labels_N] == [
        "ant", "bee", "cow", "dog", "bee", "cow",
    ]  # fmt: skip
    write_rows(tmp_path / "other/a.parquet", [0, 1], metadata=described(["ant", "bee"]))
    write_rows(tmp_path / "other/b.parquet", [0, 1], metadata=described(["bee", "ant"]))
    with pytest.raises(
        DataError, match=r"a\.parquet has 2 \(ant, bee\), .*b\.parquet has 2 \(bee, ant\); a num"
    ):
        read(tmp_path / "other")
    write_rows(tmp_path / "late/a.parquet", [0, 1])
    write_rows(tmp_path / "late/b.parquet", [0, 1], metadata=described(["ant", "bee"]))
    with pytest.raises(DataError, match=r"b\.parquet has 2 \(ant, bee\), .*a\.parquet has no list"):
        read(tmp_path / "late")


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "parts",
    [
        (pa.nulls(0), pa.array(["ant", "bee"])),
        (pa.nulls(2), pa.array(["ant", "bee"])),
        (pa.array([0, 1], pa.int8()), pa.array([0, 300], pa.int64())),
        (pa.array(["ant", "bee"]).dictionary_encode(), pa.array(["ant", "bee"], pa.large_string())),
    ],
)
def test_files_of_several_types_are_read_in_any_order(tmp_path, parts, order):
    for number, labels in enumerate(parts[::order]):
        images = [{"bytes": png(), "path": None}] * len(labels)
        images = images or pa.nulls(0)
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / f"{number}.parquet")
    dataset = read(tmp_path)
    names = [dataset.class_names[label] if label >= 0 else None for label in dataset.labels_N]
    expected = [
        str(label) if label is not None else None for part in parts[::order] for label in part.to_pylist()
    ]
    assert names == expected


def test_only_files_that_say_so_are_of_the_training_split(tmp_path):
    for name, rows in (("Train", 3), ("test", 4), ("extra", 5)):
        write_rows(tmp_path / f"{name}-00000-of-00001.parquet", [0, 1, 0, 1, 0][:rows])
    assert len(read(tmp_path)) == 3 and "not 2 others, such as extra-" in read(tmp_path).notes[0]
    assert len(read(tmp_path, split="extra")) == 5 and len(read(tmp_path, split="testing")) == 4
    with pytest.raises(DataError, match="--split dev: the name of no file says so"):
        read(tmp_path, split="dev")
    (tmp_path / "Train-00000-of-00001.parquet").unlink()
    write_rows(tmp_path / "val.parquet", [0, 1])
    with pytest.raises(
        DataError, match="of the splits test, validation, and none is for training; pass --split"
    ):
        read(tmp_path)


def test_what_is_no_parquet_is_said_and_not_called_truncated(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "labels.csv").write_text("file,label\n0.png,ant\n")
    with pytest.raises(
        DataError, match=r"a\.png: is an image, and no Parquet; pass the folder of its class folder"
    ):
        read(tmp_path / "a.png")
    (tmp_path / "labels.txt").write_text("0.png ant\n")
    with pytest.raises(DataError, match=r"labels\.txt: is no dataset that is read: expected"):
        read(tmp_path / "labels.txt")
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"is a NumPy file, .* pass the dataset .* as --features"):
        read(tmp_path / "a.npy")
    (tmp_path / "a.tfrecord").write_bytes(b"123456789")
    with pytest.raises(DataError, match="is a TFRecord file, which is not read; write its images"):
        read(tmp_path / "a.tfrecord")
    whole = write_rows(tmp_path / "d.parquet", [0, 1]).read_bytes()
    (tmp_path / "d.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=r"d\.parquet: cannot be read as Parquet .*; the file may be truncated"
    ):
        read(tmp_path / "d.parquet")


def test_columns_that_a_file_has_twice_matter_only_where_they_are_asked_for(tmp_path):
    table = pa.table({"image": [png(), png(1)], "label": [0, 1], "x": [1, 2]})
    twice = pa.Table.from_arrays([*table.columns, table["x"]], names=["image", "label", "x", "x"])
    pq.write_table(twice, tmp_path / "d.parquet")
    assert len(read(tmp_path / "d.parquet")) == 2
    with pytest.raises(DataError, match="has two columns called 'x'; rename one"):
        read(tmp_path / "d.parquet", label_columns=("x",))
    for name in ("image", "label"):  # another one is not taken in its place
        names = [name if column == "x" else column for column in table.column_names]
        more = pa.Table.from_arrays([*table.columns, table["label"]], names=[*names, "target"])
        pq.write_table(more, tmp_path / f"{name}.parquet")
        with pytest.raises(DataError, match=f"has two columns called '{name}'; rename one"):
            read(tmp_path / f"{name}.parquet")


def test_columns_that_were_found_are_said_and_a_label_that_is_none_is_an_error(tmp_path):
    path = write_rows(tmp_path / "d.parquet", [0, 1], y=[1, 0], file_name=["a", "b"])
    assert read(path).named_columns() == [("images", "image"), ("labels", "label"), ("ids", "file_name")]
    path = write_rows(tmp_path / "lists.parquet", [[0, 2], [1]], y=[1, 0])
    with pytest.raises(
        DataError, match=r"several labels of one sample \(multi-label\) are not supported.* y\."
    ):
        read(path)
    assert read(path, label_columns=("y",)).labels_N.tolist() == [1, 0]
    path = write_rows(tmp_path / "times.parquet", pa.array([0, 1], pa.timestamp("s")), target=[1, 0])
    with pytest.raises(DataError, match=r"'label' holds timestamp\[.*; pass --label-column with .*: target"):
        read(path)
    decimals = pa.array([decimal.Decimal(1), decimal.Decimal(0)], pa.decimal128(1, 0))
    assert list(read(write_rows(tmp_path / "decimal.parquet", decimals)).class_names) == ["0", "1"]
    (tmp_path / "t" / "label=ant").mkdir(parents=True)
    pq.write_table(pa.table({"image": [png()]}), tmp_path / "t" / "label=ant" / "0.parquet")
    with pytest.raises(DataError, match=r"'label' stands in the names of folders only \(label=\.\.\.\)"):
        read(tmp_path / "t")


@pytest.mark.parametrize(("mark", "kind"), [("_delta_log", "Delta"), (".hoodie", "Hudi")])
def test_tables_that_keep_earlier_versions_are_refused(tmp_path, mark, kind):
    write_rows(tmp_path / "t" / "part-0.parquet", [0, 1])
    (tmp_path / "t" / mark).mkdir()
    with pytest.raises(DataError, match=f"is a {kind} table, whose files hold earlier versions"):
        read(tmp_path / "t")


def test_odd_names_and_uris_of_parquet_files(tmp_path):
    path = write_rows(tmp_path / "my photos.parquet", [0, 1])
    assert len(read(f"file://{path}")) == len(read(f"file://{tmp_path}/my%20photos.parquet")) == 2
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet")
    shutil.copy(path, odd)
    for source in (odd, os.fsdecode(os.fsencode(tmp_path))):
        with pytest.raises(
            DataError, match=r"caf\\xe9\.parquet: its name is no UTF-8, and cannot be opened; rename"
        ):
            read(source)
    with pytest.raises(DataError, match=r"hf://datasets/x: cannot be opened"):
        read("hf://datasets/x")


def test_parquet_files_beside_class_folders_are_read_and_said(tmp_path):
    write_folder(tmp_path, 2)
    write_rows(tmp_path / "preview.parquet", [0, 1])
    assert read(tmp_path).notes == ["reading its Parquet files; images in class folders are left out"]


# --- embeddings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.list_(pa.float64(), 3), pa.large_list(pa.float32())]
)
def test_embeddings_are_read_from_any_list(tmp_path, kind):
    vectors = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], None, [7.0, float("nan"), 9.0]]
    table = pa.table({"emb": pa.array(vectors, kind), "label": [0, 1, 1, 0]})
    write_table(table, tmp_path / "d.parquet")
    dataset = read(tmp_path / "d.parquet", features_column="emb")
    assert isinstance(dataset.content, Embeddings)
    np.testing.assert_array_equal(dataset.content.vectors_ND[:2], vectors[:2])
    assert dataset.problems == {2: "no features in this row", 3: "features are not finite numbers"}
    assert dataset.statuses() == ["valued", "valued", "unreadable", "unreadable"]


def test_embeddings_of_large_integers_are_rounded(tmp_path):
    pq.write_table(pa.table({"emb": [[20_000_001, 1], [3, 4]], "label": [0, 1]}), tmp_path / "d.parquet")
    vectors = read(tmp_path / "d.parquet", features_column="emb").content.vectors_ND
    np.testing.assert_array_equal(vectors, np.array([[20_000_001, 1], [3, 4]], np.float32))


@pytest.mark.parametrize(
    "metadata", ['{"info": {"features": null}}', "[1]", '{"info": {"features": [2]}}', "{"]
)
def test_odd_metadata_is_passed_over(tmp_path, metadata):
    assert len(read(write_rows(tmp_path / "d.parquet", [0, 1], metadata={"huggingface": metadata}))) == 2


def test_embeddings_of_two_lengths_are_an_error(tmp_path):
    table = pa.table({"emb": [[1.0, 2.0], [3.0, 4.0], [5.0]], "label": [0, 1, 1]})
    pq.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="has 2 numbers in its first rows and 1 in row 2"):
        read(tmp_path / "d.parquet", features_column="emb")


# --- the built-in digits ---------------------------------------------------------------------------------


def test_digits_flip_the_stated_share_of_labels():
    from sklearn.datasets import load_digits

    dataset = read("builtin:digits")
    truth = load_digits().target
    assert np.array_equal(dataset.content.pixels_N3SS[:, 1], (load_digits().images * 255 / 16).round())
    assert (dataset.labels_N != truth).sum() == 180 == round(0.1 * len(truth))
    assert "180 of 1,797 labels (10%)" in dataset.notes[0]
    assert all(name.endswith(f"-is-{digit}") for name, digit in zip(dataset.ids, truth, strict=True))
    assert read("builtin:digits").fingerprint == dataset.fingerprint


# --- fingerprints ----------------------------------------------------------------------------------------


def test_fingerprint_changes_with_the_data_and_only_with_it(tmp_path, image_folder):
    first = read(image_folder).fingerprint
    copy = shutil.copytree(image_folder, tmp_path / "copy")
    assert read(copy).fingerprint == first
    (copy / "cat/000.png").rename(copy / "cat/zzz.png")
    renamed = read(copy).fingerprint
    (copy / "cat/zzz.png").rename(copy / "dog/zzz.png")
    relabelled = read(copy).fingerprint
    (copy / "dog/zzz.png").write_bytes(b"")
    emptied = read(copy).fingerprint
    assert len({first, renamed, relabelled, emptied}) == 4


# --- bad input -------------------------------------------------------------------------------------------


def test_unreadable_images_are_kept_with_their_reason(tmp_path):
    root = write_folder(tmp_path / "images", 3)
    (root / "cat/000.png").write_bytes(b"")
    (root / "dog/001.png").write_text("hello")
    (root / "dog/003.png").symlink_to(root / "nowhere.png")
    dataset = read(root)
    by_name = {dataset.ids[row]: reason for row, reason in dataset.problems.items()}
    assert by_name == {
        "cat/000.png": "empty file",
        "dog/001.png": "not an image in a known format",
        "dog/003.png": "No such file or directory",
    }
    assert dataset.statuses().count("unreadable") == 3 and len(dataset.usable_rows()) == 4
    with pytest.raises(DataError, match=r"3 of 7 samples cannot be read .*cat/000\.png: empty file"):
        read(root, on_error="fail")


def test_sources_that_hold_nothing_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent: no such file or folder"):
        read(tmp_path / "absent")
    with pytest.raises(DataError, match=r"absent\.parquet: no such file or folder"):
        read(tmp_path / "absent.parquet")
    with pytest.raises(DataError, match="no Parquet files found"):
        read(tmp_path / "*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders and no Parquet files found"):
        read(tmp_path / "empty")
    (tmp_path / "hollow/cat").mkdir(parents=True)
    with pytest.raises(DataError, match="1 class folders but no images"):
        read(tmp_path / "hollow")
    with pytest.raises(DataError, match="no such built-in dataset; there is builtin:digits"):
        read("builtin:letters")
    with pytest.raises(SettingsError, match="--split test: builtin:digits has no splits; leave it out"):
        read("builtin:digits", split="test")
    with pytest.raises(DataError, match="no rows"):
        read(write_rows(tmp_path / "none.parquet", pa.array([], pa.int64())))
    (tmp_path / "text.parquet").write_text("not Parquet")
    with pytest.raises(DataError, match="is no Parquet file"):
        read(tmp_path / "text.parquet")


def test_one_class_only_is_an_error(tmp_path):
    with pytest.raises(DataError, match="all 2 usable samples have the label '7'; expected at least two"):
        read(write_rows(tmp_path / "d.parquet", [7, 7, None]))


def test_labels_that_are_all_null_are_an_error(tmp_path):
    with pytest.raises(DataError, match="no readable sample has a label"):
        read(write_rows(tmp_path / "d.parquet", pa.array([None, None], pa.int64())))


def test_all_images_unreadable_is_an_error(tmp_path):
    for size in (None, 100):
        images = [{"bytes": b"", "path": None}, {"bytes": b"x", "path": None}]
        with pytest.raises(DataError, match=r"none of the 2 samples could be read .*empty file"):
            read(write_rows(tmp_path / "d.parquet", [0, 1], images=images), image_size=size)


def test_missing_columns_name_those_that_exist(tmp_path):
    path = write_rows(tmp_path / "d.parquet", [0, 1], emb=[[1.0], [2.0]])
    columns = "columns are image, label, emb"
    with pytest.raises(DataError, match=f"column 'y' not found; {columns}. Fix --label-column"):
        read(path, label_columns=("y",))
    with pytest.raises(DataError, match=f"column 'photo' not found; {columns}. Fix --image-column"):
        read(path, image_column="photo")
    with pytest.raises(DataError, match=f"column 'vec' not found; {columns}. Fix --features-column"):
        read(path, features_column="vec")
    with pytest.raises(DataError, match=r"column 'emb' holds list<.*--label-column needs integers, strings"):
        read(path, label_columns=("emb",))
    pq.write_table(pa.table({"emb": [[1.0], [2.0]], "label": [0, 1]}), tmp_path / "e.parquet")
    with pytest.raises(
        DataError,
        match=r"columns are emb, label; 'emb' holds embeddings: value, .* take --features-column emb\.",
    ):
        read(tmp_path / "e.parquet")
    for name, advice in (
        ("a/1.png", "pass that .*; or --features-column emb, if"),
        ("a/1", "'emb' holds emb"),
    ):
        table = pa.table({"id": [name], "emb": [[1.0]], "label": [0]})
        pq.write_table(table, tmp_path / "ids.parquet")
        with pytest.raises(DataError, match=advice):
            read(tmp_path / "ids.parquet")
    pq.write_table(pa.table({"image": [png()], "emb": [[1.0]]}), tmp_path / "f.parquet")
    with pytest.raises(DataError, match="column 'label' not found; columns are image, emb; pass a column of"):
        read(tmp_path / "f.parquet")
    pq.write_table(pa.table({"image": [png()], "label": [b"cat"]}), tmp_path / "h.parquet")
    with pytest.raises(
        DataError, match="column 'label' holds binary; columns are image, label; pass a column of"
    ):
        read(tmp_path / "h.parquet")
    pq.write_table(pa.table({"front": [png()], "back": [png()], "label": [0]}), tmp_path / "g.parquet")
    with pytest.raises(DataError, match="columns front, back could all hold the images; pass --image-column"):
        read(tmp_path / "g.parquet")


def test_a_label_outside_the_class_list_names_its_row(tmp_path):
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path = write_rows(tmp_path / "d.parquet", [0, 1, 5], metadata=metadata, id=["a", "b", "c"])
    with pytest.raises(
        DataError, match=r"row 2 \(c\) has the label 5, outside the class list of 2 names \(cat, dog\)"
    ):
        read(path)


def test_fractional_labels_are_an_error(tmp_path):
    with pytest.raises(DataError, match="column 'label' holds fractions"):
        read(write_rows(tmp_path / "d.parquet", [0.5, 1.0]))

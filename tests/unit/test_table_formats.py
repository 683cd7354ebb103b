"""Tables of all kinds: the same images, labels and ids whatever they are in, and what they are written as."""

import csv
import io
import json
import re
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file

from chgval.config import DataConfig
from chgval.data.dataset import Embeddings
from chgval.data.formats import format_of
from chgval.data.formats.base import KnownRows, RowChanges
from chgval.data.open import open_dataset
from chgval.errors import DataError, SettingsError
from tests.commands import invoke
from tests.pictures import CLASS_NAMES, write_folder

PER_CLASS = 6


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """One folder of class folders, and the same in every other form, by its name."""
    root = tmp_path_factory.mktemp("forms")
    folder = write_folder(root / "folder", PER_CLASS)
    rows = [(f"{path.parent.name}/{path.name}", path.parent.name) for path in sorted(folder.glob("*/*"))]
    with (root / "names.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label"])
        writer.writerows(rows)
    with (root / "names.tsv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["split", "path", "class"])
        writer.writerows(("train", *row) for row in rows)
    objects = [{"file_name": name, "label": label, "box": [1, 2]} for name, label in rows]
    (root / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects))
    (root / "names.json").write_text(json.dumps(objects, indent=1))
    pq.write_table(pa.Table.from_pylist(objects), root / "names.parquet")
    write_folder(root / "metadata", PER_CLASS)
    (root / "metadata" / "metadata.csv").write_text((root / "names.csv").read_text())
    # What Hugging Face datasets read of such a folder, and write in their own forms.
    read = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    read.to_parquet(root / "embedded.parquet")
    read.save_to_disk(root / "saved")
    datasets.DatasetDict({"test": read.select([0, 7]), "train": read}).save_to_disk(root / "splits")
    (root / "tars").mkdir()
    for number, part in enumerate((rows[:5], rows[5:])):
        with tarfile.open(root / "tars" / f"shard-{number:06d}.tar", "w") as tar:
            for name, label in part:
                stem = name.removesuffix(".png")
                for ending, data in (("png", (folder / name).read_bytes()), ("cls", label.encode())):
                    member = tarfile.TarInfo(f"{stem}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return root


def read(source, **options):
    return open_dataset(DataConfig(source=str(source), **options), 64, least_classes=1)


@pytest.mark.parametrize(
    ("name", "ids_are"),
    [
        ("names.csv", "paths"),
        ("names.tsv", "paths"),
        ("names.jsonl", "paths"),
        ("names.json", "paths"),
        ("names.parquet", "paths"),
        ("metadata", "paths"),
        ("embedded.parquet", "whole"),
        ("saved", "numbers"),  # their writer keeps the last part of a path, which repeats
        ("splits", "numbers"),
        ("tars", "keys"),
    ],
)
def test_every_form_holds_what_the_folder_holds(forms, name, ids_are):
    expected = read(forms / "folder")
    root = {"images_root": forms / "folder"} if name.startswith("names") else {}
    found = read(forms / name, **root)
    np.testing.assert_array_equal(found.content.pixels_N3SS, expected.content.pixels_N3SS)
    np.testing.assert_array_equal(found.labels_N, expected.labels_N)
    assert list(found.class_names) == list(expected.class_names) and not found.problems
    ids = {
        "paths": list(expected.ids),
        "keys": [name.removesuffix(".png") for name in expected.ids],
        "whole": [str(forms / "folder" / name) for name in expected.ids],
        "numbers": [str(row) for row in range(len(expected))],
    }
    assert list(found.ids) == ids[ids_are]
    pictures = format_of(DataConfig(source=str(forms / name), **root)).pictures([7, 0])
    paths = [forms / "folder" / expected.ids[row] for row in (7, 0)]
    assert list(pictures) == [path.read_bytes() for path in paths]


def test_values_do_not_depend_on_the_form(forms, tmp_path):
    values = []
    for name in ("folder", "names.csv", "tars"):
        root = ["--images-root", forms / "folder"] if name == "names.csv" else []
        result = invoke(
            "value", forms / name, *root, "--epochs", 1, "--arch", "resnet8", "-q", "-o", tmp_path / name[:4]
            , "--format", "parquet",
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        values.append(pq.read_table(tmp_path / name[:4])["value"].to_pylist())
    assert values[0] == values[1] == values[2]


def test_splits_are_chosen_and_said(forms):
    assert len(read(forms / "splits", split="test")) == 2
    assert (
        "reading" in read(forms / "splits").notes[0] and "beside it: test" in read(forms / "splits").notes[0]
    )
    with pytest.raises(DataError, match="--split dev: it has the splits test, train; pass one as --split"):
        read(forms / "splits", split="dev")
    notes = read(forms / "names.tsv", images_root=forms / "folder").notes
    assert "rows of all splits are read, whatever the column 'split' says" in notes
    for split in ("train", "val"):
        write_folder(forms / "divided" / split, 2)
        lines = [f"{name}/{number:03d}.png,{name}" for name in CLASS_NAMES for number in range(2)]
        (forms / "divided" / split / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    assert len(read(forms / "divided")) == 4
    assert read(forms / "divided", split="val").columns["image_column"] == "file_name"


def test_metadata_without_labels_leave_class_folders_as_they_are(tmp_path):
    folder = write_folder(tmp_path / "d", 2)
    (folder / "metadata.csv").write_text("file_name,caption\ncat/000.png,a cat\n")
    assert list(read(folder).class_names) == CLASS_NAMES and len(read(folder)) == 4
    (folder / "metadata.csv").write_text("file_name,label\ncat/000.png,x\ndog/000.png,y\n")
    found = read(folder)
    assert list(found.ids) == ["cat/000.png", "dog/000.png"] and list(found.class_names) == ["x", "y"]
    assert "2 images have no row and are left out" in found.notes


def test_names_may_lack_their_ending_and_keep_their_zeros(tmp_path):
    """As in most competitions: image_id, without .png."""
    folder = write_folder(tmp_path / "train", 3) / "cat"
    (tmp_path / "train.csv").write_text("image_id;breed\n000;a\n002;b\n001;a\n")
    found = read(tmp_path / "train.csv", images_root=folder, label_columns=("breed",))
    assert list(found.ids) == ["000", "002", "001"] and not found.problems
    np.testing.assert_array_equal(
        found.content.pixels_N3SS, read(tmp_path / "train").content.pixels_N3SS[[0, 2, 1]]
    )
    with pytest.raises(DataError, match="column 'label' not found; columns are image_id, breed"):
        read(tmp_path / "train.csv", images_root=folder)


def test_where_named_files_are_is_said(tmp_path):
    write_folder(tmp_path / "train", 2)
    table = tmp_path / "t.csv"
    table.write_text("path,label\ncat/000.png,a\ndog/000.png,b\n")
    with pytest.raises(DataError, match=rf"column 'path' names no file in {tmp_path} .*--images-root.*train"):
        read(table)
    table.write_text(f"path,label\n{tmp_path}/train/cat/000.png,a\n{tmp_path}/train/dog/000.png,b\n")
    assert len(read(table)) == 2
    (tmp_path / "x").mkdir()
    moved = table.rename(tmp_path / "x" / "t.csv")
    with pytest.raises(DataError, match=f"pass --images-root {tmp_path}/train"):
        read(moved)
    assert not read(moved, images_root=tmp_path / "train").problems
    # One that leads away, or is missing, costs its row.
    (tmp_path / "x" / "own.png").write_bytes((tmp_path / "train/cat/000.png").read_bytes())
    moved.write_text("path,label\nown.png,a\n../train/dog/000.png,b\nnone.png,a\n,b\n")
    found = read(moved)
    assert found.problems == {
        1: f"../train/dog/000.png: lies outside of {tmp_path / 'x'}",
        2: "No such file or directory",
        3: "no image in this row",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty; expected a first line that names the columns"),
        ("a.csv", "cat/000.png,cat\n", r"its first line names no columns, but a file \(cat/000.png\)"),
        ("a.csv", "path,label\na.png,b\nc.png\n", "cannot be read as CSV .*as many fields as in the first"),
        ("a.csv", b"path,label\na.png,\xff\n", "cannot be read as CSV"),
        ("a.csv", "text,label\nhello,b\n", "no image column found; columns are text, label"),
        ("a.csv", "path,label\na.png,0.5\n", "column 'label' holds fractions"),
        ("a.jsonl", "{'a': 1}\n", "cannot be read as JSON lines"),
        ("a.jsonl", "3\n", "holds 3; expected an object for each sample"),
        ("a.json", '{"images": [], "annotations": []}', "column 'label' not found"),
        ("a.json", '[{"label": 1}, {"label": "x"}]', "'label' holds values of several types"),
        ("a.tar", b"no tar", "cannot be read as a tar file of samples"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def rewrite(source, target, kept, new_labels, **options):
    """Write a dataset anew, as a report of it would have it."""
    config = DataConfig(source=str(source), **options)
    found = open_dataset(config, 64)
    known = KnownRows(found.ids, found.labels_N, found.fingerprint)
    written = format_of(config)
    written.check_target(target, "copy")
    return written.write(known, RowChanges(np.array(kept), np.array(new_labels)), target, "copy")


def test_csv_is_written_anew_line_by_line(tmp_path):
    write_folder(tmp_path / "train", 3)
    lines = [
        'file_name;label;said "by"',
        'train/cat/000.png;"a;b";"two\nlines"',
        "train/cat/001.png;01;x",
        "train/dog/000.png;c;007",
        "train/dog/001.png;;",
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    new = rewrite(tmp_path / "t.csv", tmp_path / "n.csv", [True, False, True, True], [2, -1, -1, -1])
    with (tmp_path / "n.csv").open(newline="") as file:
        found = list(csv.reader(file, delimiter=";"))
    assert found == [
        ["file_name", "label", 'said "by"', "original_label"],
        ["train/cat/000.png", "c", "two\nlines", "a;b"],
        ["train/dog/000.png", "c", "007", "c"],
        ["train/dog/001.png", "", "", ""],
    ]
    assert new.num_written == 3
    assert list(read(tmp_path / "n.csv").class_names) == ["c"]
    (tmp_path / "x").mkdir()
    new = rewrite(tmp_path / "t.csv", tmp_path / "x" / "n.csv", [True] * 4, [-1] * 4)
    assert (tmp_path / "x" / "n.csv").read_text().splitlines() == [
        line for text in lines for line in text.split("\n")
    ]
    assert any(f"read it with --images-root {tmp_path}" in note for note in new.notes)


def test_json_lines_are_written_anew_object_by_object(forms, tmp_path):
    for name in ("names.jsonl", "names.json"):
        kept, new = [True] * 3 + [False] * 9, [1] + [-1] * 11
        rewrite(forms / name, tmp_path / name, kept, new, images_root=forms / "folder")
        text = (tmp_path / name).read_text()
        rows = json.loads(text) if name.endswith("json") else [json.loads(line) for line in text.splitlines()]
        assert rows[0] == {"file_name": "cat/000.png", "label": "dog", "box": [1, 2], "original_label": "cat"}
        assert [row["label"] for row in rows] == ["dog", "cat", "cat"]


@pytest.mark.parametrize("name", ["names.csv", "metadata", "saved", "tars"])
def test_any_table_becomes_parquet_with_its_images(forms, tmp_path, name):
    root = {"images_root": forms / "folder"} if name == "names.csv" else {}
    kept = [row % 3 != 1 for row in range(12)]
    new = rewrite(forms / name, tmp_path / "n.parquet", kept, [-1] * 12, **root)
    before, after = read(forms / name, **root), read(tmp_path / "n.parquet")
    np.testing.assert_array_equal(after.content.pixels_N3SS, before.content.pixels_N3SS[kept])
    np.testing.assert_array_equal(after.labels_N, before.labels_N[kept])
    assert name == "names.csv" or "written anew as Parquet" in new.notes[-1]
    with pytest.raises(SettingsError, match="is written anew as Parquet; name a folder, or a file"):
        rewrite(forms / name, tmp_path / "n.jsonl", kept, [-1] * 12, **root)


def test_a_changed_image_is_noticed_before_a_table_is_written(forms, tmp_path):
    folder = write_folder(tmp_path / "folder", PER_CLASS)
    (tmp_path / "names.csv").write_text((forms / "names.csv").read_text())
    config = DataConfig(source=str(tmp_path / "names.csv"), images_root=folder)
    found = open_dataset(config, 64)
    known = KnownRows(found.ids, found.labels_N, found.fingerprint)
    (folder / "cat" / "000.png").write_bytes((folder / "cat" / "001.png").read_bytes())
    changes = RowChanges(np.ones(12, dtype=bool), np.full(12, -1))
    for target in ("n.csv", "n.parquet"):
        with pytest.raises(DataError, match="its contents or class names are not those of the report"):
            format_of(config).write(known, changes, tmp_path / target, "copy")
        assert not (tmp_path / target).exists()


def test_features_lie_beside_any_dataset(forms, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    vectors[3] = np.nan
    np.save(tmp_path / "f.npy", vectors)
    np.savez(tmp_path / "f.npz", other=vectors[:, :1], features=vectors)
    save_file({"any": vectors}, tmp_path / "f.safetensors")
    expected = vectors.copy()
    expected[3] = 0
    for name in ("f.npy", "f.npz", "f.safetensors"):
        for source in ("folder", "names.csv", "embedded.parquet", "tars"):
            root = {"images_root": forms / "folder"} if source == "names.csv" else {}
            config = DataConfig(source=str(forms / source), features=tmp_path / name, **root)
            found = open_dataset(config, 64)
            assert isinstance(found.content, Embeddings)
            np.testing.assert_array_equal(found.content.vectors_ND, expected)
            assert found.problems == {3: "features are not finite numbers"}
            assert list(found.ids) == list(read(forms / source, **root).ids)
            assert next(format_of(config).pictures([0])) == (forms / "folder/cat/000.png").read_bytes()
    # Written anew, the images are what is copied; the fingerprint is that of the features.
    new = rewrite(forms / "folder", tmp_path / "new", [True] * 12, [-1] * 12, features=tmp_path / "f.npy")
    assert new.num_written == 12 and len(list((tmp_path / "new").glob("*/*.png"))) == 12
    (tmp_path / "only.csv").write_text("id,label\n" + "".join(f"r{row},{row % 2}\n" for row in range(12)))
    assert read(tmp_path / "only.csv", features=tmp_path / "f.npy").ids[0] == "r0"


def test_features_that_do_not_fit_are_refused(forms, tmp_path):
    np.save(tmp_path / "short.npy", np.zeros((3, 2)))
    np.save(tmp_path / "flat.npy", np.zeros(12))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.zeros((12, 2)), b=np.zeros((12, 2)))
    (tmp_path / "text.npy").write_text("no array")
    for name, message in (
        ("short.npy", "has 3 rows where .* has 12; expected one for each, in the same order"),
        ("flat.npy", r"holds float64 of shape \(12,\); expected numbers, a row for each sample"),
        ("objects.npy", "cannot be read"),
        ("two.npz", "holds a, b, and none is called features"),
        ("text.npy", "cannot be read"),
        ("none.npy", "No such file"),
        ("short.txt", "its ending is .txt"),
    ):
        with pytest.raises(DataError, match=message):
            read(forms / "folder", features=tmp_path / name)
    with pytest.raises(SettingsError, match="--features: embeddings take no --image-size; leave it out"):
        DataConfig(source="d", features=tmp_path / "a.npy", image_size=3)


def test_what_beside_images_looks_like_a_table_is_none(tmp_path):
    """An archive left where it was unpacked, metadata of one class folder, and state of another program."""
    root = write_folder(tmp_path / "d", 2)
    with tarfile.open(root / "images.tar", "w") as tar:
        tar.add(root / "cat", "cat")
    (root / "cat" / "metadata.jsonl").write_text('{"file_name": "000.png", "label": "x"}\n')
    (root / "state.json").write_text("{}")
    (root / "metadata.csv").write_bytes(b"caption\n\xff\n")
    assert list(read(root).class_names) == CLASS_NAMES and len(read(root)) == 4


@pytest.mark.parametrize(
    ("header", "row", "column"),
    [
        ("image_id,label,mask", "{0},x,0001.png", "image_id"),
        ("Id,label,url", "{0},x,https://host/{0}.jpg", "Id"),
        ("filename,label,other", "{0},x,text", "filename"),
        ("id,label,where", "r{0},x,{0}.png", "where"),
        ("image,x,y,label", "{0}.png,3,4,x", "image"),
    ],
)
def test_which_column_names_images(tmp_path, header, row, column):
    folder = write_folder(tmp_path, 6) / "cat"
    rows = [row.format(f"{number:03d}") for number in range(6)]
    (folder / "0001.png").write_bytes((folder / "000.png").read_bytes())
    (folder / "t.csv").write_text("\n".join([header, *rows]))
    found = read(folder / "t.csv")
    assert found.columns["image_column"] == column and not found.problems
    assert found.columns["label_columns"] == ("label",)


def test_text_of_csv_stays_what_it_is(tmp_path):
    write_folder(tmp_path, 3)
    names = ["cat/000.png", "cat/001.png", "cat/002.png", "dog/000.png"]

    def classes(*labels):
        lines = [f"{name},{label}" for name, label in zip(names, labels, strict=True)]
        (tmp_path / "t.csv").write_text("\n".join(["path,label", *lines]))
        found = read(tmp_path / "t.csv")
        return list(found.class_names), found

    assert classes("1.10", "1.20", "1.1", "")[0] == ["1.1", "1.10", "1.20"]
    assert classes("01", "02", "1", "2")[0] == ["01", "02", "1", "2"]
    assert classes("1e5", "2e5", "1e5", "")[0] == ["1e5", "2e5"]
    assert classes("0.0", "1.0", "nan", "")[0] == ["0", "1"]
    long = [f"1234567890123456000{number}" for number in range(3)]
    assert classes(*long, "")[0] == long
    assert any("NA: taken for classes" in note for note in classes("NA", "a", "b", "a")[1].notes)


def test_csv_keeps_its_bytes_where_nothing_is_relabelled(tmp_path):
    write_folder(tmp_path, 2)
    text = '\ufefffile_name,label,"all"\r\n"cat/000.png","a",""\r\ndog/000.png,b,x"y\r\ncat/001.png,"",z\r\n'
    (tmp_path / "t.csv").write_bytes(text.encode())
    rewrite(tmp_path / "t.csv", tmp_path / "n.csv", [True, True, True], [-1, -1, -1])
    assert (tmp_path / "n.csv").read_bytes() == text.encode()
    assert list(read(tmp_path / "n.csv").class_names) == ["", "a", "b"]
    rewrite(tmp_path / "t.csv", tmp_path / "r.csv", [True, False, True], [2, -1, -1])
    lines = (tmp_path / "r.csv").read_bytes().decode("utf-8-sig").split("\r\n")
    assert lines == [
        'file_name,label,"all",original_label', "cat/000.png,b,,a", 'cat/001.png,"",z,""', "",
    ]  # fmt: skip


def test_relabelled_numbers_are_written_as_the_others_are(tmp_path):
    write_folder(tmp_path, 2)
    names = ["cat/000.png", "cat/001.png", "dog/000.png"]
    text = "path,label\n" + "".join(
        f"{name},{label}\n" for name, label in zip(names, ("0.0", "0.0", "1.0"), strict=True)
    )
    (tmp_path / "t.csv").write_text(text)
    rewrite(tmp_path / "t.csv", tmp_path / "n.csv", [True] * 3, [1, -1, 0])
    assert (tmp_path / "n.csv").read_text().splitlines()[1:] == [
        "cat/000.png,1.0,0.0", "cat/001.png,0.0,0.0", "dog/000.png,0.0,1.0",
    ]  # fmt: skip


def test_names_are_looked_for_below_the_folder_only(tmp_path):
    """A table from a stranger could have a whole disk searched."""
    (tmp_path / "in").mkdir()
    write_folder(tmp_path / "out", 2)
    for name in ("../**/000.png", "**/000.png", "[!x]*/000.png", "cat\\000.png", "https://host/a.png"):
        (tmp_path / "in" / "t.csv").write_text(f"path,label\n{name},a\n")
        with pytest.raises(DataError, match="column 'path' names no file") as raised:
            read(tmp_path / "in" / "t.csv")
        assert "out" not in str(raised.value).replace("without", "")
    (tmp_path / "in" / "state.json").write_text('{"_data_files": [{"filename": "../out/a.arrow"}]}')
    with pytest.raises(DataError, match="names no files in its folder"):
        read(tmp_path / "in")


def test_tar_files_of_other_contents(tmp_path):
    folder = write_folder(tmp_path / "d", 4)

    def write(members, mode="w:gz"):
        with tarfile.open(tmp_path / "t.tar.gz", mode) as tar:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return tmp_path / "t.tar.gz"

    images = [(folder / name / "000.png").read_bytes() for name in CLASS_NAMES]
    large = json.dumps({"label": "a", "vector": [0.5] * 20_000, "id": "x"}).encode()
    found = read(write([("a.mask.png", images[1]), ("a.png", images[0]), ("a.json", large)]))
    assert found.labels_N.tolist() == [0] and list(found.class_names) == ["a"] and list(found.ids) == ["x"]
    assert any("one is taken, such as a.png" in note for note in found.notes)
    np.testing.assert_array_equal(found.content.pixels_N3SS[0], read(folder).content.pixels_N3SS[0])
    with pytest.raises(DataError, match=r"a\.json cannot be read \(.*fix it or leave it out"):
        read(write([("a.png", images[0]), ("a.json", b"{")]))
    with pytest.raises(DataError, match="label"):
        read(write([]))


def test_json_with_what_no_column_can_hold(tmp_path):
    write_folder(tmp_path, 2)
    rows = [
        {"path": "cat/000.png", "label": "a", "width": 12, "meta": {}, "text": "\ud83d"},
        {"path": "dog/000.png", "label": "b", "width": "12", "meta": {}, "text": "x"},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read(tmp_path / "t.jsonl").class_names) == ["a", "b"]
    with pytest.raises(DataError, match=r"cannot be written as Parquet .*; leave that column out"):
        rewrite(tmp_path / "t.jsonl", tmp_path / "n", [True] * 2, [-1] * 2)
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    ("largest", "kind", "said"),
    [
        (1023, "uint16", "go up to 1,0.. only, of 65,535, and become nearly black; scale them to 8 bits"),
        (2_000_000, "int32", "go up to 1,9.*, and all above 65,535 become white; scale them"),
        (60_000, "uint16", None),
    ],
)
def test_deep_images_that_do_not_fill_their_range_are_told(tmp_path, largest, kind, said):
    """10 bits in a PNG of 16, counts in a TIFF of 32; in a folder and in a table."""
    rng = np.random.default_rng(0)
    for label in CLASS_NAMES:
        (tmp_path / "d" / label).mkdir(parents=True)
        for number in range(3):
            image = Image.fromarray(rng.integers(0, largest, (12, 12)).astype(kind))
            image.save(tmp_path / "d" / label / f"{number}.{'tif' if kind == 'int32' else 'png'}")
    paths = sorted((tmp_path / "d").glob("*/*"))
    cells = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    labels = [path.parent.name for path in paths]
    pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / "t.parquet")
    for source in ("d", "t.parquet"):
        notes = [note for note in read(tmp_path / source).notes if "more than 8 bits" in note]
        assert bool(notes) == bool(said) and (said is None or re.search(said, notes[0])), notes


def test_lists_of_images_are_refused_by_name(tmp_path):
    cells = [[{"bytes": b"x", "path": None}]]
    pq.write_table(pa.table({"images": cells, "label": [0]}), tmp_path / "t.parquet")
    with pytest.raises(
        DataError, match="column 'images' holds lists of images; write one image for each row"
    ):
        read(tmp_path / "t.parquet")

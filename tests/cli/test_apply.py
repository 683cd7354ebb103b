"""`chgval apply`: datasets as people decided; and `--decisions` of the commands that train or select."""

import csv
import filecmp

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchvision.datasets import ImageFolder

import chgval
from chgval.reports.files import with_metadata
from chgval.reports.tables import VALUES_SCHEMA
from tests.commands import invoke
from tests.pictures import make_image, write_folder

HEADER = ["id", "label_name", "decision", "new_label_name", "by"]
ROWS = [
    ["cat/000.png", "cat", "drop", "", "Ada"],
    ["cat/001.png", "cat", "relabel", "dog", "Ada"],
    ["dog/002.png", "dog", "keep", "", "Ada"],
    ["dog/003.png", "dog", "unsure", "", "Ada"],
]


def write_decisions(path, rows, header=HEADER):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_decisions(tmp_path / "d.csv", ROWS)
    return write_folder(tmp_path / "photos", 5)


def test_a_folder_is_written_as_decided_and_who_decided_what_lies_beside_it(photos, tmp_path):
    result = invoke("apply", "d.csv", "--dataset", "photos/")
    assert result.exit_code == 0, result.stderr
    assert "9 of 10 rows -> photos.corrected" in result.stderr
    assert "next: chgval value photos.corrected" in result.stderr
    before, after = ImageFolder("photos"), ImageFolder("photos.corrected")
    assert [label for _, label in after.samples].count(0) == 3 and len(after) == 9
    [moved] = [path for path, label in after.samples if "000" not in path and "cat" in path and label == 1]
    assert filecmp.cmp(moved, photos / "cat/001.png", shallow=False)
    untouched = [
        path for path, _ in before.samples if path not in ("photos/cat/000.png", "photos/cat/001.png")
    ]
    for path in untouched:
        assert filecmp.cmp(path, path.replace("photos", "photos.corrected", 1), shallow=False)
    kept = pd.read_csv("photos.corrected.decisions.csv", keep_default_na=False)
    assert kept.values.tolist() == ROWS and list(kept) == HEADER


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Parquet with embedded images in two files, and with ids."""
    monkeypatch.chdir(tmp_path)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]), key=datasets.Value("string")
    )
    (tmp_path / "hub").mkdir()
    for shard in range(2):
        rows = [
            {"image": make_image(i % 2, i), "label": i % 2, "key": f"k{i}"}
            for i in range(4 * shard, 4 * shard + 4)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(f"hub/train-{shard}.parquet")


@pytest.mark.parametrize(("data", "target"), [("hub", "new"), ("hub/train-0.parquet", "new.parquet")])
def test_parquet_is_written_as_decided(hub, tmp_path, data, target):
    write_decisions(tmp_path / "d.csv", [["k0", "cat", "drop", "", ""], ["k3", "dog", "relabel", "cat", ""]])
    args = ("apply", "d.csv", "--dataset", data, "--id-column", "key", "-o", target)
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    before = datasets.load_dataset("parquet", data_files=data if "." in data else "hub/*.parquet")["train"]
    after = datasets.load_dataset("parquet", data_files=target if "." in target else "new/*.parquet")["train"]
    labels = {row["key"]: row["label"] for row in before} | {"k3": 0}
    del labels["k0"]
    assert {row["key"]: row["label"] for row in after} == labels
    pixels = {row["key"]: np.asarray(row["image"]).tolist() for row in before}
    assert all(np.asarray(row["image"]).tolist() == pixels[row["key"]] for row in after)
    again = invoke("apply", "d.csv", "--dataset", target, "--id-column", "key", "-o", f"again-{target}")
    assert again.exit_code == 1 and "'k0' is no row of" in again.stderr


def test_a_table_of_paths_is_written_as_decided(photos, tmp_path):
    lines = [["file_name", "note", "label"]]
    lines += [[f"{label}/{n:03d}.png", "x,y", label] for label in ("cat", "dog") for n in range(5)]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    result = invoke("apply", "d.csv", "--dataset", "t.csv", "--images-root", "photos", "-o", "new.csv")
    assert result.exit_code == 0, result.stderr
    table = pd.read_csv("new.csv")
    assert len(table) == 9 and list(table.note.unique()) == ["x,y"]
    assert dict(zip(table.file_name, table.label, strict=True))["cat/001.png"] == "dog"


@pytest.mark.parametrize(("encoding", "separator"), [("utf-8-sig", ";"), ("utf-16", "\t"), ("utf-8", ",")])
def test_decisions_that_a_spreadsheet_wrote_are_read_and_other_columns_stay(
    photos, tmp_path, encoding, separator
):
    lines = [
        "id;label_name;decision;new_label_name;at;ticket",
        "cat/000.png;cat;drop;;2026-01-02T03:04:05Z;007",
        ";;;;;",
        "",
    ]
    text = "\r\n".join(lines).replace(";", separator)
    (tmp_path / "d.csv").write_bytes(text.encode(encoding))
    result = invoke("apply", "d.csv", "--dataset", "photos", "-o", "new")
    assert result.exit_code == 0, result.stderr
    kept = pd.read_csv("new.decisions.csv", dtype=str, keep_default_na=False)
    assert kept.values.tolist() == [["cat/000.png", "cat", "drop", "", "2026-01-02T03:04:05Z", "007"]]


@pytest.mark.parametrize("column", [[["a", "b"]], [b"\xff\xfe"]])
def test_columns_that_are_no_text_are_refused_before_anything_is_written(photos, tmp_path, column):
    rows = {"id": ["cat/000.png"], "label_name": ["cat"], "decision": ["drop"], "new_label_name": [""]}
    pq.write_table(pa.table({**rows, "tags": column}), tmp_path / "d.parquet")
    result = invoke("apply", "d.parquet", "--dataset", "photos", "-o", "new")
    assert result.exit_code == 1 and "column 'tags' holds" in result.stderr, result.output
    assert not (tmp_path / "new").exists()


def test_no_decisions_give_the_same_dataset(photos, tmp_path):
    write_decisions(tmp_path / "none.csv", [])
    for table in ("none.csv", "kept.csv"):
        write_decisions(tmp_path / "kept.csv", ROWS[2:])
        result = invoke("apply", table, "--dataset", "photos", "-o", f"{table}.new")
        assert result.exit_code == 0, result.stderr
        assert ImageFolder(f"{table}.new").samples == [
            (path.replace("photos", f"{table}.new"), label) for path, label in ImageFolder("photos").samples
        ]
        compared = filecmp.dircmp("photos", f"{table}.new")
        for part in compared.subdirs.values():
            assert not part.diff_files and not part.left_only and not part.right_only


def test_labels_alone_are_a_dataset_beside_the_images(photos):
    result = invoke("apply", "d.csv", "--dataset", "photos", "--labels-only")
    assert result.exit_code == 0, result.stderr
    table = pd.read_csv("photos.labels.csv", keep_default_na=False)
    assert len(table) == 9 and "cat/000.png" not in set(table.id)
    row = table[table.id == "cat/001.png"].iloc[0]
    assert (row.label, row.original_label, row.decision) == ("dog", "cat", "relabel")
    report = chgval.value("photos.labels.csv", images_root="photos", epochs=1, arch="resnet8")
    assert dict(zip(report["id"], report["label_name"], strict=True))["cat/001.png"] == "dog"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["cat/9.png", "cat", "drop", ""], "'cat/9.png' is no row of photos"),
        (
            ["cat/000.png", "dog", "drop", ""],
            "was labelled 'dog' when it was decided about, and is labelled 'cat'",
        ),
        (["cat/000.png", "cat", "delete", ""], "'delete'; expected keep, relabel, drop, unsure"),
        (["cat/000.png", "cat", "relabel", ""], "the decision to relabel needs a new_label_name"),
        (["cat/000.png", "cat", "keep", "dog"], "the decision to keep takes no new_label_name ('dog')"),
        (["cat/000.png", "cat", "relabel", "cow"], "'cow' is no class of photos; it has cat, dog"),
        (["cat/004.png", "cat", "drop", ""], "'cat/004.png' is decided about twice"),
    ],
)
def test_decisions_that_do_not_fit_are_named_and_nothing_is_written(photos, tmp_path, row, message):
    write_decisions(tmp_path / "d.csv", [["cat/004.png", "cat", "keep", ""], row], HEADER[:4])
    result = invoke("apply", "d.csv", "--dataset", "photos", "-o", "new")
    assert result.exit_code == 1 and message in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "d.csv"}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "--dataset: name the dataset"),
        (("--dataset", "fotos"), 1, "fotos: no such file or folder"),
        (("--dataset", "photos", "-o", "photos/new"), 1, "photos/new: is part of the dataset photos"),
        (("--dataset", "photos", "-o", "d.csv", "--labels-only"), 1, "d.csv: is the input itself"),
        (("--dataset", "photos", "-o", "x.txt", "--labels-only"), 2, "x.txt: the labels are a table"),
        (("--dataset", "photos", "--labels-only", "--link", "hard"), 2, "--link: no images are written"),
        (("--dataset", "builtin:digits"), 2, "builtin:digits: is built in"),
    ],
)
def test_wrong_inputs_are_named(photos, tmp_path, args, code, message):
    result = invoke("apply", "d.csv", *args)
    assert result.exit_code == code and message in result.stderr, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "d.csv"}


def test_numbers_tell_rows_of_one_id_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=4).tolist() for _ in range(4)]
    pq.write_table(pa.table({"id": list("aabb"), "label": list("xyxy"), "v": vectors}), "t.parquet")
    args = ("--dataset", "t.parquet", "--features-column", "v", "-o", "new.parquet")
    write_decisions(tmp_path / "d.csv", [["a", "y", "drop", "", 1]], [*HEADER[:4], "index"])
    assert invoke("apply", "d.csv", *args).exit_code == 0
    assert pq.read_table("new.parquet")["v"].to_pylist() == [vectors[0], *vectors[2:]]
    write_decisions(tmp_path / "e.csv", [["a", "y", "drop", ""]], HEADER[:4])
    assert (
        "2 rows of t.parquet are called 'a'; say which"
        in invoke("apply", "e.csv", *args, "--overwrite").stderr
    )


def test_one_label_of_several_annotators_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vectors = np.eye(4).tolist()
    table = {"id": list("abcd"), "one": list("xyxy"), "two": list("xyxx"), "v": vectors}
    pq.write_table(pa.table(table), "t.parquet")
    write_decisions(tmp_path / "d.csv", [["a", "x", "relabel", "y"]], HEADER[:4])
    args = ("--label-column", "one", "--label-column", "two", "--features-column", "v", "-o", "new.parquet")
    result = invoke("apply", "d.csv", "--dataset", "t.parquet", *args)
    assert result.exit_code == 1 and "labels of several annotators" in result.stderr


def values_report(path):
    """A report of the folder, in which higher numbers are worth more."""
    ids = [f"{name}/{n:03d}.png" for name in ("cat", "dog") for n in range(5)]
    columns = {field.name: pa.nulls(10, field.type) for field in VALUES_SCHEMA}
    columns |= {"index": range(10), "id": ids, "value": np.arange(10.0), "status": ["valued"] * 10}
    columns |= {"label": [0] * 5 + [1] * 5, "label_name": ["cat"] * 5 + ["dog"] * 5, "num_epochs": [1] * 10}
    table = pa.table(columns, schema=VALUES_SCHEMA)
    pq.write_table(with_metadata(table, {"class_names": ["cat", "dog"]}), path)


def test_select_leaves_out_what_was_dropped_or_relabelled_and_keeps_what_was_kept(photos, tmp_path):
    values_report(tmp_path / "v.parquet")
    suspects = {"index": [7, 8], "id": ["dog/002.png", "dog/003.png"], "flagged": [True, True]}
    pq.write_table(pa.table(suspects), "s.parquet")
    args = ("v.parquet", "--fraction", "1", "--drop", "s.parquet", "--decisions", "d.csv", "-o", "k.csv")
    result = invoke("select", *args, "--format", "indices")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "k.csv").read_text().split() == ["2", "3", "4", "5", "6", "7", "9"]
    chgval.read_report("v.parquet").save("v.csv")
    result = invoke("select", "v.csv", *args[1:], "--format", "indices", "--overwrite")
    assert result.exit_code == 0 and (tmp_path / "k.csv").read_text().count("\n") == 7


def test_train_with_decisions_is_training_on_a_table_with_those_labels(photos, tmp_path):
    settings = {"epochs": 2, "arch": "resnet8", "batch_size": 4}
    decided = chgval.train("photos", output="decided", decisions="d.csv", **settings)
    lines = [[f"{label}/{n:03d}.png", label] for label in ("cat", "dog") for n in range(5)]
    lines[0][1], lines[1][1] = "", "dog"
    write_decisions(tmp_path / "t.csv", lines, ["file_name", "label"])
    table = chgval.train("t.csv", output="table", images_root="photos", **settings)
    model, same = ((folder / "model.safetensors").read_bytes() for folder in (decided.folder, table.folder))
    assert model == same
    other = chgval.train("photos", output="other", **settings)
    assert (other.folder / "model.safetensors").read_bytes() != model


def test_decisions_that_were_not_downloaded_yet_are_missing():
    result = invoke("apply", "photos.decisions.csv", "--dataset", "photos/")
    assert result.exit_code == 1
    assert "photos.decisions.csv: no such file or folder. The page that chgval report" in result.stderr

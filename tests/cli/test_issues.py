"""`chgval detect-issues`: strangers, copies and leaks, planted among samples of their own."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

import chgval
from chgval.detection.duplicates import Pairs
from chgval.runs.issues import _is_plain_copy, _proposed
from tests.commands import invoke
from tests.pictures import make_blobs

SIZE = 32


def write(folder, name, image):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of two classes, with a mirrored copy, one with another label, and one that cannot be read."""
    root = tmp_path_factory.mktemp("photos")
    for seed in range(60):
        write(root / "photos", f"{('cat', 'dog')[seed % 2]}/{seed:03d}.png", make_blobs(seed, SIZE))
    write(root / "photos", "cat/mirrored.png", ImageOps.mirror(make_blobs(10, SIZE)))
    write(root / "photos", "dog/wrong.png", make_blobs(20, SIZE).crop((2, 2, 30, 30)))
    (root / "photos/dog/broken.png").write_bytes(b"no picture")
    write(root / "test", "cat/one.jpg", make_blobs(30, SIZE))
    write(root / "test", "dog/two.png", ImageOps.mirror(make_blobs(31, SIZE)))
    write(root / "test", "dog/three.png", make_blobs(1000, SIZE))
    chgval.value(
        root / "photos",
        epochs=1,
        arch="resnet8",
        output=root / "v.parquet",
        write_features=root / "f.npy",
    )
    return root


def issues_of(path):
    table = pd.read_parquet(path).set_index("id")
    return table, {
        name: text for name, text in table.issues.fillna("").items() if text and "outlier" not in text
    }


def test_copies_and_leaks_are_listed_with_what_could_be_decided(photos, tmp_path):
    result = invoke(
        "detect-issues", photos / "v.parquet", "--against", photos / "test", "-o", tmp_path / "i.parquet"
    )
    assert result.exit_code == 0, result.stderr
    table, found = issues_of(tmp_path / "i.parquet")
    assert len(table) == 63
    assert found == {
        "cat/010.png": "copy",
        "cat/mirrored.png": "copy",
        "cat/020.png": "copy with another label",
        "dog/wrong.png": "copy with another label",
        "cat/030.png": "in the test set",
        "dog/031.png": "in the test set",
    }
    assert table.copy_of_id.dropna().to_dict() == {
        "cat/mirrored.png": "cat/010.png",
        "dog/wrong.png": "cat/020.png",
    }
    assert table.test_id.dropna().to_dict() == {"cat/030.png": "cat/one.jpg", "dog/031.png": "dog/two.png"}
    assert table.conflicts_with["dog/wrong.png"] == table["index"]["cat/020.png"]
    decided = table.decision[table.index.isin(found)].fillna("").to_dict()
    dropped = {"cat/mirrored.png": "drop", "cat/030.png": "drop", "dog/031.png": "drop"}
    assert decided == dropped | {"cat/010.png": "", "cat/020.png": "unsure", "dog/wrong.png": "unsure"}
    applied = chgval.apply(tmp_path / "i.parquet", photos / "photos", output=tmp_path / "new")
    assert applied.num_written == 60 and applied.counts["drop"] == 3
    names = {path.split("new/")[1] for path, _ in ImageFolder(tmp_path / "new").samples}
    assert not names & set(dropped) and {"cat/010.png", "dog/wrong.png", "dog/broken.png"} <= names


def test_a_test_set_may_have_another_form_than_the_dataset(photos, tmp_path):
    ids, labels = [], []
    for path, label in ImageFolder(
        photos / "photos", is_valid_file=lambda path: "broken" not in path
    ).samples:
        ids.append(path)
        labels.append(label)
    rows = [
        {"picture": {"bytes": Path(path).read_bytes(), "path": None}, "what": label}
        for path, label in zip(ids, labels, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    columns = {"image_column": "picture", "label_column": "what", "arch": "resnet8", "epochs": 1}
    chgval.value(tmp_path / "d.parquet", output=tmp_path / "v.parquet", **columns)
    found = chgval.detect_issues(tmp_path / "v.parquet", against=str(photos / "test"))
    assert found.counts["in the test set"] == 2
    assert set(found.table["test_id"].drop_null().to_pylist()) == {"cat/one.jpg", "dog/two.png"}


@pytest.mark.parametrize("form", ["flat", "one class", "glob"])
def test_a_test_set_needs_no_labels(photos, tmp_path, form):
    flat = tmp_path / ("t/images" if form == "one class" else "t")
    flat.mkdir(parents=True)
    for path in (photos / "test").rglob("*.*"):
        shutil.copy(path, flat)
    against = f"{flat}/*.*" if form == "glob" else tmp_path / "t"
    found = chgval.detect_issues(photos / "v.parquet", against=str(against))
    names = {Path(name).name for name in found.table["test_id"].drop_null().to_pylist()}
    assert found.counts["in the test set"] == 2 and names == {"one.jpg", "two.png"}


def test_no_label_is_lost_and_nothing_goes_unseen():
    """Rows 0, 1, 2: a chain in which 1 is hardly like 0; 3 has no label, its copy 4 has one; 5 leaks."""
    pairs = Pairs(np.array([0, 1, 3]), np.array([1, 2, 4]), np.array([0.82, 0.95, 1.0]))
    copy_of_N, labels_N = np.array([-1, 0, 0, -1, 3, -1]), np.array([1, 1, 1, -1, 1, 1])
    plain_N = _is_plain_copy(pairs, copy_of_N, labels_N)
    assert plain_N.tolist() == [False] * 6
    assert _is_plain_copy(pairs, copy_of_N, np.ones(6)).tolist() == [False, False, False, False, True, False]
    found = {
        "copy": copy_of_N >= 0,
        "copy with another label": copy_of_N > 9,
        "in the test set": np.arange(6) == 5,
    }
    is_plain_leak_N = np.zeros(6, dtype=bool)
    assert _proposed(found, plain_N, is_plain_leak_N, copy_of_N) == [
        None,
        *["unsure"] * 2,
        None,
        *["unsure"] * 2,
    ]
    is_plain_leak_N[5] = True
    assert _proposed(found, plain_N, is_plain_leak_N, copy_of_N)[5] == "drop"


def test_the_page_shows_what_was_found(photos, tmp_path):
    chgval.detect_issues(photos / "v.parquet", output=tmp_path / "i.csv", against=str(photos / "test"))
    args = ("report", photos / "v.parquet", "--issues", tmp_path / "i.csv", "-o", tmp_path / "r.html")
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "r.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    samples = {sample["id"]: sample for sample in data["samples"]}
    assert samples["cat/030.png"]["test_id"] == "cat/one.jpg"
    copies = {
        name: [data["neighbours"][at]["id"] for at in sample["copies"]] for name, sample in samples.items()
    }
    assert copies["cat/010.png"] == ["cat/mirrored.png"] and copies["cat/mirrored.png"] == ["cat/010.png"]
    assert copies["cat/020.png"] == ["dog/wrong.png"] and copies["cat/000.png"] == []


def test_without_features_there_are_no_outliers_and_that_is_said(photos, tmp_path):
    report = chgval.read_report(photos / "v.parquet")
    del report.metadata["features"]
    report.save(tmp_path / "v.parquet")
    result = invoke("detect-issues", tmp_path / "v.parquet", "-o", tmp_path / "i.csv")
    assert result.exit_code == 0 and "outliers were not looked for" in result.stderr
    assert pd.read_csv(tmp_path / "i.csv").outlier_factor.isna().all()
    result = invoke(
        "detect-issues", tmp_path / "v.parquet", "--features", photos / "f.npy", "-o", tmp_path / "j.csv"
    )
    assert result.exit_code == 0 and pd.read_csv(tmp_path / "j.csv").outlier_factor.notna().sum() == 62


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Embeddings, with strangers, copies, and some that are also in a test set."""
    root = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4
    centres = rng.normal(size=(4, 16)) * 4
    vectors_ND = centres[labels] + rng.normal(size=(400, 16))
    vectors_ND[:12] = 4 * rng.normal(size=16) + rng.normal(size=(12, 16))
    vectors_ND[101], vectors_ND[202] = vectors_ND[301], vectors_ND[302] + 1e-3
    test_ND = np.concatenate([centres[labels[:30]] + rng.normal(size=(30, 16)), vectors_ND[[50, 60]]])
    pq.write_table(pa.table({"v": list(vectors_ND), "label": labels}), root / "d.parquet")
    pq.write_table(pa.table({"v": list(test_ND), "label": np.arange(32) % 4}), root / "t.parquet")
    chgval.value(root / "d.parquet", features_column="v", arch="linear", epochs=2, output=root / "v.parquet")
    return root


def test_embeddings_have_issues_too(vectors):
    found = chgval.detect_issues(vectors / "v.parquet", against=str(vectors / "t.parquet"))
    table = found.table.to_pandas()
    assert set(table["index"][table.copy_of.notna()]) == {301, 302}
    assert set(table["index"][table.test_id.notna()]) == {50, 60} and table.test_id[60] == "31"
    outliers = set(table["index"][table.issues.fillna("").str.contains("outlier")])
    assert set(range(12)) <= outliers and len(outliers) < 18
    assert found.counts == {
        "in the test set": 2,
        "copy with another label": 0,
        "copy": 4,
        "outlier": len(outliers),
    }


def test_what_goes_with_a_label_is_told(tmp_path, monkeypatch):
    pytest.importorskip("cleanvision", reason="cleanvision is not installed")
    monkeypatch.chdir(tmp_path)
    for seed in range(60):
        image = make_blobs(seed, SIZE)
        image = image.point(lambda value: value // 12) if seed % 2 else image
        write(tmp_path / "photos", f"{('cat', 'dog')[seed % 2]}/{seed:03d}.png", image)
    write(tmp_path / "photos", "cat/wide.png", Image.effect_noise((400, 20), 90).convert("RGB"))
    chgval.value("photos", epochs=1, arch="resnet8", output="v.parquet")
    result = invoke("detect-issues", "v.parquet", "--quality", "-o", "i.parquet")
    assert result.exit_code == 0, result.stderr
    table, _ = issues_of("i.parquet")
    assert (table.issues.fillna("").str.contains("dark") == table.label.eq(1)).all()
    assert "odd aspect ratio" in table.issues["cat/wide.png"] and "it/s" not in result.stderr
    dark = table.dark_score
    expected = sum(len(g) * (g.mean() - dark.mean()) ** 2 for _, g in dark.groupby(table.label))
    found = chgval.detect_issues("v.parquet", quality=True)
    assert (
        found.explained["dark"] == pytest.approx(expected / ((dark - dark.mean()) ** 2).sum())
        and found.told["dark"] > 0.5
    )
    assert "What goes with the labels" in result.stderr
    chgval.report("v.parquet", issues="i.parquet", output="r.html")
    assert "How dark images are goes with their labels" in Path("r.html").read_text()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("d.parquet",), 1, "d.parquet: is no values report; value the dataset first"),
        (("v.parquet", "--against", "none"), 1, "none: no such file or folder"),
        (("v.parquet", "--dataset", "test"), 1, "test: has 3 rows where the report has 63"),
        (("v.parquet", "--features", "few.npy"), 1, "few.npy: has 3 rows where"),
        (("v.parquet", "-o", "v.parquet", "--overwrite"), 1, "v.parquet: is the input itself"),
        (("w.parquet", "--quality", "--dataset", "d.parquet"), 2, "--quality: looks at images"),
        (
            ("w.parquet", "--dataset", "d.parquet", "--against", "test"),
            1,
            "test: is a folder of images; the rep",
        ),
        (
            ("w.parquet", "--dataset", "d.parquet", "--against", "narrow.parquet"),
            1,
            "embeddings of 3 numbers",
        ),
    ],
)
def test_wrong_inputs_are_named(photos, vectors, tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(photos / "v.parquet", tmp_path)
    shutil.copy(vectors / "d.parquet", tmp_path)
    shutil.copy(vectors / "v.parquet", tmp_path / "w.parquet")
    shutil.copytree(photos / "test", tmp_path / "test")
    np.save("few.npy", np.ones((3, 2)))
    pq.write_table(pa.table({"v": np.eye(3).tolist(), "label": [0, 1, 2]}), "narrow.parquet")
    result = invoke("detect-issues", *args)
    assert result.exit_code == code and message in result.stderr, result.stderr


def test_issues_of_other_rows_are_no_part_of_a_page(photos, vectors, tmp_path):
    chgval.detect_issues(vectors / "v.parquet", output=tmp_path / "i.parquet")
    result = invoke(
        "report", photos / "v.parquet", "--issues", tmp_path / "i.parquet", "-o", tmp_path / "r.html"
    )
    assert result.exit_code == 1 and "is not about the rows of this report" in result.stderr

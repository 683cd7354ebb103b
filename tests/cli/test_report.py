"""`chgval report`: what goes into the page, and what is wrong with its inputs."""

import base64
import io
import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import chgval
from tests.commands import invoke
from tests.pictures import write_folder

EMBEDDINGS = ("--features-column", "v", "--arch", "linear", "--epochs", "3")


def data_of(path):
    text = path.read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Embeddings of which every tenth is labelled wrong, their report, and what the run kept of them."""
    root = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(0)
    true = np.arange(200) % 2
    vectors_ND = (rng.normal(size=(200, 6)) + 3 * true[:, None]).astype(np.float32)
    labels = np.where(np.arange(200) % 10 == 0, 1 - true, true)
    table = pa.table({"v": list(vectors_ND), "label": labels, "id": [f"row-{n}" for n in range(200)]})
    pq.write_table(table, root / "d.parquet")
    kept = ("--write-features", root / "f.npy")
    result = invoke("value", root / "d.parquet", *EMBEDDINGS, *kept, "-o", root / "v.parquet")
    assert result.exit_code == 0, result.stderr
    return root, vectors_ND


def test_features_of_a_run_are_kept_and_found(vectors, tmp_path):
    root, vectors_ND = vectors
    np.testing.assert_array_equal(np.load(root / "f.npy"), vectors_ND.astype(np.float16))
    for name in ("v.parquet", "f.npy", "d.parquet"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    (root / "f.npy").rename(root / "elsewhere.npy")  # so that the one that moved with the report is taken
    try:
        assert invoke("report", tmp_path / "v.parquet", "-o", tmp_path / "r.html").exit_code == 0
    finally:
        (root / "elsewhere.npy").rename(root / "f.npy")
    near = data_of(tmp_path / "r.html")["samples"][0]["near"]
    assert [len(part) for part in near] == [3, 3]
    np.save(tmp_path / "f.npy", vectors_ND[::-1].astype(np.float16))  # of another run
    report = chgval.read_report(tmp_path / "v.parquet")
    report.metadata["features"]["file"] = str(tmp_path / "f.npy")
    report.save(tmp_path / "w.parquet")
    assert invoke("report", tmp_path / "w.parquet", "-o", tmp_path / "w.html").exit_code == 0
    assert all(sample["near"] == [[], []] for sample in data_of(tmp_path / "w.html")["samples"])


def test_the_page_holds_what_the_report_says(vectors, tmp_path):
    root, _ = vectors
    assert chgval.report(root / "v.parquet", output=tmp_path / "r.html").num_pictures == 0
    data, report = data_of(tmp_path / "r.html"), chgval.read_report(root / "v.parquet")
    suspects = chgval.detect_noise(root / "v.parquet")
    cut = data["curve"]["thresholds"][data["cut"]]
    flagged = [sample for sample in data["samples"] if sample["flagged"]]
    assert flagged == [sample for sample in data["samples"] if sample["score"] >= cut]
    assert data["curve"]["counts"][data["cut"]] == len(flagged)
    assert [sample["id"] for sample in flagged] == suspects.table["id"].to_pylist()
    for sample in data["samples"]:
        row = sample["index"]
        assert (sample["id"], sample["given"]) == (report["id"][row], report["label"][row])
        assert sample["value"] == pytest.approx(report.values[row], rel=1e-3)
        epochs = [
            pq.read_table(f"{root}/v.epochs/epoch={e}/values.parquet")["value"][row].as_py()
            for e in (1, 2, 3)
        ]
        assert sample["epochs"] == pytest.approx(epochs, rel=1e-3)
    assert sum(map(sum, data["confusion"]["counts"])) == len(flagged)
    assert sum(data["histogram"]["all"]) == 200


def test_pictures_are_small_upright_and_those_of_their_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos", 10)
    tall = Image.fromarray(np.full((400, 200, 3), (250, 10, 10), np.uint8))
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    tall.save("photos/cat/000.jpg", exif=exif)
    (tmp_path / "photos/dog/broken.png").write_bytes(b"no picture")
    report = chgval.value("photos", epochs=1, arch="resnet8", output="v.parquet")
    written = chgval.report("v.parquet", output="r.html")
    samples = {sample["id"]: sample for sample in data_of(tmp_path / "r.html")["samples"]}
    assert set(samples) == set(report["id"]) - {"dog/broken.png"} and written.num_pictures == len(samples)

    def picture(name):
        return Image.open(io.BytesIO(base64.b64decode(samples[name]["picture"].partition(",")[2]))).convert(
            "RGB"
        )

    assert picture("cat/000.jpg").size == (160, 80) and not samples["cat/000.jpg"]["small"]
    assert samples["dog/003.png"]["small"]
    original = np.asarray(Image.open("photos/dog/003.png"), dtype=float)
    errors = {
        name: np.abs(np.asarray(picture(name), dtype=float) - original).mean()
        for name in samples
        if "png" in name
    }
    assert min(errors, key=errors.get) == "dog/003.png"


def test_a_report_as_csv_gets_its_pictures_from_the_dataset_that_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos", 8)
    chgval.value("photos", epochs=1, arch="resnet8", output="v.csv")
    assert "no pictures: v.csv: does not say" in invoke("report", "v.csv", "-o", "none.html").stderr
    assert "the report does not say which dataset it is about" in (tmp_path / "none.html").read_text()
    assert invoke("report", "v.csv", "--dataset", "photos", "-o", "r.html").exit_code == 0
    found = data_of(tmp_path / "r.html")
    assert found["classes"] == ["cat", "dog"] and all(sample["picture"] for sample in found["samples"])


def test_what_a_rule_without_a_threshold_flags_is_on_the_page(vectors, tmp_path):
    root, _ = vectors
    args = (
        root / "v.parquet",
        "--threshold",
        "chg",
        "-o",
        tmp_path / "s.csv",
        "--report",
        tmp_path / "r.html",
    )
    result = invoke("detect-noise", *args)
    assert result.exit_code == 0, result.stderr
    ids = [line.split(",")[1].strip('"') for line in (tmp_path / "s.csv").read_text().splitlines()[1:]]
    samples = data_of(tmp_path / "r.html")["samples"]
    assert {sample["id"] for sample in samples if sample["flagged"]} == set(ids)
    scores = [sample["score"] for sample in samples]
    assert scores == sorted(scores, reverse=True)
    assert "is no threshold of the score" in (tmp_path / "r.html").read_text()


def test_a_page_of_many_classes_says_how_many_it_shows(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(800) % 200
    vectors = np.eye(200)[labels] * 5 + rng.normal(size=(800, 200))
    pq.write_table(pa.table({"v": vectors.tolist(), "label": labels}), tmp_path / "d.parquet")
    report = chgval.value(tmp_path / "d.parquet", features_column="v", arch="linear", epochs=2)
    report.save(tmp_path / "v.parquet")
    assert invoke("report", tmp_path / "v.parquet", "-o", tmp_path / "r.html").exit_code == 0
    data = data_of(tmp_path / "r.html")
    assert len(data["extremes"]) == 150 and len(data["classes"]) == 200


def test_what_lies_beside_a_report_and_is_not_of_it_is_no_error(vectors, tmp_path):
    root, _ = vectors
    for name in ("v.parquet", "d.parquet"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    shutil.copytree(root / "v.epochs", tmp_path / "v.epochs")
    shutil.copytree(root / "v.epochs/epoch=1", tmp_path / "v.epochs/epoch=1 (copy)")
    os.mkfifo(tmp_path / "fifo.npy")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04")
    report = chgval.read_report(tmp_path / "v.parquet")
    for number, file in enumerate(("", "/dev/zero", str(tmp_path / "fifo.npy"), str(tmp_path / "zip.npy"))):
        report.metadata["features"]["file"] = file
        report.save(tmp_path / "v.parquet", overwrite=True)
        result = invoke("report", tmp_path / "v.parquet", "-o", tmp_path / f"{number}.html")
        assert result.exit_code == 0, result.output
        assert len(data_of(tmp_path / f"{number}.html")["epochs"]["numbers"]) == 3


def test_the_next_command_is_named_where_there_is_one(vectors, tmp_path, monkeypatch):
    root, _ = vectors
    monkeypatch.chdir(tmp_path)
    result = invoke("report", root / "v.parquet", "-o", "r.html")
    assert f"chgval apply d.decisions.csv --dataset {root / 'd.parquet'}" in result.stderr
    chgval.value("builtin:digits", epochs=1, output="digits.parquet")
    assert "apply" not in invoke("report", "digits.parquet", "-o", "digits.html").stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("x.parquet",), 1, "x.parquet: no such file or folder"),
        (("d.parquet",), 1, "d.parquet: is no values report; value the dataset first"),
        (("few.npy",), 1, "few.npy: is no values report"),
        (("v.parquet", "-o", "page"), 2, "--output page: is a page for browsers; end it in .html"),
        (("v.parquet", "-o", "none/r.html"), 1, "there is no folder none"),
        (("v.parquet", "--dataset", "other"), 1, "other: no such file or folder"),
        (("v.parquet", "--features", "few.npy"), 1, "few.npy: has 3 rows where"),
        (("v.parquet", "-o", "old.html"), 1, "old.html: exists already"),
        (("v.parquet", "--top", "0"), 2, "--top"),
    ],
)
def test_wrong_inputs_are_named(vectors, tmp_path, monkeypatch, args, code, message):
    root, _ = vectors
    monkeypatch.chdir(tmp_path)
    for name in ("v.parquet", "d.parquet"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    np.save("few.npy", np.ones((3, 2)))
    (tmp_path / "old.html").touch()
    result = invoke("report", *args)
    assert result.exit_code == code and message in result.stderr, result.stderr


def test_value_and_detect_noise_write_the_page_too(vectors, tmp_path):
    root, _ = vectors
    assert invoke("report", root / "v.parquet", "-o", tmp_path / "a.html").exit_code == 0
    data, columns = root / "d.parquet", ("--features-column", "v", "--arch", "linear", "--epochs", "3")
    result = invoke("value", data, *columns, "-o", tmp_path / "v.parquet", "--report", tmp_path / "b.html")
    assert result.exit_code == 0 and "200 rows" in result.stderr, result.stderr
    expected, found = data_of(tmp_path / "a.html"), data_of(tmp_path / "b.html")
    near = [sample["near"] for sample in found["samples"]]
    assert near == [sample["near"] for sample in expected["samples"]] and near[0][0]
    assert found == expected
    args = (
        root / "v.parquet",
        "--threshold",
        "0.2",
        "-o",
        tmp_path / "s.csv",
        "--report",
        tmp_path / "c.html",
    )
    result = invoke("detect-noise", *args)
    assert result.exit_code == 0, result.stderr
    flagged = [sample for sample in data_of(tmp_path / "c.html")["samples"] if sample["score"] >= 0.2]
    assert len(flagged) == len((tmp_path / "s.csv").read_text().splitlines()) - 1
    refused = invoke("detect-noise", *args, "--overwrite", "--report", tmp_path / "none" / "c.html")
    assert refused.exit_code == 1 and "there is no folder" in refused.stderr
    args = ("detect-noise", data, *columns, "-o", tmp_path / "t.csv", "--report", tmp_path / "d.html")
    assert invoke(*args).exit_code == 0
    assert data_of(tmp_path / "d.html")["samples"][0]["near"] == near[0]
    assert data_of(tmp_path / "d.html")["samples"][0]["id"] == found["samples"][0]["id"]

"""Datasets as they lie about: odd files, odd names, odd labels, few samples, many classes."""

import os
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.commands import command_line, invoke
from tests.pictures import make_image, write_folder

FAST = ["--arch", "resnet8", "--epochs", "2", "-q"]


def names_in(folder):
    return sorted(os.fsencode(path.name) for path in folder.iterdir())


def rows_of(path):
    return {row["id"]: row for row in pq.read_table(path).to_pylist()}


def test_odd_files_cost_their_row_and_nothing_else(tmp_path):
    root = write_folder(tmp_path / "images", 6)
    cat = root / "cat"
    make_image(0, 1).save(tmp_path / "a.jpg", quality=95)
    jpeg = (tmp_path / "a.jpg").read_bytes()
    (cat / "folder.jpg").mkdir()
    (cat / "broken-link.png").symlink_to(cat / "nowhere.png")
    (cat / "looping-link.png").symlink_to(cat / "looping-link.png")
    (cat / "empty.png").write_bytes(b"")
    (cat / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (cat / "text.png").write_text("not an image")
    (cat / "a-jpeg.png").write_bytes(jpeg)
    os.mkfifo(cat / "waits-for-ever.png")
    (cat / "has-no-end.png").symlink_to("/dev/zero")
    with (cat / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    out = tmp_path / "v.parquet"
    result = invoke("value", root, *FAST[:-1], "-o", out)
    assert result.exit_code == 0, result.stderr
    rows = rows_of(out)
    unreadable = {name: row["reason"] for name, row in rows.items() if row["status"] == "unreadable"}
    # As for torchvision, a folder is no image whatever its name; all else that ends like one has a row.
    assert set(unreadable) == {f"cat/{name}" for name in (
        "broken-link.png", "looping-link.png", "empty.png", "truncated.jpg", "text.png",
        "waits-for-ever.png", "has-no-end.png", "sparse.png",
    )}  # fmt: skip
    assert unreadable["cat/broken-link.png"] == "No such file or directory"
    assert unreadable["cat/looping-link.png"] == "Too many levels of symbolic links"
    assert unreadable["cat/empty.png"] == "empty file"
    assert unreadable["cat/has-no-end.png"] == unreadable["cat/waits-for-ever.png"] == "no regular file"
    assert unreadable["cat/sparse.png"] == "1,099,511,627,776 bytes, more than an image can have"
    assert rows["cat/a-jpeg.png"]["status"] == "valued" and len(rows) == 21
    target = tmp_path / "pruned"
    args = ["select", out, "--fraction", 1, "--materialize", target, "-q", "-o", tmp_path / "m.parquet"]
    refused = invoke(*args)
    assert refused.exit_code == 1 and "has-no-end.png: leads out of the dataset" in refused.stderr
    (cat / "has-no-end.png").unlink()
    (cat / "has-no-end.png").symlink_to(cat / "nowhere.png")
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    assert len(list(target.rglob("*.*"))) == 13


NAMES = [
    b"new\nline.png", b"tab\tand 'quotes' \"too\".png", b"\xff\xfe.png", "émoji-\U0001f600.png".encode(),
    b"x" * 251 + b".png", b" leading.png", b"-rf.png", b"$(touch x).png", b"a,b;c|d.png", b"%s%n.png",
]  # fmt: skip


def test_odd_names_go_through_every_command_and_a_pipeline(tmp_path):
    root = write_folder(tmp_path / "images", 12)
    for number, name in enumerate(NAMES):
        (root / "cat" / f"{number:03d}.png").rename(root / "cat" / os.fsdecode(name))
    before = names_in(root / "cat")
    value = subprocess.Popen(command_line("value", root, *FAST, "-o", "-"), stdout=subprocess.PIPE)
    select = subprocess.Popen(
        command_line("select", "-", "--fraction", "1", "--format", "paths", "-0", "-q", "-o", "-"),
        stdin=value.stdout,
        stdout=subprocess.PIPE,
    )
    value.stdout.close()
    paths, _ = select.communicate(timeout=600)
    assert value.wait() == select.returncode == 0
    found = [path for path in paths.split(b"\0") if path]
    assert len(found) == 24
    # A name that is no UTF-8 is written out in reports, as no format could hold it; the others are the files.
    missing = [path for path in found if not os.path.exists(path)]  # noqa: PTH110
    assert [os.path.basename(path) for path in missing] == [b"\\xff\\xfe.png"]  # noqa: PTH119
    assert names_in(root / "cat") == before

    report = tmp_path / "v.parquet"
    assert invoke("value", root, *FAST, "-o", report).exit_code == 0
    target = tmp_path / "clean"
    result = invoke("detect-noise", report, "--all", "--threshold", "1", "--cleaned", target,
                    "-o", tmp_path / "s.csv")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert names_in(target / "cat") == before
    for name in NAMES:
        # Nothing that a terminal would act upon, nor a line that is not ours.
        assert os.fsdecode(name) not in result.stderr or name.decode().isprintable()


@pytest.mark.parametrize("per_class", [[], ["--per-class"]])
@pytest.mark.parametrize("mode", ["online", "exact"])
def test_classes_of_one_two_and_three_samples(mode, per_class, tmp_path):
    root = tmp_path / "images"
    for size, name in enumerate(("one", "two", "three"), start=1):
        (root / name).mkdir(parents=True)
        for number in range(size):
            make_image(size % 2, 10 * size + number).save(root / name / f"{number}.png")
    out = tmp_path / "v.parquet"
    assert invoke("value", root, *FAST, "--mode", mode, *per_class, "-o", out).exit_code == 0
    rows = rows_of(out)
    assert len(rows) == 6 and all(row["status"] == "valued" for row in rows.values())
    values = np.array([row["value"] for row in rows.values()])
    assert np.isfinite(values).all()
    for args in (["detect-noise", out], ["select", out, "--fraction", "0.5"]):
        assert invoke(*args, "-q", "-o", tmp_path / f"{args[0]}.parquet").exit_code == 0
    assert sum(pq.read_table(tmp_path / "select.parquet")["kept"].to_pylist()) == 3


def embeddings(labels, seed=0):
    rng = np.random.default_rng(seed)
    return pa.table({"e": list(rng.normal(size=(len(labels), 4)).astype(np.float32)), "label": labels})


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (pa.array(["b", "a", None, "b"] * 10), ["a", "b"]),
        (pa.array([True, False, None, True] * 10), ["False", "True"]),
        (pa.array([2.0, 7.0, None, float("nan")] * 10), ["2", "7"]),
        (pa.array(["b", "a", None, "b"] * 10).dictionary_encode(), ["a", "b"]),
        (pa.array([5, -1, 9, None] * 10, pa.int8()), ["5", "9"]),
        (pa.array([2**63, 1, 2**63, None] * 10, pa.uint64()), ["1", str(2**63)]),
    ],
    ids=["strings", "booleans", "whole floats", "dictionary", "small integers", "large integers"],
)
def test_labels_of_every_type(labels, names, tmp_path):
    table, out = tmp_path / "d.parquet", tmp_path / "v.parquet"
    pq.write_table(embeddings(labels), table)
    result = invoke("value", table, "--features-column", "e", "--epochs", 2, "-q", "-o", out)
    assert result.exit_code == 0, result.stderr
    report = pq.read_table(out)
    assert report.num_rows == 40
    assert sorted(set(report["label_name"].to_pylist()) - {None}, key=names.index) == names
    known = [label not in (None, -1) and label == label for label in labels.to_pylist()]
    assert [status == "valued" for status in report["status"].to_pylist()] == known


def test_ids_that_occur_twice_are_kept_apart_by_their_rows(tmp_path):
    table, out = tmp_path / "d.parquet", tmp_path / "v.parquet"
    pq.write_table(embeddings([0, 1] * 10).append_column("id", pa.array(["same"] * 20)), table)
    args = ["--features-column", "e", "--epochs", 2, "-q"]
    assert invoke("value", table, *args, "-o", out).exit_code == 0
    report = pq.read_table(out)
    assert report["index"].to_pylist() == list(range(20)) and set(report["id"].to_pylist()) == {"same"}
    assert len(set(report["value"].to_pylist())) > 10
    target = tmp_path / "half.parquet"
    result = invoke("select", out, "--fraction", 0.5, "-q", "-o", tmp_path / "m.parquet",
                    "--materialize", target)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    kept = pq.read_table(tmp_path / "m.parquet")["kept"].to_numpy()
    vectors = np.array(pq.read_table(table)["e"].to_pylist())
    np.testing.assert_array_equal(np.array(pq.read_table(target)["e"].to_pylist()), vectors[kept])


def test_a_class_for_nearly_every_row(tmp_path):
    """One sample each, and two of the first hundred."""
    table, out = tmp_path / "d.parquet", tmp_path / "v.parquet"
    labels = [*range(400), *range(100)]
    pq.write_table(embeddings(labels), table)
    result = invoke("value", table, "--features-column", "e", "--epochs", 1, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "and 380 more classes" in result.stderr
    report = pq.read_table(out)
    assert report.num_rows == 500 and np.isfinite(report["value"].to_numpy()).all()
    assert invoke("detect-noise", out, "-q", "-o", tmp_path / "s.parquet").exit_code == 0
    assert invoke("select", out, "--count", 400, "-q", "-o", tmp_path / "m.parquet").exit_code == 0
    assert sum(pq.read_table(tmp_path / "m.parquet")["kept"].to_pylist()) == 400


@pytest.mark.parametrize("what", ["no rows", "one class", "nothing readable"])
def test_what_cannot_be_valued_is_one_line(what, tmp_path):
    root = write_folder(tmp_path / "images", 3)
    match what:
        case "no rows":
            for file in root.rglob("*.png"):
                file.unlink()
        case "one class":
            shutil.rmtree(root / "dog")
        case "nothing readable":
            for file in root.rglob("*.png"):
                file.write_bytes(b"")
    result = invoke("value", root, *FAST, "-o", tmp_path / "v.parquet")
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and str(root) in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"images"}

"""Where outputs go: none replaces the data or another output, and none is lost with the one before it."""

import os
import pty
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from tests.commands import command_line, invoke, run
from tests.pictures import write_folder

EMBEDDINGS = ["--features-column", "x", "--epochs", "1", "-q"]
VALUE = ["value", "d.parquet", *EMBEDDINGS]
DETECT = ["detect-noise", "d.parquet", *EMBEDDINGS]
SELECT = ["select", "v.parquet", "--fraction", "0.5"]


def write_embeddings(path, num_rows=60, seed=0, **columns):
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % 2
    vectors = rng.normal(size=(num_rows, 4)) + 3 * labels[:, None]
    table = pa.table({"x": list(vectors), "label": labels, **columns})
    pq.write_table(table, path)
    return table


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with embeddings in d.parquet and their report in v.parquet."""
    monkeypatch.chdir(tmp_path)
    write_embeddings("d.parquet")
    assert invoke("value", "d.parquet", *EMBEDDINGS, "-o", "v.parquet").exit_code == 0
    return tmp_path


def into_a_closed_pipe(*args):
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command_line(*args), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    return result


@pytest.mark.parametrize(
    ("args", "code", "others"),
    [
        (["detect-noise", "v.parquet", "--all", "--fail-over", 0], 3, []),
        ([*SELECT, "--write-random", "r.parquet"], 0, ["r.parquet"]),
        ([*VALUE, "--write-probs", "p.npy"], 0, ["p.npy"]),
        (
            [*DETECT, "--all", "--values", "w.parquet", "--cleaned", "c.parquet"],
            0,
            ["w.parquet", "c.parquet"],
        ),
    ],
)
def test_a_reader_that_goes_takes_nothing_else_with_it(args, code, others, here):
    """Neither the other outputs nor the exit code, which a pipeline in CI lives by."""
    quiet = [] if "-q" in args else ["-q"]
    result = into_a_closed_pipe(*args, *quiet, "-o", "-", "--format", "csv")
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    assert all(Path(name).stat().st_size for name in others)
    assert not list(here.glob("*.checkpoint"))


@pytest.mark.parametrize("source", ["shards/*.parquet", "shards", "file", "folder"])
def test_no_output_replaces_a_file_of_the_dataset(source, here):
    Path("shards").mkdir()
    for name in ("a", "b"):
        write_embeddings(f"shards/{name}.parquet")
    write_folder(here / "images", 4)
    precious, options = Path("shards/a.parquet"), EMBEDDINGS
    if source == "file":
        source = precious.absolute().as_uri()
    if source == "folder":
        source, precious = "images", Path("images/cat/000.png")
        options = ["--arch", "resnet8", "--epochs", "1", "-q", "--format", "parquet"]
    before = precious.read_bytes()
    for command in (["value"], ["detect-noise"], ["select", "--fraction", 0.5]):
        refused = invoke(*command, source, *options, "-o", precious, "--overwrite")
        assert refused.exit_code == 1 and f"{precious}: is " in refused.stderr, refused.stderr
    assert precious.read_bytes() == before


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (
            [*VALUE, "--format", "parquet", "--write-probs", "x.npy", "-o", "./x.npy"],
            1,
            "x.npy: is named as two outputs",
        ),
        (
            [*SELECT, "--write-random", "s.parquet", "-o", "s.parquet"],
            1,
            "s.parquet: is named as two outputs",
        ),
        ([*DETECT, "--values", "s.parquet", "-o", "s.parquet"], 1, "s.parquet: is named as two outputs"),
        ([*DETECT, "--values", "-", "-o", "-"], 2, "--output, --values: only one"),
        ([*SELECT, "--write-random", "-", "-o", "-"], 2, "--output, --write-random: only one"),
        (
            [*SELECT, "--drop", "drop.parquet", "-o", "drop.parquet", "--overwrite"],
            1,
            "drop.parquet: is the input itself",
        ),
        (
            [*VALUE, "--write-probs", "folder.npy", "--overwrite", "-o", "w.parquet"],
            1,
            "folder.npy: is a folder; pass the name of a file",
        ),
        (
            [*DETECT, "--values", "w.parquet", "--cleaned", "w.epochs", "-o", "s.parquet"],
            1,
            "w.epochs: w.epochs is or goes there",
        ),
    ],
)
def test_outputs_that_get_into_each_others_way_are_told_before_all(args, code, message, here):
    Path("folder.npy").mkdir()
    assert invoke("detect-noise", "v.parquet", "-q", "-o", "drop.parquet").exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in here.iterdir()}
    result = invoke(*args)
    assert result.exit_code == code and message in result.stderr, result.stderr
    assert result.stdout == "" and {path: path.stat().st_mtime_ns for path in here.iterdir()} == before


def test_reports_in_the_way_of_a_glob_are_no_data(here):
    """The default output lies where the shards do; it is no shard, in the next run or on resuming."""
    Path("v.parquet").rename("values.parquet")
    Path("v.epochs").rename("values.epochs")
    for pattern in ("*.parquet", "**/*.parquet"):
        result = invoke("value", pattern, *EMBEDDINGS[:-1], "--overwrite")
        assert result.exit_code == 0 and "60 rows (60 valued)" in result.stderr, result.stderr
    refused = invoke("value", "val*.parquet", *EMBEDDINGS, "--overwrite")
    assert refused.exit_code == 1 and "no Parquet files found, besides reports" in refused.stderr


def test_what_chgval_wrote_into_a_folder_of_images_is_no_class(tmp_path, monkeypatch):
    for split in ("train", "test"):
        write_folder(tmp_path / split, 6)
    monkeypatch.chdir(tmp_path)
    args = ["train", ".", "--arch", "resnet8", "--epochs", 1]
    for more in ([], ["--overwrite"]):
        result = invoke(*args, *more)
        assert result.exit_code == 0 and "12 rows, 12 usable, 2 classes" in result.stderr, result.stderr


def test_a_class_may_be_called_as_the_folders_of_epochs_are(tmp_path):
    root = write_folder(tmp_path / "images", 6)
    (root / "dog").rename(root / "night.epochs")
    result = invoke("value", root, "--arch", "resnet8", "--epochs", 1, "-o", root / "v.parquet")
    assert result.exit_code == 0 and "12 rows, 12 usable, 2 classes" in result.stderr
    again = invoke("value", root, "--arch", "resnet8", "--epochs", 1, "-o", root / "w.parquet")
    assert again.exit_code == 0 and "12 rows, 12 usable, 2 classes" in again.stderr
    assert "chgval wrote are no classes (v.epochs)" in again.stderr


def test_a_training_goes_into_an_empty_folder(here):
    Path("t").mkdir()
    result = invoke("train", "d.parquet", *EMBEDDINGS, "-o", "t")
    assert result.exit_code == 0, result.stderr
    assert Path("t/model.safetensors").exists()
    Path("u").mkdir()
    Path("u/mine").touch()
    assert "never replaced" in invoke("train", "d.parquet", *EMBEDDINGS, "-o", "u").stderr


def test_a_report_in_another_order_cleans_the_same_rows(here):
    """Rows without ids, whose labels do not tell them apart: only their numbers do."""
    report = pq.read_table("v.parquet")
    shuffled = report.take(np.random.default_rng(0).permutation(report.num_rows))
    pq.write_table(shuffled, "shuffled.parquet")
    options = ["-q", "--expected-noise", 0.1, "-o", "s.parquet", "--overwrite"]
    for name, cleaned in (("v", "a"), ("shuffled", "b")):
        result = invoke("detect-noise", f"{name}.parquet", *options, "--cleaned", f"{cleaned}.parquet")
        assert result.exit_code == 0, result.stderr
    assert pq.read_table("a.parquet").num_rows == 54
    assert pq.read_table("b.parquet").equals(pq.read_table("a.parquet"))
    pq.write_table(report.slice(1), "part.parquet")
    refused = invoke("detect-noise", "part.parquet", *options, "--cleaned", "c.parquet")
    assert refused.exit_code == 1 and "is not the whole report" in refused.stderr


def test_other_embeddings_are_another_dataset(here):
    write_embeddings("other.parquet", seed=1)
    args = ["detect-noise", "v.parquet", "-q", "--cleaned", "c.parquet", "-o", "s.parquet"]
    refused = invoke(*args, "--dataset", "other.parquet")
    assert refused.exit_code == 1 and "other.parquet: its contents or class names" in refused.stderr
    assert not Path("c.parquet").exists()


@pytest.mark.parametrize(
    ("closed", "args", "code", "message"),
    [
        (1, [*VALUE, "-o", "-", "--format", "csv"], 1, "standard output is closed"),
        (0, ["detect-noise", "-", "-o", "s.parquet"], 1, "standard input: is closed"),
        (2, [*VALUE, "-o", "w.parquet"], 0, ""),
        (1, [*VALUE, "-o", "w.parquet"], 0, ""),
    ],
)
def test_closed_streams(closed, args, code, message, here):
    result = subprocess.run(
        command_line(*args), stderr=subprocess.PIPE, text=True, preexec_fn=lambda: os.close(closed)
    )
    assert result.returncode == code and message in result.stderr and "Traceback" not in result.stderr
    if code == 0:
        assert pq.read_table("w.parquet").num_rows == 60


@pytest.mark.parametrize("form", ["csv", "paths"])
def test_names_on_standard_output_cannot_act_upon_a_terminal(form, here):
    names = [f"{row}\x1b]0;owned\x07" for row in range(60)]
    write_embeddings("named.parquet", id=names)
    assert invoke("value", "named.parquet", *EMBEDDINGS, "-o", "n.parquet").exit_code == 0
    args = ["select", "n.parquet", "--fraction", 1, "-q", "-o", "-", "--format", form]
    # A file has the names as they are.
    result = run(*args)
    assert result.stdout.count(b"\x1b]0;owned\x07") == 60
    terminal, other = pty.openpty()
    process = subprocess.Popen(command_line(*args), stdout=other)
    os.close(other)
    shown = b""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed, as Linux has it
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert process.wait(timeout=600) == 0
    assert b"\x1b" not in shown and b"\x07" not in shown and shown.count(b"\\x1b]0;owned\\x07") == 60


def test_the_csv_of_a_pipe_is_read_back(here):
    """What goes through the guard of terminals is for terminals only."""
    result = run("select", "v.parquet", "--fraction", 0.5, "-q", "-o", "-", "--format", "csv")
    assert pacsv.read_csv(pa.py_buffer(result.stdout)).num_rows == 60

"""chgval value, as a person or a pipeline runs it."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch

from chgval.config import DataConfig, TrainConfig
from chgval.runs.session import prepare, read_dataset
from tests import commands, oracles
from tests.pictures import write_folder

FAST = ["--arch", "resnet8", "--epochs", "2"]


invoke = partial(commands.invoke, "value")


def metadata_of(path):
    return json.loads(pq.read_schema(path).metadata[b"chgval"])


def test_a_folder_of_images_gives_a_report_and_its_epochs(image_folder, tmp_path):
    out = tmp_path / "v.parquet"
    result = invoke(image_folder, *FAST, "-o", out)
    assert result.exit_code == 0 and result.stdout == ""
    rows = pq.read_table(out).to_pylist()
    assert [row["id"] for row in rows] == [f"{c}/{n:03d}.png" for c in ("cat", "dog") for n in range(20)]
    assert sorted(row["rank"] for row in rows) == list(range(1, 41))
    assert {row["status"] for row in rows} == {"valued"} and {row["num_epochs"] for row in rows} == {2}
    epochs = pads.dataset(tmp_path / "v.epochs", partitioning="hive").to_table().to_pandas()
    mean = epochs.groupby("index")["value"].mean()
    np.testing.assert_allclose([row["value"] for row in rows], mean, rtol=1e-12)
    mean = epochs.groupby("index")["margin"].mean()
    np.testing.assert_allclose([row["margin_mean"] for row in rows], mean, rtol=1e-5)

    facts = metadata_of(out)
    assert facts["class_names"] == ["cat", "dog"] and facts["epochs"] == 2 and facts["seed"] == 0
    assert facts["settings"]["train"]["lr"] == 0.3 and facts["settings"]["data"]["image_size"] == 12
    assert facts["libraries"].keys() >= {"torch", "python"} and facts["wall_seconds"] > 0
    assert len(facts["fingerprint"]) == 32 and facts["device"] == "cpu"

    for line in ("epoch 2/2", "Classes", "Lowest values", "estimated noise: ", "40 rows (40 valued)"):
        assert line in result.stderr
    assert max(len(line) for line in result.stderr.splitlines() if str(tmp_path.parent) not in line) <= 80


def test_the_same_seed_gives_the_same_bits_and_another_does_not(image_folder, tmp_path):
    values = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert invoke(image_folder, *FAST, "--seed", seed, "-o", tmp_path / f"{name}.parquet").exit_code == 0
        values.append(np.array(pq.read_table(tmp_path / f"{name}.parquet")["value"]))
    assert (values[0] == values[1]).all() and not (values[0] == values[2]).any()


def test_parquet_and_folder_of_the_same_images_give_the_same_values(image_folder, tmp_path):
    files = sorted(image_folder.glob("*/*.png"))
    table = pa.table(
        {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
            "label": [file.parent.name for file in files],
        }
    )
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    assert invoke(image_folder, *FAST, "-o", tmp_path / "f.parquet").exit_code == 0
    assert invoke(tmp_path / "d.parquet", *FAST, "-o", tmp_path / "p.parquet").exit_code == 0
    folder, parquet = (pq.read_table(tmp_path / name) for name in ("f.parquet", "p.parquet"))
    for column in ("value", "margin_mean", "label", "predicted_label"):
        assert folder[column].to_pylist() == parquet[column].to_pylist()


@pytest.mark.parametrize("mode", ["online", "exact"])
@pytest.mark.parametrize("utility", ["chg", "gradient", "hardness"])
def test_values_of_all_samples_sum_to_a_utility_that_all_modes_have(image_folder, tmp_path, mode, utility):
    out = tmp_path / "v.csv"
    result = invoke(image_folder, *FAST, "--mode", mode, "--utility", utility, "-o", out)
    assert result.exit_code == 0
    rows = list(csv.DictReader(out.open()))
    total, mean_loss = sum(float(r["value"]) for r in rows), np.mean([float(r["loss_mean"]) for r in rows])
    if utility == "hardness":
        assert total == pytest.approx(mean_loss, rel=1e-6)
        return
    first = pq.read_table(tmp_path / "v.epochs" / "epoch=1" / "values.parquet")["value"].to_numpy().sum()
    if mode == "online":  # from weights on the way, which nobody kept
        assert first > 0
        return
    # ||mean gradient||² at the first weights, by autograd.
    data, train = DataConfig(source=str(image_folder)), TrainConfig(arch="resnet8", epochs=2)
    run = prepare(data, train, read_dataset(data, train))
    inputs = torch.cat([batch.inputs_B for batch in run.loader.plain_batches()])
    features_ND = run.model.eval().backbone(inputs).detach()
    labels_N = torch.from_numpy(run.dataset.labels_N)
    x_ND = oracles.last_layer_gradients(run.model.head, features_ND, labels_N, times_loss=utility == "chg")
    assert first == pytest.approx((x_ND.mean(0) ** 2).sum(), rel=1e-4)


def test_exact_values_come_from_before_the_epoch_and_online_ones_from_within_it(image_folder, tmp_path):
    """So the values of a single epoch depend on the learning rate online only."""
    values = {}
    for mode in ("exact", "online"):
        for lr in ("0.1", "0.01"):
            out = tmp_path / f"{mode}-{lr}.parquet"
            run = invoke(
                image_folder, "--arch", "resnet8", "--epochs", 1, "--mode", mode, "--lr", lr, "-o", out
            )
            assert run.exit_code == 0
            values[mode, lr] = pq.read_table(out)["value"]
    assert values["exact", "0.1"] == values["exact", "0.01"]
    assert values["online", "0.1"] != values["online", "0.01"]


def test_per_class_values_differ_and_signals_do_not(image_folder, tmp_path):
    assert invoke(image_folder, *FAST, "-o", tmp_path / "a.parquet").exit_code == 0
    assert invoke(image_folder, *FAST, "--per-class", "-o", tmp_path / "b.parquet").exit_code == 0
    a, b = (pq.read_table(tmp_path / f"{n}.parquet") for n in "ab")
    assert a["value"] != b["value"] and a["margin_mean"] == b["margin_mean"]


def test_embeddings_with_both_models(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    vectors = rng.normal(size=(200, 6)) + 3 * np.eye(3, 6)[labels]
    given = labels.copy()
    given[:20] = (given[:20] + 1) % 3
    pq.write_table(pa.table({"emb": list(vectors), "label": given}), tmp_path / "e.parquet")
    for arch in ("linear", "mlp"):
        result = invoke(
            tmp_path / "e.parquet",
            "--features-column",
            "emb",
            "--arch",
            arch,
            "-o",
            tmp_path / f"{arch}.parquet",
        )
        assert result.exit_code == 0, result.stderr
        table = pq.read_table(tmp_path / f"{arch}.parquet").to_pandas()
        assert table["value"][:20].mean() < table["value"][20:].mean()
        assert (table["predicted_label"][20:] == labels[20:]).mean() > 0.9


def test_every_row_comes_out_whatever_became_of_it(tmp_path):
    root = write_folder(tmp_path / "images", 5)
    (root / "cat/002.png").write_bytes(b"broken")
    result = invoke(root, *FAST, "-o", tmp_path / "v.parquet")
    assert result.exit_code == 0
    assert "1 of 10 samples could not be read" in result.stderr and "cat/002.png" in result.stderr
    rows = pq.read_table(tmp_path / "v.parquet").to_pylist()
    assert len(rows) == 10 and rows[2]["status"] == "unreadable" and rows[2]["value"] is None
    assert rows[2]["reason"] == "not an image in a known format"
    assert sum(row["value"] is not None for row in rows) == 9
    strict = invoke(root, *FAST, "--on-error", "fail", "-o", tmp_path / "w.parquet")
    assert strict.exit_code == 1 and "cat/002.png" in strict.stderr and not (tmp_path / "w.parquet").exists()


def test_large_images_end_to_end(tmp_path):
    root = write_folder(tmp_path / "images", 8, size=70)
    broken = root / "dog/003.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    result = invoke(root, *FAST, "--image-size", 66, "--workers", 1, "-o", tmp_path / "v.parquet")
    assert result.exit_code == 0 and "decoded at each use" in result.stderr
    rows = pq.read_table(tmp_path / "v.parquet").to_pylist()
    assert [row["status"] for row in rows].count("unreadable") == 1 and rows[11]["status"] == "unreadable"
    assert sum(row["num_epochs"] == 2 for row in rows) == 15


@pytest.mark.parametrize("form", ["parquet", "arrow", "csv", "jsonl"])
def test_standard_output_carries_the_report_and_nothing_else(image_folder, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    result = commands.run("value", image_folder, *FAST, "-o", "-", "--format", form)
    assert result.returncode == 0 and "epoch 2/2" in result.stderr
    readers = {
        "parquet": lambda data: pq.read_table(pa.BufferReader(data)).num_rows,
        "arrow": lambda data: pa.ipc.open_file(pa.BufferReader(data)).read_all().num_rows,
        "csv": lambda data: len(list(csv.DictReader(io.StringIO(data.decode())))),
        "jsonl": lambda data: len([json.loads(line) for line in data.decode().splitlines()]),
    }
    assert readers[form](result.stdout) == 40
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_stops_early_is_no_error(image_folder, tmp_path):
    command = (
        f"{sys.executable} -m chgval value {image_folder} --arch resnet8 --epochs 1 -q -o - --format csv"
        " | head -n 1; echo ${PIPESTATUS[0]}"
    )
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    header, code = result.stdout.splitlines()
    assert "id" in header and "value" in header and code == "0" and result.stderr == ""


def test_quiet_says_nothing_and_verbose_says_more(image_folder, tmp_path):
    quiet = invoke(image_folder, *FAST, "-q", "-o", tmp_path / "a.parquet")
    assert quiet.exit_code == 0 and quiet.output == ""
    verbose = invoke(image_folder, *FAST, "-v", "-o", tmp_path / "b.parquet")
    assert "reading" in verbose.stderr and "step" in verbose.stderr


def test_plan_tells_and_stops(image_folder, tmp_path):
    result = invoke(image_folder, *FAST, "--plan", "-o", tmp_path / "v.parquet")
    assert result.exit_code == 0 and list(tmp_path.iterdir()) == []
    for words in (
        "40 rows",
        "2 classes",
        "resnet8",
        "2 epochs",
        "samples/s",
        "about",
        "on the host",
        "v.parquet",
    ):
        assert words in result.stderr


MEASURED = """
import atexit, resource, sys
from chgval.cli.commands import app
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stdout))
app(sys.argv[1:], standalone_mode=False)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what is resident")
def test_plan_tells_the_memory_that_is_taken_then(tmp_path):
    """Within 15 %, with 40 MB of embeddings."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(10_000, 1024)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), 1024)
    pq.write_table(pa.table({"v": column, "label": np.arange(10_000) % 10}), tmp_path / "d.parquet")
    words = ["value", str(tmp_path / "d.parquet"), "--features-column", "v", "--epochs", "1"]
    plan = subprocess.run(commands.command_line(*words, "--plan"), capture_output=True, text=True)
    number, unit = re.search(r"about ([\d.,]+) (MiB|GiB) on the host", plan.stderr).groups()
    told = float(number.replace(",", "")) * (1024 if unit == "GiB" else 1)
    command = [sys.executable, "-c", MEASURED, *words, "-o", str(tmp_path / "v.csv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert told == pytest.approx(int(done.stdout.split()[-1]) / 1024, rel=0.15)


def test_interruption_keeps_the_epochs_and_exits_with_130(image_folder, tmp_path):
    args = ["value", image_folder, "--arch", "resnet8", "--epochs", 100_000, "-o", tmp_path / "v.parquet"]
    process = commands.start(*args)
    commands.wait_for(tmp_path / "v.epochs/epoch=2/values.parquet", process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "v.parquet").exists()
    assert pq.read_table(tmp_path / "v.epochs/epoch=1/values.parquet").num_rows == 40


def test_names_cannot_act_upon_the_terminal(tmp_path):
    root = write_folder(tmp_path / "images", 5)
    evil = "[bold]\x1b[31mred\x07"
    (root / "cat").rename(root / evil)
    result = invoke(root, *FAST, "-o", tmp_path / "v.parquet")
    assert result.exit_code == 0
    assert "\x1b" not in result.stderr and "\x07" not in result.stderr
    assert "[bold]\\x1b[31mred\\x07" in result.stderr
    assert evil in pq.read_table(tmp_path / "v.parquet")["label_name"].to_pylist()


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl", "arrow"])
def test_file_names_that_are_no_text_come_out_in_every_format(tmp_path, form):
    root = write_folder(tmp_path / "images", 3)
    (root / "cat/000.png").rename(root / os.fsdecode(b"cat/\xff\n,.png"))
    result = invoke(root, "--arch", "resnet8", "--epochs", 1, "-o", tmp_path / f"v.{form}")
    assert result.exit_code == 0 and "6 rows (6 valued)" in result.stderr
    assert rb"\xff" in (tmp_path / f"v.{form}").read_bytes().replace(b"\\\\", b"\\")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["absent"], 1, "error: absent: no such file or folder."),
        (["builtin:digits", "--arch", "resnet9"], 1, "--arch resnet9: no such model"),
        (["builtin:digits", "--mean", "124,116,104"], 2, "pixels go from 0 to 1; divide numbers up to 255"),
        (["builtin:digits", "--std", "58,57,57"], 2, "pixels go from 0 to 1; divide numbers up to 255"),
        (["builtin:digits", "--weights", "absent.pt", "--arch", "resnet8"], 1, "absent.pt: no such file"),
        (["builtin:digits", "-o", "nowhere/v.parquet"], 1, "there is no folder nowhere; create it first"),
        (["builtin:digits", "-o", "v.xlsx"], 2, "the ending says no format"),
        (["builtin:digits", "--device", "tpu"], 2, "expected auto, cpu, cuda, cuda:N or mps"),
        (["builtin:digits", "--mean", "0.5"], 2, "expected three numbers"),
        (["builtin:digits", "--std", "0,1,1"], 2, "must be above 0"),
        (["builtin:digits", "--lr", "-1"], 2, "--lr -1: must be above 0"),
        (["builtin:digits", "--epochs", "0"], 2, "--epochs"),
        (["builtin:digits", "--features-column", "x", "--image-size", "8"], 2, "embeddings take no"),
        (["builtin:digits", "--label-column", "y"], 2, "has no columns"),
        (["builtin:digits", "--image-size", "32"], 2, "one image size"),
        (["builtin:digits", "--seed", "9" * 20], 2, "must be 0 or more and below 9,223"),
        (["builtin:digits", "--device", "cuda:00"], 2, "expected auto, cpu"),
        (["x" * 300], 1, "cannot be opened (File name too long)"),
        ([""], 1, "no such file or folder"),
        (["https://example.invalid/x.parquet"], 1, "or as a URI of s3://, gs://, abfs://, hdfs:// or file://"),
        (["builtin:digits", "-o", "/dev/null", "--format", "csv", "--overwrite"], 1, "is no regular file"),
        (["builtin:digits", "--nonsense"], 2, "No such option"),
        ([], 2, "Missing argument"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_an_exit_code(args, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*args)
    assert result.exit_code == code and result.stdout == ""
    assert message in result.stderr and "Traceback" not in result.stderr
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_non_finite_loss_stops_and_says_what_to_try(image_folder, tmp_path):
    result = invoke(image_folder, *FAST, "--lr", "1e30", "-o", tmp_path / "v.parquet")
    assert result.exit_code == 1
    assert "the training loss became nan at epoch" in result.stderr and "try a lower --lr" in result.stderr


def test_debug_shows_the_traceback(tmp_path):
    result = commands.run("value", tmp_path / "absent", "--debug")
    assert result.returncode == 1 and "Traceback" in result.stderr and "DataError" in result.stderr


def test_a_failed_run_does_not_stand_in_the_way_of_the_next(image_folder, tmp_path):
    out = tmp_path / "v.parquet"
    assert invoke(image_folder, *FAST, "--lr", "1e30", "-o", out).exit_code == 1
    assert invoke(image_folder, *FAST, "-o", out).exit_code == 0


def test_the_format_names_the_default_report(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(image_folder, *FAST, "--format", "csv").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"images.values.csv", "images.values.epochs"}


def test_reports_inside_the_data_are_not_data(tmp_path, monkeypatch):
    """The same command in the folder of the data, run twice, says the same."""
    root = write_folder(tmp_path / "images", 4)
    files = sorted(root.glob("*/*.png"))
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    shards = tmp_path / "shards"
    shards.mkdir()
    pq.write_table(pa.table({"image": images, "label": [0, 1] * 4}), shards / "data.parquet")
    for folder in (root, shards):
        monkeypatch.chdir(folder)
        values = []
        for _ in range(2):
            result = invoke(".", *FAST, "--overwrite")
            assert result.exit_code == 0, result.stderr
            values.append(pq.read_table(f"{folder.name}.values.parquet")["value"])
        assert values[0] == values[1]
    result = invoke("data.parquet", *FAST, "-o", "data.parquet", "--overwrite")
    assert result.exit_code == 1 and "is the input itself" in result.stderr


@pytest.mark.parametrize("settings", [[], ["--plan"]])
def test_large_images_none_of_which_decodes(tmp_path, settings):
    root = write_folder(tmp_path / "images", 3, size=90)
    for file in root.glob("*/*.png"):
        file.write_bytes(file.read_bytes()[:3000])
    for given in ([], ["--mean", "0,0,0", "--std", "1,1,1"]):
        out = tmp_path / f"{len(given)}.parquet"
        result = invoke(root, *FAST, "--image-size", 72, "--workers", 0, *given, *settings, "-o", out)
        assert result.exit_code == 1, result.stderr
        assert "could be read" in result.stderr or "could be decoded" in result.stderr


def test_exact_mode_leaves_a_network_with_dropout_as_it_is(tmp_path, monkeypatch):
    """Its pass over decoded images draws nothing from the generator that dropout draws from."""
    root = write_folder(tmp_path / "images", 8, size=70)
    monkeypatch.chdir(tmp_path)
    losses = []
    for command in (["train", "-o", "trained"], ["value", "--mode", "exact"]):
        options = ["--arch", "mobilenet_v3_small", "--image-size", "66", "--epochs", "2", "--workers", "0"]
        result = commands.invoke(*command, str(root), *options)
        losses.append(
            [line.split("samples/s")[0][:40] for line in result.stderr.splitlines() if "epoch " in line]
        )
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_ranks_with_per_class_are_within_classes(image_folder, tmp_path):
    assert invoke(image_folder, *FAST, "--per-class", "-o", tmp_path / "v.parquet").exit_code == 0
    table = pq.read_table(tmp_path / "v.parquet").to_pandas()
    for _, members in table.groupby("label"):
        assert (members["value"].rank(ascending=False) == members["rank"]).all()


def test_an_existing_report_is_kept_unless_overwrite(image_folder, tmp_path):
    out = tmp_path / "v.parquet"
    out.write_text("precious")
    result = invoke(image_folder, *FAST, "-o", out)
    assert result.exit_code == 1 and "exists already; pass --overwrite" in result.stderr
    assert out.read_text() == "precious"
    assert invoke(image_folder, *FAST, "-o", out, "--overwrite").exit_code == 0
    assert pq.read_table(out).num_rows == 40


def test_pretrained_weights_change_the_values(image_folder, tmp_path):
    import safetensors.torch
    import torch

    from chgval.training.models import CIFARResNet

    torch.manual_seed(99)
    safetensors.torch.save_file(CIFARResNet(1, 2).state_dict(), tmp_path / "w.safetensors")
    assert invoke(image_folder, *FAST, "-o", tmp_path / "a.parquet").exit_code == 0
    result = invoke(
        image_folder, *FAST, "--weights", tmp_path / "w.safetensors", "-o", tmp_path / "b.parquet"
    )
    assert result.exit_code == 0
    a, b = (pq.read_table(tmp_path / f"{n}.parquet")["value"] for n in "ab")
    assert a != b


def test_the_data_is_left_as_it_was(image_folder, tmp_path):
    copy = shutil.copytree(image_folder, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert invoke(copy, *FAST, "-o", tmp_path / "v.parquet").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before

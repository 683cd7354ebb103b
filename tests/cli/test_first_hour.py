"""What a newcomer sees: names of outputs, the next command, summaries, and options that do something."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.commands import command_line, invoke
from tests.pictures import write_folder

FAST = ("--epochs", "2", "--arch", "resnet8")


@pytest.fixture(scope="module")
def valued(tmp_path_factory):
    """A folder with photos/ and everything that the first commands leave there."""
    root = tmp_path_factory.mktemp("first")
    write_folder(root / "photos", 12)
    return root


@pytest.fixture(autouse=True)
def _here(valued, monkeypatch):
    monkeypatch.chdir(valued)


def next_of(result):
    assert result.exit_code == 0, result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("next: ")]
    return shlex.split(line)[2:]


def test_each_command_says_the_next_one_which_runs():
    words = next_of(invoke("value", "photos/", *FAST))
    assert words == ["report", "photos.values.parquet"]
    assert invoke(*words).exit_code == 0 and Path("photos.report.html").is_file()
    words = next_of(invoke("detect-noise", "photos.values.parquet", "--expected-noise", "10%"))
    assert words[:2] == ["select", "photos.values.parquet"] and words[-1] == "photos.suspects.parquet"
    words = next_of(invoke(*words))
    assert words[:4] == ["train", "photos/", "--subset", "photos.subset.parquet"]
    trained = invoke(*words, *FAST)
    assert trained.exit_code == 0 and "next: " not in trained.stderr
    assert Path("photos.trained/model.safetensors").is_file()


def test_values_that_are_there_are_read(valued):
    if not Path("photos.values.parquet").exists():
        invoke("value", "photos/", *FAST)
    before = Path("photos.values.parquet").read_bytes()
    Path("x.csv").write_text("a,b\n1,2\n")
    args = ["detect-noise", "photos/", "--values", "photos.values.parquet"]
    result = invoke(*args, "-o", "a.csv")
    assert result.exit_code == 0 and "epoch" not in result.stderr
    assert "note: reading the values report photos.values.parquet" in result.stderr
    assert Path("photos.values.parquet").read_bytes() == before
    for more, message in (
        (["--epochs", 3], "--epochs: has no effect, as photos.values.parquet is there and is read"),
        (["--values", "a.csv"], "a.csv: cannot be read as a values report"),
        (["--values", "x.csv"], "x.csv: is there, and is no values report"),
    ):
        refused = invoke(*args, *more, "-o", "b.csv")
        assert refused.exit_code in (1, 2) and message in refused.stderr and not Path("b.csv").exists()
    write_folder(Path("others"), 3)
    refused = invoke("select", "others", *args[2:], "--fraction", 0.5, "-o", "b.csv")
    assert refused.exit_code == 1 and "has 6 rows where the report has 24" in refused.stderr
    made = invoke("detect-noise", "others", "--values", "o.parquet", *FAST, "-o", "c.csv")
    assert made.exit_code == 0 and pq.read_metadata("o.parquet").num_rows == 6


@pytest.mark.parametrize(
    "given", [["--epochs", 3], ["--label-column", "x"], ["--device", "cpu"], ["--image-size", 8]]
)
def test_options_that_cannot_matter_are_refused(given):
    if not Path("photos.values.parquet").exists():
        invoke("value", "photos/", *FAST)
    for command in (["detect-noise"], ["select", "--fraction", 0.5]):
        result = invoke(*command, "photos.values.parquet", *given, "-o", "never.csv")
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert f"{given[0]}: has no effect, as photos.values.parquet is a report" in result.stderr
    result = invoke("detect-noise", "photos.values.parquet", "--values", "v.csv", "-o", "never.csv")
    assert result.exit_code == 2 and "--values: is for a dataset; photos.values.parquet is a" in result.stderr
    assert not Path("never.csv").exists()


def test_a_training_that_is_in_the_way_is_said_to_be_replaceable():
    Path("old").mkdir(exist_ok=True)
    Path("old/training.json").write_text("{}")
    result = invoke("train", "photos/", *FAST, "-o", "old")
    assert result.exit_code == 1 and "old: holds an earlier training; pass --overwrite" in result.stderr


def test_the_summary_as_json_is_what_is_printed_and_kept():
    result = invoke("value", "photos/", *FAST, "--json", "--show", 3, "-o", "j.parquet")
    found, table = json.loads(result.stdout), pq.read_table("j.parquet").to_pylist()
    assert found["rows"] == 24 and found["statuses"] == {"valued": 24}
    lowest = sorted(table, key=lambda row: row["value"])[:3]
    assert [line["id"] for line in found["lowest"]] == [row["id"] for row in lowest]
    assert found["lowest"][0]["value"] == lowest[0]["value"]
    assert found["outputs"] == ["j.parquet"] and found["next"] == "chgval report j.parquet"
    with_page = invoke("value", "photos/", *FAST, "--json", "-o", "k.parquet", "--report", "k.html")
    assert json.loads(with_page.stdout)["next"] == "chgval detect-noise k.parquet"
    plan = json.loads(invoke("value", "photos/", *FAST, "--json", "--plan").stdout)
    assert plan["seconds"] == plan["epochs"] * plan["seconds_per_epoch"] > 0 and plan["device_bytes"] is None
    noise = json.loads(
        invoke("detect-noise", "j.parquet", "--expected-noise", "25%", "--json", "-q", "-o", "k.csv").stdout
    )
    assert noise["labels"]["num_flagged"] == 6 and len(noise["labels"]["suspects"]) == 5
    kept = json.loads(invoke("select", "j.parquet", "--fraction", "50%", "--json", "-o", "l.csv").stdout)
    assert kept["kept"] == 12 and sum(line["num_kept"] for line in kept["classes"]) == 12
    trained = json.loads(invoke("train", "photos/", *FAST, "--holdout", "25%", "--json", "-o", "t").stdout)
    assert trained["epochs"] == 2 and 0 <= trained["test"]["accuracy"] <= 1
    refused = invoke("value", "photos/", *FAST, "--json", "-o", "-")
    assert refused.exit_code == 2 and "--json: standard output has a table already" in refused.stderr


def test_settings_from_a_file_give_way_to_the_command_line():
    Path("run.toml").write_text('epochs = 3\narch = "resnet8"\nseed = 5\n')
    result = invoke("value", "photos/", "--config", "run.toml", "--epochs", 1, "-o", "s.parquet")
    assert result.exit_code == 0, result.stderr
    settings = json.loads(pq.read_schema("s.parquet").metadata[b"chgval"])["settings"]["train"]
    assert (settings["epochs"], settings["seed"], settings["arch"]) == (1, 5, "resnet8")
    again = invoke("value", "photos/", "--config", "s.parquet", "-o", "s2.parquet")
    assert again.exit_code == 0
    assert pq.read_table("s2.parquet")["value"].equals(pq.read_table("s.parquet")["value"])
    refused = invoke("value", "photos/", "--config", "none.toml", "-o", "s3.parquet")
    assert refused.exit_code == 2 and "--config none.toml: cannot be read" in refused.stderr


def test_wrong_labels_are_found_under_their_plain_name_too():
    if not Path("photos.values.parquet").exists():
        invoke("value", "photos/", *FAST)
    for command in ("detect-noise", "find-label-errors"):
        assert invoke(command, "photos.values.parquet", "-q", "--all", "-o", f"{command}.csv").exit_code == 0
    assert Path("detect-noise.csv").read_bytes() == Path("find-label-errors.csv").read_bytes()


@pytest.mark.parametrize(("size", "given", "threads"), [(12, [], 1), (32, [], 2), (32, ["--threads", 3], 3)])
def test_tiny_images_take_one_thread_unless_told(tmp_path, size, given, threads, monkeypatch):
    monkeypatch.setattr("chgval.runs.session.usable_cores", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    counts = []
    monkeypatch.setattr("torch.set_num_threads", counts.append)
    root = write_folder(tmp_path / "d", 3, size=size)
    result = invoke("value", root, "--plan", *FAST, *given)
    assert result.exit_code == 0, result.stderr
    assert counts == [threads, 8]
    assert ("warning: --threads 3: more than the 2 cores" in result.stderr) == (threads == 3)


def test_something_is_said_before_pytorch_is_loaded_but_not_before_what_is_wrong_at_once():
    def said(*args):
        """What is said to a pipe, where no spinner turns, among what Python says of each import."""
        command = command_line(*args)
        command[1:1] = ["-X", "importtime"]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False).stderr

    torch = re.compile(r"^import time:.*\| +torch$", re.MULTILINE)
    plan = said("value", "photos/", "--plan")
    found = torch.search(plan)
    assert found is not None and "loading PyTorch" in plan[: found.start()]
    mistake = said("value", "fotos/")
    assert torch.search(mistake) is None
    [error] = [line for line in mistake.splitlines() if not line.startswith("import time:")]
    assert error.startswith("error: fotos")


def test_a_table_of_another_command_is_told_by_what_writes_it():
    assert invoke("value", "photos/", *FAST, "-o", "t.parquet").exit_code == 0
    assert invoke("detect-noise", "t.parquet", "-o", "t-s.parquet", "--all").exit_code == 0
    assert invoke("select", "t.parquet", "--fraction", "0.5", "-o", "t-m.parquet").exit_code == 0
    tables = {"t-s.parquet": "detect-noise writes (suspects)", "t-m.parquet": "select writes (a subset)"}
    for table, told in tables.items():
        for command in ("report", "detect-noise"):
            result = invoke(command, table, "-o", "t.html" if command == "report" else "t-x.csv")
            wanted = f"{table}: is what chgval {told}; pass a values report, as chgval value writes"
            assert result.exit_code == 1 and wanted in result.stderr, result.stderr
    told = invoke("train", "photos/", "--subset", "t-s.parquet", "-o", "t-trained").stderr
    assert "is what chgval detect-noise writes (suspects); pass a subset, as chgval select writes" in told

"""Runs that are stopped and gone on with end as those that were not, to the last bit."""

import gc
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from chgval import interruption
from chgval.config import strategies
from chgval.interruption import END_SIGNALS, Interrupted, Interruption, deferred_signals
from chgval.reports import files
from chgval.runs import state_file, unfinished, value
from chgval.training.loop import Trainer
from tests.commands import invoke, replace, run, start, wait_for
from tests.pictures import write_folder

SMALL = ["--arch", "resnet8", "--epochs", "3", "--batch-size", "8", "-q"]


@contextmanager
def stopping_after(steps, monkeypatch):
    """Let a signal come when so many steps were made, as if it had been sent then."""

    class Planned(Interruption):
        asked = 0

        def has_come(self):
            self.asked += 1
            if self.asked >= steps:
                self.signum = signal.SIGTERM
            return super().has_come()

    with monkeypatch.context() as patch:
        patch.setattr(interruption, "Interruption", Planned)
        yield


def run_in_parts(steps, monkeypatch, *args):
    """Run a command that is stopped again and again; return how often it was."""
    for number in range(100):
        with stopping_after(steps, monkeypatch):
            result = invoke(*args, *(["--resume"] if number else []))
        if result.exit_code == 0:
            return number
        assert result.exit_code == 143 and "resume with: chgval" in result.stderr, result.stderr
    raise AssertionError("it never ends")


def epoch_tables(folder):
    return {path.parent.name: pq.read_table(path) for path in sorted(folder.glob("epoch=*/*.parquet"))}


def assert_same_report(whole, parts):
    expected, found = pq.read_table(whole), pq.read_table(parts)
    assert found.equals(expected), [
        name for name in expected.column_names if not found[name].equals(expected[name])
    ]
    expected = epoch_tables(whole.with_name(f"{whole.stem}.epochs"))
    found = epoch_tables(parts.with_name(f"{parts.stem}.epochs"))
    assert found.keys() == expected.keys() and all(found[name].equals(expected[name]) for name in expected)


@pytest.mark.parametrize("steps", [1, 3, 5, 11])
@pytest.mark.parametrize("mode", ["online", "exact"])
def test_values_are_the_same_to_the_last_bit(mode, steps, image_folder, tmp_path, monkeypatch):
    """Five steps an epoch: stopped within epochs, at their end, and before the first one."""
    args = ["value", image_folder, *SMALL, "--mode", mode, "--per-class"]
    assert invoke(*args, "-o", tmp_path / "whole.parquet").exit_code == 0
    parts = tmp_path / "parts.parquet"
    assert run_in_parts(steps, monkeypatch, *args, "-o", parts) >= {1: 15, 3: 5, 5: 3, 11: 1}[steps]
    assert_same_report(tmp_path / "whole.parquet", parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "parts.epochs", "parts.parquet", "whole.epochs", "whole.parquet",
    ]  # fmt: skip


def test_dropout_and_images_that_turn_out_unreadable(tmp_path, monkeypatch):
    """They change what torch's own generator gives, and what an epoch consists of."""
    root = write_folder(tmp_path / "images", 12, size=90)
    for name in ("cat/003.png", "dog/001.png", "dog/007.png"):
        (root / name).write_bytes((root / name).read_bytes()[:400])
    args = ["value", root, "--arch", "mobilenet_v2", "--image-size", 40, "--workers", 0, *SMALL[2:]]
    assert invoke(*args, "-o", tmp_path / "whole.parquet").exit_code == 0
    assert run_in_parts(2, monkeypatch, *args, "-o", tmp_path / "parts.parquet") >= 4
    assert_same_report(tmp_path / "whole.parquet", tmp_path / "parts.parquet")
    statuses = pq.read_table(tmp_path / "parts.parquet")["status"].to_pylist()
    assert statuses.count("unreadable") == 3


def test_all_trainings_of_the_rule_aum_go_on(image_folder, tmp_path, monkeypatch):
    args = ["detect-noise", image_folder, *SMALL, "--threshold", "aum", "--all"]
    assert invoke(*args, "-o", tmp_path / "whole.parquet").exit_code == 0
    assert run_in_parts(7, monkeypatch, *args, "-o", tmp_path / "parts.parquet") >= 6
    assert pq.read_table(tmp_path / "parts.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))
    assert not list(tmp_path.glob("*checkpoint*"))


@pytest.mark.parametrize("strategy", strategies())
def test_trainings_are_the_same_to_the_last_bit(strategy, image_folder, tmp_path, monkeypatch):
    args = ["train", image_folder, "--arch", "resnet8", "--epochs", 6, "--batch-size", 8, "-q"]
    args += ["--holdout", 0.2, "--strategy", strategy]
    if strategy != "full":
        args += ["--fraction", 0.5, "--select-every", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert invoke(*args, "-o", whole).exit_code == 0
    assert run_in_parts(3, monkeypatch, *args, "-o", parts) >= 3
    expected, found = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    expected, found = (pq.read_table(folder / "metrics.parquet").to_pylist() for folder in (whole, parts))
    assert [{**row, "seconds": 0} for row in found] == [{**row, "seconds": 0} for row in expected]
    expected, found = epoch_tables(whole / "subsets"), epoch_tables(parts / "subsets")
    assert found.keys() == expected.keys() and all(found[name].equals(expected[name]) for name in expected)
    expected, found = (json.loads((folder / "training.json").read_text()) for folder in (whole, parts))
    assert found["test"] == expected["test"] and found["epochs"] == 6
    assert sorted(p.name for p in parts.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_a_subset_goes_on_with_its_weights(image_folder, tmp_path, monkeypatch):
    values, subset, other = tmp_path / "v.parquet", tmp_path / "s.parquet", tmp_path / "o.parquet"
    assert invoke("value", image_folder, *SMALL, "-o", values).exit_code == 0
    assert invoke("select", values, "--fraction", 0.6, "--weigh", "-q", "-o", subset).exit_code == 0
    assert invoke("select", values, "--fraction", 0.6, "-q", "-o", other).exit_code == 0
    args = ["train", image_folder, *SMALL, "--subset"]
    assert invoke(*args, subset, "-o", tmp_path / "whole").exit_code == 0
    with stopping_after(4, monkeypatch):
        assert invoke(*args, subset, "-o", tmp_path / "parts").exit_code == 143
    # The same path, with other weights in it.
    kept = subset.read_bytes()
    subset.write_bytes(other.read_bytes())
    refused = invoke(*args, subset, "-o", tmp_path / "parts", "--resume")
    assert refused.exit_code == 1 and "has another subset" in refused.stderr
    subset.write_bytes(kept)
    refused = invoke(*args[:-1], "-o", tmp_path / "parts", "--resume")
    assert refused.exit_code == 1 and "has another subset" in refused.stderr
    assert invoke(*args, subset, "-o", tmp_path / "parts", "--resume").exit_code == 0
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0])


def test_what_is_unfinished_is_neither_replaced_nor_mixed_with_another_run(
    image_folder, tmp_path, monkeypatch
):
    out = tmp_path / "v.parquet"
    args = ["value", image_folder, *SMALL, "-o", out]
    with stopping_after(7, monkeypatch):
        stopped = invoke(*args)
    assert stopped.exit_code == 143 and "v.checkpoint" in stopped.stderr
    refused = invoke(*args)
    assert refused.exit_code == 1 and "pass --resume to resume it, or --overwrite" in refused.stderr
    for change, difference in (
        (["--lr", 0.1], "has lr 0.3, not 0.1"),
        (["--seed", 1], "has seed 0, not 1"),
        (["--mode", "exact"], "has mode online, not exact"),
        (["--arch", "resnet20"], "has arch resnet8, not resnet20"),
        (["--image-size", 10], "has image-size 12, not 10"),
    ):
        refused = invoke(*args, *change, "--resume")
        assert refused.exit_code == 1 and difference in refused.stderr.replace("\n", " "), refused.stderr
    (image_folder / "dog" / "new.png").write_bytes((image_folder / "dog" / "000.png").read_bytes())
    try:
        refused = invoke(*args, "--resume")
    finally:
        (image_folder / "dog" / "new.png").unlink()
    assert refused.exit_code == 1 and "another dataset, or one that has changed" in refused.stderr
    assert invoke(*args, "--resume").exit_code == 0
    whole = tmp_path / "whole.parquet"
    assert invoke(*args[:-1], whole).exit_code == 0
    assert_same_report(whole, out)


def test_starting_anew_forgets_the_unfinished_run(image_folder, tmp_path, monkeypatch):
    out = tmp_path / "v.parquet"
    with stopping_after(12, monkeypatch):
        assert invoke("value", image_folder, *SMALL, "-o", out).exit_code == 143
    assert len(epoch_tables(tmp_path / "v.epochs")) == 2
    args = ["value", image_folder, *SMALL, "--seed", 1, "-o", out]
    with stopping_after(2, monkeypatch):
        assert invoke(*args, "--overwrite").exit_code == 143
    assert not epoch_tables(tmp_path / "v.epochs")
    assert invoke(*args, "--resume").exit_code == 0
    assert invoke(*args[:-1], tmp_path / "whole.parquet").exit_code == 0
    assert_same_report(tmp_path / "whole.parquet", out)


@pytest.mark.parametrize("size", [12, 90])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_other_images_of_the_same_size_are_another_dataset(kind, size, tmp_path, monkeypatch):
    """Uncompressed files are: here two change places, which no mean of all pixels tells."""
    root = write_folder(tmp_path / "images", 6, size=size)
    files = sorted(root.glob("*/*.png"))
    for number, file in enumerate(files):
        files[number] = file.with_suffix(".bmp")
        Image.open(file).save(files[number])
        file.unlink()
    source = root
    if kind == "parquet":
        source = tmp_path / "d.parquet"
        table = pa.table({"image": [file.read_bytes() for file in files], "label": [0] * 6 + [1] * 6})
    args = ["value", source, *SMALL, "--image-size", size, "--workers", 0, "-o", tmp_path / "v.parquet"]
    if kind == "parquet":
        pq.write_table(table, source)
    with stopping_after(2, monkeypatch):
        assert invoke(*args).exit_code == 143
    one, other = files[0].read_bytes(), files[-1].read_bytes()
    if kind == "folder":
        files[0].write_bytes(other)
        files[-1].write_bytes(one)
    else:
        images = [other, *table["image"].to_pylist()[1:-1], one]
        pq.write_table(table.set_column(0, "image", pa.array(images)), source)
    refused = invoke(*args, "--resume")
    assert refused.exit_code == 1 and "another dataset, or one that has changed" in refused.stderr


def test_an_older_state_is_not_taken_for_the_runs_own(image_folder, tmp_path, monkeypatch):
    """A signal that comes while a run with --overwrite still reads: what is there is not of that run."""
    args = ["value", image_folder, *SMALL, "-o", tmp_path / "v.parquet"]
    with stopping_after(7, monkeypatch):
        assert invoke(*args).exit_code == 143

    def reading(*_):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(value, "read_dataset", reading)
        result = invoke(*args, "--overwrite", "--seed", 1)
    assert result.exit_code == 143 and result.stderr == "error: interrupted\n"
    assert invoke(*args, "--resume").exit_code == 0


WRONG_PARTS = {
    "more epochs than the run has": ("trainer", "finished_epochs", 7),
    "half an epoch": ("trainer", "finished_epochs", 1.5),
    "no number": ("trainer", "num_parts", "x"),
    "a row that is not there": ("dataset", "problems", {"99999": "x"}),
    "a reason that is no text": ("dataset", "problems", {"3": 17}),
}


@pytest.mark.parametrize(
    "damage",
    ["cut", "no header", "no state", "other shapes", "wrong kind", "counts below 0", *WRONG_PARTS],
)
def test_a_damaged_state_is_an_error_of_one_line(damage, image_folder, tmp_path, monkeypatch):
    state, args = tmp_path / "v.checkpoint", ["value", image_folder, *SMALL, "-o", tmp_path / "v.parquet"]
    with stopping_after(7, monkeypatch):
        assert invoke(*args).exit_code == 143
    with safe_open(state, framework="np") as file:
        header = json.loads(file.metadata()["chgval"])
    tensors = load_file(state)
    match damage:
        case "cut":
            os.truncate(state, state.stat().st_size // 2)
        case "no header":
            save_file(tensors, state)
        case "no state":
            del header["state"]["trainer"]
        case "other shapes":
            tensors = {name: np.zeros((2, 3, 4), np.float32) for name in tensors}
        case "wrong kind":
            header["state"]["trainer"]["finished_epochs"] = {"tensor": "nowhere"}
        case "counts below 0":
            tensors["/accumulator/sums/count"] -= 5
        case _:
            part, name, wrong = WRONG_PARTS[damage]
            header["state"][part][name] = wrong
    if damage not in ("cut", "no header"):
        save_file(tensors, state, {"chgval": json.dumps(header)})
    result = invoke(*args, "--resume")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "v.checkpoint: cannot be resumed" in result.stderr
    assert invoke(*args, "--overwrite").exit_code == 0


def test_time_is_not_read_from_a_clock_that_can_be_set(image_folder, tmp_path, monkeypatch):
    """A machine's time that jumps by a year, to and fro, changes neither states nor figures."""
    args = ["value", image_folder, *SMALL, "--checkpoint-minutes", 0.0001]
    assert invoke(*args, "-o", tmp_path / "whole.parquet").exit_code == 0
    jumps = itertools.cycle([0, 3e7, -3e7])
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * time.time()))
    assert run_in_parts(3, monkeypatch, *args, "-o", tmp_path / "parts.parquet") >= 4
    assert_same_report(tmp_path / "whole.parquet", tmp_path / "parts.parquet")
    metadata = json.loads(pq.read_schema(tmp_path / "parts.parquet").metadata[b"chgval"])
    assert 0 < metadata["wall_seconds"] < 1000


def test_where_there_is_nothing_to_resume(image_folder, tmp_path):
    result = invoke("value", image_folder, *SMALL[:-1], "--resume", "-o", tmp_path / "v.parquet")
    assert result.exit_code == 0 and "no unfinished run" in result.stderr
    result = invoke("value", image_folder, *SMALL, "--resume", "-o", "-")
    assert result.exit_code == 2 and "keeps no state" in result.stderr
    (tmp_path / "w.checkpoint").write_bytes(b"not a checkpoint")
    result = invoke("value", image_folder, *SMALL, "--resume", "-o", tmp_path / "w.parquet")
    assert result.exit_code == 1 and "w.checkpoint: cannot be resumed" in result.stderr


def assert_told_how_to_resume(process, signum):
    _, stderr = process.communicate()
    assert process.returncode == 128 + signum, stderr
    assert stderr.count("\n") == 1 and "v.checkpoint; resume with: chgval value" in stderr, stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_keep_the_state_and_say_how_to_resume(name, tmp_path):
    """Sent to all processes of the command, workers too, as a terminal and most schedulers do."""
    root, out = write_folder(tmp_path / "images", 12, size=90), tmp_path / "v.parquet"
    args = ["value", root, "--image-size", 70, "--workers", 2, *SMALL[:2], "--epochs", 200, "-q", "-o", out]
    process = start(*args)
    wait_for(tmp_path / "v.checkpoint", process)
    os.killpg(process.pid, getattr(signal, name))
    assert_told_how_to_resume(process, getattr(signal, name))
    assert not out.exists()


def slow_steps(seconds=300):
    step = Trainer._make_step

    def slow(self, *args):
        Path("stepping").touch()
        time.sleep(seconds)
        return step(self, *args)

    replace("chgval.training.loop.Trainer._make_step", slow)


def slow_workers():
    handle = signal_handling._set_worker_signal_handlers

    def slow():
        handle()
        Path("starting").touch()
        time.sleep(1)

    replace("torch.utils.data._utils.signal_handling._set_worker_signal_handlers", slow)


def test_a_signal_does_not_end_a_worker_that_starts(tmp_path, monkeypatch):
    """Which would be told as a process that died for want of memory, and no state kept."""
    root = write_folder(tmp_path / "images", 12, size=90)
    monkeypatch.chdir(tmp_path)
    args = ["value", root, "--image-size", 70, "--workers", 2, *SMALL, "-q", "-o", "v.parquet"]
    process = start(*args, before=slow_workers)
    wait_for(tmp_path / "v.checkpoint", process)
    (tmp_path / "starting").unlink(missing_ok=True)
    wait_for(tmp_path / "starting", process)
    os.killpg(process.pid, signal.SIGTERM)
    assert_told_how_to_resume(process, signal.SIGTERM)


def test_a_second_signal_ends_at_once(image_folder, tmp_path, monkeypatch):
    """In the middle of a step of five minutes; the state is that from before it."""
    monkeypatch.chdir(tmp_path)
    process = start("value", image_folder, *SMALL, "-o", "v.parquet", before=slow_steps)
    wait_for(tmp_path / "stepping", process)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 143 and "v.checkpoint; resume with: " in stderr
    assert invoke("value", image_folder, *SMALL, "--resume", "-o", "v.parquet").exit_code == 0


def slow_unwinding():
    """Let what holds the outputs take its time to let go of them."""
    slow_steps(1)

    def slow(path):
        if not Path("ending").exists():
            Path("ending").touch()
            time.sleep(300)

    replace("chgval.files._unlink_if_possible", slow)


def slow_exit():
    """Let Python take its time to end."""
    slow_steps(1)

    def slow():
        Path("ending").touch()
        time.sleep(300)

    replace("multiprocessing.util._exit_function", slow)  # what a forked process has in place of atexit


@pytest.mark.parametrize("slow", [slow_unwinding, slow_exit])
def test_a_second_signal_while_the_command_ends_takes_no_word(slow, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = start("value", image_folder, *SMALL, "-o", "v.parquet", before=slow)
    wait_for(tmp_path / "stepping", process)
    process.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "ending", process)
    process.send_signal(signal.SIGINT)
    assert_told_how_to_resume(process, signal.SIGINT)


def slow_start():
    def slow():
        Path("slow").touch()
        time.sleep(300)

    replace("chgval.cli.commands.app", slow)


def test_a_signal_while_python_starts_is_no_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = start(before=slow_start)
    wait_for(tmp_path / "slow", process)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == 130


def signal_in_a_finalizer():
    """Python drops what is raised there."""
    end = _MultiProcessingDataLoaderIter.__del__

    def slow(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        end(self)

    replace("chgval.runs.value.Checkpoint", lambda *_: time.sleep(300))  # it comes before
    replace("torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__del__", slow)


def signal_in_a_fork():
    """multiprocessing does not know yet of a process that was forked; another thread takes the signal."""
    threading.Thread(target=time.sleep, args=[300], daemon=True).start()
    launch = ForkProcess._Popen

    def slow(process):
        started = launch(process)
        Path("worker").write_text(str(started.pid))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return started

    replace("multiprocessing.context.ForkProcess._Popen", staticmethod(slow))


@pytest.mark.parametrize("when", [signal_in_a_finalizer, signal_in_a_fork])
def test_a_signal_is_neither_lost_nor_told_twice(when, tmp_path, monkeypatch):
    """Before the first state, where a signal ends the command wherever it is."""
    root = write_folder(tmp_path / "images", 12, size=90)
    monkeypatch.chdir(tmp_path)
    args = ["value", root, "--image-size", 70, "--workers", 2, *SMALL, "-q", "-o", "v.parquet"]
    result = run(*args, before=when)
    assert (result.returncode, result.stderr) == (143, "error: interrupted\n")
    if when == signal_in_a_fork:
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "worker").read_text()), 0)


def test_a_signal_that_was_held_back_is_raised_at_the_end():
    with pytest.raises(Interrupted, match="interrupted"), deferred_signals() as held:
        signal.raise_signal(signal.SIGTERM)
        assert held.has_come()


def test_workers_that_outlive_a_killed_run_do_not_hold_its_outputs(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "images", 12, size=90)
    monkeypatch.chdir(tmp_path)
    args = ["value", root, "--image-size", 70, *SMALL, "-o", "v.parquet"]
    process = start(*args, "--workers", 2, before=slow_steps)
    wait_for(tmp_path / "stepping", process)
    process.kill()
    process.wait()
    result = invoke(*args, "--workers", 0, "--resume")
    assert result.exit_code == 0, result.stderr


def slow_steps_of_images_in_pipes():
    slow_steps()
    replace("chgval.data.loader._can_share", lambda _: False)


def test_workers_end_with_a_run_that_is_killed(tmp_path, monkeypatch):
    """While they write to a pipe that no one reads from any more, and that each of them holds open."""
    root = write_folder(tmp_path / "images", 40, size=90)
    monkeypatch.chdir(tmp_path)
    args = ["value", root, "--image-size", 70, *SMALL, "-o", "v.parquet", "--workers", 2]
    process = start(*args, before=slow_steps_of_images_in_pipes)
    wait_for(tmp_path / "stepping", process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    time.sleep(1)  # until the pipe is full
    process.kill()
    process.wait()
    deadline = time.monotonic() + 600
    # What has ended and was not asked for has no command line.
    while any(Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def signal_while_the_first_state_is_there():
    write_state = state_file.write_state

    def signalled(*args):
        write_state(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

    replace("chgval.runs.checkpoint.write_state", signalled)


def test_a_state_is_told_as_soon_as_it_is_there(image_folder, tmp_path):
    args = ["value", image_folder, *SMALL, "-o", tmp_path / "v.parquet"]
    result = run(*args, before=signal_while_the_first_state_is_there)
    assert result.returncode == 143 and "v.checkpoint; resume with: " in result.stderr


def slow_at(target):
    def slow(*_, **__):
        Path("slow").touch()
        time.sleep(300)

    replace(target, slow)


CHOOSING = ["--holdout", 0.2, "--strategy", "chg", "--fraction", 0.5]


@pytest.mark.parametrize(
    ("target", "args"),
    [
        ("chgval.runs.choosing.predict", ["train", *CHOOSING, "-o", "t"]),
        ("chgval.runs.train.evaluate", ["train", *CHOOSING, "-o", "t"]),
        ("chgval.runs.session.forward_all", ["value", "--mode", "exact", "-o", "v.parquet"]),
        ("chgval.tracker.score_labels", ["value", "-o", "v.parquet"]),
    ],
)
def test_what_can_be_done_again_is_not_waited_for(target, args, image_folder, tmp_path, monkeypatch):
    """Passes over all samples may take hours; a signal ends them at once, with the state from before."""
    args = [*args, *SMALL, image_folder]
    monkeypatch.chdir(tmp_path)
    process = start(*args, before=partial(slow_at, target))
    wait_for(tmp_path / "slow", process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 143 and ".checkpoint; resume with: " in stderr
    assert invoke(*args, "--resume").exit_code == 0


@pytest.mark.parametrize("command", ["value", "train"])
def test_a_run_killed_in_its_first_step_can_be_resumed(command, image_folder, tmp_path, monkeypatch):
    """A state is kept from the start, so that the same command with --resume always works."""
    monkeypatch.chdir(tmp_path)
    process = start(command, image_folder, *SMALL, "-o", "out.parquet", "--resume", before=slow_steps)
    wait_for(tmp_path / "stepping", process)
    process.kill()
    process.communicate()
    result = invoke(command, image_folder, *SMALL, "-o", "out.parquet", "--resume")
    assert result.exit_code == 0, result.stderr


def slow_after_an_epoch():
    write_epoch = files.ReportWriter.write_epoch

    def slow(self, *args):
        write_epoch(self, *args)
        Path("slow").touch()
        time.sleep(30)

    replace("chgval.reports.files.ReportWriter.write_epoch", slow)


def test_a_run_killed_between_its_first_epoch_and_the_state_is_resumed(image_folder, tmp_path, monkeypatch):
    """The epoch is there, the state is that of the start; and what the run may replace, it still may."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.parquet").write_text("of before")
    args = ["value", image_folder, *SMALL, "-o", "v.parquet", "--overwrite"]
    process = start(*args, before=slow_after_an_epoch)
    wait_for(tmp_path / "slow", process)
    process.kill()
    process.communicate()
    assert (tmp_path / "v.epochs" / "epoch=1").exists()
    result = invoke("value", image_folder, *SMALL, "-o", "v.parquet", "--resume")
    assert result.exit_code == 0, result.stderr
    assert invoke("value", image_folder, *SMALL, "-o", "whole.parquet").exit_code == 0
    assert_same_report(tmp_path / "whole.parquet", tmp_path / "v.parquet")


def slow_steps_and_a_full_disk():
    slow_steps(1)

    def full(*_):
        raise OSError(28, "No space left on device")

    replace("chgval.runs.state_file.save_file", full)


def test_nothing_is_said_to_be_kept_that_is_not(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = start("value", image_folder, *SMALL, "-o", "v.parquet", before=slow_steps_and_a_full_disk)
    wait_for(tmp_path / "stepping", process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 143 and stderr == "error: interrupted\n"


def test_only_what_the_run_wrote_is_replaced(image_folder, tmp_path, monkeypatch):
    """What others put there meanwhile, or another name now given, is not the run's."""
    monkeypatch.chdir(tmp_path)
    args = ["value", image_folder, *SMALL]
    with stopping_after(7, monkeypatch):
        assert invoke(*args, "-o", "v.parquet").exit_code == 143
    for name in ("v.csv", "mine.npy"):
        (tmp_path / name).write_text("precious")
    for more in (["-o", "v.csv"], ["-o", "v.parquet", "--write-probs", "mine.npy"]):
        refused = invoke(*args, *more, "--resume")
        assert refused.exit_code == 1 and "exists already" in refused.stderr
    (tmp_path / "v.parquet").write_text("precious")
    refused = invoke(*args, "-o", "v.parquet", "--resume")
    assert refused.exit_code == 1 and "v.parquet: exists already" in refused.stderr
    assert (tmp_path / "v.parquet").read_text() == "precious"
    assert invoke(*args, "-o", "v.parquet", "--resume", "--overwrite").exit_code == 0
    assert (tmp_path / "v.csv").read_text() == (tmp_path / "mine.npy").read_text() == "precious"


def test_a_command_that_failed_after_its_first_outputs_is_resumed(image_folder, tmp_path, monkeypatch):
    """The random manifest and the pruned dataset are there when the disk gets full for good."""
    monkeypatch.chdir(tmp_path)
    args = ["select", image_folder, *SMALL, "--fraction", 0.5, "--write-random", "r.parquet",
            "--materialize", "pruned", "-o", "s.parquet"]  # fmt: skip

    def full(self, *_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(unfinished.Unfinished, "remove", full)
        with pytest.raises(OSError, match="No space left"):
            invoke(*args, catch_exceptions=False)
    assert {path.name for path in tmp_path.iterdir()} >= {"r.parquet", "s.parquet", "pruned", "s.checkpoint"}
    refused = invoke(*args)
    assert refused.exit_code == 1 and "pass --resume" in refused.stderr
    result = invoke(*args, "--resume")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"r.parquet", "s.parquet", "pruned"}


def killed_at(place, monkeypatch, *args):
    """Run a command that ends for good at a function of the program, as one that is killed there."""

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(place, die)
        with pytest.raises(Killed):
            invoke(*args, catch_exceptions=False)


@pytest.mark.parametrize("between", ["nothing", "an empty folder", "the same", "something else"])
def test_a_new_dataset_is_there_and_whole_whatever_was_there_before(
    between, image_folder, tmp_path, monkeypatch
):
    """An empty folder is an allowed place; what a run finds there when it goes on may be anybody's."""
    monkeypatch.chdir(tmp_path)
    args = ["select", image_folder, *SMALL, "--fraction", 0.5, "--materialize", "pruned", "-o", "s.parquet"]
    assert invoke(*args[:-2], "-o", "whole.parquet").exit_code == 0
    whole = Path("pruned").rename("whole")
    if between == "an empty folder":
        Path("pruned").mkdir()
    killed_at("chgval.runs.select.choose", monkeypatch, *args)
    if between == "the same":
        whole.rename("pruned")
        whole = Path("pruned")
    if between == "something else":
        Path("pruned").mkdir()
        Path("pruned/mine").write_text("precious")
    result = invoke(*args, "--resume")
    if between == "something else":
        assert result.exit_code == 1 and "pruned: holds something else by now" in result.stderr
        assert [path.name for path in Path("pruned").iterdir()] == ["mine"]
        Path("pruned").rename("mine")
        result = invoke(*args, "--resume")
    assert result.exit_code == 0, result.stderr
    expected = {path.relative_to(whole): path.read_bytes() for path in whole.glob("*/*.png")}
    assert len(expected) == 20
    assert {path.relative_to("pruned"): path.read_bytes() for path in Path("pruned").glob("*/*")} == expected
    assert not list(tmp_path.glob("*.checkpoint"))


@pytest.mark.parametrize(
    ("command", "place", "changed", "said"),
    [
        (["select", "--fraction", 0.5], "select.choose", ["--fraction", 0.2], "fraction 0.5, not 0.2"),
        (["detect-noise"], "detect_noise.assess", ["--threshold", "gmm"], "threshold auto, not gmm"),
        (["detect-noise"], "detect_noise.assess", ["--all"], "all-rows False, not True"),
    ],
)
def test_settings_of_the_command_itself_stay_the_same(
    command, place, changed, said, image_folder, tmp_path, monkeypatch
):
    """They are those of the outputs that were written before, and of those that come."""
    args = [command[0], image_folder, *command[1:], *SMALL, "-o", tmp_path / "s.parquet"]
    killed_at(f"chgval.runs.{place}", monkeypatch, *args)
    refused = invoke(*args, *changed, "--resume")
    assert refused.exit_code == 1 and said in refused.stderr, refused.stderr
    assert invoke(*args, "--resume").exit_code == 0


def test_a_run_with_one_output_in_a_file_keeps_its_state_there(image_folder, tmp_path, monkeypatch):
    args = ["detect-noise", image_folder, *SMALL, "--values", "-", "-o", tmp_path / "s.csv"]
    with stopping_after(7, monkeypatch):
        assert invoke(*args).exit_code == 143
    result = invoke(*args, "--resume")
    assert result.exit_code == 0 and pq.read_table(pa.BufferReader(result.stdout_bytes)).num_rows == 40


def test_trainings_of_an_earlier_run_are_not_resumed(image_folder, tmp_path, monkeypatch):
    """The first command had come to its second training; the next one starts anew, and is stopped too."""
    args = ["detect-noise", image_folder, *SMALL, "--threshold", "aum", "-o", tmp_path / "s.parquet"]
    with stopping_after(4, monkeypatch):
        assert invoke(*args).exit_code == 143
        for _ in range(5):
            assert invoke(*args, "--resume").exit_code == 143
    assert (tmp_path / "s.threshold-1.checkpoint").exists()
    with stopping_after(4, monkeypatch):
        assert invoke(*args, "--seed", 1, "--overwrite").exit_code == 143
    assert not (tmp_path / "s.threshold-1.checkpoint").exists()
    result = invoke(*args, "--seed", 1, "--resume")
    assert result.exit_code == 0, result.stderr


def die_while_a_state_is_written():
    def die(tensors, path, header):
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    replace("chgval.runs.state_file.save_file", die)


def test_a_training_killed_in_its_first_state_can_be_resumed(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["train", image_folder, *SMALL, "-o", "t", "--resume"]
    killed = run(*args, before=die_while_a_state_is_written)
    assert killed.returncode == -signal.SIGKILL and Path("t/.training.checkpoint.part").exists()
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    assert Path("t/model.safetensors").exists()


def test_the_command_that_goes_on_is_one_that_works(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("-odd").symlink_to(image_folder)
    process = start("value", *SMALL, "-o", "v.parquet", "--", "-odd", before=slow_steps)
    wait_for(tmp_path / "stepping", process)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)  # two of a kind that wait together are one
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    command = shlex.split(stderr.partition("resume with: chgval ")[2])
    assert process.returncode == 143 and invoke(*command).exit_code == 0, stderr


def test_a_dataset_of_before_is_not_taken_for_the_new_one(image_folder, tmp_path, monkeypatch):
    """With --overwrite the old file is there until the new one is."""
    images = [file.read_bytes() for file in sorted(image_folder.glob("*/*.png"))]
    table = pa.table({"image": images, "label": [number // 20 for number in range(len(images))]})
    pq.write_table(table, tmp_path / "d.parquet")
    clean = tmp_path / "clean.parquet"
    clean.write_text("of before")
    args = ["detect-noise", tmp_path / "d.parquet", *SMALL, "--cleaned", clean, "-o", tmp_path / "s.parquet"]
    with stopping_after(7, monkeypatch):
        assert invoke(*args, "--overwrite").exit_code == 143
    assert clean.read_text() == "of before"
    result = invoke(*args, "--resume")
    assert result.exit_code == 0, result.stderr
    flagged = pq.read_table(tmp_path / "s.parquet").num_rows
    assert pq.read_table(clean).num_rows == len(images) - flagged


def test_outputs_that_share_their_state_are_not_written_at_once(image_folder, tmp_path):
    process = start("value", image_folder, *SMALL[:2], "--epochs", 5000, "-q", "-o", tmp_path / "v.parquet")
    wait_for(tmp_path / "v.checkpoint", process)
    second = invoke("value", image_folder, *SMALL, "--overwrite", "-o", tmp_path / "v.csv")
    process.kill()
    process.communicate()
    assert second.exit_code == 1 and "v.checkpoint: another run is writing it" in second.stderr
    refused = invoke("value", image_folder, *SMALL, "--format", "csv", "-o", tmp_path / "v.checkpoint")
    assert refused.exit_code == 2 and "pass another ending" in refused.stderr


def test_changed_test_data_are_other_test_data(image_folder, tmp_path, monkeypatch):
    tests = write_folder(tmp_path / "tests", 6)
    args = ["train", image_folder, *SMALL, "--test"]
    with stopping_after(7, monkeypatch):
        assert invoke(*args, tests, "-o", tmp_path / "t").exit_code == 143
    elsewhere = tmp_path / "elsewhere"
    tests.rename(elsewhere)
    (elsewhere / "cat" / "000.png").rename(tmp_path / "000.png")
    refused = invoke(*args, elsewhere, "-o", tmp_path / "t", "--resume")
    assert refused.exit_code == 1 and "has other test data" in refused.stderr
    (tmp_path / "000.png").rename(elsewhere / "cat" / "000.png")
    assert invoke(*args, elsewhere, "-o", tmp_path / "t", "--resume").exit_code == 0


def test_signals_are_handled_as_before_once_a_run_has_failed(image_folder, tmp_path, monkeypatch):
    """Whatever keeps the failed run's frames alive, as a traceback does."""
    before = [signal.getsignal(signum) for signum in END_SIGNALS]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.ReportWriter, "write_epoch", full)
        result = invoke("value", image_folder, *SMALL, "-o", tmp_path / "v.parquet")
    assert isinstance(result.exception, OSError) and result.exc_info[2] is not None
    assert [signal.getsignal(signum) for signum in END_SIGNALS] == before
    del result
    gc.collect()
    assert [signal.getsignal(signum) for signum in END_SIGNALS] == before


def test_the_second_of_two_runs_with_one_output_stops(image_folder, tmp_path):
    out = tmp_path / "v.parquet"
    process = start("value", image_folder, *SMALL[:2], "--epochs", 5000, "-q", "-o", out)
    wait_for(tmp_path / "v.checkpoint", process)
    second = invoke("value", image_folder, *SMALL, "--resume", "-o", out)
    assert second.exit_code == 1 and "another run is writing it" in second.stderr
    process.kill()
    process.communicate()
    assert (tmp_path / ".v.parquet.lock").exists()
    # What a killed run leaves behind does not stand in the way.
    assert invoke("value", image_folder, *SMALL, "--overwrite", "-o", out).exit_code == 0
    assert not (tmp_path / ".v.parquet.lock").exists()


# The output comes last.
KILLED = {
    "value": ["value", "builtin:digits", "--arch", "resnet8"],
    "exact": ["value", "builtin:digits", "--arch", "resnet8", "--mode", "exact"],
    "train": ["train", "builtin:digits", "--fraction", 0.5, "--select-every", 3, "--holdout", 0.1],
}


def start_killable(kind, epochs, out, *options):
    return start(*KILLED[kind], "--epochs", epochs, "-q", *options, "-o", out)


def results_of(kind, out):
    """All figures that a command leaves, as bytes where they are a model's."""
    if kind != "train":
        return pq.read_table(out), *epoch_tables(out.with_name(f"{out.stem}.epochs")).items()
    metrics = pq.read_table(out / "metrics.parquet").drop_columns("seconds")
    return metrics, (out / "model.safetensors").read_bytes(), *epoch_tables(out / "subsets").items()


def run_killed(kind, epochs, out, moments):
    """Run a command, kill it after each of these seconds in turn, and then let it end; return the kills."""
    kills = 0
    for moment in moments:
        process = start_killable(kind, epochs, out, "--resume", "--checkpoint-minutes", 0.002)
        try:
            process.communicate(timeout=moment)
            assert process.returncode == 0
            return kills
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    process = start_killable(kind, epochs, out, "--resume")
    _, stderr = process.communicate()
    # It may have been killed when all was written.
    finished = "exists already" in stderr and (out / "model.safetensors" if kind == "train" else out).exists()
    assert process.returncode == 0 or finished, stderr
    return kills


@pytest.mark.parametrize("kind", ["value", "train"])
def test_a_killed_run_is_resumed(kind, tmp_path):
    """Twice, each time after it has kept its state twice."""
    whole, out = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    assert run_killed(kind, 6, whole, []) == 0
    state = out / "training.checkpoint" if kind == "train" else out.with_suffix(".checkpoint")
    for _ in range(2):
        process = start_killable(kind, 6, out, "--resume", "--checkpoint-minutes", 0.002)
        kept = {state.stat().st_mtime_ns} if state.exists() else set()
        most = len(kept) + 2
        while len(kept) < most:
            assert process.poll() is None, process.communicate()
            if state.exists():
                kept.add(state.stat().st_mtime_ns)
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert state.exists()
    run_killed(kind, 6, out, [])
    assert results_of(kind, out) == results_of(kind, whole)


@pytest.mark.long
@pytest.mark.parametrize("kind", list(KILLED))
def test_runs_killed_at_many_moments_go_on(kind, tmp_path, capsys):
    """SIGKILL at 40 moments spread over the run, jittered; a resume after each, and the figures compared.

    The run is long enough for most of its time to be training.
    """
    num_moments, num_epochs = 40, 40
    began = time.monotonic()
    run_killed(kind, num_epochs, tmp_path / "whole.parquet", [])
    seconds = time.monotonic() - began
    expected = results_of(kind, tmp_path / "whole.parquet")
    rng, kills, tries, unfinished = np.random.default_rng(0), 0, 0, 0
    while kills < num_moments:
        began, tries = time.monotonic(), tries + 1
        moment = seconds * (kills + rng.random()) / num_moments
        out = tmp_path / f"parts-{tries}.parquet"
        process = start_killable(kind, num_epochs, out, "--checkpoint-minutes", 0.002)
        try:
            process.communicate(timeout=moment)
            seconds = time.monotonic() - began  # it was faster than those before
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            # Under its own name, no file is ever half written.
            for path in filter(Path.is_file, tmp_path.rglob(f"{out.stem}*/**/*")):
                if path.suffix == ".parquet":
                    pq.read_schema(path)
                elif path.suffix in (".safetensors", ".checkpoint"):
                    load_file(path)
            state = out / "training.checkpoint" if kind == "train" else out.with_suffix(".checkpoint")
            unfinished += state.exists()
            run_killed(kind, num_epochs, out, [])
        assert results_of(kind, out) == expected, moment
    with capsys.disabled():
        sys.stdout.write(
            f"\n{kind}: killed at {kills} moments of {seconds:.0f} s, {unfinished} with a state\n"
        )

"""What a run does when the machine, the disk or the terminal fails it."""

import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from chgval.data import loader
from chgval.detection.scores import score_labels
from chgval.reports.files import ReportWriter
from chgval.runs import value
from chgval.training.loop import Trainer
from tests.commands import command_line, invoke, replace, run, start, wait_for
from tests.pictures import write_folder

FAST = ["--arch", "resnet8", "--epochs", "2"]
LONG = ["--arch", "resnet8", "--epochs", "5000"]


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def limit_files(size):
    """Let no file grow beyond so many bytes, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_state_that_cannot_be_kept_is_told_and_the_run_continues(image_folder, tmp_path):
    """The state of this model is larger than the limit, the report is not."""
    out = tmp_path / "v.parquet"
    result = run("value", image_folder, *FAST, "-o", out, before=partial(limit_files, 100_000))
    assert result.returncode == 0, result.stderr
    assert "the state of the run cannot be kept" in result.stderr and "File too large" in result.stderr
    assert pq.read_table(out).num_rows == 40 and files_in(tmp_path) == ["v.epochs", "v.parquet"]


def test_a_report_that_cannot_be_written_leaves_the_run_to_resume(tmp_path):
    """The disk is full in the end; when there is room, --resume only writes."""
    root = write_folder(tmp_path / "images", 20)
    out, whole = tmp_path / "out" / "v.csv", tmp_path / "whole.csv"
    out.parent.mkdir()
    # Embeddings train a state that is smaller than the report of many rows.
    table = tmp_path / "e.parquet"
    make_embeddings(table, 3000)
    args = ["value", table, "--features-column", "e", "--epochs", 2, "--format", "csv"]
    result = run(*args, "-o", out, before=partial(limit_files, 400_000))
    assert result.returncode == 1 and "v.csv: cannot be written (File too large)" in result.stderr
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    assert files_in(out.parent) == ["v.checkpoint", "v.epochs"]
    assert invoke(*args, "-o", out, "--resume", "-q").exit_code == 0
    assert invoke(*args, "-o", whole, "-q").exit_code == 0
    assert out.read_bytes() == whole.read_bytes() and root.exists()


def make_embeddings(path, num_rows):
    rng = np.random.default_rng(0)
    labels = np.arange(num_rows) % 2
    vectors = rng.normal(size=(num_rows, 4)) + labels[:, None]
    pq.write_table(pa.table({"e": list(vectors.astype(np.float32)), "label": labels}), path)


def test_a_full_standard_output_is_an_error_of_one_line(image_folder, tmp_path):
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            command_line("value", image_folder, *FAST, "-q", "-o", "-"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
            cwd=tmp_path,
            # With it, nothing would be left to be written at the end of Python.
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        )
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "standard output: cannot be written (No space left on device)" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_output_folder_that_vanishes_is_made_anew(image_folder, tmp_path, monkeypatch):
    """What was in it is gone; the report comes all the same."""
    folder = tmp_path / "out"
    folder.mkdir()
    original = ReportWriter.write_epoch

    def write_epoch(self, epoch, signals, metadata):
        if epoch == 2:
            folder.rename(tmp_path / "elsewhere")
        original(self, epoch, signals, metadata)

    monkeypatch.setattr(ReportWriter, "write_epoch", write_epoch)
    assert invoke("value", image_folder, *FAST, "-q", "-o", folder / "v.parquet").exit_code == 0
    assert files_in(folder) == ["v.epochs", "v.parquet"]
    assert pq.read_table(folder / "v.parquet").num_rows == 40
    assert files_in(tmp_path / "elsewhere") == [
        ".v.checkpoint.lock", ".v.parquet.lock", "v.checkpoint", "v.epochs",
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["detect-noise", "select", "train"])
def test_an_output_folder_that_vanishes_under_another_command(command, image_folder, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    original = Trainer.records

    def records(self, *args):
        yield from original(self, *args)
        folder.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(Trainer, "records", records)
    more = ["--fraction", 0.5] if command == "select" else []
    result = invoke(command, image_folder, *FAST, *more, "-q", "-o", folder / "out.parquet")
    assert result.exit_code == 0, result.stderr
    assert files_in(folder) == ["out.parquet"]


def obeying_permissions(command):
    """Let a command run as somebody who may not write where permissions say so, even if that is root."""
    if os.geteuid() != 0:
        return command
    prefix = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if not shutil.which("setpriv") or subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("root writes into read-only folders, and cannot give that up here")
    return [*prefix, *command]


def make_read_only_before_scores(folder):
    def read_only(*args):
        Path(folder).chmod(0o500)
        return score_labels(*args)

    replace("chgval.tracker.score_labels", read_only)


def test_an_output_folder_that_becomes_read_only(image_folder, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    args = ["value", image_folder, *FAST, "-q", "-o", folder / "v.parquet"]
    code = (
        f"from {__name__} import make_read_only_before_scores; make_read_only_before_scores({str(folder)!r})"
    )
    code += "; from chgval.cli import main; main()"
    changed = obeying_permissions([sys.executable, "-c", code, *map(str, args)])
    result = subprocess.run(changed, capture_output=True, text=True, timeout=600)
    folder.chmod(0o700)
    assert_one_line(result, "v.parquet: cannot be written (Permission denied)")
    assert invoke(*args, "--resume").exit_code == 0
    assert {"v.epochs", "v.parquet"} <= set(files_in(folder))


def test_a_folder_for_outputs_or_temporary_files_that_is_read_only_is_told_before_all(image_folder, tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    table = tmp_path / "d.parquet"
    files = sorted(write_folder(tmp_path / "images", 4, size=90).glob("*/*.png"))
    pq.write_table(pa.table({"image": [file.read_bytes() for file in files], "label": [0, 1] * 4}), table)
    for source, out, temporary, said in (
        (image_folder, folder / "v.parquet", tmp_path, "v.parquet: cannot be written (Permission denied)"),
        (table, tmp_path / "v.parquet", folder, "images cannot be kept there"),
    ):
        args = ["value", source, *FAST, "--image-size", 90, "-q", "-o", out]
        # Python takes the next folder where it can write nothing into the one that TMPDIR names.
        code = f"import tempfile; tempfile.tempdir = {str(temporary)!r}; from chgval.cli import main; main()"
        changed = obeying_permissions([sys.executable, "-c", code, *map(str, args)])
        result = subprocess.run(changed, capture_output=True, text=True, timeout=600, cwd=tmp_path)
        assert_one_line(result, said)
        assert not out.exists()


def tidy_temporary_folder():
    training_batches = loader.DecodingLoader.training_batches

    def tidied(*args, **options):
        for copy in Path(tempfile.gettempdir()).glob("chgval-*/images"):
            copy.unlink()
        return training_batches(*args, **options)

    replace("chgval.data.loader.DecodingLoader.training_batches", tidied)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_temporary_copy_that_is_tidied_away_is_told(workers, tmp_path):
    """What was done so far is kept; --resume copies the images again. Nothing waits for the workers."""
    files = sorted(write_folder(tmp_path / "images", 12, size=90).glob("*/*.png"))
    table = pa.table({"image": [file.read_bytes() for file in files], "label": [0] * 12 + [1] * 12})
    pq.write_table(table, tmp_path / "d.parquet")
    args = ["value", tmp_path / "d.parquet", "--image-size", 70, "--workers", workers, *FAST, "-q"]
    args += ["-o", tmp_path / "v.parquet"]
    result = run(*args, before=tidy_temporary_folder, TMPDIR=str(tmp_path))
    message = "images cannot be kept there while they are used (No such file or directory)"
    assert_one_line(result, message)
    assert (tmp_path / "v.checkpoint").exists() and invoke(*args, "--resume").exit_code == 0
    assert set(pq.read_table(tmp_path / "v.parquet")["status"].to_pylist()) == {"valued"}


def test_a_terminal_that_is_gone_does_not_end_the_run(image_folder, tmp_path):
    """Without SIGHUP, as for a job that was disowned: nothing can be printed any more."""
    out = tmp_path / "v.parquet"
    terminal, other = pty.openpty()
    process = subprocess.Popen(
        command_line("value", image_folder, "--arch", "resnet8", "--epochs", 40, "-o", out),
        stderr=other,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(other)
    wait_for(tmp_path / "v.checkpoint", process)
    os.close(terminal)
    assert process.wait(timeout=600) == 0
    assert pq.read_table(out).num_rows == 40


def test_a_terminal_that_closes_ends_the_run_with_its_state_kept(image_folder, tmp_path):
    process, terminal = pty.fork()
    if process == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, command_line("value", image_folder, *LONG, "-o", tmp_path / "v.parquet"))
    deadline = time.monotonic() + 600
    while not (tmp_path / "v.checkpoint").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
        os.set_blocking(terminal, False)
        try:
            os.read(terminal, 65536)
        except BlockingIOError:
            continue
    os.close(terminal)  # the kernel sends SIGHUP
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert (tmp_path / "v.checkpoint").exists()


def test_ignored_signals_stay_ignored(image_folder, tmp_path):
    """As under nohup."""
    out = tmp_path / "v.parquet"
    args = ["value", image_folder, "--arch", "resnet8", "--epochs", 40, "-q", "-o", out]
    process = start(*args, before=partial(signal.signal, signal.SIGHUP, signal.SIG_IGN))
    wait_for(tmp_path / "v.checkpoint", process)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0 and out.exists()


def decode_with_workers(root, out):
    """Return the arguments for a run of large images."""
    return ["value", root, *FAST, "--image-size", 70, "--workers", 2, "-q", "-o", out]


def assert_one_line(result, message):
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr


def fill_shared_memory():
    def full(self):
        raise RuntimeError("No space left")

    replace("torch.Tensor.share_memory_", full)


def test_workers_need_no_shared_memory_and_no_sockets(tmp_path):
    """Containers have little of it; torch's sockets lie in the temporary folder, and have short names."""
    root, long = write_folder(tmp_path / "images", 12, size=90), tmp_path / ("t" * 100)
    long.mkdir()
    first, second, third = (decode_with_workers(root, tmp_path / f"{number}.parquet") for number in range(3))
    results = [
        run(*first),
        run(*second, before=fill_shared_memory),
        # Forked processes have the temporary folder of what they come from.
        subprocess.run(
            command_line(*third), capture_output=True, text=True, env={**os.environ, "TMPDIR": str(long)}
        ),
    ]
    assert [(result.returncode, result.stderr) for result in results] == 3 * [(0, "")]
    tables = [pq.read_table(tmp_path / f"{number}.parquet") for number in range(3)]
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])


def open_no_file_once_workers_run():
    starting_workers = loader.starting_workers

    @contextmanager
    def starting():
        with starting_workers():
            yield
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))

    replace("chgval.data.loader.starting_workers", starting)


def test_batches_that_cannot_be_opened_are_an_error_of_one_line(tmp_path):
    """Each of them is an open file, of which none is allowed any more once the workers run."""
    args = decode_with_workers(write_folder(tmp_path / "images", 12, size=90), tmp_path / "v.parquet")
    result = run(*args, before=open_no_file_once_workers_run)
    assert_one_line(result, "too many open files to hear from the processes that decode images")


def start_one_worker_only():
    launch, started = ForkProcess._Popen, []

    def full(process):
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(1)
        return launch(process)

    replace("multiprocessing.context.ForkProcess._Popen", staticmethod(full))


def test_workers_that_cannot_be_started_are_an_error_of_one_line(tmp_path):
    args = decode_with_workers(write_folder(tmp_path / "images", 12, size=90), tmp_path / "v.parquet")
    result = run(*args, before=start_one_worker_only)
    assert_one_line(result, "can be started (Resource temporarily unavailable); pass fewer --workers")


def kill_workers_in_a_step():
    step = Trainer._make_step

    def killing(self, *args):
        for worker in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(worker), signal.SIGKILL)
        time.sleep(0.5)
        return step(self, *args)

    replace("chgval.training.loop.Trainer._make_step", killing)


def test_a_worker_that_dies_is_an_error_of_one_line(tmp_path):
    """Whatever the main process does then, here a step."""
    root = write_folder(tmp_path / "images", 30, size=90)
    args = ["value", root, "--image-size", 70, "--workers", 1, "--batch-size", 4, *FAST, "-q"]
    result = run(*args, "-o", tmp_path / "v.parquet", before=kill_workers_in_a_step)
    assert_one_line(result, "a process that decodes images died")
    assert (tmp_path / "v.checkpoint").exists()


def test_images_that_disappear_or_change_during_a_run_are_told(tmp_path, monkeypatch):
    """Large images are read at each use: what is gone in the second epoch has values of the first alone."""
    root = write_folder(tmp_path / "images", 12, size=90)
    original = loader.DecodingLoader.training_batches
    epochs = []

    def training_batches(self, *args, **options):
        epochs.append(1)
        if len(epochs) == 2:
            (root / "cat" / "003.png").unlink()
            (root / "dog" / "004.png").write_bytes(b"")
        return original(self, *args, **options)

    monkeypatch.setattr(loader.DecodingLoader, "training_batches", training_batches)
    result = invoke("value", root, "--image-size", 70, "--workers", 0, *FAST, "-o", tmp_path / "v.parquet")
    assert result.exit_code == 0
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "v.parquet").to_pylist()}
    assert len(rows) == 24
    assert rows["cat/003.png"]["status"] == rows["dog/004.png"]["status"] == "unreadable"
    assert rows["cat/003.png"]["reason"] == "No such file or directory"
    assert rows["dog/004.png"]["reason"] == "empty file"
    assert "2 of 24 samples could not be read" in result.stderr


def test_a_parquet_file_that_changes_after_it_was_read_does_not_matter(tmp_path):
    """Whatever the size of the images: they are copied when the run starts."""
    root = write_folder(tmp_path / "images", 12, size=90)
    files = sorted(root.glob("*/*.png"))
    table = pa.table(
        {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
            "label": [file.parent.name for file in files],
        }
    )
    source, out = tmp_path / "d.parquet", tmp_path / "v.parquet"
    pq.write_table(table, source)
    args = ["value", source, "--image-size", 70, "--workers", 0, "--arch", "resnet8", "--epochs", 30, "-q"]
    process = start(*args, "-o", out)
    wait_for(tmp_path / "v.checkpoint", process)
    os.truncate(source, 100)
    assert process.wait() == 0
    assert set(pq.read_table(out)["status"].to_pylist()) == {"valued"}


def hold_no_image_in_memory_nor_on_disk():
    limit_files(50_000)
    replace("chgval.data.decode_once.MEMORY_BYTES", 0)


def test_a_temporary_folder_that_is_full_is_told(tmp_path):
    """Decoded images go there that memory should not hold, and copies of large ones in Parquet files."""
    table = tmp_path / "d.parquet"
    files = sorted(write_folder(tmp_path / "images", 4, size=90).glob("*/*.png"))
    pq.write_table(pa.table({"image": [file.read_bytes() for file in files], "label": [0, 1] * 4}), table)
    for size in (64, 90):
        args = ["value", table, *FAST, "--image-size", size, "-q", "-o", tmp_path / "v.parquet"]
        result = run(*args, before=hold_no_image_in_memory_nor_on_disk)
        assert result.returncode == 1 and "set TMPDIR to a larger folder" in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def no_device_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_host_memory(*_):
    torch.empty(2**55, dtype=torch.uint8)


def no_memory_for_an_array(*_):
    np.ones(2**55, dtype=np.uint8)


@pytest.mark.parametrize(
    ("observe_average", "said"),
    [
        (no_device_memory, "CUDA out of memory."),
        (no_host_memory, "can't allocate memory"),
        (no_memory_for_an_array, "Unable to allocate"),
    ],
)
def test_out_of_memory_outside_of_steps_is_an_error_of_one_line(
    observe_average, said, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(value, "observe_average", observe_average)
    result = invoke("value", image_folder, *FAST, "-q", "-o", tmp_path / "v.parquet")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "out of memory (" in result.stderr and said in result.stderr
    assert (tmp_path / "v.checkpoint").exists()

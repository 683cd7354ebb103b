"""Files lie on the disk before they get their names: what a power cut would show, and no kill does."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from chgval.files import replacing
from tests.commands import invoke
from tests.pictures import write_folder


def test_a_file_is_forced_to_the_disk_before_it_gets_its_name_and_its_folder_after(monkeypatch, tmp_path):
    calls = []
    fsync, replace = os.fsync, Path.replace

    def noting_fsync(descriptor):
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def noting_replace(self, target):
        calls.append(("name", self, target))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    with replacing(tmp_path / "out") as file:
        file.write(b"whole")
        assert not (tmp_path / "out").exists()
    part = tmp_path / ".out.part"
    assert calls == [("fsync", part), ("name", part, tmp_path / "out"), ("fsync", tmp_path)]


def test_all_that_a_run_leaves_is_forced_to_the_disk(monkeypatch, tmp_path):
    """All but copied images, which the system is left to write when it likes."""
    forced = set()
    fsync = os.fsync

    def noting(descriptor):
        forced.add(identity(os.fstat(descriptor)))
        fsync(descriptor)

    def identity(status):
        return status.st_ino, status.st_size, status.st_mtime_ns

    monkeypatch.setattr(os, "fsync", noting)
    root = write_folder(tmp_path / "images", 6)
    images = [file.read_bytes() for file in sorted(root.glob("*/*.png"))]
    pq.write_table(pa.table({"image": images, "label": [0] * 6 + [1] * 6}), tmp_path / "d.parquet")
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    for number, source in enumerate((root, tmp_path / "d.parquet")):
        args = ["detect-noise", source, "--arch", "resnet8", "--epochs", 2, "-q", "--expected-noise", 0.3,
                "-o", outputs / f"s{number}.csv", "--values", outputs / f"v{number}.parquet",
                "--cleaned", outputs / f"clean{number}", "--relabel", 0]  # fmt: skip
        result = invoke(*args)
        assert result.exit_code == 0, result.stderr
    left = [path for path in outputs.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert {path.name for path in left} >= {"relabelled.csv", "train-00000-of-00001.parquet", "s0.csv"}
    assert [path for path in left if identity(path.stat()) not in forced] == []

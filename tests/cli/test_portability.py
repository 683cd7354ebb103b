"""Systems that lack what Linux has: a command runs with these names taken away."""

import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from tests.pictures import write_folder

# What Windows, and in part macOS, does not have.
WITHOUT = """
import os, signal, sys
sys.modules["resource"] = None
for module, names in {
    signal: ["SIGHUP", "pthread_sigmask", "pthread_kill"],
    os: ["preadv", "pwrite", "pread", "fork", "sched_getaffinity", "sysconf"],
}.items():
    for name in names:
        delattr(module, name)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["value", "IMAGES", "--epochs", "1", "-o", "out.parquet"],
        ["value", "IMAGES", "--plan"],
        ["value", "LARGE", "--image-size", "70", "--epochs", "1", "--workers", "1", "-o", "out.parquet"],
    ],
)
def test_a_command_runs_without_what_other_systems_lack(arguments, image_folder, tmp_path, monkeypatch):
    large = write_folder(tmp_path / "large", 8, size=90)
    monkeypatch.chdir(tmp_path)
    arguments = [{"IMAGES": str(image_folder), "LARGE": str(large)}.get(word, word) for word in arguments]
    # torch itself asks for SIGCHLD where it starts workers, unless the system is Windows. A worker is started
    # anew: all that it works on must be sent.
    without = WITHOUT if "--workers" in arguments else f"{WITHOUT}\ndel signal.SIGCHLD"
    script = tmp_path / "run.py"
    script.write_text(
        f"{without}\nfrom chgval.cli import main\n"
        f"if __name__ == '__main__':\n    sys.argv = ['chgval', *{arguments!r}]\n    main()\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    if "-o" in arguments:
        table = pq.read_table("out.parquet")
        assert table["value"].null_count == 0 and table.num_rows in (16, 40)
    else:
        assert "memory" in result.stderr and "on the host" not in result.stderr

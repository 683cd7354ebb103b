"""Run chgval: inside of the tests, in a process forked from one that has imported it, or from its start.

A forked process is one like any other to the system, with its own signals, limits and memory, and is there in
a tenth of a second, where Python takes seconds to import all that a run needs.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from click.testing import Result
from typer.testing import CliRunner

from chgval.cli import app, main

FORKS = multiprocessing.get_context("forkserver")
# What commands import when they are called, and what holds functions to call before them.
RUNS = [f"chgval.runs.{name}" for name in ("detect_noise", "select", "train", "value")]
FORKS.set_forkserver_preload(["filelock", "pytest", "sklearn.isotonic", "tests.commands", *RUNS])


def invoke(*args: object, **options: Any) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, list(map(str, args)), **options)


def command_line(*args: object) -> list[str]:
    """Return what starts a command from nothing."""
    return [sys.executable, "-m", "chgval", *map(str, args)]


class Forked:
    """A command in a forked process that leads a session of its own; used as a `subprocess.Popen` is."""

    def __init__(self, args: tuple[object, ...], before: Callable[[], None] | None, **environment: str):
        self._said = tempfile.TemporaryDirectory()
        self._paths = [Path(self._said.name, name) for name in ("stdout", "stderr")]
        self._process = FORKS.Process(
            target=_become,
            args=(list(map(str, args)), before, self._paths, {**os.environ, **environment}),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 600) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("chgval", timeout)
        return code

    def communicate(self, timeout: float = 600) -> tuple[bytes, str]:
        self.wait(timeout)
        stdout, stderr = (path.read_bytes() if path.exists() else b"" for path in self._paths)
        return stdout, stderr.decode()

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()


def start(*args: object, before: Callable[[], None] | None = None, **environment: str) -> Forked:
    """Start a command; before it, call a function of a module, which may replace some of the program."""
    return Forked(args, before, **environment)


def run(
    *args: object, before: Callable[[], None] | None = None, **environment: str
) -> subprocess.CompletedProcess[Any]:
    """Run a command as `start` does, to its end; return standard output as bytes and the rest as text."""
    process = start(*args, before=before, **environment)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(list(args), process.wait(), stdout, stderr)


def imported_by(arguments: list[str], code: int = 0, *, until: str = "") -> set[str]:
    """Run a command in a process of its own, which must end with that code; return what it loaded.

    Args:
        arguments: of the command.
        code: that it ends with.
        until: function, by its dotted path, that ends it when it is called.
    """
    ends = f"from unittest import mock\nmock.patch({until!r}, side_effect=SystemExit({code})).start()\n"
    program = (
        f"import sys\n{ends if until else ''}from chgval.cli import app\n"
        f"try: app({arguments!r})\n"
        f"except SystemExit as end: assert (end.code or 0) == {code}, end.code\n"
        "print('loaded', *sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stderr.rpartition("loaded")[2].split())


def replace(target: str, new: object) -> None:
    """Replace a part of the program, named by its dotted path, which must be there; for the whole process."""
    mock.patch(target, new).start()


def wait_for(path: Path, process: Forked | subprocess.Popen[str]) -> None:
    """Wait until a process has made a file."""
    deadline = time.monotonic() + 600
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def _become(
    args: list[str], before: Callable[[], None] | None, paths: list[Path], environment: Mapping[str, str]
) -> None:
    os.setsid()
    for descriptor, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # as the environment says
    sys.argv = ["chgval", *args]
    if before:
        before()
    main()

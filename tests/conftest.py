"""What holds for all tests, and a folder of images that most of them use."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import write_folder

# Libraries that could reach for a network must not, and output must not depend on who runs the tests.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", NO_COLOR="1", COLUMNS="80", TERM="dumb")
os.environ.pop("FORCE_COLOR", None)
# Models of tests are so small that threads only wait for each other, and as many tests run at a time as there
# are cores. Set before torch is loaded, and inherited by what tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# What tests start would ignore what is ignored here, as under nohup; handlers it does not inherit.
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, lambda *_: None)


@pytest.fixture(autouse=True)
def nothing_runs_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kill what a test that failed has left running, as it would slow all others."""
    started = []

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    yield
    for forked in multiprocessing.active_children():
        forked.kill()
        forked.join()
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 PNG images of 12 x 12 pixels in two class folders."""
    return write_folder(tmp_path_factory.mktemp("data") / "images")

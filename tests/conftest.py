"""Tiny datasets, made by the programs that people make theirs with."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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

CLASS_NAMES = ["cat", "dog"]
PIXELS = 12


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


def imported_by(arguments: list[str]) -> set[str]:
    """Run a command in a process of its own, which must succeed; return the modules that it loaded."""
    code = (
        "import sys\nfrom chgval.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stderr.split())


def make_image(label: int, seed: int, size: int = PIXELS) -> Image.Image:
    """Noise that is brighter at the top for class 0 and at the bottom for class 1."""
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 120, (size, size, 3))
    half = slice(None, size // 2) if label == 0 else slice(size // 2, None)
    array[half] += 120
    return Image.fromarray(array.astype(np.uint8))


def make_blobs(seed: int, size: int) -> Image.Image:
    """A picture of random blobs, smooth as photographs are, that no other resembles."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (9, 9, 3)).astype(np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def write_folder(root: Path, per_class: int = 20, size: int = PIXELS) -> Path:
    for label, name in enumerate(CLASS_NAMES):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            make_image(label, 1000 * label + number, size).save(root / name / f"{number:03d}.png")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 PNG images of 12 x 12 pixels in two class folders."""
    return write_folder(tmp_path_factory.mktemp("data") / "images")

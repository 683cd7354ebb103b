"""What the README tells people to type, in its order, in one folder."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.commands import run
from tests.pictures import write_folder

README = (Path(__file__).parent.parent / "README.md").read_text()
INSTALLS = [
    "pip install .",
    "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu",
    "pip install .[dev] && pytest -n auto --dist loadfile",
]


def commands():
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    # What a shell takes for a comment, so that words behind it are none of a command.
    return [" ".join(shlex.split(line, comments=True)) if "|" not in line else line for line in lines]


def write_data(root):
    """Everything that the README names: a folder, tables of it, embeddings, and labels of two annotators."""
    photos = write_folder(root / "photos", 24)
    write_folder(root / "more-photos", 6)
    paths = sorted(photos.glob("*/*"))
    labels = [path.parent.name for path in paths]
    with (root / "train.csv").open("w", newline="") as file:
        rows = ((str(path.relative_to(photos)), path.parent.name) for path in paths)
        csv.writer(file).writerows([("file_name", "label"), *rows])
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    pq.write_table(pa.table({"image": images, "label": labels}), root / "shards.parquet")
    vectors = np.random.default_rng(0).normal(size=(48, 8)).astype(np.float32)
    vectors[24:] += 1
    np.save(root / "embeddings.npy", vectors)
    pq.write_table(pa.table({"embedding": list(vectors), "label": labels}), root / "embeddings.parquet")
    decided = [["id", "label_name", "decision", "new_label_name"], ["cat/000.png", "cat", "drop", ""]]
    with (root / "photos.decisions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(decided)
    crowd = {"image": images, "ann": labels, "bob": [*labels[:-1], labels[0]]}
    pq.write_table(pa.table(crowd), root / "crowd.parquet")


def test_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch):
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    shell = f'chgval() {{ {shlex.quote(sys.executable)} -m chgval "$@"; }}; set -o pipefail; '
    typed = commands()
    # The first shows what the program is about; it is typed again further down.
    assert [line for line in typed if line.startswith("pip")] == INSTALLS
    typed = [line for line in typed[1:] if not line.startswith("pip")]
    assert len(typed) > 15
    for line in typed:
        if "|" in line:
            result = subprocess.run(["bash", "-c", shell + line], capture_output=True, text=True)
            # `sort` is told when `head` has seen enough.
            assert result.returncode in ((0, 141) if "| head" in line else (0,)), (line, result.stderr)
        else:
            done = run(*shlex.split(line)[1:])
            assert done.returncode == 0, (line, done.stderr)
    [block] = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})  # noqa: S102 (our own)
    for name in re.findall(r"(?:leaves|^|\s)`?(photos\.\w+\.parquet|digits\.values\.parquet)", README):
        assert Path(name).is_file(), name
    assert len(Path("kept.txt").read_text().splitlines()) == round(0.3 * 48)
    assert Path("photos.report.html").is_file() and len(list(Path("photos.corrected").glob("*/*.png"))) == 47
    assert len(list(Path("pruned").glob("*/*.png"))) == 24 and Path("photos.trained/training.json").is_file()

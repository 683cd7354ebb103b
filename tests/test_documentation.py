"""What the documentation names is there, and what it tells people to type runs."""

import csv
import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import chgval
from chgval.reports import tables
from tests.commands import run
from tests.pictures import write_folder

ROOT = Path(__file__).parent.parent


def test_every_promise_names_tests_that_exist():
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    page = (ROOT / "docs" / "reliability.md").read_text()
    table = page.split("## What becomes of what")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 30
    for row in rows[1:]:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and set(named) <= defined, row


def test_links_inside_the_documentation_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_examples_of_the_python_page_run(tmp_path, monkeypatch):
    """Block by block, in one folder; those of other libraries are tested in tests/unit/test_tracker.py."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), {})  # noqa: S102 (our own)
    assert {path.name for path in tmp_path.iterdir()} == {"values.parquet", "tracked.parquet"}


def columns_shown(kind):
    rows = "".join(
        f"| `{column.name}` | {column.kind} | {column.about} |\n"
        for column in getattr(tables, f"{kind}_COLUMNS")
    )
    return f"<!-- columns: {kind} -->\n\n| column | type | meaning |\n|---|---|---|\n{rows}\n<!-- end -->"


@pytest.mark.parametrize("name", ["reports.md", "selection.md"])
def test_columns_are_described_as_the_schemas_say(name):
    """To renew the tables: CHGVAL_WRITE_DOCS=1 pytest tests/test_documentation.py"""
    path = ROOT / "docs" / name
    page = path.read_text()
    shown = re.sub(
        r"<!-- columns: (\w+) -->.*?<!-- end -->",
        lambda found: columns_shown(found[1]),
        page,
        flags=re.DOTALL,
    )
    if os.environ.get("CHGVAL_WRITE_DOCS"):
        path.write_text(shown)
        page = shown
    assert page == shown


def recipes():
    page = (ROOT / "docs" / "recipes.md").read_text()
    return re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("library", "recipe"), recipes())
def test_recipes_run(library, recipe, tmp_path, monkeypatch):
    pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos", 12)
    chgval.value("photos", epochs=1, arch="resnet8", output="photos.values.parquet")
    rng = np.random.default_rng(0)
    table = {"embedding": rng.normal(size=(40, 4)).tolist(), "label": [n % 2 for n in range(40)]}
    pq.write_table(pa.table(table), "embeddings.parquet")
    names: dict[str, object] = {}
    exec(compile(recipe, "docs/recipes.md", "exec"), names)  # noqa: S102 (our own)
    match library:
        case "cleanlab":
            assert len(names["theirs"]) == 24
        case "datasets":
            assert len(names["clean"]) <= len(names["dataset"]) == 24
        case "polars":
            assert (names["worst"]["noise_score"] > 0.5).all()
        case _:
            assert len(names["report"]) == 40


def test_all_python_of_the_recipes_is_tested():
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert page.count("```python") == len(recipes()) == 5


def test_every_table_is_described():
    pages = (ROOT / "docs/reports.md").read_text() + (ROOT / "docs/selection.md").read_text()
    kinds = {name.removesuffix("_COLUMNS") for name in vars(tables) if name.endswith("_COLUMNS")}
    assert kinds == set(re.findall(r"<!-- columns: (\w+) -->", pages))


def test_the_site_has_every_page():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


@pytest.mark.parametrize("module", ["api", "tracker", "reports.report", "detection.issues"])
def test_examples_in_docstrings_run(module):
    failed, tried = doctest.testmod(importlib.import_module(f"chgval.{module}"))
    assert tried and not failed


def test_functions_that_the_method_names_are_there():
    """As `valuation.closed_form.chg_values`, in the table of equations."""
    page = (ROOT / "docs" / "method.md").read_text()
    named = re.findall(r"`((?:valuation|training|detection)\.[\w.]+)`", page)
    assert len(named) >= 5
    for name in named:
        parts = name.split(".")
        found = importlib.import_module(f"chgval.{parts[0]}.{parts[1]}")
        for part in parts[2:]:
            found = getattr(found, part)


def test_versions_that_are_told_are_one():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {chgval.__version__}\n" in citation


# --- what the README tells people to type, in its order, in one folder

README = (ROOT / "README.md").read_text()
INSTALLS = [
    "pip install .",
    "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu",
    "pip install .[dev] && pytest -n auto --dist loadfile",
]


def commands_of_the_readme():
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
    typed = commands_of_the_readme()
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

"""What the documentation names is there."""

import doctest
import importlib
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import chgval
from chgval.reports import tables
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

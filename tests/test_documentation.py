"""What the documentation names is there."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import chgval
from chgval.reports.tables import (
    DECISIONS_SCHEMA,
    EPOCH_SCHEMA,
    LABELS_SCHEMA,
    MANIFEST_SCHEMA,
    SUSPECTS_SCHEMA,
    VALUES_SCHEMA,
)

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
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"):
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


def test_the_columns_of_reports_are_all_described():
    page = "".join((ROOT / "docs" / name).read_text() for name in ("reports.md", "selection.md"))
    for table in (
        VALUES_SCHEMA,
        EPOCH_SCHEMA,
        SUSPECTS_SCHEMA,
        MANIFEST_SCHEMA,
        DECISIONS_SCHEMA,
        LABELS_SCHEMA,
    ):
        for name in table.names:
            assert f"`{name}`" in page, name


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

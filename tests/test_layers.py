"""Imports inside chgval point one way: to lower layers only."""

import ast
import re
import tomllib
from pathlib import Path

import chgval

PACKAGE = Path(chgval.__file__).parent

# A module may import from lower layers only; modules of one layer do not import each other, except within
# the package data/, which is one room.
LAYERS = [
    {"errors", "types", "system", "registry"},
    {"files", "spreadsheets", "interruption"},
    {"config"},
    {"settings"},
    {"settings_file"},
    {"valuation"},
    {"detection"},
    {"data", "reports"},
    {"training"},
    {"progress"},
    {"tracker"},
    {"runs", "integrations"},
    {"api"},
    {"cli"},
    {"__main__"},
]


def module_name(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("chgval."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "chgval":
            yield from (alias.name for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("chgval."))


def test_every_module_has_a_layer_and_imports_downwards():
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for path in PACKAGE.rglob("*.py"):
        name = module_name(path)
        if name == "__init__":
            continue
        assert name in level, f"{path.name} has no layer"
        for imported in imported_names(path):
            assert imported == name or level[imported] < level[name], f"{name} imports {imported}"


def test_the_program_never_names_ground_truth_columns():
    """Clean labels are for measuring; nothing in the package may read them."""
    for path in PACKAGE.rglob("*.py"):
        assert "clean_label" not in path.read_text(), path


def test_the_map_for_contributors_is_that_of_the_layers():
    """Every room is in the table, in the order of the layers; every module that it names is there."""
    page = (PACKAGE.parent / "docs" / "contributing.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", page, re.MULTILINE)
    rooms = [
        [name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([\w./]+)`", row)]
        for row, _ in rows
    ]
    ranks = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    told = [name for row in rooms for name in row]
    assert sorted(told) == sorted(set(ranks) - {"__main__"})
    assert [ranks[name] for name in told] == sorted(ranks[name] for name in told)
    for (row, text), names in zip(rows, rooms, strict=True):
        for module in re.findall(r"`([\w/]+(?:\.py|/))`", text):
            places = [PACKAGE / name / module for name in names] + [PACKAGE / module]
            assert any(place.exists() for place in places), f"{row}: {module}"


def test_ci_tries_the_oldest_versions_that_are_allowed():
    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    oldest = dict(re.split(">=", requirement) for requirement in project["dependencies"])
    lines = (root / ".ci" / "lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned.keys() == oldest.keys()
    for name, version in pinned.items():
        assert version.removesuffix(".0").removesuffix(".0") == oldest[name].removesuffix(".0"), name

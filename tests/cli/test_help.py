"""The command line as a contract: its help, its documentation, its start-up and its completion."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import chgval
from chgval.cli import app
from tests.commands import imported_by, invoke

PAGES = Path(__file__).parents[2] / "docs" / "commands"
NAMES = [
    *("value", "detect-noise", "detect-issues", "select", "train"),
    *("report", "apply", "embed", "merge", "compare"),
]
COMMANDS = [[], *([name] for name in NAMES)]


def help_of(command, option="--help-all"):
    """The help at 80 columns, as `COLUMNS=80 chgval COMMAND --help-all` prints it."""
    result = CliRunner().invoke(app, [*command, option if command else "--help"], prog_name="chgval")
    assert result.exit_code == 0
    return result.stdout


def page_of(command):
    title = " ".join(["chgval", *command])
    about = (
        "The help of the command, as it prints it. `--help` alone shows the options that most people need."
    )
    if not command:
        listed = "".join(f"- [`chgval {name}`]({name}.md)\n" for name in NAMES)
        return f"# Command line\n\n```text\n{help_of([])}```\n\n{listed}"
    return f"# `{title}`\n\n{about}\n\n```text\n{help_of(command)}```\n"


@pytest.mark.skipif(
    not typer.__version__.startswith("0.29."), reason="other versions of typer lay out help in other ways"
)
@pytest.mark.parametrize("command", COMMANDS)
def test_pages_of_commands_are_the_help_itself(command):
    """A changed option shows here. To renew the pages: CHGVAL_WRITE_DOCS=1 pytest tests/cli/test_help.py"""
    path = PAGES / f"{command[0] if command else 'index'}.md"
    if os.environ.get("CHGVAL_WRITE_DOCS"):
        path.write_text(page_of(command))
    assert path.read_text() == page_of(command)


def test_every_command_has_a_page():
    shown = {command.name for command in app.registered_commands if not command.hidden}
    assert shown == set(NAMES) and {path.stem for path in PAGES.iterdir()} == {*NAMES, "index"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_shows_examples(command):
    text = help_of(command)
    assert max(map(len, text.splitlines())) <= 80
    assert f"chgval {' '.join(command) or 'value'} " in text.split("Usage:")[1].split("\n", 1)[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_short_help_is_a_screen_of_options_that_the_whole_help_has(command):
    short = help_of(command, "--help")
    assert len(short.splitlines()) <= 35 and max(map(len, short.splitlines())) <= 80
    for name in re.findall(r"^  (?:-\w, )?(--[\w-]+)", short, re.MULTILINE):
        assert name in help_of(command) or name == "--help", name


def test_help_groups_every_option_of_value():
    sections = [line for line in help_of(["value"]).splitlines() if line and not line.startswith(" ")]
    assert sections[1:] == ["Arguments:", "Values:", "Output:", "Data:", "Model and training:", "Options:"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["value", "--help"], ["detect-noise", "--help"], ["--version"]]
)
def test_starting_up_imports_no_heavy_library(arguments):
    heavy = {"torch", "torchvision", "numpy", "pyarrow", "sklearn", "scipy", "PIL"}
    assert not heavy & imported_by(arguments)


def test_a_run_loads_nothing_that_it_does_not_need_before_it_trains(image_folder, tmp_path):
    """torchvision takes longer to load than torch; its networks are the only ones that need it."""
    unneeded = {"torchvision", "torch._dynamo", "sympy", "sklearn", "scipy", "pandas", "matplotlib"}
    for source in ("builtin:digits", str(image_folder)):
        words = ["value", source, "-q", "-o", str(tmp_path / "v.parquet"), "--overwrite"]
        assert not unneeded & imported_by(words, until="chgval.runs.value.train_to_end")


@pytest.mark.parametrize("command", ["value", "detect-noise", "select --fraction 0.5", "train"])
@pytest.mark.parametrize(
    ("source", "out"), [("absent", "new.csv"), ("here", "old.csv"), ("here", "no/x.csv")]
)
def test_mistakes_in_paths_are_told_before_anything_large_is_loaded(command, source, out, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "old.csv").write_text("of before")
    arguments = [*command.split(), str(tmp_path / source), "-o", str(tmp_path / out)]
    large = {"torch", "numpy", "pyarrow", "PIL"}
    assert not large & imported_by(arguments, code=1)


def test_version_is_that_of_the_package():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"chgval {chgval.__version__}\n"


def complete(words):
    """What bash would be offered for the last word."""
    environment = {
        **os.environ, "_CHGVAL_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1),
    }  # fmt: skip
    script = "import sys; sys.argv[0] = 'chgval'; from chgval.cli import app; app(prog_name='chgval')"
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    return result.stdout.split()


def test_shell_completion_offers_commands_options_and_models():
    assert complete(["chgval", "va"]) == ["value"]
    assert {"--arch", "--augment"} <= set(complete(["chgval", "value", "--a"]))
    assert complete(["chgval", "value", "x", "--mode", "on"]) == ["online"]
    assert complete(["chgval", "detect-noise", "x", "--threshold", "c"]) == ["chg", "confident"]
    assert {"resnet8", "resnet18", "resnet20"} <= set(complete(["chgval", "value", "x", "--arch", "resnet"]))


def test_the_installed_script_and_the_module_are_the_same_program():
    module = subprocess.run([sys.executable, "-m", "chgval", "--version"], capture_output=True, text=True)
    script = Path(sys.executable).with_name("chgval")
    if not script.exists():
        pytest.skip("chgval is not installed as a script in this environment")
    installed = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert installed.stdout == module.stdout == f"chgval {chgval.__version__}\n"


def test_a_pattern_that_the_shell_has_expanded_is_told_in_a_line():
    result = invoke("value", *(f"photos/{number}.png" for number in range(200)), "--epochs", "2")
    assert result.exit_code == 2
    told = "value takes no photos/1.png, photos/2.png, photos/3.png, ... besides. Quote patterns"
    assert told in result.stderr and len(result.stderr) < 400
    assert "No such option: --epoch" in invoke("value", "photos/", "--epochz", "2").stderr
    assert invoke("merge", "a.parquet", "b.parquet", "-o", "c.parquet").exit_code == 1  # takes several

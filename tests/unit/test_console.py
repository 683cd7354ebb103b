"""Tables for people: numbers whole, names as long as there is room."""

import io
import re
import sys

import pytest
from rich.cells import cell_len

from chgval.cli.console import Console, fit, share_room

ROWS = [
    ("-1.200e-01", "American_pit_bull_terrier", "American_pit_bull_terrier/American_pit_bull_003.jpg"),
    ("-1.100e-01", "猫", "猫/ファイル_004.jpg"),
]
SIDES = {"value": "right", "label": "left", "id": "left"}


def printed(monkeypatch, *, columns=None, encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stderr", stream)
    if columns:
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
    console = Console()
    console.table("Lowest values", SIDES, ROWS)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_on_a_terminal_numbers_are_whole_and_names_keep_their_ends(columns, monkeypatch):
    lines = printed(monkeypatch, columns=columns)
    assert len(lines) == 5 and all(cell_len(line) <= columns for line in lines)
    for line, row in zip(lines[3:], ROWS, strict=True):
        assert line.startswith(row[0]) and line.endswith(row[2][-5:])


def test_in_a_file_names_are_whole(monkeypatch):
    lines = printed(monkeypatch)
    for line, row in zip(lines[3:], ROWS, strict=True):
        assert line.split() == list(row)


def test_names_of_wide_characters_fill_their_cells():
    for text in ("猫" * 20, "a猫" * 10, "short", "x" * 50):
        for width in range(8, 45):
            assert cell_len(fit(text, width)) == width
    assert fit("abcdefghijklmnopqrst", 10) == "abc…opqrst"


@pytest.mark.parametrize("room", [20, 40, 70, 200])
def test_the_widest_name_gives_way_first(room):
    shared = share_room([10, 30, 60], room)
    assert sum(shared) == min(max(room, 24), 100)
    assert shared == sorted(shared) and (shared[0] == 10 or max(shared) - min(shared) <= 1)


@pytest.mark.parametrize("columns", [40, 60])
def test_prose_breaks_at_spaces_and_commands_nowhere(columns, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "interrupted after epoch 3 of 30; pass --resume to resume it where it was, with the same values"
    command = f"chgval select {'x' * 70}.parquet --fraction 0.5"
    console = Console()
    console.warn(text)
    console.say_next(command)
    stream.flush()
    escapes = re.compile(r"\x1b\[[0-9;]*m")
    lines = [escapes.sub("", line) for line in stream.buffer.getvalue().decode().splitlines()]
    assert lines[-1] == f"next: {command}"
    assert all(cell_len(line) <= columns for line in lines[:-1])
    words = " ".join(line.strip() for line in lines[:-1]).split()
    assert words == ["warning:", *text.split()]


def test_settings_are_in_two_columns_whose_names_alone_are_bold(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console = Console()
    console.settings([("data", "photos/: 10,000 rows, 10,000 usable, 10 classes, 32 px"), ("time", "2 min")])
    console.fail("none")
    stream.flush()
    written = stream.buffer.getvalue().decode()
    bold = re.findall(r"\x1b\[1(?:;\d+)?m(.*?)\x1b\[0m", written)
    assert [text.strip() for text in bold if text.strip()] == ["data", "time", "error:"]
    lines = re.sub(r"\x1b\[[0-9;]*m", "", written).splitlines()
    assert [line[:6] for line in lines[:-1]] == ["data  ", "      ", "time  "]
    assert " ".join(line[6:].strip() for line in lines[:2]).endswith("usable, 10 classes, 32 px")
    assert all(len(line) <= 40 for line in lines)

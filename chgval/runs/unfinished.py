"""Unfinished runs: where a command keeps them, and which outputs are theirs."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chgval import progress
from chgval.config import (
    DetectConfig,
    OutputConfig,
    SelectConfig,
    TrainingConfig,
    ValueConfig,
    free_settings,
    option_of,
)
from chgval.errors import OutputError, SettingsError
from chgval.files import locked, output_errors
from chgval.interruption import Interrupted
from chgval.runs.state_file import read_header, reading

# Names of the runs that a command may consist of, after the first one: those with threshold samples.
LATER_RUNS = ("threshold-1", "threshold-2")

ResumableConfig = ValueConfig | DetectConfig | SelectConfig | TrainingConfig


class Unfinished:
    """Where a command keeps the state of its runs until all that comes of them is written.

    Args:
        command: its name.
        settings: of the command, beyond those of its runs, by name.
        path: a file; None keeps nothing.
        outputs: files and folders that the command writes.
        before: what the state tells of the run that is there, if the user wants to resume it.
        overwrite: whether the user lets outputs be replaced.
    """

    def __init__(
        self,
        command: str = "",
        settings: Mapping[str, Any] | None = None,
        path: Path | None = None,
        outputs: Sequence[Path] = (),
        before: Mapping[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        self.command = command
        self.settings = settings or {}
        self.resumes = before is not None
        # Whether a state is there that this command can be resumed from.
        self.is_kept = self.resumes
        named_before = [] if before is None else [str(output) for output in before["outputs"]]
        self.outputs = sorted({*named_before, *(str(output.absolute()) for output in outputs)})
        self.overwrites = overwrite or (before is not None and bool(before["overwrites"]))
        self._path = path
        # Nothing is written before the (first) run has ended.
        self._is_over = before is not None and bool(before["is_over"])
        self._own = set(named_before if self._is_over or self.overwrites else ())

    def file(self, name: str) -> Path | None:
        """Return where the run of that name is kept, if it is."""
        path = self._path
        return path if path is None or not name else path.with_name(f"{path.stem}.{name}{path.suffix}")

    def is_own(self, path: Path) -> bool:
        """Say whether the resumed run has written what is under that name, or may replace it."""
        return str(path.absolute()) in self._own

    def may_have_written(self, folder: Path) -> bool:
        """Say whether the resumed run had come to write a folder: none is ever replaced."""
        return self._is_over and self.is_own(folder)

    def replaceable(self, output: OutputConfig) -> OutputConfig:
        """Return an output as it is to be checked: what the run itself has written may be replaced."""
        own = not output.to_stdout and self.is_own(Path(output.path))
        return dataclasses.replace(output, overwrite=output.overwrite or own)

    def remove(self) -> None:
        """Delete the states, once there is nothing to resume."""
        self._remove("", *LATER_RUNS)

    def remove_later(self) -> None:
        """Delete those of later runs, which an earlier command may have left, before the first one starts."""
        self._remove(*LATER_RUNS)

    def _remove(self, *names: str) -> None:
        for name in names:
            path = self.file(name)
            if path is not None:
                with output_errors(path):
                    path.unlink(missing_ok=True)


@contextmanager
def unfinished_run(command: str, config: ResumableConfig) -> Iterator[Unfinished]:
    """Look for a run to resume (`find_unfinished`), and delete its state once the block has ended.

    What the command writes is locked meanwhile. Where it is interrupted, the message says how to resume.

    Raises:
        OutputError: another run holds one of the outputs, or two are the same.
    """
    found: list[Unfinished] = []
    try:
        with locked(*config.outputs, config.state_file):
            found.append(find_unfinished(command, config))
            yield found[0]
            found[0].remove()
    except Interrupted as interruption:  # outermost: a second signal may come while outputs are let go of
        if not found or not found[0].is_kept:
            raise
        message = f"interrupted; what was done so far is kept in {config.state_file}; {_how_to_resume()}"
        raise Interrupted(interruption.signum, message) from interruption


def find_unfinished(command: str, config: ResumableConfig) -> Unfinished:
    """Look for a run to resume.

    Args:
        command: its name.
        config: its settings.
    Raises:
        OutputError: there is one, and the user did not say what to do with it.
        DataError: its state cannot be read.
        SettingsError: there can be none.
    """
    path, outputs, resumes = config.state_file, config.outputs, config.resume.resume
    overwrite = config.overwrites
    if path is None:
        if resumes:
            raise SettingsError(
                "--resume: a run that writes to standard output keeps no state; pass a file as --output."
            )
        return Unfinished()
    settings = _own_settings(config)
    with output_errors(path):
        is_there = path.exists()
    if is_there and not resumes and not overwrite:
        raise OutputError(
            f"{path}: an unfinished run is kept there; pass --resume to resume it, or --overwrite to start "
            "anew."
        )
    if is_there and resumes:
        header = read_header(path)
        with reading(path):
            return Unfinished(command, settings, path, outputs, header, overwrite=overwrite)
    if resumes:
        progress.say(f"note: no unfinished run at {path}; starting from the beginning")
    return Unfinished(command, settings, path, outputs, overwrite=overwrite)


def _own_settings(config: ResumableConfig) -> dict[str, Any]:
    """Return what a command adds to the settings of the run whose values it takes."""
    if isinstance(config, ValueConfig | TrainingConfig):
        return {}
    free = set(free_settings(config))
    return {
        setting.name: getattr(config, setting.name)
        for setting in dataclasses.fields(config)
        if option_of(setting) is not None and setting.name not in free
    }


def _how_to_resume() -> str:
    words = shlex.split(progress.command())
    if words[0] != "chgval":
        return "resume with resume=True"
    if "--resume" not in words:
        words.insert(2, "--resume")  # after the command's name: what follows may end in -- and arguments
    return f"resume with: {shlex.join(words)}"

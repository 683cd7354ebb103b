"""The state of a run on disk: kept as it goes, restored by --resume."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from chgval import progress
from chgval.config import TrainingConfig, ValueConfig, free_settings
from chgval.errors import DataError, NonFiniteError, OutputError, first_line
from chgval.files import output_errors
from chgval.interruption import deferred_signals
from chgval.runs.state_file import read_header, read_state, reading, write_state
from chgval.runs.unfinished import Unfinished
from chgval.training.loop import Trainer
from chgval.training.records import EpochRecord, Record
from chgval.types import State

# Of a run's time, at most this share goes into keeping its state after epochs: a GPU makes short ones.
KEEPING_SHARE = 0.05


class HasState(Protocol):
    """A part of a run whose state can be kept."""

    def state_dict(self) -> State:
        """Return what another of its kind needs to resume."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Resume from there."""
        ...


class Checkpoint:
    """Where a run keeps its state: a safetensors file that is replaced as a whole.

    Creating it resumes the state that is there, if the user wants that; else it keeps the first one, so that
    there is something to resume from the start.

    Args:
        unfinished: where the command keeps its runs.
        trainer: of the run.
        parts: what else has state, by name.
        metadata: what is known of the run (`metadata_of`); the file is of this run if command, settings,
            data, device and version are the same.
        config: says how often to keep it, and which of the settings may change meanwhile.
        name: of the run among those of the command.
        digests: of what else must be the same, by what it is called.
    Raises:
        DataError: the state cannot be read, or is of another run.
    """

    def __init__(
        self,
        unfinished: Unfinished,
        trainer: Trainer,
        parts: Mapping[str, HasState],
        metadata: dict[str, Any],
        config: ValueConfig | TrainingConfig,
        *,
        name: str = "",
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self._unfinished = unfinished
        self._path = unfinished.file(name)
        self._trainer = trainer
        self._parts = {**parts, "trainer": trainer}
        self._identity = {
            "command": unfinished.command,
            **(digests or {}),
            **unfinished.settings,
            **_identity(metadata, set(free_settings(config))),
        }
        self._machine = {"torch": metadata["libraries"]["torch"], "threads": torch.get_num_threads()}
        self._seconds_between = 60 * config.resume.minutes
        self._began = self._kept = time.perf_counter()
        self._keeping_seconds = 0.0
        self._seconds_before = 0.0
        if self._path is not None and unfinished.resumes and self._path.exists():
            self._restore(self._path)
        elif self._path is not None:
            if not name:
                unfinished.remove_later()
            with deferred_signals():  # a signal that comes when the file is there is told that it is
                self._keep(self._path)

    @property
    def seconds(self) -> float:
        """Time that the run has taken so far, before and after interruptions."""
        return self._seconds_before + time.perf_counter() - self._began

    def records(self) -> Generator[Record]:
        """Train, and yield what happens; keep the state when it is due, and after epochs that are not short.

        Whoever iterates closes the iterator: until then, signals are held back while a step is made.

        Raises:
            Interrupted: a signal came; the state was kept then.
            NonFiniteError: the loss became NaN or infinite; the state is deleted, as it would again.
        """
        if self._path is None:
            yield from self._trainer.records()
            return
        with deferred_signals() as interruption, self._of_use(self._path):
            kept_at = self._trainer.position
            for record in self._trainer.records(interruption.has_come):
                yield record
                seconds = time.perf_counter() - self._kept
                is_due = self._trainer.is_over or self._keeping_seconds <= KEEPING_SHARE * seconds
                if (isinstance(record, EpochRecord) and is_due) or seconds > self._seconds_between:
                    self._keep(self._path)
                    kept_at = self._trainer.position
            if interruption.signum is not None and self._trainer.position != kept_at:
                self._keep(self._path)

    @contextmanager
    def _of_use(self, path: Path) -> Iterator[None]:
        try:
            yield
        except NonFiniteError:
            with output_errors(path):
                path.unlink(missing_ok=True)
            raise

    def _keep(self, path: Path) -> None:
        started = time.perf_counter()
        header = {
            "identity": self._identity,
            "machine": self._machine,
            "outputs": self._unfinished.outputs,
            "overwrites": self._unfinished.overwrites,
            "is_over": self._trainer.is_over,
            "seconds": self.seconds,
        }
        try:
            with output_errors(path):
                write_state(path, header, {name: part.state_dict() for name, part in self._parts.items()})
            self._unfinished.is_kept = True
        except (OutputError, SafetensorError) as error:
            progress.warn(
                f"the state of the run cannot be kept in {path} ({first_line(error)}); the run continues, "
                "and a state that was kept before is still there"
            )
        self._kept = time.perf_counter()
        self._keeping_seconds = self._kept - started

    def _restore(self, path: Path) -> None:
        header = read_header(path)
        with reading(path):
            differences = _differences(header["identity"], self._identity)
            if differences:
                raise DataError(
                    f"{path}: the unfinished run there has {differences}; pass what it was started with, "
                    "or --overwrite instead of --resume to start anew."
                )
            state = read_state(path)
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            self._seconds_before = float(header["seconds"])
            machine = dict(header["machine"])
        epochs = self._trainer.finished_epochs
        progress.say(f"resuming {path}, after {epochs:,} finished epochs")
        for name, own in self._machine.items():
            if machine.get(name) != own:
                progress.warn(
                    f"the run was started with {name} {machine.get(name)} and is resumed with {own}; values "
                    "may differ in their last digits"
                )


def _identity(metadata: dict[str, Any], free: set[str]) -> dict[str, Any]:
    """Return what must stay the same while a run is unfinished, by name, as JSON has it.

    Args:
        metadata: what is known of the run.
        free: names of the settings that may change.
    """
    settings = _flat(metadata["settings"])
    identity = {
        "version": metadata["version"],
        "dataset": metadata["fingerprint"],
        "classes": metadata["class_names"],
        **{name: value for name, value in settings.items() if name not in free},
    }
    same: dict[str, Any] = json.loads(json.dumps(identity))
    return same


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _differences(kept: dict[str, Any], own: dict[str, Any]) -> str:
    """Name the first difference; say nothing where there is none."""
    for name in {**kept, **own}:
        if name in kept and name in own and kept[name] == own[name]:
            continue
        if name == "dataset":
            return "another dataset, or one that has changed since"
        if name in ("classes", "test data"):
            return f"other {name}"
        if name == "subset":
            return "another subset"
        option = name.rpartition(".")[2].replace("_", "-")
        return f"{option} {kept.get(name)}, not {own.get(name)}"
    return ""

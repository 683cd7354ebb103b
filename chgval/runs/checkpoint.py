"""The state of an unfinished run on disk: kept as it goes, taken up again by --resume."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chgval.config import OutputConfig, ResumeConfig
from chgval.console import Console
from chgval.errors import DataError, OutputError, SettingsError, first_line
from chgval.files import could_not_write, replacing_by_name
from chgval.interruption import Interrupted, holding_back
from chgval.records import EpochRecord, Record, State
from chgval.training import Trainer

STATE_KEY = "chgval"
# Settings that may change while a run is unfinished: where things are, and what does not enter its figures.
FREE_SETTINGS = {"data.source", "data.workers", "pred_probs", "folder", "overwrite"}
FREE_GROUPS = ("output.", "resume.")


class HasState(Protocol):
    """A part of a run whose state can be kept."""

    def state_dict(self) -> State:
        """Return what another of its kind needs to go on."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        ...


class Unfinished:
    """Where a command keeps the state of its runs until all that comes of them is written.

    Args:
        path: a file; None keeps nothing.
        resumes: whether the user wants to go on with what is there.
    """

    def __init__(self, path: Path | None = None, *, resumes: bool = False) -> None:
        self.resumes = resumes
        self._path = path
        self._files: list[Path] = []

    def file(self, name: str) -> Path | None:
        """Return where the run of that name is kept, if it is; the first has the name ""."""
        path = self._path
        if path is not None and name:
            path = path.with_name(f"{path.stem}.{name}{path.suffix}")
        if path is not None:
            self._files.append(path)
        return path

    def replaceable(self, output: OutputConfig) -> OutputConfig:
        """Return an output as it is to be checked: where a run goes on, what is there may be replaced."""
        return dataclasses.replace(output, overwrite=output.overwrite or self.resumes)

    def remove(self) -> None:
        """Delete the files, once there is nothing to go on with."""
        for path in self._files:
            with could_not_write(path):
                path.unlink(missing_ok=True)


def find_unfinished(
    path: Path | None, config: ResumeConfig, console: Console, *, overwrite: bool
) -> Unfinished:
    """Look for a run to go on with.

    Raises:
        OutputError: there is one, and the user did not say what to do with it.
        SettingsError: there can be none.
    """
    if path is None:
        if config.resume:
            raise SettingsError(
                "--resume: a run that writes to standard output keeps no state; pass a file as --output."
            )
        return Unfinished()
    with could_not_write(path):
        is_there = path.exists()
    if config.resume and not is_there:
        console.say(f"note: no unfinished run at {path}; starting from the beginning")
    if is_there and not config.resume and not overwrite:
        raise OutputError(
            f"{path}: an unfinished run is kept there; pass --resume to go on with it, or --overwrite to "
            "start anew."
        )
    return Unfinished(path, resumes=is_there and config.resume)


class Checkpoint:
    """Where a run keeps its state: a safetensors file that is replaced as a whole.

    Creating it goes on with the state that is there, if the user wants that; else it deletes it.

    Args:
        unfinished: where the command keeps its runs.
        trainer: of the run.
        parts: what else has state, by name.
        metadata: what is known of the run (`metadata_of`); the file is of this run if settings, data, device
            and version are the same.
        config: how often to keep it.
        console: where to warn.
        name: of the run among those of the command.
        subset: says which samples are trained on and how they weigh, where that is not all of them alike.
    Raises:
        DataError: the state cannot be read, or is of another run.
    """

    def __init__(
        self,
        unfinished: Unfinished,
        trainer: Trainer,
        parts: Mapping[str, HasState],
        metadata: dict[str, Any],
        config: ResumeConfig,
        console: Console,
        *,
        name: str = "",
        subset: str = "",
    ) -> None:
        self._path = unfinished.file(name)
        self._trainer = trainer
        self._parts = {**parts, "trainer": trainer}
        self._identity = {**_identity(metadata), "subset": subset}
        self._torch = metadata["libraries"]["torch"]
        self._command = metadata["command"]
        self._seconds_between = 60 * config.minutes
        self._console = console
        self._begun = self._kept = time.perf_counter()
        self._seconds_before = 0.0
        if self._path is not None and unfinished.resumes and self._path.exists():
            self._restore(self._path)
        elif self._path is not None:
            with could_not_write(self._path):
                self._path.unlink(missing_ok=True)

    @property
    def seconds(self) -> float:
        """Time that the run has taken so far, before and after interruptions."""
        return self._seconds_before + time.perf_counter() - self._begun

    def records(self) -> Iterator[Record]:
        """Train, and yield what happens; keep the state after each epoch, and when it is due.

        Raises:
            Interrupted: a signal came; the state was kept then.
        """
        if self._path is None:
            yield from self._trainer.records()
            return
        with holding_back() as interruption:
            for record in self._trainer.records(interruption.has_come):
                yield record
                is_due = time.perf_counter() - self._kept > self._seconds_between
                if isinstance(record, EpochRecord) or is_due:
                    self._keep(self._path)
            if interruption.signum is not None:
                self._keep(self._path)
                hint = "" if "--resume" in self._command.split() else " --resume"
                raise Interrupted(
                    interruption.signum,
                    f"interrupted; what was done so far is kept in {self._path}; go on with: "
                    f"{self._command}{hint}",
                )

    def _keep(self, path: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        state = {name: part.state_dict() for name, part in self._parts.items()}
        kept = {
            "identity": self._identity,
            "torch": self._torch,
            "seconds": self.seconds,
            "state": _without_tensors(state, "", tensors),
        }
        try:
            with could_not_write(path), replacing_by_name(path) as part:
                save_file(tensors, part, {STATE_KEY: json.dumps(kept)})
        except (OutputError, SafetensorError) as error:
            self._console.warn(
                f"the state of the run cannot be kept in {path} ({first_line(error)}); the run goes on, and "
                "a state that was kept before is still there"
            )
        self._kept = time.perf_counter()

    def _restore(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                kept = json.loads(file.metadata()[STATE_KEY])
                differences = _differences(kept["identity"], self._identity)
                if differences:
                    raise DataError(
                        f"{path}: the unfinished run there has {differences}; pass what it was started with, "
                        "or --overwrite instead of --resume to start anew."
                    )
                state = _with_tensors(kept["state"], file)
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            self._seconds_before = float(kept["seconds"])
            torch_before = kept["torch"]
        except (
            *(OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError),
        ) as error:
            raise DataError(
                f"{path}: cannot be taken up ({first_line(error)}); pass --overwrite instead of --resume to "
                "start anew."
            ) from error
        epochs = self._trainer.finished_epochs
        self._console.say(f"going on with {path}, after {epochs:,} finished epochs")
        if torch_before != self._torch:
            self._console.warn(
                f"the run was started with torch {torch_before} and goes on with {self._torch}; figures may "
                "differ in their last digits"
            )


def _identity(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what must stay the same while a run is unfinished, by name, as JSON has it."""
    settings = {
        name: value
        for name, value in _flat(metadata["settings"]).items()
        if name not in FREE_SETTINGS and not name.startswith(FREE_GROUPS)
    }
    identity = {
        "version": metadata["version"],
        "dataset": metadata["fingerprint"],
        "classes": metadata["class_names"],
        **settings,
    }
    same: dict[str, Any] = json.loads(json.dumps(identity))
    return same


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _differences(kept: dict[str, Any], own: dict[str, Any]) -> str:
    """Name the first difference; say nothing where there is none."""
    for name, value in own.items():
        if name not in kept or kept[name] != value:
            whole = {"dataset": "another dataset, or one that has changed since", "classes": "other classes"}
            whole["subset"] = "another subset"
            option = name.rpartition(".")[2].replace("_", "-")
            return whole.get(name, f"{option} {kept.get(name)}, not {value}")
    return ""


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a state in which tensors are references, {"tensor": name}; put them among the tensors."""
    if isinstance(value, dict):
        return {name: _without_tensors(item, f"{path}/{name}", tensors) for name, item in value.items()}
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        storages = {known.untyped_storage().data_ptr() for known in tensors.values()}
        # safetensors refuses tensors that share their memory.
        tensors[path] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        return {"tensor": path}
    return value


def _with_tensors(value: Any, file: Any) -> Any:
    """Undo `_without_tensors`."""
    if not isinstance(value, dict):
        return value
    if set(value) == {"tensor"}:
        return file.get_tensor(value["tensor"])
    return {name: _with_tensors(item, file) for name, item in value.items()}

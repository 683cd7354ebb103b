"""The state of an unfinished run on disk: kept as it goes, taken up again by --resume."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chgval.config import DetectConfig, OutputConfig, ResumeConfig, SelectConfig, TrainingConfig, ValueConfig
from chgval.console import Console
from chgval.errors import DataError, NonFiniteError, OutputError, SettingsError, first_line
from chgval.files import could_not_write, replacing_by_name
from chgval.interruption import holding_back
from chgval.records import EpochRecord, Record, State
from chgval.training import Trainer

HEADER_KEY = "chgval"
# Settings that may change while a run is unfinished: where things are, and what does not enter its figures.
# What tests and subsets hold is compared, not where they are.
FREE_SETTINGS = {
    *("data.source", "data.workers", "pred_probs", "folder", "overwrite", "test", "subset", "dataset"),
    *("values", "with_random", "cleaned", "force", "materialize", "drop", "fail_over"),
}
FREE_GROUPS = ("output.", "resume.", "values.", "with_random.")
# Names of the runs that a command may consist of; the first is that of the values, or the training.
RUN_NAMES = ("", "threshold-1", "threshold-2")
# What another library, or a file that is not what it should be, raises when a state is taken up.
UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)


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
        command: its name.
        settings: of the command, beyond those of its runs, by name.
        path: a file; None keeps nothing.
        outputs: files and folders that the command writes.
        before: what the state tells of the run that is there, if the user wants to go on with it.
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
        """Say whether the run that is gone on with has written what is under that name, or may replace it."""
        return str(path.absolute()) in self._own

    def may_have_written(self, folder: Path) -> bool:
        """Say whether the run that is gone on with had come to write a folder: none is ever replaced."""
        return self._is_over and self.is_own(folder)

    def replaceable(self, output: OutputConfig) -> OutputConfig:
        """Return an output as it is to be checked: what the run itself has written may be replaced."""
        own = not output.to_stdout and self.is_own(Path(output.path))
        return dataclasses.replace(output, overwrite=output.overwrite or own)

    def remove(self) -> None:
        """Delete the files, once there is nothing to go on with."""
        self._remove(RUN_NAMES)

    def remove_later(self) -> None:
        """Delete those of later runs, which an earlier command may have left, before the first one starts."""
        self._remove(RUN_NAMES[1:])

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            path = self.file(name)
            if path is not None:
                with could_not_write(path):
                    path.unlink(missing_ok=True)


def find_unfinished(
    command: str,
    config: ValueConfig | DetectConfig | SelectConfig | TrainingConfig,
    resume: ResumeConfig,
    console: Console,
    *,
    overwrite: bool,
) -> Unfinished:
    """Look for a run to go on with.

    Args:
        command: its name.
        config: its settings.
        resume: whether the user wants to go on.
        console: where to tell that there is nothing to go on with.
        overwrite: whether outputs, and an unfinished run, may be replaced.
    Raises:
        OutputError: there is one, and the user did not say what to do with it.
        DataError: its state cannot be read.
        SettingsError: there can be none.
    """
    path, outputs = config.state_file, config.outputs
    settings = {} if isinstance(config, ValueConfig | TrainingConfig) else _own_settings(config)
    if path is None:
        if resume.resume:
            raise SettingsError(
                "--resume: a run that writes to standard output keeps no state; pass a file as --output."
            )
        return Unfinished()
    with could_not_write(path):
        is_there = path.exists()
    if is_there and not resume.resume and not overwrite:
        raise OutputError(
            f"{path}: an unfinished run is kept there; pass --resume to go on with it, or --overwrite to "
            "start anew."
        )
    if is_there and resume.resume:
        with _taking_up(path), safe_open(path, framework="pt") as file:
            return Unfinished(command, settings, path, outputs, _header(file), overwrite=overwrite)
    if resume.resume:
        console.say(f"note: no unfinished run at {path}; starting from the beginning")
    return Unfinished(command, settings, path, outputs, overwrite=overwrite)


def _own_settings(config: DetectConfig | SelectConfig) -> dict[str, Any]:
    """Return what a command adds to the settings of the run whose values it takes."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "value"}


class Checkpoint:
    """Where a run keeps its state: a safetensors file that is replaced as a whole.

    Creating it goes on with the state that is there, if the user wants that; else it keeps the first one, so
    that there is something to go on with from the start.

    Args:
        unfinished: where the command keeps its runs.
        trainer: of the run.
        parts: what else has state, by name.
        metadata: what is known of the run (`metadata_of`); the file is of this run if command, settings,
            data, device and version are the same.
        config: how often to keep it.
        console: where to warn.
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
        config: ResumeConfig,
        console: Console,
        *,
        name: str = "",
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self._path = unfinished.file(name)
        self._outputs = unfinished.outputs
        self._overwrites = unfinished.overwrites
        self._trainer = trainer
        self._parts = {**parts, "trainer": trainer}
        self._identity = {
            "command": unfinished.command,
            **(digests or {}),
            **_compared(unfinished.settings),
            **_identity(metadata),
        }
        self._machine = {"torch": metadata["libraries"]["torch"], "threads": torch.get_num_threads()}
        self._seconds_between = 60 * config.minutes
        self._console = console
        self._began = self._kept = time.perf_counter()
        self._seconds_before = 0.0
        if self._path is not None and unfinished.resumes and self._path.exists():
            self._restore(self._path)
        elif self._path is not None:
            if not name:
                unfinished.remove_later()
            self._keep(self._path)

    @property
    def seconds(self) -> float:
        """Time that the run has taken so far, before and after interruptions."""
        return self._seconds_before + time.perf_counter() - self._began

    def records(self) -> Generator[Record]:
        """Train, and yield what happens; keep the state after each epoch, and when it is due.

        Whoever iterates closes the iterator: until then, signals are held back while a step is made.

        Raises:
            Interrupted: a signal came; the state was kept then.
            NonFiniteError: the loss became NaN or infinite; the state is deleted, as it would again.
        """
        if self._path is None:
            yield from self._trainer.records()
            return
        with holding_back() as interruption, self._of_use(self._path):
            kept_at = self._trainer.position
            for record in self._trainer.records(interruption.has_come):
                yield record
                is_due = time.perf_counter() - self._kept > self._seconds_between
                if isinstance(record, EpochRecord) or is_due:
                    self._keep(self._path)
                    kept_at = self._trainer.position
            if interruption.signum is not None and self._trainer.position != kept_at:
                self._keep(self._path)

    @contextmanager
    def _of_use(self, path: Path) -> Iterator[None]:
        try:
            yield
        except NonFiniteError:
            with could_not_write(path):
                path.unlink(missing_ok=True)
            raise

    def _keep(self, path: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        state = {name: part.state_dict() for name, part in self._parts.items()}
        header = {
            "identity": self._identity,
            "machine": self._machine,
            "outputs": self._outputs,
            "overwrites": self._overwrites,
            "is_over": self._trainer.is_over,
            "seconds": self.seconds,
            "state": _without_tensors(state, "", tensors, set()),
        }
        try:
            with could_not_write(path), replacing_by_name(path) as part:
                save_file(tensors, part, {HEADER_KEY: json.dumps(header)})
        except (OutputError, SafetensorError) as error:
            self._console.warn(
                f"the state of the run cannot be kept in {path} ({first_line(error)}); the run goes on, and "
                "a state that was kept before is still there"
            )
        self._kept = time.perf_counter()

    def _restore(self, path: Path) -> None:
        with _taking_up(path), safe_open(path, framework="pt") as file:
            header = _header(file)
            differences = _differences(header["identity"], self._identity)
            if differences:
                raise DataError(
                    f"{path}: the unfinished run there has {differences}; pass what it was started with, "
                    "or --overwrite instead of --resume to start anew."
                )
            state = _with_tensors(header["state"], file)
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            self._seconds_before = float(header["seconds"])
            machine = dict(header["machine"])
        epochs = self._trainer.finished_epochs
        self._console.say(f"going on with {path}, after {epochs:,} finished epochs")
        for name, own in self._machine.items():
            if machine.get(name) != own:
                self._console.warn(
                    f"the run was started with {name} {machine.get(name)} and goes on with {own}; figures "
                    "may differ in their last digits"
                )


@contextmanager
def _taking_up(path: Path) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise DataError(
            f"{path}: cannot be taken up ({first_line(error)}); pass --overwrite instead of --resume to "
            "start anew."
        ) from error


def _header(file: Any) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(file.metadata()[HEADER_KEY])
    return header


def _identity(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what must stay the same while a run is unfinished, by name, as JSON has it."""
    identity = {
        "version": metadata["version"],
        "dataset": metadata["fingerprint"],
        "classes": metadata["class_names"],
        **_compared(metadata["settings"]),
    }
    same: dict[str, Any] = json.loads(json.dumps(identity))
    return same


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that may not change while a run is unfinished, by name."""
    return {
        name: value
        for name, value in _flat(settings).items()
        if name not in FREE_SETTINGS and not name.startswith(FREE_GROUPS)
    }


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


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor], storages: set[int]) -> Any:
    """Return a state in which tensors are references, {"tensor": name}; put them among the tensors.

    Args:
        value: the state, or a part of it.
        path: names that lead there.
        tensors: gets them, contiguous and on the host.
        storages: addresses of their memory.
    """
    if isinstance(value, dict):
        return {
            name: _without_tensors(item, f"{path}/{name}", tensors, storages) for name, item in value.items()
        }
    if not isinstance(value, torch.Tensor):
        return value
    tensor = value.detach().cpu().contiguous()
    if tensor.untyped_storage().data_ptr() in storages:
        tensor = tensor.clone()  # safetensors refuses tensors that share their memory
    storages.add(tensor.untyped_storage().data_ptr())
    tensors[path] = tensor
    return {"tensor": path}


def _with_tensors(value: Any, file: Any) -> Any:
    """Undo `_without_tensors`."""
    if not isinstance(value, dict):
        return value
    if set(value) == {"tensor"}:
        return file.get_tensor(value["tensor"])
    return {name: _with_tensors(item, file) for name, item in value.items()}

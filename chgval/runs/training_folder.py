"""The folder that a training leaves: its model, its settings and results, epochs, and what was chosen."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save

from chgval.config import OutputConfig, TrainingConfig
from chgval.data.dataset import Dataset
from chgval.errors import OutputError
from chgval.files import (
    METRICS_FILE,
    TRAINING_FILE,
    check_new_folder,
    check_writable,
    lock_of,
    output_errors,
    part_of,
    replacing,
)
from chgval.reports.files import with_metadata, write_table
from chgval.reports.tables import MANIFEST
from chgval.runs.choosing import Chooser
from chgval.runs.session import Run
from chgval.training.loop import Subset
from chgval.training.pretrained import describe
from chgval.training.records import EpochRecord, Evaluation
from chgval.types import State

MODEL_FILE, SUBSETS_FOLDER = "model.safetensors", "subsets"

METRICS_SCHEMA = pa.schema(
    [
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("accuracy", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("test_accuracy", pa.float64()),
        pa.field("test_loss", pa.float64()),
        pa.field("test_calibration_error", pa.float64()),
    ]
)
SUBSET_SCHEMA = pa.schema(
    [*(MANIFEST.schema.field(name) for name in ("index", "id", "label")), pa.field("weight", pa.float64())]
)


@dataclass(slots=True)
class TrainingProgress:
    """What a training has come to.

    Attributes:
        epochs: what happened in each, as rows of METRICS_SCHEMA.
        seconds: time spent on training and choosing, without tests.
        evaluation: the last test, if there was one.
        target: epoch and seconds at which the target accuracy was reached, if it was.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    evaluation: Evaluation | None = None
    target: dict[str, float] | None = None

    def state_dict(self) -> State:
        """Return what it has come to so far."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: State) -> None:
        """Resume from there."""
        evaluation = state["evaluation"]
        self.epochs, self.seconds, self.target = state["epochs"], state["seconds"], state["target"]
        self.evaluation = None if evaluation is None else Evaluation(**evaluation)

    def add(self, record: EpochRecord, evaluation: Evaluation | None, target_accuracy: float | None) -> None:
        """Take in an epoch, and its test if there was one."""
        self.seconds += record.seconds
        row = {
            name: getattr(record, name) for name in ("epoch", "num_samples", "loss", "accuracy", "seconds")
        }
        if evaluation is not None:
            self.evaluation = evaluation
            row.update(
                test_accuracy=evaluation.accuracy,
                test_loss=evaluation.loss,
                test_calibration_error=evaluation.calibration_error,
            )
            if target_accuracy is not None and evaluation.accuracy >= target_accuracy:
                self.target = {"epoch": record.epoch, "seconds": round(self.seconds, 3)}
        self.epochs.append(row)


def _described(run: Run) -> dict[str, str]:
    """Return what the file of the model says of it, so that it can be a backbone without more words."""
    if run.is_embedding:
        return {"format": "pt"}
    statistics = run.loader.statistics
    return describe(
        run.arch,
        run.dataset.input_size,
        statistics.mean.flatten().tolist(),
        statistics.std.flatten().tolist(),
        small_stem=run.model.small_stem,
    )


class TrainingFolder:
    """Where a training leaves its files: metrics and choices as they come, the model when it is trained.

    Args:
        folder: of the training; files of an earlier one are deleted.
        metadata: what is known of the training.
        dataset: what is trained on.
        chooser: what of it.
        resumes: whether the files there belong to this training.
    Raises:
        OutputError: it cannot be written.
    """

    def __init__(
        self, folder: Path, metadata: dict[str, Any], dataset: Dataset, chooser: Chooser, *, resumes: bool
    ) -> None:
        self._folder = folder
        self._metadata = metadata
        self._dataset = dataset
        self._chooser = chooser
        with output_errors(folder):
            for name in () if resumes else (MODEL_FILE, METRICS_FILE):
                (folder / name).unlink(missing_ok=True)
            if not resumes and (folder / SUBSETS_FOLDER).exists():
                shutil.rmtree(folder / SUBSETS_FOLDER)
        self._describe({})

    def write(self, training: TrainingProgress) -> None:
        """Keep the epochs so far, and what was chosen before the last one, if anything was."""
        epoch = training.epochs[-1]["epoch"]
        chosen = self._chooser.chosen_in(epoch)
        if chosen is not None:
            part = self._folder / SUBSETS_FOLDER / f"epoch={epoch}" / "subset.parquet"
            with output_errors(part):
                part.parent.mkdir(parents=True, exist_ok=True)
            _write_table(part, subset_table(self._dataset, chosen), self._metadata)
        _write_table(
            self._folder / METRICS_FILE, pa.Table.from_pylist(training.epochs, METRICS_SCHEMA), self._metadata
        )

    def finish(self, run: Run, training: TrainingProgress) -> None:
        """Write the model, and everything that is known of its training."""
        path = self._folder / MODEL_FILE
        with output_errors(path), replacing(path) as file:
            file.write(save(run.model.network_state(), _described(run)))
        evaluation = training.evaluation
        results = {
            "epochs": len(training.epochs),
            "train_seconds": round(training.seconds, 3),
            "test": None if evaluation is None else evaluation_as_json(evaluation, self._dataset),
            "target": training.target,
        }
        self._describe(results)

    def _describe(self, results: dict[str, Any]) -> None:
        """Write the settings, from the start: an interrupted training can be told from other folders."""
        path = self._folder / TRAINING_FILE
        text = json.dumps({**self._metadata, **results}, indent=2, ensure_ascii=False)
        with output_errors(path), replacing(path) as file:
            file.write(text.encode("utf-8", "backslashreplace"))


def check_training_folder(config: TrainingConfig) -> None:
    """Raise OutputError where files of a training would be in the way of what is no training."""
    folder = config.folder
    if config.overwrite and ((folder / TRAINING_FILE).is_file() or config.state_file.is_file()):
        return
    state_file = config.state_file
    with output_errors(folder):
        # The lock of this run, and what is left of one that was killed while it wrote its first state.
        own = {lock_of(state_file), part_of(state_file)}
        is_there = folder.is_dir() and not folder.is_symlink()
        if is_there and own.issuperset(folder.iterdir()):
            check_writable(state_file)
            return
    if config.overwrite and is_there:
        raise OutputError(
            f"{folder}: holds no {TRAINING_FILE}, so it is no earlier training; pass another name."
        )
    if is_there and (folder / TRAINING_FILE).is_file():
        raise OutputError(f"{folder}: holds an earlier training; pass --overwrite, or another name.")
    check_new_folder(folder)


def subset_table(dataset: Dataset, subset: Subset) -> pa.Table:
    """Return what is trained on: one row per sample."""
    rows = torch.from_numpy(np.setdiff1d(subset.rows.numpy(), list(dataset.problems)))
    weights = torch.ones(len(rows)) if subset.weights_N is None else subset.weights_N.cpu()[rows]
    columns = {
        "index": rows.numpy(),
        "id": [dataset.ids[row] for row in rows.tolist()],
        "label": dataset.labels_N[rows.numpy()],
        "weight": weights.double().numpy(),
    }
    return pa.table(columns, schema=SUBSET_SCHEMA)


def evaluation_as_json(evaluation: Evaluation, dataset: Dataset) -> dict[str, Any]:
    """Return a test as JSON: accuracies of classes by name, null for those without samples."""
    accuracies = zip(dataset.class_names, evaluation.class_accuracies, strict=True)
    return {
        **dataclasses.asdict(evaluation),
        "class_accuracies": {name: None if math.isnan(value) else value for name, value in accuracies},
    }


def _write_table(path: Path, table: pa.Table, metadata: dict[str, Any]) -> None:
    write_table(OutputConfig(path=str(path)), with_metadata(table, metadata))

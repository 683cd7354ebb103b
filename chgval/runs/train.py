"""`chgval train`: train a model, on everything, on a manifest, or on what a strategy chooses on the way."""

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
import pyarrow.compute as pc
import torch
from safetensors.torch import save
from torch import Tensor

from chgval.config import DataConfig, OutputConfig, TrainingConfig, ValueConfig
from chgval.console import Console, evaluation_line
from chgval.data.dataset import Dataset, Embeddings
from chgval.data.loader import Loader, make_loader
from chgval.data.open import open_dataset
from chgval.errors import DataError, OutputError, SettingsError
from chgval.evaluation import evaluate
from chgval.files import check_new_folder, could_not_write, replacing
from chgval.models import SplitModel
from chgval.records import EpochRecord, Evaluation, IntArray
from chgval.reports import MANIFEST, read_report, with_metadata, write_table
from chgval.runs.value import Run, as_json, metadata_of, prepared, read_dataset, settings_shown
from chgval.selection import keep_highest
from chgval.strategies import REGISTRY, Pass, Question, Strategy
from chgval.training import Subset, WeightAverage, observe, schedule_factor, train_epochs

# Choices in a run, unless the user says: as many as in the paper (300 epochs, every 20).
NUM_CHOICES = 15
# The moving average of the weights forgets over this share of the steps: the first choices need young ones.
AVERAGED_SHARE = 1 / 25
MODEL_FILE, TRAINING_FILE, METRICS_FILE, SUBSETS_FOLDER = (
    "model.safetensors", "training.json", "metrics.parquet", "subsets",
)  # fmt: skip

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


@dataclass(frozen=True, slots=True)
class Test:
    """Samples that the model is not trained on.

    Attributes:
        loader: of them.
        labels_N: of every row of their dataset, in the model's classes; -1 for rows that are not among them.
    """

    loader: Loader
    labels_N: IntArray

    @property
    def rows(self) -> IntArray:
        """Rows of the samples in their dataset."""
        return np.flatnonzero(self.labels_N >= 0)


@dataclass(slots=True)
class Training:
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


class Chooser:
    """Says, before each epoch, what to train on: all, a fixed subset, or what a strategy answers when asked.

    Args:
        run: the run, whose loader has the training samples.
        config: the strategy, how much of the samples it may choose, and how often it is asked.
        held: samples that it may compare with.
        fixed: a subset that is always trained on, instead.
    """

    def __init__(
        self, run: Run, config: TrainingConfig, held: Test | None = None, fixed: Subset | None = None
    ) -> None:
        self._run = run
        self._held = held
        self._rows = run.dataset.usable_rows()
        self._count = max(2, round((config.fraction or 1) * len(self._rows)))
        self._memory: dict[str, Tensor] = {}
        self._strategy = None if config.strategy == "full" else REGISTRY[config.strategy]
        self._every = select_every(config, run.recipe.epochs)
        self.average = None
        if self._strategy is not None and self._strategy.averages_weights:
            steps = run.recipe.epochs * run.loader.num_batches(torch.from_numpy(self._rows[: self._count]))
            self.average = WeightAverage(run.model, steps, share=AVERAGED_SHARE)
        self.subset = fixed
        self.is_new = False

    def __call__(self, epoch: int) -> Subset | None:
        """Return what to train on in this epoch; None is all."""
        if self._strategy is not None:
            self.is_new = (epoch - 1) % self._every == 0
            if self.is_new:
                self.subset = self._ask(self._strategy, epoch)
        return self.subset

    def _ask(self, strategy: Strategy, epoch: int) -> Subset:
        run, recipe, held = self._run, self._run.recipe, self._held

        def held_pass() -> Pass:
            if held is None:
                raise ValueError("there are no held-out samples")
            return pass_over(run.model, held.loader, held.rows, held.labels_N)

        def averaged_pass() -> Pass:
            if self.average is None:
                raise ValueError("no moving average of the weights is kept")
            return pass_over(self.average.model, run.loader, self._rows, run.dataset.labels_N)

        choice = strategy.choose(
            Question(
                labels_N=torch.from_numpy(run.dataset.labels_N[self._rows]),
                num_classes=run.dataset.num_classes,
                count=self._count,
                epoch=epoch,
                num_epochs=recipe.epochs,
                batch_size=recipe.batch_size,
                lr=recipe.lr * schedule_factor(recipe.schedule, (epoch - 0.5) / recipe.epochs),
                generator=run.generator,
                run_pass=lambda: pass_over(run.model, run.loader, self._rows, run.dataset.labels_N),
                run_averaged_pass=averaged_pass,
                run_held_pass=held_pass,
                memory=self._memory,
            )
        )
        rows = torch.from_numpy(self._rows)[choice.positions_K]
        if choice.weights_K is None:
            return Subset(rows)
        return Subset.weighted(rows, choice.weights_K, len(run.dataset), run.device)


def select_every(config: TrainingConfig, num_epochs: int) -> int:
    """Return the epochs from one choice to the next."""
    return config.select_every or max(1, round(num_epochs / NUM_CHOICES))


def pass_over(model: SplitModel, loader: Loader, rows: IntArray, labels_N: IntArray) -> Pass:
    """Show rows to a model as it is, without training; what cannot be read is predicted nothing about."""
    num_rows, device = len(labels_N), model.head.weight.device
    logits_NC = torch.zeros(num_rows, model.head.out_features, device=device)
    features_ND = torch.zeros(num_rows, model.head.in_features, device=device)

    def take(indices_B: Tensor, logits_BC: Tensor, features_BD: Tensor) -> None:
        logits_NC[indices_B] = logits_BC.float()
        features_ND[indices_B] = features_BD.float()

    observe(model, loader, take)
    kept = torch.from_numpy(rows)
    return Pass(
        logits_NC.cpu()[kept],
        features_ND.cpu()[kept],
        torch.from_numpy(labels_N)[kept],
        model.head.bias is not None,
    )


def hold_out(
    dataset: Dataset, share: float | None, generator: torch.Generator
) -> tuple[Dataset, Dataset | None]:
    """Split off a share of the usable samples, drawn within each class; return what is left, and that."""
    if share is None:
        return dataset, None
    rows = dataset.usable_rows()
    draw = torch.rand(len(rows), generator=generator, dtype=torch.float64).numpy()
    held_N = keep_highest(draw, dataset.labels_N[rows], round(share * len(rows)))
    if not held_N.any() or held_N.all():
        raise SettingsError(f"--holdout {share:g}: of {len(rows):,} samples that leaves nothing on one side.")
    return dataset.only(rows[~held_N]), dataset.only(rows[held_N])


def read_test(data: DataConfig, source: str, dataset: Dataset) -> Dataset:
    """Read a test dataset as the training data were read, with labels in the classes of these.

    Args:
        data: how the training data were read.
        source: the test dataset.
        dataset: the training data.
    Raises:
        DataError: it cannot be read, or has a class that the training data have not.
    """
    is_embedding = isinstance(dataset.content, Embeddings)
    size = None if is_embedding else dataset.input_size
    test = open_dataset(
        dataclasses.replace(data, source=source, image_size=size), dataset.input_size, least_classes=1
    )
    if test.input_size != dataset.input_size:
        raise DataError(
            f"{source}: has embeddings of {test.input_size} numbers, the training data of "
            f"{dataset.input_size}."
        )
    index = {name: label for label, name in enumerate(dataset.class_names)}
    unknown = [name for name in test.class_names if name not in index]
    if unknown:
        raise DataError(
            f"{source}: the class '{unknown[0]}' is none of the training data's "
            f"({', '.join(dataset.class_names[:5])}{', ...' if dataset.num_classes > 5 else ''})."
        )
    labels_C = np.array([*(index[name] for name in test.class_names), -1])
    return dataclasses.replace(test, labels_N=labels_C[test.labels_N], class_names=dataset.class_names)


def test_on(run: Run, dataset: Dataset) -> Test:
    """Make samples ready for the model of a run, normalised as its training samples are."""
    statistics = run.loader.statistics
    loader = make_loader(
        dataset,
        batch_size=run.recipe.batch_size,
        augment="none",
        device=run.device,
        mean=tuple(statistics.mean.flatten().tolist()),
        std=tuple(statistics.std.flatten().tolist()),
    )
    labels_N = np.full(len(dataset), -1)
    labels_N[dataset.usable_rows()] = dataset.labels_N[dataset.usable_rows()]
    return Test(loader, labels_N)


def read_manifest(source: str, dataset: Dataset) -> tuple[Dataset, Tensor]:
    """Return the dataset of which only a manifest's kept rows are used, and the weight of every row.

    Raises:
        DataError: it cannot be read, is of another dataset, or keeps nothing that can be used.
    """
    manifest, metadata = read_report(source, ("index", "id", "label", "weight", "kept"), MANIFEST)
    if metadata.get("fingerprint", dataset.fingerprint) != dataset.fingerprint:
        raise DataError(
            f"{source}: was made of another dataset than {dataset.source}, or that has changed since; value "
            "and select anew."
        )
    index = manifest["index"].to_numpy()
    if len(index) and not 0 <= index.min() <= index.max() < len(dataset):
        raise DataError(
            f"{source}: row {index.max():,} is none of the {len(dataset):,} rows of {dataset.source}."
        )
    differs = np.array(manifest["id"].to_pylist(), dtype=object) != np.array(dataset.ids, dtype=object)[index]
    differs |= manifest["label"].to_numpy() != dataset.labels_N[index]
    if differs.any():
        row = manifest["id"][int(differs.argmax())]
        raise DataError(f"{source}: '{row}' has another number or label in {dataset.source}; select anew.")
    kept = manifest.filter(manifest["kept"])
    rows = np.intersect1d(kept["index"].to_numpy(), dataset.usable_rows())
    weights_N = np.zeros(len(dataset))
    weights_N[kept["index"].to_numpy()] = pc.fill_null(kept["weight"], 1.0).to_numpy()
    chosen = dataset.only(rows)
    chosen.check()
    return chosen, torch.from_numpy(weights_N)


def run_train(config: TrainingConfig, console: Console, *, command: str) -> None:
    """Train a model, test it, and keep it with all that is known of its training.

    Args:
        config: the settings.
        console: where to tell what happens.
        command: the command line, for metadata.
    Raises:
        ChgvalError: see the modules that this calls.
    """
    check_training_folder(config.folder, overwrite=config.overwrite)
    values = ValueConfig(data=config.data, train=config.train, mode="none")
    dataset = read_dataset(values, console)
    tested = None if config.test is None else read_test(config.data, config.test, dataset)
    weights_N = None
    if config.subset is not None:
        dataset, weights_N = read_manifest(config.subset, dataset)
    dataset, held_out = hold_out(dataset, config.holdout, torch.Generator().manual_seed(config.train.seed))
    with prepared(values, dataset) as run:
        held = None if held_out is None else test_on(run, held_out)
        test = held if tested is None else test_on(run, tested)
        console.settings([*settings_shown(run, values)[:-1], *_choices_shown(config, run, test)])
        metadata = {**metadata_of(run, values, command), "training": as_json(dataclasses.asdict(config))}
        folder = TrainingFolder(config.folder, metadata)
        fixed = None
        if weights_N is not None:
            rows = torch.from_numpy(dataset.usable_rows())
            fixed = Subset.weighted(rows, weights_N[rows], len(dataset), run.device)
        chooser = Chooser(run, config, held, fixed)
        training = train(run, config, console, chooser, folder=folder, test=test)
        folder.finish(run, training)
    _tell(run, training, config, console)


def train(
    run: Run,
    config: TrainingConfig,
    console: Console,
    chooser: Chooser,
    *,
    folder: TrainingFolder | None = None,
    test: Test | None = None,
) -> Training:
    """Train a prepared run to its end, or to the target accuracy.

    Args:
        run: the run.
        config: when to test, and when to stop.
        console: where to show progress.
        chooser: says what to train on.
        folder: where choices and epochs are kept, if they are.
        test: samples to test on.
    """
    training = Training()
    records = train_epochs(
        run.model,
        run.loader,
        run.recipe,
        device=run.device,
        generator=run.generator,
        average=chooser.average,
        choose=chooser,
    )
    with console.progress(run.recipe.epochs * run.loader.num_batches()) as shown:
        for record in records:
            shown.show(record)
            if not isinstance(record, EpochRecord):
                continue
            evaluation = None
            if test is not None and (
                record.epoch % config.test_every == 0 or record.epoch == record.num_epochs
            ):
                evaluation = evaluate(run.model, test.loader, test.labels_N, run.dataset.num_classes)
                console.say(evaluation_line(evaluation))
            training.add(record, evaluation, config.target_accuracy)
            if folder is not None:
                folder.write(run.dataset, training, chooser)
            if training.target is not None:
                break
    return training


class TrainingFolder:
    """Where a training leaves its files: metrics and choices as they come, the model when it is trained.

    Args:
        folder: is made, or emptied of the files of an earlier training.
        metadata: what is known of the training.
    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any]) -> None:
        self._folder = folder
        self._metadata = metadata
        with could_not_write(folder):
            folder.mkdir(exist_ok=True)
            for name in (MODEL_FILE, METRICS_FILE, TRAINING_FILE):
                (folder / name).unlink(missing_ok=True)
            if (folder / SUBSETS_FOLDER).exists():
                shutil.rmtree(folder / SUBSETS_FOLDER)
        self._describe({})

    def write(self, dataset: Dataset, training: Training, chooser: Chooser) -> None:
        """Keep the epochs so far, and what was chosen before the last one, if anything was."""
        if chooser.is_new and chooser.subset is not None:
            part = self._folder / SUBSETS_FOLDER / f"epoch={training.epochs[-1]['epoch']}" / "subset.parquet"
            with could_not_write(part):
                part.parent.mkdir(parents=True)
            _write_table(part, subset_table(dataset, chooser.subset), self._metadata)
        _write_table(
            self._folder / METRICS_FILE, pa.Table.from_pylist(training.epochs, METRICS_SCHEMA), self._metadata
        )

    def finish(self, run: Run, training: Training) -> None:
        """Write the model, and everything that is known of its training."""
        path = self._folder / MODEL_FILE
        with could_not_write(path), replacing(path) as file:
            file.write(save(run.model.network_state(), {"format": "pt"}))
        evaluation = training.evaluation
        results = {
            "epochs": len(training.epochs),
            "train_seconds": round(training.seconds, 3),
            "test": None if evaluation is None else test_of(evaluation, run.dataset),
            "target": training.target,
        }
        self._describe(results)

    def _describe(self, results: dict[str, Any]) -> None:
        """Write the settings, from the start: an interrupted training can be told from other folders."""
        path = self._folder / TRAINING_FILE
        text = json.dumps({**self._metadata, **results}, indent=2, ensure_ascii=False)
        with could_not_write(path), replacing(path) as file:
            file.write(text.encode("utf-8", "backslashreplace"))


def check_training_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise OutputError where files of a training would be in the way of what is no training."""
    if overwrite and (folder / TRAINING_FILE).is_file():
        return
    if overwrite and folder.is_dir() and any(folder.iterdir()):
        raise OutputError(
            f"{folder}: holds no {TRAINING_FILE}, so it is no earlier training; pass another name."
        )
    check_new_folder(folder)


def subset_table(dataset: Dataset, subset: Subset) -> pa.Table:
    """Return what is trained on: one row per sample."""
    rows = subset.rows.sort().values
    weights = torch.ones(len(rows)) if subset.weights_N is None else subset.weights_N.cpu()[rows]
    columns = {
        "index": rows.numpy(),
        "id": [dataset.ids[row] for row in rows.tolist()],
        "label": dataset.labels_N[rows.numpy()],
        "weight": weights.double().numpy(),
    }
    return pa.table(columns, schema=SUBSET_SCHEMA)


def test_of(evaluation: Evaluation, dataset: Dataset) -> dict[str, Any]:
    """Return a test as JSON: accuracies of classes by name, null for those without samples."""
    accuracies = zip(dataset.class_names, evaluation.class_accuracies, strict=True)
    return {
        **dataclasses.asdict(evaluation),
        "class_accuracies": {name: None if math.isnan(value) else value for name, value in accuracies},
    }


def _write_table(path: Path, table: pa.Table, metadata: dict[str, Any]) -> None:
    write_table(OutputConfig(path=str(path)), with_metadata(table, metadata))


def _choices_shown(config: TrainingConfig, run: Run, test: Test | None) -> list[tuple[str, str]]:
    shown = []
    if config.subset is not None:
        shown.append(("subset", config.subset))
    if config.strategy != "full":
        every = select_every(config, run.recipe.epochs)
        shown.append(
            ("choice", f"{config.strategy}, {config.fraction:.0%} of the samples, every {every} epochs")
        )
    if test is not None:
        shown.append(
            ("test", f"{len(test.rows):,} samples of {config.test or 'the training data, held out'}")
        )
    return shown


def _tell(run: Run, training: Training, config: TrainingConfig, console: Console) -> None:
    evaluation = training.evaluation
    if evaluation is not None:
        console.accuracies(run.dataset.class_names, evaluation)
    console.say("")
    if config.target_accuracy is not None:
        reached = training.target
        console.say(
            f"accuracy {config.target_accuracy:.1%} was not reached"
            if reached is None
            else f"accuracy {config.target_accuracy:.1%} reached in epoch {reached['epoch']}, after "
            f"{reached['seconds']:.1f} s"
        )
    console.say(f"trained {len(training.epochs)} epochs in {training.seconds:.1f} s -> {config.folder}")

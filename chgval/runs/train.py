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
from chgval.evaluation import evaluate, predict
from chgval.files import check_new_folder, could_not_write, replacing
from chgval.models import SplitModel
from chgval.records import EpochRecord, Evaluation, IntArray
from chgval.reports import MANIFEST, read_report, with_metadata, write_table
from chgval.runs.value import Run, metadata_of, prepared, read_dataset, settings_shown, tell_problems
from chgval.selection import keep_highest
from chgval.strategies import REGISTRY, Pass, Question, Strategy
from chgval.training import Subset, WeightAverage, schedule_factor, train_epochs

# Choices in a run, unless the user says: as many as in the paper (300 epochs, every 20).
NUM_CHOICES = 15
# The moving average of the weights forgets over this share of the steps: the first choices need young ones.
AVERAGED_WHILE_CHOOSING = 1 / 25
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
        self._fraction = config.fraction or 1
        self._memory: dict[str, Tensor] = {}
        self._strategy = None if config.strategy == "full" else REGISTRY[config.strategy]
        self._every = select_every(config, run.recipe.epochs)
        self.average = None
        if self._strategy is not None and self._strategy.averages_weights:
            steps = run.recipe.epochs * run.loader.num_batches(torch.from_numpy(self._rows[: self._count]))
            self.average = WeightAverage(run.model, steps, share=AVERAGED_WHILE_CHOOSING)
        self.subset = fixed
        self.is_new = False

    def __call__(self, epoch: int) -> Subset | None:
        """Return what to train on in this epoch; None is all."""
        if self._strategy is not None:
            self.is_new = (epoch - 1) % self._every == 0
            if self.is_new:
                self.subset = self._ask(self._strategy, epoch)
        return self.subset

    @property
    def _count(self) -> int:
        return max(2, round(self._fraction * len(self._rows)))

    def _ask(self, strategy: Strategy, epoch: int) -> Subset:
        run, recipe, held = self._run, self._run.recipe, self._held
        labels_N = run.dataset.labels_N
        passes: list[Pass] = []

        def sample_pass(model: SplitModel) -> Pass:
            passes.append(pass_over(model, run.loader, labels_N, self._rows))
            return passes[-1]

        def averaged_pass() -> Pass:
            if self.average is None:
                raise ValueError("no moving average of the weights is kept")
            return sample_pass(self.average.model)

        def held_pass() -> Pass:
            if held is None:
                raise ValueError("there are no held-out samples")
            return pass_over(run.model, held.loader, held.labels_N)

        choice = strategy.choose(
            Question(
                labels_N=torch.from_numpy(labels_N[self._rows]),
                num_classes=run.dataset.num_classes,
                count=self._count,
                epoch=epoch,
                num_epochs=recipe.epochs,
                batch_size=recipe.batch_size,
                lr=recipe.lr * schedule_factor(recipe.schedule, (epoch - 0.5) / recipe.epochs),
                generator=run.generator,
                run_pass=lambda: sample_pass(run.model),
                run_averaged_pass=averaged_pass,
                run_held_pass=held_pass,
                memory=self._memory,
            )
        )
        readable = np.setdiff1d(self._rows, list(run.dataset.problems))
        if passes and len(readable) < len(self._rows):
            # Images that the pass could not read are nothing to choose from. It has tried them all, so that
            # this happens once, and what was remembered of them is not much.
            self._rows, self._memory = readable, {}
            return self._ask(strategy, epoch)
        rows = torch.from_numpy(self._rows)[choice.positions_K]
        if choice.weights_K is None:
            return Subset(rows)
        return Subset.weighted(rows, choice.weights_K, len(run.dataset), run.device)


def select_every(config: TrainingConfig, num_epochs: int) -> int:
    """Return the epochs from one choice to the next."""
    return config.select_every or max(1, round(num_epochs / NUM_CHOICES))


def pass_over(model: SplitModel, loader: Loader, labels_N: IntArray, rows: IntArray | None = None) -> Pass:
    """Show samples to a model as it is, without training.

    Args:
        model: the model.
        loader: of the samples.
        labels_N: class of every row of their dataset.
        rows: which samples to return, in this order; of those that cannot be read zeros. None returns all
            that can be read, in any order.
    Raises:
        DataError, NonFiniteError: see `predict`.
    """
    seen_N, logits_NC, features_ND = predict(model, loader)
    if rows is not None:
        position_N = np.full(len(labels_N), -1)
        position_N[seen_N.numpy()] = np.arange(len(seen_N))
        found_N = torch.from_numpy(position_N[rows])
        logits_NC = logits_NC[found_N].where(found_N[:, None] >= 0, 0)
        features_ND = features_ND[found_N].where(found_N[:, None] >= 0, 0)
        seen_N = torch.from_numpy(rows)
    return Pass(logits_NC, features_ND, torch.from_numpy(labels_N)[seen_N], model.head.bias is not None)


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


def read_test(data: DataConfig, source: str, dataset: Dataset, console: Console) -> Dataset:
    """Read a test dataset as the training data were read, with labels in the classes of these.

    Args:
        data: how the training data were read.
        source: the test dataset.
        dataset: the training data.
        console: where to tell how it was read.
    Raises:
        DataError: it cannot be read, has samples of another kind, or a class that these have not.
    """
    read = dataclasses.replace(data, source=source, image_size=None)
    if source.startswith("builtin:"):
        read = DataConfig(source=source, on_error=data.on_error)
    elif not isinstance(dataset.content, Embeddings):
        read = dataclasses.replace(read, image_size=dataset.input_size)
    test = open_dataset(read, dataset.input_size, least_classes=1)
    for note in test.notes:
        console.say(f"note: {note}")
    if test.fingerprint == dataset.fingerprint:
        console.warn(f"--test {source}: holds exactly the training samples; what is tested on was trained on")
    if isinstance(test.content, Embeddings) != isinstance(dataset.content, Embeddings):
        raise DataError(f"{source}: one of test and training data are images, the other embeddings.")
    if test.input_size != dataset.input_size:
        kind = "numbers" if isinstance(dataset.content, Embeddings) else "pixels"
        raise DataError(
            f"{source}: has samples of {test.input_size} {kind}, the training data of {dataset.input_size}."
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


def test_on(run: Run, data: DataConfig, dataset: Dataset) -> Test:
    """Make samples ready for the model of a run, read and normalised as its training samples are."""
    statistics = run.loader.statistics
    loader = make_loader(
        dataset,
        batch_size=run.recipe.batch_size,
        augment="none",
        device=run.device,
        mean=tuple(statistics.mean.flatten().tolist()),
        std=tuple(statistics.std.flatten().tolist()),
        workers=data.workers,
        fail_on_error=data.on_error == "fail",
    )
    labels_N = np.full(len(dataset), -1)
    labels_N[dataset.usable_rows()] = dataset.labels_N[dataset.usable_rows()]
    return Test(loader, labels_N)


def read_manifest(source: str, dataset: Dataset) -> tuple[IntArray, Tensor]:
    """Return the rows that a manifest of a dataset keeps, and the weight of every row.

    Raises:
        DataError: it cannot be read, or is of another dataset.
    """
    manifest, metadata = read_report(source, ("index", "id", "label", "weight", "kept"), MANIFEST)
    if metadata.get("fingerprint", dataset.fingerprint) != dataset.fingerprint:
        raise DataError(
            f"{source}: was made of another dataset than {dataset.source}, or that has changed since; value "
            "and select anew."
        )
    index = manifest["index"].to_numpy()
    if len(index) and not 0 <= index.min() <= index.max() < len(dataset):
        row = index[(index < 0) | (index >= len(dataset))][0]
        raise DataError(f"{source}: row {row:,} is none of the {len(dataset):,} rows of {dataset.source}.")
    differs = np.array(manifest["id"].to_pylist(), dtype=object) != np.array(dataset.ids, dtype=object)[index]
    differs |= manifest["label"].to_numpy() != dataset.labels_N[index]
    if differs.any():
        row = manifest["id"][int(differs.argmax())]
        raise DataError(f"{source}: '{row}' has another number or label in {dataset.source}; select anew.")
    kept = manifest.filter(manifest["kept"])
    rows: IntArray = kept["index"].to_numpy()
    weights_N = np.zeros(len(dataset))
    weights_N[rows] = pc.fill_null(kept["weight"], 1.0).to_numpy()
    return rows, torch.from_numpy(weights_N)


def only_kept(dataset: Dataset, rows: IntArray, source: str) -> Dataset:
    """Return the dataset of which only the rows that a manifest keeps are used.

    Raises:
        DataError: fewer than two classes are left to train on.
    """
    rows = np.intersect1d(rows, dataset.usable_rows())
    classes = np.unique(dataset.labels_N[rows])
    if len(classes) < 2:
        raise DataError(
            f"{source}: keeps {len(rows):,} samples that can be trained on, of {len(classes)} classes; "
            "training needs at least two."
        )
    return dataset.only(rows)


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
    tested = None if config.test is None else read_test(config.data, config.test, dataset, console)
    manifest = None if config.subset is None else read_manifest(config.subset, dataset)
    # From all samples, whatever the manifest keeps: what it leaves out is as much a part of what will come.
    dataset, held_out = hold_out(dataset, config.holdout, torch.Generator().manual_seed(config.train.seed))
    if config.subset is not None and manifest is not None:
        dataset = only_kept(dataset, manifest[0], config.subset)
    with prepared(values, dataset) as run:
        if config.strategy != "full":
            config = dataclasses.replace(config, select_every=select_every(config, run.recipe.epochs))
        held = None if held_out is None else test_on(run, config.data, held_out)
        test = held if tested is None else test_on(run, config.data, tested)
        console.settings([*settings_shown(run, values), *_choices_shown(config, test)])
        folder = TrainingFolder(config.folder, metadata_of(run, config, command))
        fixed = None
        if manifest is not None:
            rows = torch.from_numpy(dataset.usable_rows())
            fixed = Subset.weighted(rows, manifest[1][rows], len(dataset), run.device)
        chooser = Chooser(run, config, held, fixed)
        training = train(run, config, console, chooser, folder=folder, test=test)
        folder.finish(run, training)
    tell_problems(dataset, console, "they were not trained on")
    if tested is not None:
        tell_problems(tested, console, "they were not tested on")
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
    rows = torch.from_numpy(np.setdiff1d(subset.rows.numpy(), list(dataset.problems)))
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


def _choices_shown(config: TrainingConfig, test: Test | None) -> list[tuple[str, str]]:
    shown = []
    if config.subset is not None:
        shown.append(("subset", config.subset))
    if config.strategy != "full":
        when = f"every {config.select_every} epochs"
        shown.append(("choice", f"{config.strategy}, {config.fraction:.0%} of the samples, {when}"))
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

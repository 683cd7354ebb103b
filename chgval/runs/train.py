"""`chgval train`: train a model, on everything, on a manifest, or on what a strategy chooses on the way."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from chgval import progress
from chgval.config import DataConfig, TrainConfig, TrainingConfig
from chgval.data.dataset import Dataset, Embeddings, as_seen
from chgval.data.formats import format_of
from chgval.data.loader import make_loader
from chgval.data.open import open_dataset
from chgval.errors import DataError, SettingsError, first_few
from chgval.files import output_errors
from chgval.interruption import interruptible
from chgval.reports.decisions import match_decisions
from chgval.reports.files import read_table, report_name
from chgval.reports.tables import DECISIONS, MANIFEST
from chgval.runs.checkpoint import Checkpoint, HasState
from chgval.runs.choosing import Chooser, Holdout, select_every, strategy_of
from chgval.runs.embedding import digest_of, embedded_dataset
from chgval.runs.session import (
    Run,
    make_trainer,
    metadata_of,
    prepared,
    read_dataset,
    settings_shown,
    tell_problems,
    train_to_end,
)
from chgval.runs.training_folder import TrainingFolder, TrainingProgress, check_training_folder
from chgval.runs.unfinished import Unfinished, unfinished_run
from chgval.training.evaluation import evaluate
from chgval.training.loop import Subset
from chgval.training.records import EpochRecord, Evaluation, Record
from chgval.types import IntArray
from chgval.valuation.selection import class_quotas, keep_highest

# Missing classes that are named.
NAMED_CLASSES = 5
# Of a sample in a manifest; losses of larger ones could not be told from a training that diverged.
LARGEST_WEIGHT = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training has come to.

    Attributes:
        folder: where the model, its settings and metrics are.
        epochs: what happened in each, as rows of metrics.parquet.
        seconds: time spent on training and choosing, without tests.
        class_names: of all classes.
        evaluation: the last test, if there was one.
        target: epoch and seconds at which the target accuracy was reached, if it was.
    """

    folder: Path
    epochs: list[dict[str, float]]
    seconds: float
    class_names: list[str]
    evaluation: Evaluation | None
    target: dict[str, float] | None


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


def read_test(data: DataConfig, train: TrainConfig, source: str, dataset: Dataset) -> Dataset:
    """Read a test dataset as the training data were read, with labels in the classes of these.

    Args:
        data: how the training data were read.
        train: what is trained on them.
        source: the test dataset.
        dataset: the training data.
    Raises:
        DataError: it cannot be read, has samples of another kind, or a class that these have not.
    """
    read = dataclasses.replace(data, source=source, split=None, image_size=None)
    if dataset.annotations is not None:  # what is tested on has one label
        read = dataclasses.replace(read, label_columns=())
    if source.startswith("builtin:"):
        read = DataConfig(source=source, on_error=data.on_error)
    elif not isinstance(dataset.content, Embeddings):
        read = dataclasses.replace(read, image_size=dataset.input_size)
    elif train.frozen:
        read = dataclasses.replace(read, image_size=data.image_size)
    test = open_dataset(read, dataset.input_size, least_classes=1)
    if train.frozen:
        test = embedded_dataset(format_of(read), test, train)
    for note in test.notes:
        progress.say(f"note: {note}")
    if test.fingerprint == dataset.fingerprint:
        progress.warn(
            f"--test {source}: holds exactly the training samples; what is tested on was trained on"
        )
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
        like = [name for name in index if as_seen(name) == as_seen(unknown[0])]
        looks = f" It looks like {like[0]!a}, and is spelled {unknown[0]!a}." if like else ""
        raise DataError(
            f"{source}: the class '{unknown[0]}' is none of the training data's "
            f"({first_few(dataset.class_names, 5)}).{looks}"
        )
    labels_C = np.array([*(index[name] for name in test.class_names), -1])
    return dataclasses.replace(test, labels_N=labels_C[test.labels_N], class_names=dataset.class_names)


def ready_for(run: Run, data: DataConfig, dataset: Dataset) -> Holdout:
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
    return Holdout(loader, labels_N)


def read_manifest(source: str, dataset: Dataset) -> tuple[IntArray, Tensor]:
    """Return the rows that a manifest of a dataset keeps, and the weight of every row.

    Raises:
        DataError: it cannot be read, or is of another dataset.
    """
    manifest, metadata = read_table(source, ("index", "id", "label", "weight", "kept"), MANIFEST)
    name = report_name(source)
    if metadata.get("fingerprint", dataset.fingerprint) != dataset.fingerprint:
        raise DataError(
            f"{name}: was made of another dataset than {dataset.source}, or that has changed since; value "
            "and select anew."
        )
    index = manifest["index"].to_numpy()
    if len(index) and not 0 <= index.min() <= index.max() < len(dataset):
        row = index[(index < 0) | (index >= len(dataset))][0]
        raise DataError(f"{name}: row {row:,} is none of the {len(dataset):,} rows of {dataset.source}.")
    differs = np.array(manifest["id"].to_pylist(), dtype=object) != np.array(dataset.ids, dtype=object)[index]
    differs |= manifest["label"].to_numpy() != dataset.labels_N[index]
    if differs.any():
        row = manifest["id"][int(differs.argmax())]
        raise DataError(f"{name}: '{row}' has another number or label in {dataset.source}; select anew.")
    kept = manifest.filter(manifest["kept"])
    rows: IntArray = kept["index"].to_numpy()
    weights_N = np.zeros(len(dataset))
    weights_N[rows] = pc.fill_null(kept["weight"], 1.0).to_numpy()
    wrong_N = ~((weights_N >= 0) & (weights_N <= LARGEST_WEIGHT))
    if wrong_N.any():
        row = int(wrong_N.argmax())
        raise DataError(
            f"{name}: '{dataset.ids[row]}' has the weight {weights_N[row]:g}; weights are from 0 to "
            f"{LARGEST_WEIGHT:,.0f}, and 1 is that of a sample in full training."
        )
    return rows, torch.from_numpy(weights_N)


def as_decided(dataset: Dataset, source: str) -> Dataset:
    """Return the dataset with the labels that people decided on; rows to drop have none.

    Raises:
        DataError: the decisions cannot be read, or are about another dataset.
    """
    table, _ = read_table(source, kind=DECISIONS)
    decisions = match_decisions(
        table, source, dataset.ids, dataset.labels_N, dataset.class_names, dataset.source
    )
    labels_N = np.where(decisions.new_labels_N >= 0, decisions.new_labels_N, dataset.labels_N)
    return dataclasses.replace(dataset, labels_N=np.where(decisions.kept_N, labels_N, -1))


def only_kept(dataset: Dataset, rows: IntArray, source: str) -> Dataset:
    """Return the dataset of which only the rows that a manifest keeps are used.

    Raises:
        DataError: fewer than two classes are left to train on.
    """
    rows = np.intersect1d(rows, dataset.usable_rows())
    classes = np.unique(dataset.labels_N[rows])
    if len(classes) < 2:
        raise DataError(
            f"{report_name(source)}: keeps {len(rows):,} samples that can be trained on, of "
            f"{len(classes)} classes; training needs at least two."
        )
    return dataset.only(rows)


def warn_of_missing_classes(dataset: Dataset, config: TrainingConfig) -> None:
    """Name classes that are not trained on, or have no share in what is chosen."""
    sizes_C = np.bincount(dataset.labels_N[dataset.usable_rows()], minlength=dataset.num_classes)
    chosen_C = sizes_C
    strategy = strategy_of(config)
    if config.fraction is not None and strategy is not None and strategy.keeps_shares:
        chosen_C = class_quotas(sizes_C, round(config.fraction * int(sizes_C.sum())))
    missing = np.flatnonzero(chosen_C == 0)
    if len(missing):
        names = [dataset.class_names[label] for label in missing[:NAMED_CLASSES]]
        more = f" and {len(missing) - len(names):,} more" if len(missing) > len(names) else ""
        progress.warn(f"no samples to train on: {', '.join(names)}{more}")


def run_train(config: TrainingConfig) -> Trained:
    """Train a model, test it, and keep it with all that is known of its training.

    Raises:
        ChgvalError: see the modules that this calls.
        Interrupted: a signal came.
    """
    strategy = strategy_of(config)
    if strategy is not None and strategy.needs_holdout and config.holdout is None:
        raise SettingsError(
            f"--strategy {config.strategy}: compares with held-out samples; pass --holdout 0.1."
        )
    with unfinished_run("train", config) as unfinished:
        return _train(config, unfinished)


def _train(config: TrainingConfig, unfinished: Unfinished) -> Trained:
    if not unfinished.resumes:
        check_training_folder(config)
    dataset = read_dataset(config.data, config.train)
    tested = None if config.test is None else read_test(config.data, config.train, config.test, dataset)
    manifest = None if config.subset is None else read_manifest(config.subset, dataset)
    if config.decisions is not None:
        dataset = as_decided(dataset, config.decisions)
    decided_N = dataset.labels_N
    # From all samples, whatever the manifest keeps: what it leaves out is as much a part of what will come.
    dataset, held_out = hold_out(dataset, config.holdout, torch.Generator().manual_seed(config.train.seed))
    if config.subset is not None and manifest is not None:
        dataset = only_kept(dataset, manifest[0], config.subset)
    dataset.check()
    warn_of_missing_classes(dataset, config)
    with prepared(config.data, config.train, dataset) as run:
        if config.chooses:
            config = dataclasses.replace(config, select_every=select_every(config, run.recipe.epochs))
        held = None if held_out is None else ready_for(run, config.data, held_out)
        test = held if tested is None else ready_for(run, config.data, tested)
        progress.settings([*settings_shown(run, config.train), *_choices_shown(config, test)])
        metadata = metadata_of(run, config)
        fixed, digests = None, {"test data": "" if tested is None else tested.fingerprint}
        if manifest is not None:
            rows = torch.from_numpy(dataset.usable_rows())
            fixed = Subset.weighted(rows, manifest[1][rows], len(dataset), run.device)
            chosen = rows.numpy().tobytes() + manifest[1][rows].numpy().tobytes()
            digests["subset"] = hashlib.blake2b(chosen).hexdigest()
        if config.decisions is not None:
            digests["decisions"] = hashlib.blake2b(decided_N.tobytes()).hexdigest()
        if config.train.frozen:
            digests["embeddings"] = digest_of(dataset)
        chooser, so_far = Chooser(run, config, held, fixed), TrainingProgress()
        trainer = make_trainer(run, average=chooser.average, choose=chooser)
        parts: dict[str, HasState] = {"dataset": dataset, "chooser": chooser, "training": so_far}
        if tested is not None:
            parts["tested"] = tested
        with output_errors(config.folder):
            config.folder.mkdir(exist_ok=True)
        checkpoint = Checkpoint(unfinished, trainer, parts, metadata, config, digests=digests)
        resumes = trainer.position != (0, 0)
        folder = TrainingFolder(config.folder, metadata, dataset, chooser, resumes=resumes)
        train(run, checkpoint.records(), so_far, config, test=test, folder=folder)
        folder.finish(run, so_far)
    tell_problems(dataset, "they were not trained on")
    if tested is not None:
        tell_problems(tested, "they were not tested on")
    return Trained(
        folder=config.folder,
        epochs=so_far.epochs,
        seconds=so_far.seconds,
        class_names=list(dataset.class_names),
        evaluation=so_far.evaluation,
        target=so_far.target,
    )


def train(
    run: Run,
    records: Generator[Record],
    so_far: TrainingProgress,
    config: TrainingConfig,
    *,
    test: Holdout | None = None,
    folder: TrainingFolder | None = None,
) -> None:
    """Train a prepared run to its end, or to the target accuracy.

    Args:
        run: the run.
        records: of its trainer.
        so_far: takes in what it comes to.
        config: when to test, and when to stop.
        test: samples to test on.
        folder: where choices and epochs are kept, if they are.
    """

    def after_epoch(record: EpochRecord) -> bool:
        evaluation = None
        if test is not None and (record.epoch % config.test_every == 0 or record.epoch == record.num_epochs):
            with interruptible():
                evaluation = evaluate(run.model, test.loader, test.labels_N, run.dataset.num_classes)
            progress.say(progress.evaluation_line(evaluation))
        so_far.add(record, evaluation, config.target_accuracy)
        if folder is not None:
            folder.write(so_far)
        return so_far.target is not None

    train_to_end(run, records, after_epoch)


def _choices_shown(config: TrainingConfig, test: Holdout | None) -> list[tuple[str, str]]:
    shown = []
    if config.subset is not None:
        shown.append(("subset", config.subset))
    if config.chooses:
        when = f"every {config.select_every} epochs"
        shown.append(("choice", f"{config.strategy}, {config.fraction:.0%} of the samples, {when}"))
    if test is not None:
        shown.append(
            ("test", f"{len(test.rows):,} samples of {config.test or 'the training data, held out'}")
        )
    return shown

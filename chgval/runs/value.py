"""`chgval value`: train once, and report what every sample is worth."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import resource
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

import chgval
from chgval.accumulate import Utility, ValueAccumulator
from chgval.config import OutputConfig, TrainingConfig, ValueConfig
from chgval.console import Console, histogram
from chgval.data.dataset import Dataset, Embeddings, LargeImages
from chgval.data.loader import Loader, make_loader
from chgval.data.open import check_not_read, open_dataset
from chgval.detection.scores import memory_bytes, score_labels
from chgval.detection.verdict import annotators_shown, notes_on, verdict_of
from chgval.errors import SettingsError
from chgval.evaluation import predict
from chgval.files import check_file
from chgval.models import InputShape, SplitModel, build_model, check_names
from chgval.recipe import Recipe, choose_arch, choose_recipe, largest_image_size
from chgval.records import ClassLine, EpochRecord, Record, RunSignals, RunSummary, SampleLine, StepRecord
from chgval.reports import ReportWriter, values_table, write_array
from chgval.runs.checkpoint import Checkpoint, Unfinished, find_unfinished
from chgval.training import Subset, Trainer, WeightAverage
from chgval.views import mirrored, rotated

SHOWN_SAMPLES = 5
SHOWN_CLASSES = 20
SHOWN_PROBLEMS = 5
# Share of a GPU's free memory that the accumulator's buffers may take; beyond it they stay on the host.
ACCUMULATOR_MEMORY_SHARE = 0.25
# An epoch with a pass of its own costs about this much more: a forward pass beside a forward and a backward.
SEPARATE_PASS_COST = 1.4
# The plan times this many readings of the training loop.
TIMED_READINGS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a run consists of, ready to start."""

    dataset: Dataset
    arch: str
    model: SplitModel
    loader: Loader
    recipe: Recipe
    device: torch.device
    generator: torch.Generator
    accumulator: ValueAccumulator | None
    average: WeightAverage | None


@dataclass(frozen=True, slots=True)
class Valued:
    """A run that has valued its samples, what it says of them, and their report with its metadata."""

    run: Run
    signals: RunSignals
    table: pa.Table
    metadata: dict[str, Any]


def run_value(config: ValueConfig, console: Console, *, command: str) -> None:
    """Value a dataset and write the report; with mode "none", train the same without valuing.

    Args:
        config: the settings.
        console: where to tell what happens.
        command: the command line, for the report's metadata.
    Raises:
        ChgvalError: see the modules that this calls.
    """
    started = time.perf_counter()
    if config.mode == "none":
        with prepared(config, read_dataset(config, console)) as run:
            console.settings(settings_shown(run, config))
            train_to_end(run, make_trainer(run).records(), console)
        seconds = time.perf_counter() - started
        console.say(
            f"trained {run.recipe.epochs} epochs in {seconds:.1f} s; nothing was valued (--no-values)"
        )
        return
    unfinished = find_unfinished("value", config, config.resume, console, overwrite=config.output.overwrite)
    output = unfinished.replaceable(config.output)
    check_outputs(config, output, unfinished)
    dataset = read_dataset(config, console)
    valued = value_dataset(config, dataset, output, console, unfinished, command=command)
    unfinished.remove()
    console.summary(summarise(dataset, valued.signals))
    console.annotators(annotators_shown(valued.metadata["verdict"]))
    console.notes(notes_on(valued.metadata["verdict"]))
    statuses = dataset.statuses()
    counts = ", ".join(
        f"{statuses.count(s):,} {s}" for s in dict.fromkeys(["valued", *sorted(set(statuses))])
    )
    target = "standard output" if config.output.to_stdout else config.output.path
    seconds = time.perf_counter() - started
    console.say("")
    console.say(f"{len(dataset):,} rows ({counts}) in {seconds:.1f} s -> {target}")


def value_dataset(
    config: ValueConfig,
    dataset: Dataset,
    output: OutputConfig | None,
    console: Console,
    unfinished: Unfinished,
    *,
    command: str,
) -> Valued:
    """Value a dataset, write the report if it is to be kept, and return it.

    Args:
        config: the settings; its own output is not looked at.
        dataset: what they read (`read_dataset`).
        output: where the report goes, which `check_outputs` has checked; None keeps none.
        console: where to tell what happens.
        unfinished: where the run keeps its state.
        command: the command line, for the report's metadata.
    Raises:
        ChgvalError: see the modules that this calls.
        Interrupted: a signal came.
    """
    with prepared(config, dataset) as run:
        console.settings(settings_shown(run, config))
        metadata = metadata_of(run, config, command)
        trainer = make_trainer(run, separate_pass=config.mode == "exact")
        parts = {"dataset": dataset}
        checkpoint = Checkpoint(unfinished, trainer, parts, metadata, config.resume, console)
        goes_on = trainer.position != (0, 0)
        writer = None if output is None else ReportWriter(output, goes_on=goes_on)
        train_to_end(run, checkpoint.records(), console, writer, metadata)
        accumulator = run.accumulator
        if accumulator is None or run.average is None:
            raise ValueError("mode 'none' values nothing")
        unseen_ND, seen_ND = observe_average(run, accumulator, run.average)
    signals, probabilities_NC = accumulator.run_signals(), accumulator.averaged_probabilities()
    noise = score_labels(run.dataset.labels_N, probabilities_NC, unseen_ND, seen_ND, run.dataset.annotations)
    table = values_table(run.dataset, signals, noise, per_class=config.per_class)
    metadata["verdict"] = verdict_of(
        noise,
        run.dataset.labels_N,
        signals.predicted_label_N,
        run.dataset.class_names,
        run.dataset.annotations,
    )
    metadata.update(epochs=run.recipe.epochs, wall_seconds=round(checkpoint.seconds, 3), finished=True)
    if writer is not None:
        writer.write(table, metadata)
    if config.pred_probs is not None:
        write_array(config.pred_probs, probabilities_NC)
    tell_problems(run.dataset, console, "they have no value (status 'unreadable' in the report)")
    return Valued(run, signals, table, metadata)


def run_plan(config: ValueConfig, console: Console) -> None:
    """Tell what a run would do and cost, from a few timed steps, and stop."""
    check_outputs(config, None if config.mode == "none" else config.output, Unfinished())
    with prepared(config, read_dataset(config, console)) as run:
        console.settings([*settings_shown(run, config), *_costs(run, config)])


def check_outputs(config: ValueConfig, output: OutputConfig | None, unfinished: Unfinished) -> None:
    """Raise OutputError, before anything is read, where something cannot be written."""
    if output is not None:
        ReportWriter.check(output, config.data.source, goes_on=unfinished.resumes)
        check_not_read(config.data, output)
    if config.pred_probs is not None and not unfinished.is_own(config.pred_probs):
        check_file(config.pred_probs, overwrite=config.output.overwrite)


@contextmanager
def prepared(config: ValueConfig, dataset: Dataset) -> Iterator[Run]:
    """Prepare a run, and put torch's global generator back after it."""
    with torch.random.fork_rng(devices=[]):
        yield prepare(config, dataset)


def read_dataset(config: ValueConfig, console: Console) -> Dataset:
    """Read the data, once all that can be checked without them is checked."""
    train = config.train
    check_names(train.arch, train.weights)
    device = pick_device(train.device)
    console.detail(f"reading {config.data.source}")
    dataset = open_dataset(config.data, largest_image_size(train.arch, device.type))
    for note in dataset.notes:
        console.say(f"note: {note}")
    return dataset


def prepare(config: ValueConfig, dataset: Dataset) -> Run:
    """Build the model and resolve all that the user left open.

    Seeds torch's global generators, which dropout layers draw from; the caller puts the CPU's back.
    """
    train = config.train
    torch.manual_seed(train.seed)
    generator = torch.Generator().manual_seed(train.seed)
    device = pick_device(train.device)
    is_embedding = isinstance(dataset.content, Embeddings)
    arch = train.arch or choose_arch(None if is_embedding else dataset.input_size, device.type)
    shape = InputShape(dataset.input_size, is_embedding)
    model = build_model(arch, dataset.num_classes, shape, generator, train.weights)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = choose_recipe(
        train,
        len(dataset.usable_rows()),
        has_batch_norm=any(isinstance(m, nn.BatchNorm2d) for m in model.modules()),
        num_features=dataset.input_size if is_embedding else None,
        flips=dataset.flips,
    )
    loader = make_loader(
        dataset,
        batch_size=recipe.batch_size,
        augment=recipe.augment,
        device=device,
        mean=config.data.mean,
        std=config.data.std,
        workers=config.data.workers,
        fail_on_error=config.data.on_error == "fail",
    )
    accumulator = average = None
    if config.mode != "none":
        accumulator = _make_accumulator(config, dataset, model, device, recipe.epochs)
        average = WeightAverage(model, recipe.epochs * loader.num_batches(loader.rows))
    if train.compile_model:
        model.backbone.compile()
    return Run(dataset, arch, model, loader, recipe, device, generator, accumulator, average)


def pick_device(name: str) -> torch.device:
    """Return the device of that name; auto takes the fastest there is.

    Raises:
        SettingsError: this machine, or this build of PyTorch, does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise SettingsError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsError("--device mps: not available on this machine.")
    return device


def summarise(dataset: Dataset, signals: RunSignals) -> RunSummary:
    """Pick out of the signals what a person wants to see."""
    rows = np.flatnonzero(~np.isnan(signals.value_N))
    order = rows[np.argsort(signals.value_N[rows], kind="stable")]
    labels = dataset.labels_N[rows]
    values, agrees = signals.value_N[rows], signals.predicted_label_N[rows] == labels
    counts = np.bincount(labels, minlength=dataset.num_classes)
    safe_counts = counts.clip(min=1)
    means = np.bincount(labels, weights=values, minlength=dataset.num_classes) / safe_counts
    agreements = np.bincount(labels, weights=agrees, minlength=dataset.num_classes) / safe_counts
    shown = range(dataset.num_classes)
    if dataset.num_classes > SHOWN_CLASSES:
        shown = np.argsort(-counts, kind="stable")[:SHOWN_CLASSES].tolist()
    histogram_counts, edges = histogram(values)

    def line(row: int) -> SampleLine:
        return SampleLine(
            id=dataset.ids[row],
            label_name=dataset.class_names[dataset.labels_N[row]],
            predicted_name=dataset.class_names[signals.predicted_label_N[row]],
            value=float(signals.value_N[row]),
        )

    return RunSummary(
        classes=[
            ClassLine(
                name=dataset.class_names[label],
                num_samples=int(counts[label]),
                mean_value=float(means[label]),
                agreement=float(agreements[label]),
            )
            for label in shown
        ],
        hidden_classes=dataset.num_classes - len(shown),
        lowest=[line(row) for row in order[:SHOWN_SAMPLES]],
        highest=[line(row) for row in order[::-1][:SHOWN_SAMPLES]],
        histogram_counts=histogram_counts,
        histogram_edges=edges,
    )


def train_to_end(
    run: Run,
    records: Generator[Record],
    console: Console,
    writer: ReportWriter | None = None,
    metadata: dict[str, object] | None = None,
) -> None:
    """Train to the end, showing and writing each epoch as it comes."""
    total = run.recipe.epochs * run.loader.num_batches(run.loader.rows)
    with closing(records), console.progress(total) as shown:
        for record in records:
            shown.show(record)
            if isinstance(record, EpochRecord) and writer is not None:
                writer.write_epoch(record, metadata or {})


def make_trainer(
    run: Run,
    *,
    separate_pass: bool = False,
    choose: Callable[[int], Subset | None] | None = None,
    average: WeightAverage | None = None,
) -> Trainer:
    """Return what trains a prepared run, and values it if it has an accumulator; see `Trainer`."""
    return Trainer(
        run.model,
        run.loader,
        run.recipe,
        device=run.device,
        generator=run.generator,
        accumulator=run.accumulator,
        average=average or run.average,
        separate_pass=separate_pass,
        choose=choose,
    )


def observe_average(
    run: Run, accumulator: ValueAccumulator, average: WeightAverage
) -> tuple[Tensor, Tensor | None]:
    """Let the average of the weights predict every sample; it counts as much as all averaged epochs.

    Returns:
        What noise scores are made of, shape (N, D) each: last-layer inputs of a view of the samples that was
        not trained on, or the embeddings themselves; and last-layer inputs of what was trained on, None for
        embeddings.
    """
    content = run.dataset.content
    mirrors = run.recipe.augment == "crop-flip"
    trained = [None, mirrored] if mirrors else [None]
    weight = (run.recipe.epochs - accumulator.averaged_from + 1) / len(trained)
    seen_ND: Tensor | None = None
    for view in trained:
        keeps = view is None and not isinstance(content, Embeddings)
        rows_N, logits_NC, features_ND = predict(average.model, run.loader, with_features=keeps, view=view)
        accumulator.add_predictions(rows_N, logits_NC, weight)
        if keeps:
            seen_ND = _of_all_rows(rows_N, features_ND, len(run.dataset))
    if isinstance(content, Embeddings):
        return torch.from_numpy(content.vectors_ND), None
    rows_N, _, features_ND = predict(average.model, run.loader, view=rotated if mirrors else mirrored)
    return _of_all_rows(rows_N, features_ND, len(run.dataset)), seen_ND


def _of_all_rows(rows_N: Tensor, features_ND: Tensor, num_rows: int) -> Tensor:
    """Return features at the places of their rows; those of other rows are NaN."""
    placed_ND = features_ND.new_full((num_rows, features_ND.shape[1]), torch.nan)
    placed_ND[rows_N] = features_ND
    return placed_ND


def _make_accumulator(
    config: ValueConfig, dataset: Dataset, model: SplitModel, device: torch.device, epochs: int
) -> ValueAccumulator:
    needed = ValueAccumulator.memory_bytes(len(dataset), dataset.num_classes, model.head.in_features)
    if device.type == "cuda" and needed > ACCUMULATOR_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
        device = torch.device("cpu")
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    return ValueAccumulator(
        torch.from_numpy(dataset.labels_N).to(device),
        dataset.num_classes,
        model.head.in_features,
        has_bias=model.head.bias is not None,
        utility=Utility(config.utility),
        per_class=config.per_class,
        averaged_from=epochs // 2 + 1,
    )


def settings_shown(run: Run, config: ValueConfig) -> list[tuple[str, str]]:
    """Return what a person wants to know of a run before it starts, as names and values."""
    dataset, recipe = run.dataset, run.recipe
    kind = "numbers" if isinstance(dataset.content, Embeddings) else "px"
    decoded = ", decoded at each use" if isinstance(dataset.content, LargeImages) else ""
    usable = len(dataset.usable_rows())
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    stem = ", small-image stem" if run.model.small_stem else ""
    shown = [
        (
            "data",
            f"{dataset.source}: {len(dataset):,} rows, {usable:,} usable, {dataset.num_classes:,} classes, "
            f"{dataset.input_size} {kind}{decoded}",
        ),
        ("model", f"{run.arch} ({parameters:,} parameters{stem}) on {run.device}"),
        (
            "training",
            f"{recipe.epochs} epochs, batches of {recipe.batch_size}, {recipe.schedule} to lr {recipe.lr:g}, "
            f"{recipe.augment}, seed {config.train.seed}",
        ),
    ]
    if config.mode != "none":
        signals = "the training steps" if config.mode == "online" else "a pass before each epoch"
        within = ", within each class" if config.per_class else ""
        shown.append(("values", f"{config.utility} values from {signals}{within}"))
    return shown


def _costs(run: Run, config: ValueConfig) -> list[tuple[str, str]]:
    """Time a few steps; they also show the memory that a run takes."""
    readings: list[StepRecord] = []
    for record in make_trainer(run).records():
        if isinstance(record, EpochRecord) or len(readings) == TIMED_READINGS:
            break
        if isinstance(record, StepRecord):
            readings.append(record)
    first, last = readings[0], readings[-1]
    samples, seconds = last.num_samples, last.seconds
    if len(readings) > 1:  # the first steps also pay for what is done once
        samples, seconds = samples - first.num_samples, seconds - first.seconds
    rate = samples / seconds
    epoch_seconds = len(run.dataset.usable_rows()) / rate
    if config.mode == "exact":
        epoch_seconds *= SEPARATE_PASS_COST
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    costs = [
        ("speed", f"{rate:,.0f} samples/s, over {samples:,} samples"),
        (
            "time",
            f"about {_duration(epoch_seconds * run.recipe.epochs)} ({_duration(epoch_seconds)} an epoch)",
        ),
        ("memory", f"{_gibibytes(host)} on the host (peak so far)"),
    ]
    if run.device.type == "cuda":
        costs.append(("", f"{_gibibytes(torch.cuda.max_memory_allocated(run.device))} on {run.device}"))
    if run.accumulator is not None:
        needed = ValueAccumulator.memory_bytes(
            len(run.dataset), run.dataset.num_classes, run.model.head.in_features
        )
        costs.append(("", f"{_gibibytes(needed)} of it for valuing, on {run.accumulator.labels_N.device}"))
        is_embedding = isinstance(run.dataset.content, Embeddings)
        width = run.dataset.input_size if is_embedding else run.model.head.in_features
        scoring = memory_bytes(len(run.dataset), run.dataset.num_classes, width)
        costs.append(("", f"{_gibibytes(scoring)} more in the end, for noise scores"))
        if config.output.to_stdout:
            costs.append(("output", "standard output"))
        else:
            costs.append(("output", config.output.path))
    return costs


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _gibibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"


def tell_problems(dataset: Dataset, console: Console, consequence: str) -> None:
    """Name the first samples that could not be read, and what follows of it."""
    if not dataset.problems:
        return
    rows = sorted(dataset.problems)
    console.warn(f"{len(rows):,} of {len(dataset):,} samples could not be read; {consequence}:")
    for row in rows[:SHOWN_PROBLEMS]:
        console.warn(f"  {dataset.ids[row]}: {dataset.problems[row]}")
    if len(rows) > SHOWN_PROBLEMS:
        console.warn(f"  ... and {len(rows) - SHOWN_PROBLEMS:,} more")


def metadata_of(run: Run, config: ValueConfig | TrainingConfig, command: str) -> dict[str, object]:
    """Return what is kept of a run beside its results: all settings as they were resolved, and versions."""
    statistics = run.loader.statistics
    settings = dataclasses.asdict(config)
    settings["train"].update(dataclasses.asdict(run.recipe), arch=run.arch, device=str(run.device))
    settings["data"].update(
        image_size=None if isinstance(run.dataset.content, Embeddings) else run.dataset.input_size,
        mean=statistics.mean.flatten().tolist(),
        std=statistics.std.flatten().tolist(),
    )
    return {
        "version": chgval.__version__,
        "command": command,
        "settings": as_json(settings),
        "class_names": list(run.dataset.class_names),
        "fingerprint": run.dataset.fingerprint,
        "root": run.dataset.root,
        "seed": config.train.seed,
        "device": str(run.device),
        "libraries": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": importlib.metadata.version("torchvision"),
            "pyarrow": str(pa.__version__),
            "numpy": str(np.__version__),
        },
    }


def as_json(value: object) -> object:
    """Return settings with paths as text."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value

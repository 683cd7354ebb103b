"""A run: its data, model and loader made ready, trained to the end, and described in metadata."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

import chgval
from chgval import progress
from chgval.config import DataConfig, TrainConfig, TrainingConfig, ValueConfig
from chgval.data.dataset import Dataset, Embeddings, LargeImages
from chgval.data.formats import Format, format_of
from chgval.data.loader import Loader, make_loader
from chgval.data.open import open_dataset
from chgval.errors import DataError
from chgval.interruption import interruptible
from chgval.reports.files import is_report
from chgval.reports.tables import InputRows
from chgval.runs.embedding import embedded_dataset
from chgval.system import has_amx, usable_cores
from chgval.training.devices import (
    AUTOCAST,
    SMALL_IMAGE,
    SMALL_PIXELS,
    SMALL_PRODUCTS,
    Precision,
    check_memory,
    choose_precision,
    device_settings,
    gains_from_amx,
    has_room,
    pick_device,
)
from chgval.training.loop import Subset, Trainer, forward_all
from chgval.training.models import (
    EMBEDDING_ARCHS,
    IMAGE_ARCHS_OF_CHGVAL,
    InputShape,
    SplitModel,
    build_model,
    check_names,
)
from chgval.training.pretrained import DEFAULT_ARCH, DEFAULT_WEIGHTS, arch_of, normalisation
from chgval.training.recipe import Recipe, choose_arch, choose_epochs, choose_recipe, largest_image_size
from chgval.training.records import EpochRecord, Record
from chgval.training.step import WeightAverage
from chgval.valuation.accumulator import ValueAccumulator

SHOWN_PROBLEMS = 5
# Share of a GPU's free memory that the accumulator's buffers may take; beyond it they stay on the host.
ACCUMULATOR_MEMORY_SHARE = 0.25
# An epoch that takes so many times as long as the fastest one is told.
SLOWNESS = 3


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a training consists of, ready to start."""

    dataset: Dataset
    arch: str
    model: SplitModel
    loader: Loader
    recipe: Recipe
    device: torch.device
    precision: Precision
    generator: torch.Generator

    @property
    def is_embedding(self) -> bool:
        """Whether the samples are embeddings, not images."""
        return isinstance(self.dataset.content, Embeddings)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run on all samples."""
        return self.recipe.epochs * self.loader.num_batches(self.loader.rows)


@contextmanager
def prepared(data: DataConfig, train: TrainConfig, dataset: Dataset) -> Iterator[Run]:
    """Prepare a run, and put torch's global generators and number of threads back after it.

    Steps of models on embeddings, and on tiny images, are so small that threads would only wait for each
    other, and on a busy machine for long: such a run takes one thread.
    """
    device = device_for(train, dataset)
    num_threads = torch.get_num_threads()
    try:
        # What is made without saying where, such as events, is then made there: it may be the second GPU.
        there = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with there, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.set_num_threads(_threads(train, dataset))
            run = prepare(data, train, dataset)
            with device_settings(device, run.precision):
                yield run
    finally:
        torch.set_num_threads(num_threads)


def device_for(train: TrainConfig, dataset: Dataset) -> torch.device:
    """Return the device that a dataset is trained on: where nothing is said, the one that is done first."""
    num_samples, content = len(dataset.usable_rows()), dataset.content
    is_embedding = isinstance(content, Embeddings)
    uses = num_samples * choose_epochs(train, num_samples, is_embedding=is_embedding)
    if is_embedding:
        is_small = uses * dataset.input_size * dataset.num_classes <= SMALL_PRODUCTS
    else:
        is_small = uses * dataset.input_size**2 <= SMALL_PIXELS
    own = (None, *IMAGE_ARCHS_OF_CHGVAL, *EMBEDDING_ARCHS)
    has_small_network = train.frozen or (train.arch in own and train.weights is None)
    return pick_device(train.device, is_small=is_small and has_small_network)


def _threads(train: TrainConfig, dataset: Dataset) -> int:
    if train.threads is not None:
        if train.threads > usable_cores():
            progress.warn(
                f"--threads {train.threads}: more than the {usable_cores()} cores that can be used wait for "
                "each other, and take many times as long."
            )
        return train.threads
    is_small = isinstance(dataset.content, Embeddings) or dataset.input_size <= SMALL_IMAGE
    return 1 if is_small else min(torch.get_num_threads(), usable_cores())


def read_dataset(data: DataConfig | Format, train: TrainConfig) -> Dataset:
    """Read the data, once all that can be checked without them is checked."""
    if is_report(data.source):
        raise DataError(
            f"{data.source}: is a report of chgval, not a dataset; pass it to detect-noise or select."
        )
    check_names(train.arch, train.weights)
    device = pick_device(train.device)
    progress.detail(f"reading {data.source}")
    dataset = open_dataset(data, largest_image_size(train.arch, device.type, frozen=train.frozen))
    for note in dataset.notes:
        progress.say(f"note: {note}")
    if train.frozen:
        return embedded_dataset(format_of(data) if isinstance(data, DataConfig) else data, dataset, train)
    return dataset


def prepare(data: DataConfig, train: TrainConfig, dataset: Dataset) -> Run:
    """Build the model and resolve all that the user left open.

    Seeds torch's global generators, which dropout layers draw from; the caller puts them back.
    """
    torch.manual_seed(train.seed)
    generator = torch.Generator().manual_seed(train.seed)
    device = device_for(train, dataset)
    is_embedding = isinstance(dataset.content, Embeddings)
    # A frozen network has been passed: what is trained is a model of embeddings.
    arch = None if train.frozen else train.arch or arch_of(train.weights)
    arch = arch or choose_arch(None if is_embedding else dataset.input_size, device.type)
    weights = None if train.frozen else train.weights
    shape = InputShape(dataset.input_size, is_embedding)
    model = build_model(arch, dataset.num_classes, shape, generator, weights)
    mean, std = data.mean, data.std
    if weights is not None:
        trained_mean, trained_std = normalisation(arch, weights)
        mean, std = mean or trained_mean, std or trained_std
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    precision = _precision(train, device, model, dataset.input_size, has_batch_norm=has_batch_norm)
    model.backbone_dtype = AUTOCAST.get(precision)
    recipe = choose_recipe(
        train,
        len(dataset.usable_rows()),
        has_batch_norm=has_batch_norm,
        num_features=dataset.input_size if is_embedding else None,
        flips=dataset.flips,
        image_size=dataset.input_size,
        device_type=device.type,
    )
    if device.type == "cpu" and not is_embedding:
        check_memory(model, arch, recipe.batch_size, dataset.input_size)
    loader = make_loader(
        dataset,
        batch_size=recipe.batch_size,
        augment=recipe.augment,
        device=device,
        mean=None if is_embedding else mean,
        std=None if is_embedding else std,
        workers=data.workers,
        fail_on_error=data.on_error == "fail",
    )
    if train.compile_model:
        progress.say("note: the first steps compile the model, which takes a minute or more")
        model.backbone.compile()
    return Run(dataset, arch, model, loader, recipe, device, precision, generator)


def _precision(
    train: TrainConfig, device: torch.device, model: SplitModel, input_size: int, *, has_batch_norm: bool
) -> Precision:
    """Return what the backbone computes in, and say so where that is slow."""
    precision = choose_precision(
        train.precision,
        device.type,
        torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        has_batch_norm=has_batch_norm,
        gains_on_cpu=has_batch_norm and gains_from_amx(model, input_size),
    )
    if precision == "bfloat16" and device.type == "cpu" and not has_amx():
        progress.say("note: this processor has no AMX; --precision float32 is mostly faster on it")
    return precision


def make_accumulator(run: Run, config: ValueConfig) -> ValueAccumulator:
    """Return what values the samples of a run, on its device if there is room."""
    dataset, model, device = run.dataset, run.model, run.device
    needed = ValueAccumulator.memory_bytes(len(dataset), dataset.num_classes, model.head.in_features)
    if not has_room(device, needed, ACCUMULATOR_MEMORY_SHARE):
        device = torch.device("cpu")
    return ValueAccumulator(
        torch.from_numpy(dataset.labels_N).to(device),
        dataset.num_classes,
        model.head.in_features,
        has_bias=model.head.bias is not None,
        utility=config.utility,
        per_class=config.per_class,
        averaged_from=run.recipe.epochs // 2 + 1,
    )


def make_trainer(
    run: Run,
    accumulator: ValueAccumulator | None = None,
    average: WeightAverage | None = None,
    *,
    exact: bool = False,
    choose: Callable[[int], Subset | None] | None = None,
) -> Trainer:
    """Return what trains a prepared run.

    Args:
        run: the run.
        accumulator: values it, if given.
        average: follows its weights, if given.
        exact: whether the accumulator sees a pass of its own before each epoch (Algorithm 1 to the letter: no
            augmentation, evaluation mode), or the training steps themselves.
        choose: says what an epoch trains on, asked before it and again where it is resumed; None is all.
    """

    def before_epoch(epoch: int, is_resumed: bool) -> Subset | None:
        with interruptible():
            if accumulator is not None and exact and not is_resumed:
                forward_all(run.model, run.loader, accumulator.update)
            return None if choose is None else choose(epoch)

    return Trainer(
        run.model,
        run.loader,
        run.recipe,
        device=run.device,
        generator=run.generator,
        average=average,
        observer=accumulator,
        sees_steps=not exact,
        before_epoch=before_epoch,
        scales_loss=run.precision == "float16",
    )


def make_valuing(run: Run, config: ValueConfig) -> tuple[ValueAccumulator, WeightAverage, Trainer]:
    """Return what values the samples of a run, the average of its weights, and its trainer."""
    accumulator, average = make_accumulator(run, config), WeightAverage(run.model, run.total_steps)
    return accumulator, average, make_trainer(run, accumulator, average, exact=config.mode == "exact")


def train_to_end(
    run: Run, records: Generator[Record], after_epoch: Callable[[EpochRecord], bool | None] | None = None
) -> None:
    """Train to the end, telling each record as it comes.

    Args:
        run: the run.
        records: of its trainer.
        after_epoch: is given each epoch's record; it ends the training by returning True.
    """
    fastest = float("inf")
    is_told = False
    with closing(records), progress.following(run.total_steps) as tell:
        for record in records:
            tell(record)
            if isinstance(record, EpochRecord):
                seconds_a_sample = 1 / max(record.speed, 1e-9)
                fastest = min(fastest, seconds_a_sample)
                if not is_told and record.seconds > 1 and seconds_a_sample > SLOWNESS * fastest:
                    is_told = True
                    progress.warn(
                        f"epoch {record.epoch} took {seconds_a_sample / fastest:.0f} times as long as the "
                        "fastest one; if other programs keep the cores busy, --threads 1 may be faster."
                    )
            if isinstance(record, EpochRecord) and after_epoch is not None and after_epoch(record):
                break


def settings_shown(run: Run, train: TrainConfig) -> list[tuple[str, str]]:
    """Return what a person wants to know of a run before it starts, as names and values."""
    dataset, recipe = run.dataset, run.recipe
    kind = "numbers" if run.is_embedding else "px"
    decoded = ", decoded at each use" if isinstance(dataset.content, LargeImages) else ""
    usable = len(dataset.usable_rows())
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    stem = ", small-image stem" if run.model.small_stem else ""
    columns = ", ".join(f"{what}: {name}" for what, name in dataset.named_columns())
    return [
        (
            "data",
            f"{dataset.source}: {len(dataset):,} rows, {usable:,} usable, {dataset.num_classes:,} classes, "
            f"{dataset.input_size} {kind}{decoded}",
        ),
        *([("columns", columns)] if columns else []),
        (
            "model",
            f"{run.arch} ({parameters:,} parameters{stem}) on {run.device}, {run.precision}{_frozen(train)}",
        ),
        *_device_shown(run, train),
        (
            "training",
            f"{recipe.epochs:,} {'epoch' if recipe.epochs == 1 else 'epochs'}, batches of "
            f"{recipe.batch_size:,}, {recipe.schedule} to lr {recipe.lr:g}, {recipe.augment}, "
            f"seed {train.seed}",
        ),
    ]


def _device_shown(run: Run, train: TrainConfig) -> list[tuple[str, str]]:
    """Say why a GPU that is there is not used."""
    fastest = pick_device("auto")
    if train.device != "auto" or run.device == fastest:
        return []
    return [("device", f"{run.device}, done before {fastest} would be ready; --device {fastest} takes that")]


def _frozen(train: TrainConfig) -> str:
    if not train.frozen:
        return ""
    return f", on {train.arch or DEFAULT_ARCH}, frozen, {train.weights or DEFAULT_WEIGHTS}"


def tell_problems(dataset: Dataset, consequence: str) -> None:
    """Name the first samples that could not be read, and what follows of it."""
    if not dataset.problems:
        return
    rows = sorted(dataset.problems)
    progress.warn(f"{len(rows):,} of {len(dataset):,} samples could not be read; {consequence}:")
    for row in rows[:SHOWN_PROBLEMS]:
        progress.warn(f"  {dataset.ids[row]}: {dataset.problems[row]}")
    if len(rows) > SHOWN_PROBLEMS:
        progress.warn(f"  ... and {len(rows) - SHOWN_PROBLEMS:,} more")


def input_rows(dataset: Dataset) -> InputRows:
    """Return what a report says of the rows of a dataset."""
    return InputRows(
        ids=dataset.ids,
        labels_N=dataset.labels_N,
        class_names=dataset.class_names,
        statuses=dataset.statuses(),
        reasons=[dataset.problems.get(row) for row in range(len(dataset))],
        annotations=dataset.annotations,
    )


def metadata_of(run: Run, config: ValueConfig | TrainingConfig) -> dict[str, Any]:
    """Return what is kept of a run beside its results: all settings as they were resolved, and versions."""
    statistics = run.loader.statistics
    settings = dataclasses.asdict(config)
    settings["train"].update(dataclasses.asdict(run.recipe), device=str(run.device), precision=run.precision)
    settings["data"].update(run.dataset.columns)
    if config.train.frozen:  # then these are about the network that was passed
        if config.train.arch is None and config.train.weights is None:
            settings["train"].update(arch=DEFAULT_ARCH, weights=DEFAULT_WEIGHTS)
    else:
        settings["train"]["arch"] = run.arch
        settings["data"].update(
            image_size=None if run.is_embedding else run.dataset.input_size,
            mean=statistics.mean.flatten().tolist(),
            std=statistics.std.flatten().tolist(),
        )
    return {
        "version": chgval.__version__,
        "command": progress.command(),
        "settings": as_json(settings),
        "class_names": list(run.dataset.class_names),
        "fingerprint": run.dataset.fingerprint,
        "root": run.dataset.root,
        "seed": config.train.seed,
        "device": str(run.device),
        "threads": torch.get_num_threads(),
        "libraries": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": importlib.metadata.version("torchvision"),
            "pyarrow": str(pa.__version__),
            "numpy": str(np.__version__),
        },
    }


def as_json(value: object) -> Any:
    """Return settings with paths as text."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value

"""`chgval value --plan`: what a run would do and cost, from a few timed steps."""

from __future__ import annotations

import dataclasses

import torch

from chgval.config import ValueConfig
from chgval.detection.scores import memory_bytes
from chgval.runs.session import Run, make_valuing, prepared, read_dataset
from chgval.runs.value import value_settings_shown
from chgval.system import peak_memory
from chgval.training.records import EpochRecord, StepRecord
from chgval.valuation.accumulator import ValueAccumulator

# An epoch with a pass of its own costs about this much more: a forward pass beside a forward and a backward.
SEPARATE_PASS_COST = 1.4
# So many readings of the training loop are timed.
TIMED_READINGS = 4


def run_plan(config: ValueConfig) -> list[tuple[str, str]]:
    """Return what a run would do and cost, as names and values.

    Raises:
        ChgvalError: see the modules that this calls.
    """
    dataset = read_dataset(config.data, config.train)
    with prepared(config.data, config.train, dataset) as run:
        return [*value_settings_shown(run, config), *_costs(run, config)]


def _costs(run: Run, config: ValueConfig) -> list[tuple[str, str]]:
    """Time a few steps; they also show the memory that a run takes."""
    accumulator, _, trainer = make_valuing(run, dataclasses.replace(config, mode="online"))
    readings: list[StepRecord] = []
    for record in trainer.records():
        if isinstance(record, EpochRecord) or len(readings) == TIMED_READINGS:
            break
        if isinstance(record, StepRecord):
            readings.append(record)
    first, last = readings[0], readings[-1]
    samples, seconds = last.num_samples, last.seconds
    if len(readings) > 1:  # the first steps also pay for what is done once
        samples, seconds = samples - first.num_samples, seconds - first.seconds
    rate = samples / seconds
    num_samples, num_classes, num_features = (
        len(run.dataset),
        run.dataset.num_classes,
        run.model.head.in_features,
    )
    epoch_seconds = len(run.dataset.usable_rows()) / rate
    if config.mode == "exact":
        epoch_seconds *= SEPARATE_PASS_COST
    valuing = ValueAccumulator.memory_bytes(num_samples, num_classes, num_features)
    width = run.dataset.input_size if run.is_embedding else num_features
    costs = [
        ("speed", f"{rate:,.0f} samples/s, over {samples:,} samples"),
        (
            "time",
            f"about {_duration(epoch_seconds * run.recipe.epochs)} ({_duration(epoch_seconds)} an epoch)",
        ),
    ]
    memory = []
    peak = peak_memory()
    if peak is not None:
        memory.append(f"{_gibibytes(peak)} on the host (peak so far)")
    if run.device.type == "cuda":
        memory.append(f"{_gibibytes(torch.cuda.max_memory_allocated(run.device))} on {run.device}")
    memory.append(f"{_gibibytes(valuing)} of it for valuing, on {accumulator.labels_N.device}")
    scoring = memory_bytes(num_samples, num_classes, width)
    memory.append(f"{_gibibytes(scoring)} more in the end, for noise scores")
    costs.extend(("" if number else "memory", text) for number, text in enumerate(memory))
    if config.output is not None:
        costs.append(("output", config.output.target))
    return costs


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _gibibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"

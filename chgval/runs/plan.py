"""`chgval value --plan`: what a run would do and cost, from a few timed steps."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch

from chgval.config import ValueConfig
from chgval.detection.scores import memory_bytes, score_labels
from chgval.runs.session import Run, make_valuing, prepared, read_dataset
from chgval.runs.value import value_settings_shown
from chgval.system import peak_memory, resident_memory
from chgval.training.records import EpochRecord, StepRecord
from chgval.valuation.accumulator import ValueAccumulator

# An epoch with a pass of its own costs about this much more: a forward pass beside a forward and a backward.
SEPARATE_PASS_COST = 1.4
# So many readings of the training loop are timed.
TIMED_READINGS = 4


def run_plan(config: ValueConfig) -> Plan:
    """Return what a run would do and cost.

    Raises:
        ChgvalError: see the modules that this calls.
    """
    dataset = read_dataset(config.data, config.train)
    with prepared(config.data, config.train, dataset) as run:
        costs = measure_costs(run, config)
        shown = [*value_settings_shown(run, config), *_shown(costs, run, config)]
        return Plan(shown=shown, costs=costs, num_epochs=run.recipe.epochs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would do and cost.

    Attributes:
        shown: for people, as names and values.
        costs: measured.
        num_epochs: of the run.
    """

    shown: list[tuple[str, str]]
    costs: Costs
    num_epochs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a run costs.

    Attributes:
        rate: samples a second.
        num_timed: samples over which that was measured.
        epoch_seconds: of each epoch.
        host_bytes: peak of this process; None where the system does not say. Libraries are part of it.
        device_bytes: peak of what torch holds of a CUDA device; None on others.
        valuing_bytes, valued_on: what of that is for valuing, and where.
        scoring_bytes: what of the host's is for noise scores, in the end.
    """

    rate: float
    num_timed: int
    epoch_seconds: float
    host_bytes: int | None
    device_bytes: int | None
    valuing_bytes: int
    valued_on: torch.device
    scoring_bytes: int


def measure_costs(run: Run, config: ValueConfig) -> Costs:
    """Time a few steps, which also show the memory that a run takes."""
    accumulator, _, trainer = make_valuing(run, dataclasses.replace(config, mode="online"))
    readings: list[StepRecord] = []
    for record in trainer.records():
        if isinstance(record, EpochRecord) or len(readings) == TIMED_READINGS:
            break
        if isinstance(record, StepRecord):
            readings.append(record)
    # From one reading to the next; the first steps also pay for what is done once, as do some others.
    spans = [
        (after.num_samples - before.num_samples, after.seconds - before.seconds)
        for before, after in pairwise(readings)
    ] or [(readings[0].num_samples, readings[0].seconds)]
    rate = statistics.median(samples / seconds for samples, seconds in spans)
    if accumulator.has_seen and run.device.type == "cuda":
        accumulator.finish_epoch()  # takes memory, too
    num_samples, num_classes = len(run.dataset), run.dataset.num_classes
    num_features = run.model.head.in_features
    epoch_seconds = len(run.dataset.usable_rows()) / rate
    if config.mode == "exact":
        epoch_seconds *= SEPARATE_PASS_COST
    valuing = ValueAccumulator.memory_bytes(num_samples, num_classes, num_features)
    scored_features = run.dataset.input_size if run.is_embedding else num_features
    scoring = memory_bytes(num_samples, num_classes, scored_features)
    on_cuda = run.device.type == "cuda"
    return Costs(
        rate=rate,
        num_timed=sum(samples for samples, _ in spans),
        epoch_seconds=epoch_seconds,
        host_bytes=_host_bytes(scoring + (valuing if accumulator.device.type == "cpu" else 0)),
        device_bytes=torch.cuda.max_memory_reserved(run.device) if on_cuda else None,
        valuing_bytes=valuing,
        valued_on=accumulator.device,
        scoring_bytes=scoring,
    )


def _host_bytes(more: int) -> int | None:
    """Return the peak of this process if it will take so much more than now, and load what scores load."""
    rng = np.random.default_rng(0)
    labels_N = np.arange(60) % 2
    probabilities_NC = rng.dirichlet((1, 1), 60).astype(np.float32)
    score_labels(labels_N, probabilities_NC, torch.from_numpy(rng.normal(size=(60, 4)).astype(np.float32)))
    pa.default_memory_pool().release_unused()  # of reading
    present, peak = resident_memory(), peak_memory()
    return None if present is None or peak is None else max(peak, present + more)


def _shown(costs: Costs, run: Run, config: ValueConfig) -> list[tuple[str, str]]:
    whole = _duration(costs.epoch_seconds * run.recipe.epochs)
    memory = []
    if costs.host_bytes is not None:
        memory.append(f"about {_gibibytes(costs.host_bytes)} on the host")
    if costs.device_bytes is not None:
        memory.append(f"about {_gibibytes(costs.device_bytes)} on {run.device}")
    memory.append(f"{_gibibytes(costs.valuing_bytes)} of it for valuing, on {costs.valued_on}")
    memory.append(f"{_gibibytes(costs.scoring_bytes)} for noise scores, in the end")
    return [
        ("speed", f"{costs.rate:,.0f} samples/s, measured on {costs.num_timed:,}"),
        ("time", f"about {whole} ({_duration(costs.epoch_seconds)} an epoch)"),
        *(("" if number else "memory", text) for number, text in enumerate(memory)),
        *([] if config.output is None else [("output", config.output.target)]),
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _gibibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"

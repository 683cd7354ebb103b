"""Flags by threshold samples: labels that are wrong on purpose show what a wrong label looks like."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from chgval import progress
from chgval.config import ValueConfig
from chgval.data.dataset import Dataset
from chgval.errors import DataError
from chgval.runs.checkpoint import Checkpoint, HasState
from chgval.runs.session import make_valuing, metadata_of, prepared, train_to_end
from chgval.runs.unfinished import LATER_RUNS, Unfinished
from chgval.types import FloatArray, IntArray

# A label is flagged if its margin is no higher than that of most threshold samples (the paper's percentile).
PERCENTILE = 99


def check_enough(dataset: Dataset) -> None:
    """Raise DataError where there are too few samples to put some into another class."""
    num_samples = len(dataset.usable_rows())
    if num_samples <= dataset.num_classes:
        raise DataError(
            f"{dataset.source}: {num_samples:,} samples of {dataset.num_classes:,} classes are too few for "
            "--threshold aum; use another rule."
        )


def threshold_flags(
    dataset: Dataset, seed: int, margins_of: Callable[[str, Dataset], FloatArray]
) -> NDArray[np.bool_]:
    """Train twice, each time with some samples put into an additional class, and flag by their margins.

    Nothing connects the samples of the additional class, so that their margins are those of wrong labels. A
    sample is flagged if its margin, averaged over the run, lies below the 99th percentile of theirs. The
    second run tells about the samples that were put there in the first (Pleiss et al. 2020, arXiv:2001.10528,
    section 3.2).

    Args:
        dataset: the samples.
        seed: which of them are put there.
        margins_of: trains a run of that name on a dataset, and returns every row's margin (`run_margins`).
    Returns:
        Which rows are flagged, shape (N,).
    Raises:
        DataError: none of the threshold samples can be read.
    """
    first_rows, second_rows = threshold_sets(dataset.usable_rows(), dataset.num_classes, seed)
    first_name, second_name = LATER_RUNS
    first_N = margins_of(first_name, _marked(dataset, first_rows))
    second_N = margins_of(second_name, _marked(dataset, second_rows))
    flagged_N = below_threshold(first_N, first_rows)
    flagged_N[first_rows] = below_threshold(second_N, second_rows)[first_rows]
    return flagged_N


def run_margins(
    name: str,
    dataset: Dataset,
    config: ValueConfig,
    unfinished: Unfinished,
) -> FloatArray:
    """Train on a dataset that has threshold samples, and return the averaged margin of every row.

    Args:
        name: of the run, among those of the command.
        dataset: the samples.
        config: the settings.
        unfinished: where the run keeps its state.
    """
    progress.say(f"training with threshold samples ({name})")
    with prepared(config.data, config.train, dataset) as run:
        accumulator, _, trainer = make_valuing(run, config)
        parts: dict[str, HasState] = {"dataset": dataset, "accumulator": accumulator}
        checkpoint = Checkpoint(unfinished, trainer, parts, metadata_of(run, config), config, name=name)
        train_to_end(run, checkpoint.records())
        return accumulator.run_signals().means["margin"]


def threshold_sets(rows: IntArray, num_classes: int, seed: int) -> tuple[IntArray, IntArray]:
    """Draw two disjoint sets of rows, each as large as a class is on average with one class more."""
    size = len(rows) // (num_classes + 1)
    drawn = np.random.default_rng(seed).permutation(rows)
    return drawn[:size], drawn[size : 2 * size]


def below_threshold(margin_N: FloatArray, threshold_rows: IntArray) -> NDArray[np.bool_]:
    """Say which margins lie below the percentile of those of the threshold samples; NaN never does."""
    known_T = margin_N[threshold_rows]
    known_T = known_T[np.isfinite(known_T)]
    if not len(known_T):
        raise DataError("none of the threshold samples could be read; use another --threshold.")
    flagged_N: NDArray[np.bool_] = margin_N < np.percentile(known_T, PERCENTILE)
    return flagged_N


def _marked(dataset: Dataset, threshold_rows: IntArray) -> Dataset:
    """Return the dataset in which these rows have a class of their own."""
    labels_N = dataset.labels_N.copy()
    labels_N[threshold_rows] = dataset.num_classes
    class_names = [*dataset.class_names, "threshold samples"]
    return dataclasses.replace(dataset, labels_N=labels_N, class_names=class_names)

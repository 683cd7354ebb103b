"""`chgval value`: train once, and report what every sample is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chgval import progress
from chgval.config import DetectConfig, OutputConfig, ReportConfig, ValueConfig
from chgval.data.dataset import Dataset, Embeddings
from chgval.data.formats import Format, format_of
from chgval.data.open import check_not_read
from chgval.files import check_file
from chgval.reports.files import ReportWriter, kept_features, write_array
from chgval.reports.report import Report
from chgval.runs.assessment import assess, can_be_assessed
from chgval.runs.checkpoint import Checkpoint, HasState
from chgval.runs.embedding import digest_of
from chgval.runs.report import write_and_tell
from chgval.runs.session import (
    Run,
    input_rows,
    make_valuing,
    metadata_of,
    prepared,
    read_dataset,
    settings_shown,
    tell_problems,
    train_to_end,
)
from chgval.runs.unfinished import Unfinished, unfinished_run
from chgval.tracker import make_report
from chgval.training.evaluation import predict
from chgval.training.records import EpochRecord
from chgval.training.step import WeightAverage
from chgval.training.views import mirrored, rotated
from chgval.valuation.accumulator import ValueAccumulator


@dataclass(frozen=True, slots=True)
class Valued:
    """A run that has valued its samples, the average of its weights, the report, and last-layer inputs."""

    run: Run
    average: WeightAverage
    report: Report
    features_ND: NDArray[np.float16]


def run_value(config: ValueConfig) -> Report:
    """Value a dataset, write the report if it has an output, and return it.

    Raises:
        ChgvalError: see the modules that this calls.
        Interrupted: a signal came.
    """
    with unfinished_run("value", config) as unfinished:
        output = None if config.output is None else unfinished.replaceable(config.output)
        source = format_of(config.data)
        check_outputs(config, source, output, unfinished)
        dataset = read_dataset(source, config.train)
        valued = value_dataset(config, dataset, output, unfinished)
        if config.page is not None:
            write_page_of(valued, source, config.page)
        return valued.report


def value_dataset(
    config: ValueConfig, dataset: Dataset, output: OutputConfig | None, unfinished: Unfinished
) -> Valued:
    """Value a dataset, write the report if it is to be kept, and return it.

    Args:
        config: the settings; its own output is not looked at.
        dataset: what they read (`read_dataset`).
        output: where the report goes, which `check_outputs` has checked; None keeps none.
        unfinished: where the run keeps its state.
    Raises:
        ChgvalError: see the modules that this calls.
        Interrupted: a signal came.
    """
    with prepared(config.data, config.train, dataset) as run:
        progress.settings(value_settings_shown(run, config))
        metadata = metadata_of(run, config)
        accumulator, average, trainer = make_valuing(run, config)
        parts: dict[str, HasState] = {"dataset": dataset, "accumulator": accumulator}
        digests = {"embeddings": digest_of(dataset)} if config.train.frozen else {}
        checkpoint = Checkpoint(unfinished, trainer, parts, metadata, config, digests=digests)
        writer = None if output is None else ReportWriter(output, resumes=trainer.position != (0, 0))

        def keep(record: EpochRecord) -> None:
            if writer is not None and record.signals is not None:
                writer.write_epoch(record.epoch, record.signals, metadata)

        train_to_end(run, checkpoint.records(), keep)
        unseen_ND, seen_ND = observe_average(run, accumulator, average)
    report = make_report(input_rows(dataset), accumulator, unseen_ND, seen_ND, metadata)
    report.metadata.update(epochs=run.recipe.epochs, wall_seconds=round(checkpoint.seconds, 3), finished=True)
    features_ND = (unseen_ND if seen_ND is None else seen_ND).to(torch.float16).cpu().numpy()
    features_ND[list(dataset.problems)] = np.nan  # embeddings of what cannot be read are zeros
    if config.write_features is not None:
        write_array(config.write_features, features_ND)
        report.metadata["features"] = kept_features(config.write_features, features_ND)
    if writer is not None:
        writer.write(report.table, report.metadata)
    if config.write_probs is not None:
        write_array(config.write_probs, accumulator.averaged_probabilities())
    tell_problems(dataset, "they have no value (status 'unreadable' in the report)")
    return Valued(run, average, report, features_ND)


def write_page_of(valued: Valued, source: Format, page: ReportConfig) -> None:
    """Write the review page of a run, if its report has a noise score."""
    report = valued.report
    if not can_be_assessed(report):
        progress.warn("no page: nothing can be said about these labels")
        return
    found = assess(report, DetectConfig(output=None, all_rows=True))
    write_and_tell(report, found, source, page, valued.features_ND)


def check_outputs(
    config: ValueConfig, source: Format, output: OutputConfig | None, unfinished: Unfinished
) -> None:
    """Raise OutputError, before anything is read, where something cannot be written."""
    if output is not None:
        ReportWriter.check(output, config.data.source, resumes=unfinished.resumes)
        check_not_read(source, output)
    for path in config.also_written:
        if not unfinished.is_own(path):
            check_file(path, overwrite=config.overwrites)


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


def value_settings_shown(run: Run, config: ValueConfig) -> list[tuple[str, str]]:
    """Return what a person wants to know of a run that values its samples."""
    signals = "the training steps" if config.mode == "online" else "a pass before each epoch"
    within = ", within each class" if config.per_class else ""
    return [
        *settings_shown(run, config.train),
        ("values", f"{config.utility} values from {signals}{within}"),
    ]

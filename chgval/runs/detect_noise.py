"""`chgval detect-noise`: which labels are probably wrong."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from chgval import progress
from chgval.config import DetectConfig, OutputConfig, page_config
from chgval.detection.rules import REGISTRY as RULES
from chgval.detection.signals import NoiseRate
from chgval.errors import DataError, SettingsError
from chgval.reports.files import is_report, with_metadata, write_table
from chgval.reports.report import Report
from chgval.reports.tables import SUSPECTS_SCHEMA
from chgval.runs.assessment import Assessment, assess, can_be_assessed
from chgval.runs.summaries import NoiseSummary, summarise_noise
from chgval.runs.valued import Input, values_of
from chgval.types import FloatArray, IntArray

if TYPE_CHECKING:  # imports torch, which reports do without
    from chgval.data.dataset import Dataset

# What is read of a values report.
COLUMNS = (
    *("index", "id", "label", "label_name", "value", "loss_mean", "margin_mean"),
    *("noise_score", "noise_score_std", "confident_label"),
    *("suggested_label", "suggested_name", "suggested_probability"),
)


# And for the review page.
PAGE_COLUMNS = ("percentile", "status")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspects:
    """Labels that are probably wrong, and what the command line says of them.

    Attributes:
        table: the rows that were asked for, worst first, as docs/reports.md describes them.
        rate: estimated share of wrong labels, and its interval.
        num_rows: of the dataset.
        report: the values report; of a file, the columns that were needed.
        summary: what a person wants to see.
        values: file of the values report, if there is one.
        num_duplicates: samples with a near-duplicate of another label; None if none were looked for.
        cleaned: what became of the dataset that was written, if one was.
    """

    table: pa.Table
    rate: NoiseRate
    num_rows: int
    report: Report
    summary: NoiseSummary
    values: str | None = None
    num_duplicates: int | None = None
    cleaned: str | None = None


def run_detect_noise(config: DetectConfig) -> Suspects:
    """Find the labels that are probably wrong, write them if there is an output, and return them.

    Raises:
        ChgvalError: the input is neither a report nor a dataset that can be valued, no row has a score, or
            an output is in the way.
    """
    trains = isinstance(config.rule, str) and RULES[config.rule].trains

    def check(dataset: Dataset) -> None:
        from chgval.data.dataset import Embeddings
        from chgval.runs.threshold_samples import check_enough

        _check_relabel(config, several=dataset.annotations is not None)
        if config.duplicates and isinstance(dataset.content, Embeddings):
            raise _needs_images(dataset.source)
        if trains:
            check_enough(dataset)

    if trains and is_report(config.source):
        raise SettingsError(
            f"--threshold {config.rule}: trains twice more; pass the dataset, not its report {config.source}."
        )
    columns = COLUMNS if config.report is None else (*COLUMNS, *PAGE_COLUMNS)
    with values_of(
        "detect-noise",
        config,
        columns,
        in_order=config.report is not None or config.duplicates,
        on_dataset=check,
        needs_training=trains,
    ) as given:
        if given.valued is None:
            _check_relabel(config, several=bool(given.report.verdict.get("annotators")))
        below_threshold_N = _threshold_flags(config, given) if trains else None
        duplicates_N = _conflicts(given, config) if config.duplicates else None
        report = given.report
        all_rows = config.all_rows or config.report is not None  # a page shows unflagged ones too
        assessment = assess(report, dataclasses.replace(config, all_rows=all_rows), below_threshold_N)
        written_N = np.full(len(report), config.all_rows) | assessment.flagged_N
        if duplicates_N is not None:
            written_N |= duplicates_N >= 0
        rows = assessment.order[written_N[assessment.order]]
        table = _suspects(report, assessment, duplicates_N, rows[: config.top])
        metadata = {
            **report.metadata, "command": progress.command(), "rule": config.rule,
            "expected_noise": config.expected_noise, "noise_rate": dataclasses.asdict(assessment.rate),
        }  # fmt: skip
        table = with_metadata(table, metadata)
        if config.output is not None:
            write_table(config.output, table)
        if config.report is not None:
            _write_page(given, assessment, config)
        cleaned = None
        if config.cleaned is not None:
            cleaned = _write_cleaned(given, assessment.flagged_N, config, config.cleaned)
        return Suspects(
            table=table,
            rate=assessment.rate,
            num_rows=len(report),
            report=report,
            summary=summarise_noise(
                report.table,
                assessment.score_N,
                assessment.flagged_N,
                assessment.order,
                assessment.rate,
                duplicates_N,
            ),
            values=given.values,
            num_duplicates=None if duplicates_N is None else int((duplicates_N >= 0).sum()),
            cleaned=cleaned,
        )


def summarise_labels(report: Report) -> NoiseSummary | None:
    """Return what detection with all its defaults finds in a report; None if nothing can be said."""
    if not can_be_assessed(report):
        return None
    found = assess(report, DetectConfig(output=None))
    return summarise_noise(report.table, found.score_N, found.flagged_N, found.order, found.rate)


def _write_page(given: Input, found: Assessment, config: DetectConfig) -> None:
    """Write the review page."""
    from chgval.runs.report import dataset_of_page, features_of_page, write_and_tell  # imports torch

    values = None if given.values is None else OutputConfig(path=given.values)
    page = page_config(config.report, values, config.overwrites)
    if page is None:
        raise ValueError("no page was asked for")
    page = dataclasses.replace(page, dataset=config.dataset)
    source = given.source or dataset_of_page(page, given.report)
    if given.valued is None:
        features_ND = features_of_page(page.features, given.report, page.source)
    else:
        features_ND = given.valued[0].features_ND
    write_and_tell(given.report, found, source, page, features_ND)


def _threshold_flags(config: DetectConfig, given: Input) -> NDArray[np.bool_]:
    """Return which margins lie below those of samples that are labelled wrong on purpose."""
    from chgval.runs.threshold_samples import run_margins, threshold_flags

    if given.valued is None:
        raise ValueError("threshold samples need a dataset")
    valued, unfinished = given.valued

    def margins_of(name: str, marked: Dataset) -> FloatArray:
        return run_margins(name, marked, config.value, unfinished)

    return threshold_flags(valued.run.dataset, config.train.seed, margins_of)


def _conflicts(given: Input, config: DetectConfig) -> IntArray:
    """Return every row's copy with another label, -1 for none.

    Raises:
        ChgvalError: the dataset is not there, is another by now, or has no images.
    """
    from chgval.runs.issues import conflicts_in  # these import torch
    from chgval.runs.rewriting import same_dataset

    report, source = given.report, given.source
    if source is None:
        source = same_dataset(config.source, report.table, report.metadata, config.dataset)
    if source.config.takes_features:
        raise _needs_images(source.source)
    return conflicts_in(source, report.integers("label"))


def _needs_images(source: str) -> SettingsError:
    return SettingsError(
        f"--duplicates: needs images, and {source} holds embeddings; see chgval detect-issues."
    )


def _check_relabel(config: DetectConfig, *, several: bool) -> None:
    """Raise SettingsError where one label of several would have to be written anew."""
    if config.relabel is not None and several:
        raise SettingsError(
            "--relabel: several annotators labelled each row, and none of their labels stands for all; leave "
            "it out, and take consensus_label from the report of chgval value."
        )


def _write_cleaned(given: Input, flagged_N: NDArray[np.bool_], config: DetectConfig, target: Path) -> str:
    """Write the dataset without its flagged rows, or with those of sure suggestions under their new label.

    Returns what became of it, for people.
    """
    from chgval.runs.rewriting import rewrite_rows  # imports torch

    report, relabel = given.report, config.relabel
    sure_N = np.zeros(len(flagged_N), dtype=bool)
    if relabel is not None:
        sure_N = flagged_N & (report.scores("suggested_probability") >= relabel)
    new_labels_N = np.where(sure_N, report.integers("suggested_label"), -1)
    kept_N = ~flagged_N | sure_N
    if not config.force:
        names_N = np.where(sure_N, report["suggested_name"], report["label_name"])
        _check_loss(report.table, names_N, kept_N, target)
    written = rewrite_rows(
        given.source,
        report.table,
        report.metadata,
        kept_N,
        target,
        new_labels_N=new_labels_N,
        link=config.link or "copy",
    )
    relabelled = "" if relabel is None else f", {sure_N.sum():,} of them relabelled"
    return f"{written:,} of {len(report):,} rows kept{relabelled} -> {target}"


def _check_loss(
    report: pa.Table, names_N: NDArray[np.object_], kept_N: NDArray[np.bool_], target: Path
) -> None:
    """Raise DataError where a cleaned dataset would lose over half of its rows, or all rows of a class.

    Args:
        report: of the dataset.
        names_N: new label names of all rows.
        kept_N: which rows are kept.
        target: where the dataset would go.
    """
    losses = []
    if 2 * kept_N.sum() < len(kept_N):
        losses.append(f"{(~kept_N).sum():,} of {len(kept_N):,} rows")
    names, left = set(report["label_name"].to_pylist()), set(names_N[kept_N])
    gone = sorted(name for name in names - left if name is not None)
    if gone:
        more = f" and {len(gone) - 1:,} more classes" if len(gone) > 1 else ""
        losses.append(f"all of class {gone[0]!r}{more}")
    if losses:
        raise DataError(
            f"--cleaned {target}: would lose {' and '.join(losses)}; look at the suspects first, "
            "or pass --force."
        )


def _suspects(
    report: Report, assessment: Assessment, duplicates_N: IntArray | None, rows: IntArray
) -> pa.Table:
    """Return the output: these rows, in this order."""
    score_N, order = assessment.score_N, assessment.order
    rank_N = np.zeros(len(score_N), dtype=np.int64)
    rank_N[order] = np.arange(1, len(order) + 1)
    duplicate_of = np.full(len(rows), -1) if duplicates_N is None else duplicates_N[rows]
    chosen = report.table.take(rows)
    columns = {
        **{name: chosen[name] for name in SUSPECTS_SCHEMA.names if name in chosen.column_names},
        "noise_score": pa.array(score_N[rows], mask=np.isnan(score_N[rows])),
        "margin": chosen["margin_mean"],
        "rank": pa.array(rank_N[rows], mask=np.isnan(score_N[rows])),
        "flagged": assessment.flagged_N[rows],
        "duplicate_of": pa.array(duplicate_of, mask=duplicate_of < 0),
    }
    return pa.table(columns, schema=SUSPECTS_SCHEMA)

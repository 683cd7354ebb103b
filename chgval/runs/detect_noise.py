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
from chgval.config import DetectConfig
from chgval.detection.calibration import calibrated_by, estimate_rate
from chgval.detection.rules import REGISTRY as RULES
from chgval.detection.rules import Judged
from chgval.detection.signals import NoiseRate
from chgval.errors import DataError, SettingsError
from chgval.reports.files import is_report, report_name, with_metadata, write_table
from chgval.reports.report import Report
from chgval.reports.tables import SUSPECTS_SCHEMA
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
        from chgval.runs.duplicates import check_images
        from chgval.runs.threshold_samples import check_enough

        _check_relabel(config, several=dataset.annotations is not None)
        if config.duplicates:
            check_images(dataset)
        if trains:
            check_enough(dataset)

    if is_report(config.source):
        _check_needs_no_dataset(config, trains=trains)
    needs_training = trains or config.duplicates
    with values_of(
        "detect-noise", config, COLUMNS, in_order=False, on_dataset=check, needs_training=needs_training
    ) as given:
        if given.valued is None:
            _check_relabel(config, several=bool(given.report.verdict.get("annotators")))
        below_threshold_N = _threshold_flags(config, given) if trains else None
        duplicates_N = _duplicates(given) if config.duplicates else None
        report = given.report
        assessment = assess(report, config, below_threshold_N)
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
    if not (np.isfinite(report.noise_scores) & np.isfinite(report.values)).any():
        return None
    found = assess(report, DetectConfig(output=None))
    return summarise_noise(report.table, found.score_N, found.flagged_N, found.order, found.rate)


def _check_needs_no_dataset(config: DetectConfig, *, trains: bool) -> None:
    """Raise SettingsError where a report alone is not enough."""
    if trains:
        raise SettingsError(
            f"--threshold {config.rule}: trains twice more; pass the dataset, not its report {config.source}."
        )
    if config.duplicates:
        raise SettingsError(
            f"--duplicates: looks at images; pass the dataset, not its report {config.source}."
        )


def _threshold_flags(config: DetectConfig, given: Input) -> NDArray[np.bool_]:
    """Return which margins lie below those of samples that are labelled wrong on purpose."""
    from chgval.runs.threshold_samples import run_margins, threshold_flags

    if given.valued is None:
        raise ValueError("threshold samples need a dataset")
    valued, unfinished = given.valued

    def margins_of(name: str, marked: Dataset) -> FloatArray:
        return run_margins(name, marked, config.value, unfinished)

    return threshold_flags(valued.run.dataset, config.train.seed, margins_of)


def _duplicates(given: Input) -> IntArray:
    """Return every row's near-duplicate with another label, -1 for none."""
    from chgval.runs.duplicates import find_duplicates

    if given.valued is None:
        raise ValueError("near-duplicates are found in a dataset")
    valued, _ = given.valued
    return find_duplicates(valued.run, valued.average.model)


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


@dataclass(frozen=True, slots=True)
class Assessment:
    """What was decided about every row of a report.

    Attributes:
        score_N: noise scores; NaN where a row has none.
        flagged_N: which rows are flagged.
        order: the rows that are asked for and all that are more suspicious, the most suspicious first; rows
            without a score last.
        rate: estimated share of wrong labels.
    """

    score_N: FloatArray
    flagged_N: NDArray[np.bool_]
    order: IntArray
    rate: NoiseRate


def assess(
    report: Report, config: DetectConfig, below_threshold_N: NDArray[np.bool_] | None = None
) -> Assessment:
    """Score the rows of a values report, rank them and cut.

    Args:
        report: COLUMNS of a values report.
        config: the score and what decides on flags.
        below_threshold_N: which margins are below those of threshold samples, if these were trained.
    Raises:
        DataError: no row has a score.
    """
    score_N, value_N = report.noise_scores, report.values
    known = np.flatnonzero(np.isfinite(score_N) & np.isfinite(value_N))
    if not len(known):
        raise DataError(f"{report_name(config.source)}: no row has a noise score; nothing was valued in it.")
    if config.score == "chg":
        score_N[known] = calibrated_by(value_N[known], score_N[known])
    rate = estimate_rate(score_N[known], report.scores("noise_score_std")[known])
    flagged_N = np.zeros(len(score_N), dtype=bool)
    if config.expected_noise is None:
        rule = config.rule
        if isinstance(rule, float):
            flagged_N[known] = score_N[known] >= rule
        else:
            judged = Judged(
                score_K=score_N[known],
                value_K=value_N[known],
                loss_K=report.scores("loss_mean")[known],
                label_K=report.integers("label")[known],
                confident_label_K=report.integers("confident_label")[known],
                below_threshold_K=None if below_threshold_N is None else below_threshold_N[known],
            )
            flagged_N[known] = RULES[rule].flag(judged)
    if config.all_rows or config.duplicates or config.expected_noise is not None:
        ranked = np.arange(len(score_N))
    else:  # sorting a million rows takes longer than all else that is done with them
        ranked = np.flatnonzero(score_N >= score_N[flagged_N].min(initial=np.inf))
    # Samples of one score, as those have that nothing can be said about, are ordered by their value.
    ties_N = np.where(np.isfinite(score_N), value_N, 0)[ranked]
    order = ranked[np.lexsort((ties_N, -score_N[ranked]))]
    if config.expected_noise is not None:
        flagged_N[order[: round(config.expected_noise * len(known))]] = True
    return Assessment(score_N, flagged_N, order, rate)


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

"""`chgval detect-noise`: which labels are probably wrong."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from chgval.config import DataConfig, DetectConfig, Rule
from chgval.console import Console
from chgval.detection.rules import (
    automatic_cut,
    calibrated_by,
    estimate_rate,
    mixture_flags,
    two_means_flags,
)
from chgval.detection.verdict import annotators_shown, notes_on
from chgval.errors import DataError, SettingsError
from chgval.files import check_apart
from chgval.records import FloatArray, IntArray, NoiseRate, NoiseSummary, SuspectLine
from chgval.reports import (
    SUSPECTS_SCHEMA,
    check_output,
    in_input_order,
    is_report,
    read_report,
    report_name,
    with_metadata,
    write_table,
)

if TYPE_CHECKING:  # imports torch, which reports do without
    from chgval.data.dataset import Dataset
    from chgval.runs.checkpoint import Unfinished

SHOWN_SUSPECTS = 5
SHOWN_CLASSES = 20
SHOWN_PAIRS = 5

# What is read of a values report.
COLUMNS = (
    *("index", "id", "label", "label_name", "value", "loss_mean", "margin_mean"),
    *("noise_score", "noise_score_std", "confident_label"),
    *("suggested_label", "suggested_name", "suggested_probability"),
)


def run_detect_noise(config: DetectConfig, console: Console, *, command: str) -> NoiseRate:
    """Find the labels that are probably wrong, write them, and return the estimated share of wrong labels.

    Args:
        config: the settings.
        console: where to tell what was found.
        command: the command line, for metadata.
    Raises:
        ChgvalError: the input is neither a report nor a dataset that can be valued, no row has a score, or
            an output is in the way.
    """
    source = config.value.data.source
    if config.cleaned is not None:
        check_apart(config.cleaned, config.files)
    given = _read_report(config) if is_report(source) else _value_dataset(config, console, command)
    report = given.report
    assessment = assess(report, config, given.aum_flags_N)
    rate = assessment.rate
    metadata = {
        **given.metadata, "command": command, "rule": config.rule, "expected_noise": config.expected_noise,
        "noise_rate": dataclasses.asdict(rate),
    }  # fmt: skip
    written_N = np.full(report.num_rows, config.all_rows) | assessment.flagged_N
    if given.duplicates_N is not None:
        written_N |= given.duplicates_N >= 0
    rows = assessment.order[written_N[assessment.order]]
    suspects = _suspects(report, assessment, given.duplicates_N, rows[: config.top])
    write_table(config.output, with_metadata(suspects, metadata))
    console.noise(summarise(report, assessment))
    verdict = given.metadata.get("verdict", {})
    console.annotators(annotators_shown(verdict))
    console.say("")
    console.notes(notes_on(verdict))
    if given.duplicates_N is not None:
        console.say(f"{(given.duplicates_N >= 0).sum():,} samples have a near-duplicate with another label")
    target = "standard output" if config.output.to_stdout else config.output.path
    console.say(f"{suspects.num_rows:,} of {report.num_rows:,} rows -> {target}")
    if config.cleaned is not None:
        _write_cleaned(given, assessment.flagged_N, config, config.cleaned, console)
    if given.unfinished is not None:
        given.unfinished.remove()
    return rate


@dataclass(frozen=True, slots=True)
class _Input:
    """What the user gave, read or valued.

    Attributes:
        report, metadata: COLUMNS of the values report.
        data: the dataset that it is about.
        aum_flags_N: which rows the rule aum flags, if that is the rule.
        duplicates_N: every row's near-duplicate with another label, -1 for none, if they were looked for.
        unfinished: where the runs behind it keep their state, if it was valued.
    """

    report: pa.Table
    metadata: dict[str, Any]
    data: DataConfig
    aum_flags_N: NDArray[np.bool_] | None = None
    duplicates_N: IntArray | None = None
    unfinished: Unfinished | None = None


def _read_report(config: DetectConfig) -> _Input:
    source = config.value.data.source
    if config.rule == "aum":
        raise SettingsError(f"--threshold aum: trains twice more; pass the dataset, not its report {source}.")
    if config.duplicates:
        raise SettingsError(f"--duplicates: looks at images; pass the dataset, not its report {source}.")
    check_output(config.output, source)
    report, metadata = read_report(source, COLUMNS)
    _check_relabel(config, several=bool(metadata.get("verdict", {}).get("annotators")))
    data = config.value.data
    if config.cleaned is not None:
        from chgval.runs.rewriting import dataset_behind  # imports torch

        report = in_input_order(report, source)
        data = dataset_behind(
            source,
            report,
            metadata,
            config.cleaned,
            dataset=config.dataset,
            overwrite=config.output.overwrite,
        )
    return _Input(report, metadata, data)


def _value_dataset(config: DetectConfig, console: Console, command: str) -> _Input:
    # These import torch, which reports do without.
    from chgval.data.open import check_not_read
    from chgval.data.rewrite import check_rewritable
    from chgval.runs.checkpoint import find_unfinished
    from chgval.runs.duplicates import check_images, find_duplicates
    from chgval.runs.threshold_samples import check_enough, run_margins, threshold_flags
    from chgval.runs.value import check_outputs, read_dataset, value_dataset

    if config.dataset is not None:
        raise SettingsError(f"--dataset: is for a report; {config.value.data.source} is a dataset itself.")
    unfinished = find_unfinished(
        "detect-noise", config, config.value.resume, console, overwrite=config.output.overwrite
    )
    data = config.value.data
    if config.cleaned is not None:
        check_rewritable(
            data,
            config.cleaned,
            overwrite=unfinished.overwrites,
            may_be_there=unfinished.may_have_written(config.cleaned),
        )
    check_output(unfinished.replaceable(config.output), data.source)
    check_not_read(data, config.output)
    values = None if config.values is None else unfinished.replaceable(config.values)
    check_outputs(config.value, values, unfinished)
    dataset = read_dataset(config.value, console)
    _check_relabel(config, several=dataset.annotations is not None)
    if config.duplicates:
        check_images(dataset)
    if config.rule == "aum":
        check_enough(dataset)
    valued = value_dataset(config.value, dataset, values, console, unfinished, command=command)

    def margins_of(name: str, marked: Dataset) -> FloatArray:
        return run_margins(name, marked, config.value, console, unfinished, command=command)

    return _Input(
        report=valued.table.select(COLUMNS),
        metadata=valued.metadata,
        data=data,
        aum_flags_N=threshold_flags(dataset, config.value.train.seed, margins_of)
        if config.rule == "aum"
        else None,
        duplicates_N=find_duplicates(valued.run) if config.duplicates else None,
        unfinished=unfinished,
    )


def _check_relabel(config: DetectConfig, *, several: bool) -> None:
    """Raise SettingsError where one label of several would have to be written anew."""
    if config.relabel is not None and several:
        raise SettingsError(
            "--relabel: several annotators labelled each row, and none of their labels stands for all; leave "
            "it out, and take consensus_label from the report of chgval value."
        )


def _write_cleaned(
    given: _Input, flagged_N: NDArray[np.bool_], config: DetectConfig, target: Path, console: Console
) -> None:
    """Write the dataset without its flagged rows, or with those of sure suggestions under their new label."""
    from chgval.runs.rewriting import rewrite_rows  # imports torch

    report, relabel = given.report, config.relabel
    sure_N = np.zeros(len(flagged_N), dtype=bool)
    if relabel is not None:
        sure_N = flagged_N & (_figures(report, "suggested_probability") >= relabel)
    suggested_N = report["suggested_label"].fill_null(-1).to_numpy()
    new_labels_N = np.where(sure_N, suggested_N, -1)
    kept_N = ~flagged_N | sure_N
    if not config.force:
        names_N = np.where(sure_N, report["suggested_name"].to_numpy(), report["label_name"].to_numpy())
        _check_loss(report, names_N, kept_N, target)
    written = rewrite_rows(
        given.data, report, given.metadata, kept_N, target, console, new_labels_N=new_labels_N
    )
    relabelled = "" if relabel is None else f", {sure_N.sum():,} of them relabelled"
    console.say(f"{written:,} of {report.num_rows:,} rows kept{relabelled} -> {target}")


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

    @property
    def flagged_rows(self) -> IntArray:
        """The flagged rows, the most suspicious first."""
        return self.order[self.flagged_N[self.order]]


def assess(
    report: pa.Table, config: DetectConfig, aum_flags_N: NDArray[np.bool_] | None = None
) -> Assessment:
    """Score the rows of a values report, rank them and cut.

    Args:
        report: COLUMNS of a values report.
        config: the score and what decides on flags.
        aum_flags_N: which rows the rule aum flags, if that is the rule.
    Raises:
        DataError: no row has a score.
    """
    score_N, value_N = _figures(report, "noise_score"), _figures(report, "value")
    known = np.flatnonzero(np.isfinite(score_N) & np.isfinite(value_N))
    if not len(known):
        name = report_name(config.value.data.source)
        raise DataError(f"{name}: no row has a noise score; nothing was valued in it.")
    if config.score == "chg":
        score_N[known] = calibrated_by(value_N[known], score_N[known])
    rate = estimate_rate(score_N[known], _figures(report, "noise_score_std")[known])
    flagged_N = np.zeros(len(score_N), dtype=bool)
    if aum_flags_N is not None:
        flagged_N[known] = aum_flags_N[known]
    elif config.expected_noise is None:
        flagged_N[known] = _flags(report, known, score_N, value_N, config.rule)
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


def _flags(
    report: pa.Table, known: IntArray, score_N: FloatArray, value_N: FloatArray, rule: Rule | float
) -> NDArray[np.bool_]:
    match rule:
        case "auto":
            return score_N[known] >= automatic_cut(score_N[known])
        case "chg":
            return two_means_flags(value_N[known])
        case "gmm":
            return mixture_flags(_figures(report, "loss_mean")[known])
        case "confident":
            confident_N: IntArray = report["confident_label"].fill_null(-1).to_numpy()[known]
            labels_N: IntArray = report["label"].to_numpy()[known]
            flags_N: NDArray[np.bool_] = (confident_N >= 0) & (confident_N != labels_N)
            return flags_N
        case _:
            return score_N[known] >= float(rule)


def _suspects(
    report: pa.Table, assessment: Assessment, duplicates_N: IntArray | None, rows: IntArray
) -> pa.Table:
    """Return the output: these rows, in this order."""
    score_N, order = assessment.score_N, assessment.order
    rank_N = np.zeros(len(score_N), dtype=np.int64)
    rank_N[order] = np.arange(1, len(order) + 1)
    duplicate_of = np.full(len(rows), -1) if duplicates_N is None else duplicates_N[rows]
    chosen = report.take(rows)
    columns = {
        **{name: chosen[name] for name in SUSPECTS_SCHEMA.names if name in chosen.column_names},
        "noise_score": pa.array(score_N[rows], mask=np.isnan(score_N[rows])),
        "margin": chosen["margin_mean"],
        "rank": pa.array(rank_N[rows], mask=np.isnan(score_N[rows])),
        "flagged": assessment.flagged_N[rows],
        "duplicate_of": pa.array(duplicate_of, mask=duplicate_of < 0),
    }
    return pa.table(columns, schema=SUSPECTS_SCHEMA)


def summarise(report: pa.Table, assessment: Assessment) -> NoiseSummary:
    """Pick out of the assessment what a person wants to see."""
    known = np.isfinite(assessment.score_N)
    scored = pa.table(
        {
            "label_name": report["label_name"],
            "suggested_name": report["suggested_name"],
            "flagged": assessment.flagged_N.astype(np.int64),
            "score": assessment.score_N,
        }
    ).filter(known)
    classes = scored.group_by("label_name").aggregate(
        [("score", "count"), ("flagged", "sum"), ("score", "mean")]
    )
    classes = classes.sort_by([("flagged_sum", "descending"), ("label_name", "ascending")])
    suggested = pc.and_(pc.equal(scored["flagged"], 1), pc.is_valid(scored["suggested_name"]))
    pairs = scored.filter(suggested).group_by(["label_name", "suggested_name"])
    counted = pairs.aggregate([([], "count_all")]).sort_by(
        [("count_all", "descending"), ("label_name", "ascending"), ("suggested_name", "ascending")]
    )
    worst = assessment.flagged_rows[:SHOWN_SUSPECTS]
    lines = report.take(worst)
    return NoiseSummary(
        rate=assessment.rate,
        num_assessed=int(known.sum()),
        num_flagged=int(assessment.flagged_N.sum()),
        classes=[
            (row["label_name"], row["score_count"], row["flagged_sum"], row["score_mean"])
            for row in classes.slice(0, SHOWN_CLASSES).to_pylist()
        ],
        hidden_classes=max(0, classes.num_rows - SHOWN_CLASSES),
        pairs=[tuple(row.values()) for row in counted.slice(0, SHOWN_PAIRS).to_pylist()],
        suspects=[
            SuspectLine(
                id=line["id"],
                label_name=line["label_name"],
                suggested_name=line["suggested_name"] or "",
                noise_score=float(assessment.score_N[row]),
            )
            for row, line in zip(worst, lines.to_pylist(), strict=True)
        ],
    )


def _figures(report: pa.Table, name: str) -> FloatArray:
    """Return a copy of a column of numbers, NaN for null."""
    figures: FloatArray = pc.fill_null(report[name], np.nan).to_numpy().copy()
    return figures

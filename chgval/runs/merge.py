"""`chgval merge`: what several runs on the same rows say together.

Shape legend: R runs, N rows, C classes, A annotators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import chgval
from chgval import progress
from chgval.config import MergeConfig
from chgval.detection.signals import Annotations, Consensus, NoiseSignals
from chgval.detection.verdict import verdict_of
from chgval.errors import DataError
from chgval.files import locked
from chgval.reports.files import (
    check_output,
    report_name,
    with_metadata,
    write_table,
)
from chgval.reports.report import Report, read_whole_report
from chgval.reports.tables import InputRows, annotations_of, annotators_in, values_table
from chgval.types import FloatArray, IntArray
from chgval.valuation.signals import SIGNAL_NAMES, RunSignals

ADVICE = "only runs on the same rows can be put together"
# Settings under which values are of another kind.
KINDS = ("utility", "per_class")


def run_merge(config: MergeConfig) -> Report:
    """Write the report of what several runs say together, and return it.

    Raises:
        ChgvalError: a report cannot be read, is about other rows or values of another kind, or the output is
            in the way.
    """
    with locked(*config.outputs):
        if config.output is not None:
            check_output(config.output, *config.inputs)
        reports = [read_whole_report(source) for source in config.sources]
        check_same_rows(reports, config.sources)
        _check_annotators(reports, config.sources)
        _tell_repeated(reports, config.sources)
        merged = merge(reports, config.sources)
        if config.output is not None:
            write_table(config.output, with_metadata(merged.table, merged.metadata))
        return merged


def merge(reports: Sequence[Report], sources: Sequence[str]) -> Report:
    """Return the mean of what runs say of the same rows, and its standard error over the runs.

    Noise scores are probabilities, so their mean is one, too; its standard deviation is that of the noise
    models of each run and that between the runs. Classes that are predicted or suggested are those of the
    highest mean probability, as far as reports tell: each holds that of one class only.

    Args:
        reports: of the runs, in input order, about the same rows.
        sources: what they are called.
    """
    first = reports[0]
    names = _class_names(reports)
    labels_N, per_class = first.integers("label"), bool(_setting(first, "per_class"))
    value_RN = np.stack([report.values for report in reports])
    num_values_N = np.isfinite(value_RN).sum(0)
    value_std_N = _std_of(value_RN)
    predicted_N, predicted_probability_N = _most_probable(reports, "predicted", len(names))
    signals = RunSignals(
        num_epochs_N=np.sum([report.integers("num_epochs") for report in reports], axis=0),
        value_N=_mean_of(value_RN),
        value_std_N=value_std_N,
        value_stderr_N=value_std_N / np.sqrt(np.maximum(num_values_N, 1)),
        means={name: _mean_of(_stacked(reports, f"{name}_mean")) for name in SIGNAL_NAMES},
        forgetting_events_N=np.sum([r.integers("forgetting_events").clip(0) for r in reports], axis=0),
        predicted_label_N=predicted_N,
        predicted_probability_N=predicted_probability_N,
    )
    score_RN, std_RN = _stacked(reports, "noise_score"), _stacked(reports, "noise_score_std")
    suggested_N, suggested_probability_N = _most_probable(reports, "suggested", len(names))
    annotations, consensus = _annotations(reports, names)
    verdicts = [report.verdict for report in reports if report.verdict]
    noise = NoiseSignals(
        noise_score_N=_mean_of(score_RN),
        noise_score_std_N=np.sqrt(_mean_of(std_RN**2) + _spread_of(score_RN)),
        suggested_label_N=suggested_N,
        suggested_probability_N=suggested_probability_N,
        confident_label_N=_commonest(np.stack([r.integers("confident_label") for r in reports]), len(names)),
        explained=float(np.mean([verdict["explained"] for verdict in verdicts])) if verdicts else 0.0,
        memorised=float(np.mean([verdict["memorised"] for verdict in verdicts])) if verdicts else 0.0,
        consensus=consensus,
    )
    status_RN = np.stack([report["status"] for report in reports])
    best_N = (status_RN == "valued").argmax(0)
    rows = InputRows(
        ids=list(first["id"]),
        labels_N=labels_N,
        class_names=names,
        statuses=status_RN[best_N, np.arange(len(first))].tolist(),
        reasons=[
            None if count else reason for count, reason in zip(num_values_N, first["reason"], strict=True)
        ],
        annotations=annotations,
    )
    table = values_table(rows, signals, noise, per_class=per_class)
    verdict = verdict_of(noise, labels_N, predicted_N, names, annotations) if verdicts else {}
    return Report(table, {**_metadata(reports, sources), "class_names": names, "verdict": verdict})


def check_same_rows(reports: Sequence[Report], sources: Sequence[str], *, same_labels: bool = True) -> None:
    """Raise DataError where reports are about other rows, or, if wanted, other labels or kinds of values."""
    first, name = reports[0], report_name(sources[0])
    ids, label_names, classes = first["id"], first["label_name"], _classes(first)
    for report, source in zip(reports[1:], sources[1:], strict=True):
        what = f"{report_name(source)}: "
        if len(report) != len(first):
            raise DataError(f"{what}has {len(report):,} rows where {name} has {len(first):,}; {ADVICE}.")
        differs_N = report["id"] != ids
        if same_labels:
            differs_N |= report["label_name"] != label_names
        if differs_N.any():
            row = int(differs_N.argmax())
            raise DataError(
                f"{what}row {row:,} is {report['id'][row]} ({report['label_name'][row]}), and is {ids[row]} "
                f"({label_names[row]}) in {name}; {ADVICE}."
            )
        if not same_labels:
            continue
        if (classes or _classes(report)) != (_classes(report) or classes):
            raise DataError(f"{what}has other classes, or in another order, than {name}; {ADVICE}.")
        for kind in KINDS:
            known = None not in (_setting(report, kind), _setting(first, kind))
            if known and _setting(report, kind) != _setting(first, kind):
                raise DataError(
                    f"{what}its values are of another kind ({kind} is {_setting(report, kind)}, and is "
                    f"{_setting(first, kind)} in {name}); merge values of one kind."
                )


def _check_annotators(reports: Sequence[Report], sources: Sequence[str]) -> None:
    """Raise DataError where runs looked at labels of other annotators, or are several runs themselves."""
    for report, source in zip(reports, sources, strict=True):
        if "merged" in report.metadata:
            raise DataError(f"{report_name(source)}: is merged already; merge the reports of its runs.")
        if annotators_in(report.table) != annotators_in(reports[0].table):
            raise DataError(
                f"{report_name(source)}: has labels of other annotators than {report_name(sources[0])}; "
                f"{ADVICE}."
            )


def _tell_repeated(reports: Sequence[Report], sources: Sequence[str]) -> None:
    for place, report in enumerate(reports):
        for before in range(place):
            if np.array_equal(report.values, reports[before].values, equal_nan=True):
                progress.warn(
                    f"{report_name(sources[place])} has the values of {report_name(sources[before])}: the "
                    "same run twice says nothing new; give each run its own --seed"
                )
                return


def _classes(report: Report) -> list[str]:
    return list(report.metadata.get("class_names", []))


def _class_names(reports: Sequence[Report]) -> list[str]:
    known = [_classes(report) for report in reports if _classes(report)]
    return known[0] if known else max((report.class_names for report in reports), key=len)


def _setting(report: Report, name: str) -> object:
    """Return a setting of the run behind a report, of the command line or of a tracker; None if unknown."""
    settings = report.metadata.get("settings", {})
    found: object = settings.get("tracker", settings).get(name)
    return found


def _metadata(reports: Sequence[Report], sources: Sequence[str]) -> dict[str, Any]:
    """Return what is known of the runs together; settings and features are those of one."""
    kept = ("settings", "class_names", "fingerprint", "root", "libraries", "features")
    metadata = next((report.metadata for report in reports if report.metadata), {})
    metadata = next((report.metadata for report in reports if "features" in report.metadata), metadata)
    runs = [
        {
            "report": report_name(source),
            **{name: report.metadata.get(name) for name in ("command", "seed", "epochs", "wall_seconds")},
        }
        for report, source in zip(reports, sources, strict=True)
    ]
    return {
        **{name: metadata[name] for name in kept if name in metadata},
        "version": chgval.__version__,
        "command": progress.command(),
        "merged": runs,
        "epochs": sum(run["epochs"] or 0 for run in runs),
        "finished": True,
    }


def _stacked(reports: Sequence[Report], column: str) -> FloatArray:
    return np.stack([report.scores(column) for report in reports])


def _mean_of(number_RN: FloatArray) -> FloatArray:
    """Return means over the runs that say something; NaN where none does."""
    known_RN = np.isfinite(number_RN)
    sum_N = np.where(known_RN, number_RN, 0).sum(0)
    count_N = known_RN.sum(0)
    mean_N: FloatArray = np.where(count_N > 0, sum_N / np.maximum(count_N, 1), np.nan)
    return mean_N


def _spread_of(number_RN: FloatArray) -> FloatArray:
    """Return mean squared differences from the mean over the runs that say something."""
    return _mean_of((number_RN - _mean_of(number_RN)) ** 2)


def _std_of(number_RN: FloatArray) -> FloatArray:
    """Return standard deviations over runs (divided by n - 1); NaN where fewer than two say something."""
    count_N = np.isfinite(number_RN).sum(0)
    std_N: FloatArray = np.sqrt(_spread_of(number_RN) * count_N / np.maximum(count_N - 1, 1))
    return np.where(count_N > 1, std_N, np.nan)


def _most_probable(reports: Sequence[Report], what: str, num_classes: int) -> tuple[IntArray, FloatArray]:
    """Return the class of the highest mean probability of each row, and that; -1 and NaN where none is."""
    label_RN = np.stack([report.integers(f"{what}_label") for report in reports])
    probability_RN = _stacked(reports, f"{what}_probability")
    known_RN = (label_RN >= 0) & np.isfinite(probability_RN)
    total_N = np.zeros((label_RN.shape[1], num_classes))
    run, row = np.nonzero(known_RN)
    np.add.at(total_N, (row, label_RN[run, row]), probability_RN[run, row])
    count_N = known_RN.sum(0)
    label_N: IntArray = np.where(count_N > 0, total_N.argmax(1), -1)
    return label_N, np.where(count_N > 0, total_N.max(1) / np.maximum(count_N, 1), np.nan)


def _commonest(label_RN: IntArray, num_classes: int) -> IntArray:
    """Return the class that most runs name for each row; -1 where most name none."""
    count_NC = np.zeros((label_RN.shape[1], num_classes + 1), dtype=np.int64)
    for label_N in label_RN:
        count_NC[np.arange(len(label_N)), label_N + 1] += 1
    commonest_N: IntArray = count_NC.argmax(1) - 1
    return commonest_N


def _annotations(
    reports: Sequence[Report], names: Sequence[str]
) -> tuple[Annotations | None, Consensus | None]:
    """Return the labels of several annotators, if there are any, and what all runs say of them."""
    told = [who["name"] for who in reports[0].verdict.get("annotators", [])]
    annotations = annotations_of(reports[0].table, names, told)
    if annotations is None:
        return None, None
    label_N, probability_N = _most_probable(reports, "consensus", len(names))
    scores = [_mean_of(_stacked(reports, f"noise_score_of_{name}")) for name in annotations.names]
    consensus = Consensus(label_N=label_N, probability_N=probability_N, scores_NA=np.stack(scores, axis=1))
    return annotations, consensus

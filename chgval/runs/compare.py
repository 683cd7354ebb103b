"""`chgval compare`: trainings side by side, or how two reports rank the same rows.

Shape legend: N rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import rankdata, spearmanr

from chgval.config import CompareConfig, DetectConfig
from chgval.errors import ChgvalError, DataError, first_line
from chgval.files import METRICS_FILE, TRAINING_FILE, check_file, locked, output_errors, replacing
from chgval.reports.files import is_report, report_name
from chgval.reports.html import render_comparison
from chgval.reports.plots import as_svg, check_folder, check_plots, learning_plot, ranks_plot, save_plots
from chgval.reports.report import Report, read_whole_report
from chgval.runs.assessment import assess, can_be_assessed
from chgval.runs.merge import check_same_rows
from chgval.types import FloatArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Share of the rows that selection would keep, for how far two reports would keep the same.
KEPT_SHARE = 0.3
# Rows on which two reports differ most.
MOST_DIFFERENT = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Things side by side.

    Attributes:
        headings: of the columns.
        lines: of the table, a text for each column.
        facts: the same as numbers, by name, for other programs.
        different: of two reports, the id of rows that they rank most differently, and their percentiles.
        figures: curves, by name, if they were asked for.
    """

    headings: list[str]
    lines: Sequence[tuple[str, ...]]
    facts: list[dict[str, object]]
    different: list[tuple[str, str, str, str]] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)


def run_compare(config: CompareConfig) -> Comparison:
    """Compare trainings, or two reports, and write a page or figures of it, if they were asked for.

    Raises:
        ChgvalError: something named is neither, or the reports are about other rows, or an output is in the
            way.
    """
    with locked(*config.outputs):
        draws = config.path is not None or config.plots is not None
        if draws:
            check_plots()
        if config.path is not None:
            check_file(config.path, overwrite=config.overwrite)
        if all((Path(source) / TRAINING_FILE).is_file() for source in config.sources):
            found = _compare_trainings(config.sources, draws=draws)
        elif all(is_report(source) for source in config.sources):
            found = _compare_reports(config.sources, draws=draws)
        else:
            raise _neither(config.sources)
        if config.plots is not None:
            check_folder(config.plots, list(found.figures), overwrite=config.overwrite)
            save_plots(found.figures, config.plots)
        if config.path is not None:
            figures = {name: as_svg(figure) for name, figure in found.figures.items()}
            text = render_comparison(found.headings, found.lines, found.different, figures)
            with output_errors(config.path), replacing(config.path) as file:
                file.write(text.encode("utf-8", "backslashreplace"))
        return found


def _neither(sources: Sequence[str]) -> ChgvalError:
    for source in sources:
        if not is_report(source) and not (Path(source) / TRAINING_FILE).is_file():
            return DataError(
                f"{source}: is neither the folder of a training nor a values report; compare outputs of "
                "chgval train, or of chgval value."
            )
    return DataError(f"{' '.join(sources)}: some are trainings, some reports; compare like with like.")


def _check_different(sources: Sequence[str]) -> None:
    """Raise DataError where something is named twice."""
    named: dict[Path, str] = {}
    for source in sources:
        path = Path(source).resolve()
        if path in named:
            raise DataError(f"{source}: is {named[path]}; name each once.")
        named[path] = source


def _compare_trainings(sources: Sequence[str], *, draws: bool) -> Comparison:
    _check_different(sources)
    trainings = [_training(Path(source)) for source in sources]
    facts: list[dict[str, object]] = []
    for source, (known, metrics) in zip(sources, trainings, strict=True):
        settings, test = known["settings"], known.get("test") or {}
        facts.append(
            {
                "training": source,
                "arch": settings["train"]["arch"],
                "strategy": settings["strategy"],
                "epochs": len(metrics["epoch"]),
                "samples": metrics["num_samples"][-1] if metrics["num_samples"] else 0,
                "seconds": float(np.sum(metrics["seconds"])),
                "accuracy": test.get("accuracy"),
                "loss": test.get("loss"),
                "calibration_error": test.get("calibration_error"),
                "finished": "train_seconds" in known,
                "target": known.get("target"),
            }
        )
    lines = [
        (
            str(fact["training"]) + ("" if fact["finished"] else " (unfinished)"),
            str(fact["arch"]),
            str(fact["strategy"]),
            f"{fact['epochs']:,}",
            f"{fact['samples']:,}",
            f"{fact['seconds']:,.1f}",
            _share(fact["accuracy"]),
            _decimal(fact["loss"]),
            _decimal(fact["calibration_error"]),
        )
        for fact in facts
    ]
    figures = {}
    if draws:
        curves: dict[str, tuple[FloatArray, FloatArray]] = {}
        times: dict[str, tuple[FloatArray, FloatArray]] = {}
        for source, (_, metrics) in zip(sources, trainings, strict=True):
            accuracy = np.array(metrics["test_accuracy"], dtype=float)
            tested = np.isfinite(accuracy)
            if tested.any():
                curves[source] = np.array(metrics["epoch"], dtype=float)[tested], accuracy[tested]
                times[source] = np.cumsum(metrics["seconds"])[tested], accuracy[tested]
        if curves:
            figures = {
                "accuracy-by-epoch": learning_plot(curves, "epoch"),
                "accuracy-by-time": learning_plot(times, "seconds of training"),
            }
    headings = ["training", "model", "strategy", "epochs", "samples", "seconds", "accuracy", "loss", "ECE"]
    return Comparison(headings=headings, lines=lines, facts=facts, figures=figures)


def _training(folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return what a training says of itself, and its metrics by column.

    Raises:
        DataError: they cannot be read.
    """
    try:
        known = json.loads((folder / TRAINING_FILE).read_text("utf-8"))
        known["settings"]["train"]["arch"], known["settings"]["strategy"]  # whether they are there
        path = folder / METRICS_FILE
        columns = ("epoch", "num_samples", "seconds", "test_accuracy")
        if not path.is_file():
            return known, {name: [] for name in columns}
        return known, pq.read_table(path, columns=list(columns)).to_pydict()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{folder}: cannot be read as a training ({first_line(error)}); expected the output of chgval "
            "train."
        ) from error


def _compare_reports(sources: Sequence[str], *, draws: bool) -> Comparison:
    if len(sources) != 2:
        raise DataError(f"{' '.join(sources)}: are {len(sources)} reports; compare two, or merge them.")
    reports = [read_whole_report(source) for source in sources]
    check_same_rows(reports, sources, same_labels=False)
    facts: list[dict[str, object]] = []
    figures = {}
    for what in ("value", "noise_score"):
        first_N, second_N = (report.scores(what) for report in reports)
        both_N = np.isfinite(first_N) & np.isfinite(second_N)
        first, second = first_N[both_N], second_N[both_N]
        correlation = float(spearmanr(first, second).statistic) if len(first) > 1 else np.nan
        number = correlation if np.isfinite(correlation) else None  # JSON has no NaN
        facts.append({"what": f"rank correlation of {what}s", "number": number, "rows": len(first)})
        if draws and len(first):
            names = (report_name(sources[0]), report_name(sources[1]))
            figures[what.replace("_", "-")] = ranks_plot(
                _percentiles(first), _percentiles(second), names, what.replace("_", " ")
            )
        if what == "value" and len(first):
            count = max(1, round(KEPT_SHARE * len(first)))
            kept = [set(np.argsort(-part, kind="stable")[:count].tolist()) for part in (first, second)]
            share = len(kept[0] & kept[1]) / count
            facts.append({"what": f"in common of the best {KEPT_SHARE:.0%}", "number": share, "rows": count})
    if all(can_be_assessed(report) for report in reports):
        flagged = [assess(report, DetectConfig(output=None, all_rows=True)).flagged_N for report in reports]
        either, both = (flagged[0] | flagged[1]).sum(), (flagged[0] & flagged[1]).sum()
        for source, flags_N in zip(sources, flagged, strict=True):
            facts.append(
                {
                    "what": f"flagged by {report_name(source)}",
                    "number": float(flags_N.mean()),
                    "rows": int(flags_N.sum()),
                }
            )
        shared = float(both / either) if either else 1.0
        facts.append({"what": "flagged by both, of those by either", "number": shared, "rows": int(both)})
    lines = [(str(f["what"]), _decimal(f["number"]), f"{f['rows']:,}") for f in facts]
    return Comparison(
        headings=["", "share", "rows"],
        lines=lines,
        facts=facts,
        different=_different(reports),
        figures=figures,
    )


def _different(reports: Sequence[Report]) -> list[tuple[str, str, str, str]]:
    """Return id, label and both percentiles of the rows whose values are ranked most differently."""
    first_N, second_N = (report.values for report in reports)
    rows = np.flatnonzero(np.isfinite(first_N) & np.isfinite(second_N))
    first, second = _percentiles(first_N[rows]), _percentiles(second_N[rows])
    apart = np.abs(first - second)
    order = np.argsort(-apart, kind="stable")[: min(MOST_DIFFERENT, int((apart > 0).sum()))]
    ids, labels = reports[0]["id"], reports[0]["label_name"]
    return [
        (str(ids[rows[at]]), str(labels[rows[at]] or ""), f"{first[at]:.0f}", f"{second[at]:.0f}")
        for at in order
    ]


def _percentiles(values: FloatArray) -> FloatArray:
    """Return 100 for the highest value and 0 for the lowest."""
    percentiles: FloatArray = 100 * (rankdata(values) - 1) / max(1, len(values) - 1)
    return percentiles


def _share(number: object) -> str:
    return f"{number:.2%}" if isinstance(number, float) else "-"


def _decimal(number: object) -> str:
    return f"{number:.3f}" if isinstance(number, float) and np.isfinite(number) else "-"

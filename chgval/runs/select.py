"""`chgval select`: which part of a dataset is enough to train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from chgval import progress
from chgval.config import ManifestOutput, SelectConfig
from chgval.errors import DataError, SettingsError
from chgval.reports.decisions import DROP, KEEP, RELABEL, match_decisions
from chgval.reports.files import (
    read_table,
    report_name,
    with_metadata,
    write_names,
    write_table,
)
from chgval.reports.report import Report
from chgval.reports.tables import DECISIONS, MANIFEST_SCHEMA, RANKED_BY, SUSPECTS
from chgval.runs.summaries import NO_LABEL, SelectedClass, summarise_selection
from chgval.runs.valued import values_of
from chgval.types import FloatArray, IntArray
from chgval.valuation.selection import keep_highest, min_max_weights, ranks_within

SHOWN_VANISHED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rows are kept, and what the command line says of them.

    Attributes:
        table: the manifest, one row per input row, as docs/reports.md describes it.
        kept_N: which rows are kept, shape (N,).
        report: the values report; of a file, the columns that were needed.
        classes: what is kept of every class, the largest first.
        warnings: sentences about what a person may not expect.
        materialized: what became of the dataset that was written, if one was.
    """

    table: pa.Table
    kept_N: NDArray[np.bool_]
    report: Report
    classes: list[SelectedClass]
    warnings: list[str]
    materialized: str | None = None

    @property
    def indices(self) -> IntArray:
        """Row numbers of the kept rows."""
        return np.flatnonzero(self.kept_N)


def run_select(config: SelectConfig) -> Selection:
    """Choose the rows to keep, write the manifest and whatever else was asked for, and return it.

    Raises:
        ChgvalError: the input is neither a report nor a dataset that can be valued, nothing can be kept, or
            an output is in the way.
    """
    if config.by not in RANKED_BY:
        raise SettingsError(f"--by {config.by}: expected one of {', '.join(RANKED_BY)}.")
    with values_of("select", config, _columns(config), in_order=True) as given:
        report, rng = given.report, np.random.default_rng(config.train.seed)
        dropped_N = np.zeros(len(report), dtype=bool)
        if config.drop is not None:
            dropped_N = _flagged(config.drop, report)
        if config.decisions is not None:
            dropped_N = _dropped_by(config.decisions, report, dropped_N)
        score_N, group_N = _scores(report, config, rng), _groups(report)
        kept_N, rank_N = choose(np.where(dropped_N, np.nan, score_N), group_N, config)
        if not kept_N.any():
            raise DataError(
                f"{report_name(config.source)}: no row can be kept; of {len(report):,} none has what it is "
                "kept by."
            )
        weight_N = np.ones(len(report))
        if config.weigh:
            weight_N[kept_N] = min_max_weights(-score_N[kept_N] if config.lowest else score_N[kept_N])
        metadata = {**report.metadata, "command": progress.command(), "selection": _settings(config)}
        manifest = with_metadata(_manifest(report, score_N, rank_N, kept_N, weight_N), metadata)
        if config.output is not None:
            _write(config.output, manifest, metadata, "\0" if config.end_with_null else "\n")
        if config.random_output is not None:
            draw_N = _random_of_the_same_classes(report, group_N, kept_N, rng)
            drawn_N = ~np.isnan(draw_N)
            random = _manifest(report, draw_N, ranks_within(draw_N, group_N), drawn_N, np.ones(len(draw_N)))
            metadata = {**metadata, "selection": {"by": "random"}}
            write_table(config.random_output, with_metadata(random, metadata))
        materialized = None
        if config.materialize is not None:
            from chgval.runs.rewriting import rewrite_rows  # imports torch

            written = rewrite_rows(
                given.source,
                report.table,
                report.metadata,
                kept_N,
                config.materialize,
                link=config.link or "copy",
            )
            materialized = f"{written:,} rows -> {config.materialize}"
        classes = summarise_selection(report.table, kept_N, dropped_N)
        return Selection(
            table=manifest,
            kept_N=kept_N,
            report=report,
            classes=classes,
            warnings=_warnings(config, classes, kept_N),
            materialized=materialized,
        )


def choose(
    score_N: FloatArray, group_N: IntArray, config: SelectConfig
) -> tuple[NDArray[np.bool_], IntArray]:
    """Return which rows are kept, and the rank of each row (within its class, if classes are ranked alone).

    Args:
        score_N: what rows are ranked by; NaN for rows that cannot be kept.
        group_N: class of each row, from 0.
        config: how much to keep, and of which end.
    """
    if not config.per_class:
        group_N = np.zeros_like(group_N)
    ranked_N = -score_N if config.lowest else score_N
    rank_N = ranks_within(ranked_N, group_N)
    if config.min_value is not None:
        kept_N = score_N <= config.min_value if config.lowest else score_N >= config.min_value
        return kept_N, rank_N
    available = int((rank_N > 0).sum())
    return keep_highest(ranked_N, group_N, min(available, _asked(config, len(score_N)))), rank_N


def _asked(config: SelectConfig, num_rows: int) -> int:
    return config.count if config.count is not None else round((config.fraction or 0) * num_rows)


def _columns(config: SelectConfig) -> list[str]:
    ranked_by = [] if config.by == "random" else [config.by]
    # Of a CSV file these say which classes there are, and only decisions ask.
    suggested = [] if config.decisions is None else ["suggested_label", "suggested_name"]
    return ["index", "id", "label", "label_name", *ranked_by, *suggested]


def _flagged(source: str, report: Report) -> NDArray[np.bool_]:
    """Return which rows of the report are flagged in a table of suspects."""
    suspects, other = read_table(source, ("index", "id", "flagged"), SUSPECTS)
    name = report_name(source)
    ours, theirs = report.metadata.get("fingerprint"), other.get("fingerprint")
    if ours and theirs and ours != theirs:
        raise DataError(f"{name}: these suspects are of another dataset ({other.get('command')}).")
    index_S: IntArray = suspects["index"].to_numpy()
    if len(index_S) and (index_S.min() < 0 or index_S.max() >= len(report)):
        raise DataError(f"{name}: row {index_S.max():,} is none of the report's {len(report):,} rows.")
    strange = pc.invert(pc.equal(report.table["id"].take(pa.array(index_S)), suspects["id"]))
    if pc.any(strange).as_py():
        row = suspects.filter(strange)["id"][0]
        raise DataError(f"{name}: '{row}' has another number in the report; the two are of other datasets.")
    flagged_N = np.zeros(len(report), dtype=bool)
    flagged_N[index_S[suspects["flagged"].to_numpy()]] = True
    return flagged_N


def _dropped_by(source: str, report: Report, flagged_N: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which rows are left out: as people decided, and what is flagged where they did not.

    What they relabelled is left out too: its value is that of the label that it had.
    """
    ids, labels_N = list(report["id"]), report.integers("label")
    table, _ = read_table(source, kind=DECISIONS)
    decisions = match_decisions(table, source, ids, labels_N, report.class_names, "the report")
    left_out_N: NDArray[np.bool_] = np.isin(decisions.word_N.astype(str), (DROP, RELABEL))
    left_out_N |= flagged_N & (decisions.word_N != KEEP)
    return left_out_N


def _scores(report: Report, config: SelectConfig, rng: np.random.Generator) -> FloatArray:
    """Return what rows are ranked by; NaN where a row has no score or, for random ranks, no label."""
    if config.by == "random":
        return np.where(report.integers("label") >= 0, rng.random(len(report)), np.nan)
    return report.scores(config.by)


def _groups(report: Report) -> IntArray:
    """Return the class of every row, numbered from 0; rows without one have no score and join the first."""
    # A report can claim labels of any size; there are no more classes than rows.
    groups: IntArray = np.unique(np.maximum(report.integers("label"), 0), return_inverse=True)[1]
    return groups


def _random_of_the_same_classes(
    report: Report, group_N: IntArray, kept_N: NDArray[np.bool_], rng: np.random.Generator
) -> FloatArray:
    """Draw as many labelled rows of each class as are kept of it; NaN for the others."""
    draw_N = np.where(report.integers("label") >= 0, rng.random(len(report)), np.nan)
    quotas_C = np.bincount(group_N[kept_N], minlength=int(group_N.max(initial=0)) + 1)
    rank_N = ranks_within(draw_N, group_N)
    return np.where((rank_N > 0) & (rank_N <= quotas_C[group_N]), draw_N, np.nan)


def _manifest(
    report: Report, score_N: FloatArray, rank_N: IntArray, kept_N: NDArray[np.bool_], weight_N: FloatArray
) -> pa.Table:
    columns = {
        **{name: report.table[name] for name in ("index", "id", "label")},
        "value": pa.array(score_N, mask=np.isnan(score_N)),
        "rank": pa.array(rank_N, mask=rank_N == 0),
        "weight": pa.array(weight_N, mask=~kept_N),
        "kept": kept_N,
    }
    return pa.table(columns, schema=MANIFEST_SCHEMA)


def _write(output: ManifestOutput, manifest: pa.Table, metadata: dict[str, Any], end: str) -> None:
    if output.listing is None:
        write_table(output, manifest)
        return
    kept = manifest.filter(manifest["kept"])
    names = kept["index"].cast(pa.string()) if output.listing == "indices" else kept["id"]
    root = metadata.get("root") if output.listing == "paths" else None
    listed = (name if root is None else str(Path(root, name)) for name in names.to_pylist())
    write_names(output, listed, end)


def _settings(config: SelectConfig) -> dict[str, object]:
    names = ("fraction", "count", "min_value", "per_class", "by", "lowest", "drop", "decisions", "weigh")
    return {name: getattr(config, name) for name in names}


def _warnings(config: SelectConfig, classes: list[SelectedClass], kept_N: NDArray[np.bool_]) -> list[str]:
    """Return what a person may not expect of a selection."""
    warnings = []
    vanished = [line.name for line in classes if not line.num_kept and line.name != NO_LABEL]
    if vanished:
        more = f" and {len(vanished) - SHOWN_VANISHED:,} more" if len(vanished) > SHOWN_VANISHED else ""
        warnings.append(f"nothing is kept of {', '.join(vanished[:SHOWN_VANISHED])}{more}")
    asked, num_kept = _asked(config, len(kept_N)), int(kept_N.sum())
    if config.min_value is None and num_kept < asked:
        warnings.append(
            f"{asked:,} rows were asked for, but only {num_kept:,} are labelled, readable and not dropped"
        )
    return warnings

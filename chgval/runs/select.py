"""`chgval select`: which part of a dataset is enough to train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from chgval.config import DataConfig, SelectConfig
from chgval.console import Console
from chgval.errors import DataError, SettingsError
from chgval.files import check_apart
from chgval.records import FloatArray, IntArray, SelectedClass
from chgval.reports import (
    MANIFEST_SCHEMA,
    SUSPECTS,
    check_output,
    in_input_order,
    is_report,
    read_report,
    report_name,
    with_metadata,
    write_names,
    write_table,
)
from chgval.selection import keep_highest, min_max_weights, ranks_within

if TYPE_CHECKING:  # imports torch, which reports do without
    from chgval.runs.checkpoint import Unfinished

SHOWN_CLASSES = 20
SHOWN_VANISHED = 5
NO_LABEL = "(no label)"


def run_select(config: SelectConfig, console: Console, *, command: str) -> None:
    """Choose the rows to keep, and write the manifest and whatever else was asked for.

    Args:
        config: the settings.
        console: where to tell what was chosen.
        command: the command line, for metadata.
    Raises:
        ChgvalError: the input is neither a report nor a dataset that can be valued, nothing can be kept, or
            an output is in the way.
    """
    source = config.value.data.source
    if config.materialize is not None:
        check_apart(config.materialize, config.files)
    given = _read_report(config) if is_report(source) else _value_dataset(config, console, command)
    report, rng = given.report, np.random.default_rng(config.value.train.seed)
    dropped_N = np.zeros(report.num_rows, dtype=bool)
    if config.drop is not None:
        dropped_N = _flagged(config.drop, report, given.metadata)
    figure_N, group_N = _figures(report, config, rng), _groups(report)
    kept_N, rank_N = choose(np.where(dropped_N, np.nan, figure_N), group_N, config)
    if not kept_N.any():
        raise DataError(
            f"{report_name(source)}: no row can be kept; of {report.num_rows:,} none has what it is kept by."
        )

    weight_N = np.ones(report.num_rows)
    if config.weights:
        weight_N[kept_N] = min_max_weights(-figure_N[kept_N] if config.lowest else figure_N[kept_N])
    metadata = {**given.metadata, "command": command, "selection": _settings(config)}
    _write(config, _manifest(report, figure_N, rank_N, kept_N, weight_N), metadata)
    if config.with_random is not None:
        draw_N = _random_of_the_same_classes(report, group_N, kept_N, rng)
        drawn_N = ~np.isnan(draw_N)
        random = _manifest(report, draw_N, ranks_within(draw_N, group_N), drawn_N, np.ones(len(draw_N)))
        write_table(config.with_random, with_metadata(random, {**metadata, "selection": {"by": "random"}}))
    _tell(config, console, report, kept_N, dropped_N)
    if config.materialize is not None:
        from chgval.runs.rewriting import rewrite_rows  # imports torch

        link = config.link or "copy"
        written = rewrite_rows(
            given.data, report, given.metadata, kept_N, config.materialize, console, link=link
        )
        console.say(f"{written:,} rows -> {config.materialize}")
    if given.unfinished is not None:
        given.unfinished.remove()


def choose(
    figure_N: FloatArray, group_N: IntArray, config: SelectConfig
) -> tuple[NDArray[np.bool_], IntArray]:
    """Return which rows are kept, and the rank of each row (within its class, if classes are ranked alone).

    Args:
        figure_N: what rows are ranked by; NaN for rows that cannot be kept.
        group_N: class of each row, from 0.
        config: how much to keep, and of which end.
    """
    if not config.per_class:
        group_N = np.zeros_like(group_N)
    ranked_N = -figure_N if config.lowest else figure_N
    rank_N = ranks_within(ranked_N, group_N)
    if config.min_value is not None:
        kept_N = figure_N <= config.min_value if config.lowest else figure_N >= config.min_value
        return kept_N, rank_N
    available = int((rank_N > 0).sum())
    return keep_highest(ranked_N, group_N, min(available, _asked(config, len(figure_N)))), rank_N


def _asked(config: SelectConfig, num_rows: int) -> int:
    return config.count if config.count is not None else round((config.fraction or 0) * num_rows)


@dataclass(frozen=True, slots=True)
class _Input:
    """A values report, its metadata, and the dataset that it is about (if that will be written anew).

    The state of the run behind it is `unfinished`, if it was valued.
    """

    report: pa.Table
    metadata: dict[str, Any]
    data: DataConfig
    unfinished: Unfinished | None = None


def _columns(config: SelectConfig) -> list[str]:
    return ["index", "id", "label", "label_name", *([] if config.by == "random" else [config.by])]


def _read_report(config: SelectConfig) -> _Input:
    source = config.value.data.source
    for output in (config.output, config.with_random):
        if output is not None:
            check_output(output, source, config.drop or "")
    report, metadata = read_report(source, _columns(config))
    report = in_input_order(report, source)
    data = config.value.data
    if config.materialize is not None:
        from chgval.runs.rewriting import dataset_behind  # imports torch

        data = dataset_behind(
            source,
            report,
            metadata,
            config.materialize,
            dataset=config.dataset,
            overwrite=config.output.overwrite,
        )
    return _Input(report, metadata, data)


def _value_dataset(config: SelectConfig, console: Console, command: str) -> _Input:
    # These import torch, which reports do without.
    from chgval.data.open import check_not_read
    from chgval.data.rewrite import check_rewritable
    from chgval.runs.checkpoint import find_unfinished
    from chgval.runs.value import check_outputs, read_dataset, value_dataset

    if config.dataset is not None:
        raise SettingsError(f"--dataset: is for a report; {config.value.data.source} is a dataset itself.")
    data = config.value.data
    unfinished = find_unfinished(
        "select", config, config.value.resume, console, overwrite=config.output.overwrite
    )
    if config.materialize is not None:
        check_rewritable(
            data,
            config.materialize,
            overwrite=unfinished.overwrites,
            link=config.link or "copy",
            may_be_there=unfinished.may_have_written(config.materialize),
        )
    for output in (config.output, config.with_random):
        if output is not None:
            check_output(unfinished.replaceable(output), data.source, config.drop or "")
            check_not_read(data, output)
    values = None if config.values is None else unfinished.replaceable(config.values)
    check_outputs(config.value, values, unfinished)
    dataset = read_dataset(config.value, console)
    valued = value_dataset(config.value, dataset, values, console, unfinished, command=command)
    return _Input(valued.table.select(_columns(config)), valued.metadata, data, unfinished)


def _flagged(source: str, report: pa.Table, metadata: dict[str, Any]) -> NDArray[np.bool_]:
    """Return which rows of the report are flagged in a table of suspects."""
    suspects, other = read_report(source, ("index", "id", "flagged"), SUSPECTS)
    name = report_name(source)
    ours, theirs = metadata.get("fingerprint"), other.get("fingerprint")
    if ours and theirs and ours != theirs:
        raise DataError(f"{name}: these suspects are of another dataset ({other.get('command')}).")
    index_S: IntArray = suspects["index"].to_numpy()
    if len(index_S) and (index_S.min() < 0 or index_S.max() >= report.num_rows):
        raise DataError(f"{name}: row {index_S.max():,} is none of the report's {report.num_rows:,} rows.")
    strange = pc.invert(pc.equal(report["id"].take(pa.array(index_S)), suspects["id"]))
    if pc.any(strange).as_py():
        row = suspects.filter(strange)["id"][0]
        raise DataError(f"{name}: '{row}' has another number in the report; the two are of other datasets.")
    flagged_N = np.zeros(report.num_rows, dtype=bool)
    flagged_N[index_S[suspects["flagged"].to_numpy()]] = True
    return flagged_N


def _figures(report: pa.Table, config: SelectConfig, rng: np.random.Generator) -> FloatArray:
    """Return what rows are ranked by; NaN where a row has no figure or, for random ranks, no label."""
    if config.by == "random":
        return np.where(report["label"].to_numpy() >= 0, rng.random(report.num_rows), np.nan)
    figures: FloatArray = pc.fill_null(report[config.by].cast(pa.float64()), np.nan).to_numpy()
    return figures


def _groups(report: pa.Table) -> IntArray:
    """Return the class of every row, numbered from 0; rows without one have no figure and join the first."""
    # A report can claim labels of any size; there are no more classes than rows.
    groups: IntArray = np.unique(np.maximum(report["label"].to_numpy(), 0), return_inverse=True)[1]
    return groups


def _random_of_the_same_classes(
    report: pa.Table, group_N: IntArray, kept_N: NDArray[np.bool_], rng: np.random.Generator
) -> FloatArray:
    """Draw as many labelled rows of each class as are kept of it; NaN for the others."""
    draw_N = np.where(report["label"].to_numpy() >= 0, rng.random(report.num_rows), np.nan)
    quotas_C = np.bincount(group_N[kept_N], minlength=int(group_N.max(initial=0)) + 1)
    rank_N = ranks_within(draw_N, group_N)
    return np.where((rank_N > 0) & (rank_N <= quotas_C[group_N]), draw_N, np.nan)


def _manifest(
    report: pa.Table, figure_N: FloatArray, rank_N: IntArray, kept_N: NDArray[np.bool_], weight_N: FloatArray
) -> pa.Table:
    columns = {
        **{name: report[name] for name in ("index", "id", "label")},
        "value": pa.array(figure_N, mask=np.isnan(figure_N)),
        "rank": pa.array(rank_N, mask=rank_N == 0),
        "weight": pa.array(weight_N, mask=~kept_N),
        "kept": kept_N,
    }
    return pa.table(columns, schema=MANIFEST_SCHEMA)


def _write(config: SelectConfig, manifest: pa.Table, metadata: dict[str, Any]) -> None:
    if config.output.listing is None:
        write_table(config.output, with_metadata(manifest, metadata))
        return
    kept = manifest.filter(manifest["kept"])
    names = kept["index"].cast(pa.string()) if config.output.listing == "indices" else kept["id"]
    root = metadata.get("root") if config.output.listing == "paths" else None
    listed = (name if root is None else str(Path(root, name)) for name in names.to_pylist())
    write_names(config.output, listed, "\0" if config.end_with_null else "\n")


def _settings(config: SelectConfig) -> dict[str, object]:
    names = ("fraction", "count", "min_value", "per_class", "by", "lowest", "drop", "weights")
    return {name: getattr(config, name) for name in names}


def _tell(
    config: SelectConfig,
    console: Console,
    report: pa.Table,
    kept_N: NDArray[np.bool_],
    dropped_N: NDArray[np.bool_],
) -> None:
    """Say what is kept of every class, and what a person may not expect."""
    rows = pa.table(
        {"name": report["label_name"], "kept": kept_N.astype(np.int64), "dropped": dropped_N.astype(np.int64)}
    )
    classes = rows.group_by("name").aggregate([([], "count_all"), ("dropped", "sum"), ("kept", "sum")])
    lines = [
        SelectedClass(
            name=NO_LABEL if row["name"] is None else row["name"],
            num_rows=row["count_all"],
            num_dropped=row["dropped_sum"],
            num_kept=row["kept_sum"],
        )
        for row in classes.sort_by([("count_all", "descending"), ("name", "ascending")]).to_pylist()
    ]
    console.selection(lines[:SHOWN_CLASSES], max(0, len(lines) - SHOWN_CLASSES))
    vanished = [line.name for line in lines if not line.num_kept and line.name != NO_LABEL]
    if vanished:
        more = f" and {len(vanished) - SHOWN_VANISHED:,} more" if len(vanished) > SHOWN_VANISHED else ""
        console.warn(f"nothing is kept of {', '.join(vanished[:SHOWN_VANISHED])}{more}")
    num_kept = int(kept_N.sum())
    if config.min_value is None and num_kept < _asked(config, report.num_rows):
        console.warn(
            f"{_asked(config, report.num_rows):,} rows were asked for, but only {num_kept:,} are labelled, "
            "readable and not dropped"
        )
    target = "standard output" if config.output.to_stdout else config.output.path
    console.say("")
    console.say(f"{num_kept:,} of {report.num_rows:,} rows kept -> {target}")

"""Write a dataset anew from what a report says of its rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from chgval import progress
from chgval.config import DataConfig, DetectConfig, Link, SelectConfig
from chgval.data.formats import Format, format_of
from chgval.data.formats.base import KnownRows, RowChanges
from chgval.data.open import check_rewritable
from chgval.errors import DataError
from chgval.reports.files import dataset_of, report_name
from chgval.types import IntArray


def dataset_behind(
    source: str,
    report: pa.Table,
    metadata: dict[str, Any],
    target: Path,
    *,
    dataset: str | None,
    overwrite: bool,
    link: Link,
) -> Format:
    """Return the dataset that a report is about, if it can be written anew at the target.

    Args:
        source: the report's name.
        report: `id` and `label` of every row.
        metadata: of the report.
        target: where the dataset shall be written.
        dataset: where the user says that it is; None takes where the report says that it was.
        overwrite: whether a file may be replaced.
        link: how files of a folder get there.
    Raises:
        ChgvalError: the report does not say, or names another machine, the dataset is not there or another
            by now, or the target is not free.
    """
    data = data_behind(source, metadata, dataset)
    try:
        source_of_rows = format_of(data)
        check_rewritable(source_of_rows, target, overwrite=overwrite, link=link)
        source_of_rows.check_same(known_rows(report, metadata))
    except DataError as error:
        if dataset is not None:
            raise
        message = f"{error} {report_name(source)} was made from it; pass --dataset if it has moved."
        raise DataError(message) from error
    return source_of_rows


def data_behind(source: str, metadata: dict[str, Any], dataset: str | None) -> DataConfig:
    """Return which dataset a report is about, here or where the user says; see `dataset_behind`."""
    if dataset is not None and not metadata:  # a CSV file
        return DataConfig(source=dataset)
    data = dataset_of(metadata, source)
    if dataset is not None:
        return dataclasses.replace(data, source=dataset)
    if "://" in data.source and not data.source.startswith("file://"):
        # A report from a stranger could name any machine.
        raise DataError(
            f"{report_name(source)}: says that its dataset is {data.source}; nothing is fetched because a "
            "report says so. If you trust that place, pass it as --dataset."
        )
    return data


def same_dataset(source: str, report: pa.Table, metadata: dict[str, Any], dataset: str | None) -> Format:
    """Return the dataset that a report is about, if its rows are still those; see `data_behind`.

    Raises:
        ChgvalError: the report does not say, or the dataset is not there, or another by now.
    """
    found = format_of(data_behind(source, metadata, dataset))
    found.check_same(known_rows(report, metadata))
    return found


def dataset_of_values(
    config: DetectConfig | SelectConfig, report: pa.Table, metadata: dict[str, Any]
) -> Format:
    """Return the dataset that the user named, if a report that is there already is about it.

    Raises:
        ChgvalError: it is about another, or the dataset cannot be written anew as was asked.
    """
    source = format_of(config.value.data)
    if config.target is not None:
        check_rewritable(source, config.target, overwrite=config.overwrites, link=config.link or "copy")
    try:
        source.check_same(known_rows(report, metadata))
    except DataError as error:
        raise DataError(
            f"{error} The report is {config.values}; pass --overwrite, or another name as --values."
        ) from error
    return source


def known_rows(report: pa.Table, metadata: dict[str, Any]) -> KnownRows:
    """Return what a report says of its dataset."""
    return KnownRows(report["id"].to_pylist(), report["label"].to_numpy(), metadata.get("fingerprint"))


def rewrite_rows(
    source: Format | None,
    report: pa.Table,
    metadata: dict[str, Any],
    kept_N: NDArray[np.bool_],
    target: Path,
    *,
    new_labels_N: IntArray | None = None,
    link: Link = "copy",
) -> int:
    """Write the kept rows of a dataset anew, say what a person should know, and return how many there are.

    Args:
        source: the dataset.
        report: `id` and `label` of every row.
        metadata: of the report.
        kept_N: which rows to write.
        target: where to.
        new_labels_N: the class that a row gets, -1 for its own.
        link: how files of a folder get there.
    Raises:
        ChgvalError: the dataset is not that of the report any more, or cannot be written.
    """
    if source is None:
        raise ValueError("no dataset was asked for that could be written anew")
    changes = RowChanges(kept_N, np.full(len(kept_N), -1) if new_labels_N is None else new_labels_N)
    return write_changed(source, known_rows(report, metadata), changes, target, link)


def write_changed(source: Format, known: KnownRows, changes: RowChanges, target: Path, link: Link) -> int:
    """Write a dataset anew, say what a person should know of it, and return how many rows it has.

    Raises:
        ChgvalError: see `Format.write`.
    """
    written = source.write(known, changes, target, link)
    for note in written.notes:
        progress.say(f"note: {note}")
    for name in written.vanished:
        progress.warn(f"class '{name}' has no rows any more")
    if written.unreadable:
        progress.warn(
            f"{len(written.unreadable):,} files could not be read, and are left out (the first, "
            f"{written.unreadable[0]})"
        )
    return written.num_written

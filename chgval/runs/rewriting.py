"""Datasets written anew from what a report says of their rows, for the commands that do so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from chgval.config import DataConfig, Link
from chgval.console import Console
from chgval.data.rewrite import Changes, check_rewritable, rewrite
from chgval.errors import DataError
from chgval.records import IntArray
from chgval.reports import dataset_of


def dataset_behind(report: str, metadata: dict[str, Any], target: Path, *, overwrite: bool) -> DataConfig:
    """Return the dataset that a report is about, if it can be written anew at the target.

    Raises:
        ChgvalError: the report does not say, the dataset is not there, or the target is not free.
    """
    data = dataset_of(metadata, report)
    try:
        check_rewritable(data, target, overwrite=overwrite)
    except DataError as error:
        raise DataError(f"{error} {report} was made from it, under this name.") from error
    return data


def rewrite_rows(
    data: DataConfig,
    report: pa.Table,
    kept_N: NDArray[np.bool_],
    target: Path,
    console: Console,
    *,
    new_labels_N: IntArray | None = None,
    link: Link = "copy",
) -> int:
    """Write the kept rows of a dataset anew, tell what a person should know, and return how many there are.

    Args:
        data: the dataset.
        report: `id` and `label` of every row.
        kept_N: which rows to write.
        target: where to.
        console: where to tell about vanished classes and unreadable files.
        new_labels_N: the class that a row gets, -1 for its own.
        link: how files of a folder get there.
    Raises:
        ChgvalError: the dataset is not that of the report any more, or cannot be written.
    """
    changes = Changes(
        ids=report["id"].to_pylist(),
        labels_N=report["label"].to_numpy(),
        kept_N=kept_N,
        new_labels_N=np.full(len(kept_N), -1) if new_labels_N is None else new_labels_N,
    )
    written = rewrite(data, changes, target, link)
    for name in written.vanished:
        console.warn(f"class '{name}' has no rows any more")
    if written.unreadable:
        console.warn(
            f"{len(written.unreadable):,} files could not be read, and are left out (the first, "
            f"{written.unreadable[0]})"
        )
    return written.num_written

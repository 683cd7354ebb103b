"""The values report: its columns, its metadata, and how it gets to disk or down a pipe.

docs/reports.md describes every column.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq
from numpy.typing import NDArray

from chgval.config import METADATA_KEY, STANDARD_STREAM, DataConfig, OutputConfig, ReportFormat
from chgval.errors import DataError, OutputError, first_line
from chgval.files import check_file, check_free, could_not_write, replacing
from chgval.records import (
    Annotations,
    Consensus,
    EpochRecord,
    EpochSignals,
    FloatArray,
    IntArray,
    NoiseSignals,
    RunSignals,
)
from chgval.selection import ranks_within
from chgval.spreadsheets import with_marks, without_marks

if TYPE_CHECKING:  # a report is read without what decodes images
    from chgval.data.dataset import Dataset

# Raised whenever a column changes its name, type or meaning.
REPORT_VERSION = 3
ROW_GROUP_ROWS = 262_144
# Bytes of a row in JSON lines.
LONGEST_LINE = 2**20

VALUES_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("label_name", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("value_std", pa.float64()),
        pa.field("value_stderr", pa.float64()),
        pa.field("rank", pa.int64()),
        pa.field("percentile", pa.float64()),
        pa.field("loss_mean", pa.float64()),
        pa.field("margin_mean", pa.float64()),
        pa.field("el2n_mean", pa.float64()),
        pa.field("label_probability_mean", pa.float64()),
        pa.field("forgetting_events", pa.int64()),
        pa.field("num_epochs", pa.int64(), nullable=False),
        pa.field("predicted_label", pa.int64()),
        pa.field("predicted_name", pa.string()),
        pa.field("predicted_probability", pa.float64()),
        pa.field("noise_score", pa.float64()),
        pa.field("noise_score_std", pa.float64()),
        pa.field("suggested_label", pa.int64()),
        pa.field("suggested_name", pa.string()),
        pa.field("suggested_probability", pa.float64()),
        pa.field("confident_label", pa.int64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)

EPOCH_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("loss", pa.float32()),
        pa.field("margin", pa.float32()),
        pa.field("el2n", pa.float32()),
        pa.field("label_probability", pa.float32()),
        pa.field("predicted_label", pa.int32()),
    ]
)


SUSPECTS_SCHEMA = pa.schema(
    [
        *(VALUES_SCHEMA.field(name) for name in ("index", "id", "label", "label_name")),
        *(VALUES_SCHEMA.field(name) for name in ("suggested_label", "suggested_name")),
        *(VALUES_SCHEMA.field(name) for name in ("suggested_probability", "noise_score", "noise_score_std")),
        VALUES_SCHEMA.field("value"),
        pa.field("margin", pa.float64()),
        pa.field("rank", pa.int64()),
        pa.field("flagged", pa.bool_(), nullable=False),
        pa.field("duplicate_of", pa.int64()),
    ]
)


MANIFEST_SCHEMA = pa.schema(
    [
        *(VALUES_SCHEMA.field(name) for name in ("index", "id", "label", "value", "rank")),
        pa.field("weight", pa.float64()),
        pa.field("kept", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class TableKind:
    """A table that a command writes, and others may read.

    Attributes:
        schema: its columns.
        what: it is called in messages.
        command: that writes it.
    """

    schema: pa.Schema
    what: str
    command: str


VALUES = TableKind(VALUES_SCHEMA, "a values report", "value")
SUSPECTS = TableKind(SUSPECTS_SCHEMA, "suspects", "detect-noise")
MANIFEST = TableKind(MANIFEST_SCHEMA, "a manifest", "select")


def values_table(
    dataset: Dataset, signals: RunSignals, noise: NoiseSignals, *, per_class: bool = False
) -> pa.Table:
    """Return the report: one row per input row, in input order.

    Labels of several annotators add columns: the consensus, and each one's label and score.

    Args:
        dataset: the input rows.
        signals: what the run says of them.
        noise: what it says of their labels.
        per_class: whether the values come from one game per class; samples are then ranked within theirs.
    """
    names = np.array([*dataset.class_names, None], dtype=object)  # index -1 gives None
    group_N = dataset.labels_N if per_class else np.zeros_like(dataset.labels_N)
    rank_N = ranks_within(signals.value_N, group_N)
    seen_N = signals.num_epochs_N > 0
    columns = {
        "index": np.arange(len(dataset)),
        "id": dataset.ids,
        "label": dataset.labels_N,
        "label_name": names[dataset.labels_N],
        "value": _or_null(signals.value_N),
        "value_std": _or_null(signals.value_std_N),
        "value_stderr": _or_null(signals.value_stderr_N),
        "rank": pa.array(rank_N, mask=rank_N == 0),
        "percentile": _or_null(_percentiles(rank_N, group_N)),
        "loss_mean": _or_null(signals.loss_N),
        "margin_mean": _or_null(signals.margin_N),
        "el2n_mean": _or_null(signals.el2n_N),
        "label_probability_mean": _or_null(signals.label_probability_N),
        "forgetting_events": pa.array(signals.forgetting_events_N, mask=~seen_N),
        "num_epochs": signals.num_epochs_N,
        "predicted_label": _or_null(signals.predicted_label_N),
        "predicted_name": names[signals.predicted_label_N],
        "predicted_probability": _or_null(signals.predicted_probability_N),
        "noise_score": _or_null(noise.noise_score_N),
        "noise_score_std": _or_null(noise.noise_score_std_N),
        "suggested_label": _or_null(noise.suggested_label_N),
        "suggested_name": names[noise.suggested_label_N],
        "suggested_probability": _or_null(noise.suggested_probability_N),
        "confident_label": _or_null(noise.confident_label_N),
        "status": dataset.statuses(),
        "reason": [dataset.problems.get(row) for row in range(len(dataset))],
    }
    schema = VALUES_SCHEMA
    if dataset.annotations is not None and noise.consensus is not None:
        added = _annotation_columns(dataset.annotations, noise.consensus, names)
        columns |= added
        schema = pa.schema([*schema, *(pa.field(name, column.type) for name, column in added.items())])
    return pa.table(columns, schema=schema)


def _annotation_columns(
    annotations: Annotations, consensus: Consensus, names: NDArray[np.object_]
) -> dict[str, pa.Array]:
    """Return what all annotators say together, and each one's label with how probably it is wrong."""
    columns = {
        "consensus_label": _or_null(consensus.label_N),
        "consensus_name": pa.array(names[consensus.label_N], pa.string()),
        "consensus_probability": _or_null(consensus.probability_N),
    }
    for name, labels_N, score_N in zip(
        annotations.names, annotations.labels_NA.T, consensus.scores_NA.T, strict=True
    ):
        columns[f"label_name_of_{name}"] = pa.array(names[labels_N], pa.string())
        columns[f"noise_score_of_{name}"] = _or_null(score_N)
    return columns


def epoch_table(signals: EpochSignals) -> pa.Table:
    """Return one epoch's values and signals: one row per input row."""
    columns = {
        "index": np.arange(len(signals.value_N)),
        "value": _or_null(signals.value_N),
        "loss": _or_null(signals.loss_N.astype(np.float32)),
        "margin": _or_null(signals.margin_N.astype(np.float32)),
        "el2n": _or_null(signals.el2n_N.astype(np.float32)),
        "label_probability": _or_null(signals.label_probability_N.astype(np.float32)),
        "predicted_label": _or_null(signals.predicted_label_N.astype(np.int32)),
    }
    return pa.table(columns, schema=EPOCH_SCHEMA)


def with_metadata(table: pa.Table, metadata: dict[str, object]) -> pa.Table:
    """Attach what is known of the run under the schema's key `chgval`."""
    text = json.dumps({"report_version": REPORT_VERSION, **metadata}, ensure_ascii=False)
    return table.replace_schema_metadata({METADATA_KEY: text.encode("utf-8", "backslashreplace")})


class ReportWriter:
    """Writes a run's report and, for a report in a file, one part per epoch beside it.

    `check` lets a run find out before it reads and trains what it may not write; creating the writer deletes
    the parts of an earlier run.

    Args:
        config: where to write.
        goes_on: whether parts are there already that belong to the run.
    Raises:
        OutputError: they cannot be deleted.
    """

    def __init__(self, config: OutputConfig, *, goes_on: bool = False) -> None:
        self._config = config
        self.epochs_folder = config.epochs_folder
        if self.epochs_folder is not None:
            with could_not_write(self.epochs_folder):
                for part in [] if goes_on else self.epochs_folder.glob("epoch=*"):
                    shutil.rmtree(part)

    @staticmethod
    def check(config: OutputConfig, source: str = "", *, goes_on: bool = False) -> None:
        """Raise OutputError where the output cannot be written, or is the dataset; leave all as it is.

        Parts may be there where a run `goes_on`.
        """
        check_output(config, source)
        if config.epochs_folder is not None and not goes_on:
            check_free(config.epochs_folder, overwrite=config.overwrite)

    def write_epoch(self, record: EpochRecord, metadata: dict[str, object]) -> None:
        """Put one epoch's values where a reader finds them at once: epochs/epoch=3/values.parquet."""
        if self.epochs_folder is None or record.signals is None:
            return
        folder = self.epochs_folder / f"epoch={record.epoch}"
        path = folder / "values.parquet"
        with could_not_write(path):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                _write(with_metadata(epoch_table(record.signals), metadata), file, "parquet")

    def write(self, table: pa.Table, metadata: dict[str, object]) -> None:
        """Write the report. A file appears under its name only when it is complete."""
        write_table(self._config, with_metadata(table, metadata))


def check_output(config: OutputConfig, *sources: str) -> None:
    """Raise OutputError where a table cannot be written; leave all as it is.

    Args:
        config: where the table shall go.
        sources: what it is made from, which it may not replace.
    """
    path, report_format = Path(config.path), config.resolved_format
    if config.to_stdout:
        if sys.stdout is None:
            raise OutputError("--output -: standard output is closed; open it, or name a file.")
        if config.listing is None and sys.stdout.isatty() and report_format in ("parquet", "arrow"):
            raise OutputError(
                f"--output -: standard output is a terminal, and {report_format} is not text; "
                "redirect it, or pass --format csv."
            )
    else:
        with could_not_write(path):
            for source in filter(None, sources):
                if path.exists() and Path(source).exists() and path.samefile(source):
                    raise OutputError(f"{path}: is the input itself; pass another --output.")
        check_file(path, overwrite=config.overwrite)


def write_table(config: OutputConfig, table: pa.Table) -> None:
    """Write a table. A file appears under its name only when it is complete."""
    if config.to_stdout:
        with _standard_output() as file:
            _write(table, file, config.resolved_format)
        return
    path = Path(config.path)
    with could_not_write(path), replacing(path) as file:
        _write(table, file, config.resolved_format)


def write_names(config: OutputConfig, names: Iterable[str], end: str) -> None:
    """Write one name after the other, each with its end; bytes that are no text come out as they were."""
    encoded = b"".join(os.fsencode(name + end) for name in names)
    if config.to_stdout:
        with _standard_output() as file:
            file.write(encoded)
        return
    path = Path(config.path)
    with could_not_write(path), replacing(path) as file:
        file.write(encoded)


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    try:
        with could_not_write(Path("standard output")):
            stream = sys.stdout.buffer
            yield cast(BinaryIO, _Printable(stream)) if sys.stdout.isatty() else stream
            stream.flush()
    except (OutputError, BrokenPipeError) as error:
        # What could not be written must not be tried again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A reader that has seen enough is no error: other outputs are to be written all the same.
        if isinstance(error, OutputError):
            raise


class _Printable:
    """A terminal that names in a table cannot act upon: control characters but line ends are written out."""

    _CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, data: bytes) -> int:
        self._stream.write(self._CONTROL.sub(lambda found: b"\\x%02x" % found[0][-1], bytes(data)))
        return len(data)


def write_array(path: Path, array: NDArray[np.float32]) -> None:
    """Write a NumPy file. It appears under its name only when it is complete."""
    with could_not_write(path), replacing(path) as file:
        np.save(file, array)


def is_report(source: str) -> bool:
    """Say whether the user named a report, and not a dataset: standard input, or a file of a report."""
    if source == STANDARD_STREAM or Path(source).suffix in (".csv", ".jsonl", ".arrow"):
        return True
    if not Path(source).is_file():
        return False
    try:
        schema = pq.read_schema(source)
    except (OSError, pa.ArrowException):
        return False  # whatever is wrong with it will be told when it is read as a dataset
    # Programs that rewrite a report may drop its metadata.
    return METADATA_KEY in (schema.metadata or {}) or {"index", "value", "status"} <= set(schema.names)


def report_name(source: str) -> str:
    """Return what messages call a table that the user named: "-" is standard input."""
    return "standard input" if source == STANDARD_STREAM else source


def read_report(
    source: str, columns: Sequence[str], kind: TableKind = VALUES
) -> tuple[pa.Table, dict[str, Any]]:
    """Read columns of a table of chgval in any of its formats.

    Args:
        source: a file, or "-" for standard input.
        columns: of its schema.
        kind: which table it is.
    Returns:
        The columns, typed as in the schema, and the table's metadata (empty for CSV and JSON lines).
    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    name = report_name(source)
    wanted = pa.schema([kind.schema.field(column) for column in columns])
    if source == STANDARD_STREAM and sys.stdin is None:
        raise DataError(f"{name}: is closed; pipe {kind.what} into it, or name a file.")
    try:
        buffer = pa.py_buffer(sys.stdin.buffer.read()) if source == STANDARD_STREAM else pa.memory_map(source)
        table = _parse(pa.BufferReader(buffer) if source == STANDARD_STREAM else buffer, wanted)
        table.validate(full=True)  # nothing else looks whether offsets lie within the file, and text is UTF-8
        missing = [column for column in columns if column not in table.column_names]
        if missing:
            raise DataError(
                f"{name}: no column '{missing[0]}'; expected {kind.what} of this version of chgval. Make "
                f"it anew with chgval {kind.command}."
            )
        return table.select(columns).cast(wanted), _metadata(table.schema)
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file; expected the output of chgval {kind.command}.") from error
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise DataError(
            f"{name}: cannot be read as {kind.what} ({first_line(error)}); expected the output of chgval "
            f"{kind.command}, as Parquet, CSV, JSON lines or Arrow."
        ) from error


def in_input_order(report: pa.Table, source: str) -> pa.Table:
    """Sort a report that is in another order, such as that of suspects.

    Raises:
        DataError: it lacks rows, or has some twice.
    """
    report = report.sort_by("index")
    if not np.array_equal(report["index"].to_numpy(), np.arange(report.num_rows)):
        raise DataError(
            f"{report_name(source)}: is not the whole report (its {report.num_rows:,} rows have numbers "
            f"up to {report['index'][-1].as_py():,}), so that shares and places in it say nothing. "
            "Pass the report of chgval value; suspects go to select --drop, or are whole with detect-noise "
            "--all."
        )
    return report


def dataset_of(metadata: dict[str, Any], source: str) -> DataConfig:
    """Return which dataset a report is about, and which of its columns.

    Args:
        metadata: of the report.
        source: the report, for messages.
    Raises:
        DataError: the metadata do not say.
    """
    try:
        data = metadata["settings"]["data"]
        columns = ("image_column", "id_column", "features_column")
        named, label_columns = {column: data[column] for column in columns}, data["label_columns"]
        texts = [data["source"], *label_columns]
        if not (isinstance(label_columns, list) and all(isinstance(text, str) for text in texts)):
            raise TypeError("names are text")
        if not all(isinstance(name, str | None) for name in named.values()):
            raise TypeError("names are text")
        return DataConfig(source=data["source"], label_columns=tuple(label_columns), **named)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{report_name(source)}: does not say which dataset it is about, as CSV and JSON lines cannot; "
            "pass the report as Parquet or Arrow."
        ) from error


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    metadata = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
    names = ("root", "fingerprint", "command")
    if not isinstance(metadata, dict) or not all(isinstance(metadata.get(n), str | None) for n in names):
        raise ValueError("what it says of its run is not in the form that chgval writes")
    return metadata


def _parse(file: pa.NativeFile, wanted: pa.Schema) -> pa.Table:
    """Read what is there of the wanted columns, in whatever format the first bytes show."""
    start = file.read(6)
    file.seek(0)
    if not start:
        raise ValueError("it is empty")
    if start.startswith(b"PAR1"):
        parquet = pq.ParquetFile(file)
        return parquet.read([name for name in wanted.names if name in parquet.schema_arrow.names])
    if start == b"ARROW1":
        return pa.ipc.open_file(file).read_all()
    if start.startswith(b"{"):
        # Columns that are missing would come back as nulls.
        names = json.loads(file.read(LONGEST_LINE).split(b"\n", 1)[0])
        file.seek(0)
        there = pa.schema([field for field in wanted if field.name in names])
        return pajson.read_json(file, parse_options=pajson.ParseOptions(explicit_schema=there))
    convert = pacsv.ConvertOptions(
        column_types=wanted,
        include_columns=wanted.names,
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,  # reports write null as nothing, and an empty id as ""
    )
    parse = pacsv.ParseOptions(newlines_in_values=True)
    return without_marks(pacsv.read_csv(file, parse_options=parse, convert_options=convert))


def _write(table: pa.Table, file: BinaryIO, report_format: ReportFormat) -> None:
    match report_format:
        case "parquet":
            pq.write_table(table, file, compression="zstd", row_group_size=ROW_GROUP_ROWS)
        case "arrow":
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table, ROW_GROUP_ROWS)
        case "csv":
            pacsv.write_csv(with_marks(table), file)
        case "jsonl":
            for batch in table.to_batches(ROW_GROUP_ROWS):
                for row in batch.to_pylist():
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _or_null(figure_N: NDArray[np.floating] | NDArray[np.integer]) -> pa.Array:
    """Return a column in which NaN, or a label below 0, is null."""
    unknown_N = figure_N < 0 if np.issubdtype(figure_N.dtype, np.integer) else np.isnan(figure_N)
    return pa.array(figure_N, mask=unknown_N)


def _percentiles(rank_N: IntArray, group_N: IntArray) -> FloatArray:
    """Return 100 for the first rank of each group, 0 for its last, NaN where there is no rank."""
    sizes_N = np.bincount(group_N.clip(0), weights=rank_N > 0)[group_N.clip(0)]
    return np.where(rank_N > 0, 100 * (sizes_N - rank_N) / np.maximum(sizes_N - 1, 1), np.nan)

"""How tables get to disk or down a pipe, and back; what is known of a run goes with them."""

from __future__ import annotations

import codecs
import csv
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq
from numpy.typing import NDArray

from chgval.config import STANDARD_STREAM, DataConfig, OutputConfig, ReportFormat
from chgval.errors import DataError, OutputError, first_line
from chgval.files import ARRAY_ENDING, METADATA_KEY, check_file, check_free, output_errors, replacing
from chgval.reports.tables import KINDS, VALUES, TableKind, epoch_table
from chgval.spreadsheets import with_marks, without_marks
from chgval.valuation.signals import EpochSignals

# Raised whenever a column changes its name, type or meaning.
REPORT_VERSION = 3
ROW_GROUP_ROWS = 262_144
# What stands between the fields of CSV: spreadsheets write what their country does.
DELIMITERS = (",", ";", "\t")
# Bytes of a row of text.
LONGEST_LINE = 2**20


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
        resumes: whether parts are there already that belong to the run.
    Raises:
        OutputError: they cannot be deleted.
    """

    def __init__(self, config: OutputConfig, *, resumes: bool = False) -> None:
        self._config = config
        self.epochs_folder = config.epochs_folder
        if self.epochs_folder is not None:
            with output_errors(self.epochs_folder):
                for part in [] if resumes else self.epochs_folder.glob("epoch=*"):
                    shutil.rmtree(part)

    @staticmethod
    def check(config: OutputConfig, source: str = "", *, resumes: bool = False) -> None:
        """Raise OutputError where the output cannot be written, or is the dataset; leave all as it is.

        Parts may be there where a run `resumes`.
        """
        check_output(config, source)
        if config.epochs_folder is not None and not resumes:
            check_free(config.epochs_folder, overwrite=config.overwrite)

    def write_epoch(self, epoch: int, signals: EpochSignals, metadata: dict[str, object]) -> None:
        """Put one epoch's values where a reader finds them at once: epochs/epoch=3/values.parquet."""
        if self.epochs_folder is None:
            return
        folder = self.epochs_folder / f"epoch={epoch}"
        path = folder / "values.parquet"
        with output_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                _write(with_metadata(epoch_table(signals), metadata), file, "parquet")

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
        with output_errors(path):
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
    with output_errors(path), replacing(path) as file:
        _write(table, file, config.resolved_format)


def write_names(config: OutputConfig, names: Iterable[str], end: str) -> None:
    """Write one name after the other, each with its end; bytes that are no text come out as they were."""
    # Whatever the locale: names in reports are text that was read as UTF-8.
    encoded = b"".join((name + end).encode("utf-8", "surrogateescape") for name in names)
    if config.to_stdout:
        with _standard_output() as file:
            file.write(encoded)
        return
    path = Path(config.path)
    with output_errors(path), replacing(path) as file:
        file.write(encoded)


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    try:
        with output_errors(Path("standard output")):
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


def write_array(path: Path, array: NDArray[np.floating]) -> None:
    """Write a NumPy file. It appears under its name only when it is complete."""
    with output_errors(path), replacing(path) as file:
        np.save(file, array)


def kept_features(path: Path, features_ND: NDArray[np.floating]) -> dict[str, str]:
    """Return what a report says of features that its run wrote: where, and what tells them from others."""
    digest = hashlib.blake2b(np.ascontiguousarray(features_ND).tobytes(), digest_size=16).hexdigest()
    return {"file": str(path.absolute()), "digest": digest}


def features_of(metadata: dict[str, Any], source: str, num_rows: int) -> NDArray[np.floating] | None:
    """Return the features that the run of a report wrote, shape (N, D), if they are there; NaN for none.

    Args:
        metadata: of the report.
        source: the report; features may have moved with it.
        num_rows: N.
    """
    said = metadata.get("features")
    if not isinstance(said, dict):
        return None
    file = Path(str(said.get("file")))
    for path in (file, Path(source).parent / file.name):
        if path.suffix != ARRAY_ENDING or not path.is_file():  # a stranger's report may name anything
            continue
        with suppress(OSError, ValueError):  # whatever is there is not what the run wrote
            features_ND: NDArray[np.floating] = np.lib.format.open_memmap(path, mode="r")
            is_whole = features_ND.ndim == 2 and len(features_ND) == num_rows
            if is_whole and kept_features(path, features_ND)["digest"] == said.get("digest"):
                return features_ND
    return None


def is_report(source: str) -> bool:
    """Say whether the user named a report, and not a dataset: standard input, or a file of a report."""
    if source == STANDARD_STREAM:
        return True
    if not Path(source).is_file():
        return False
    try:
        if not source.endswith((".csv", ".jsonl")):
            if source.endswith(".arrow"):
                return True  # no dataset is such a file
            schema = pq.read_schema(source)
            # Programs that rewrite a report may drop its metadata.
            return METADATA_KEY in (schema.metadata or {}) or _are_of_report(schema.names)
        with Path(source).open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline(LONGEST_LINE)
        return _are_of_report(next(csv.reader([first]), []) if source.endswith(".csv") else json.loads(first))
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException):
        return False  # whatever is wrong with it will be told when it is read as a dataset


def _are_of_report(names: Iterable[str]) -> bool:
    """Say whether columns are those of a table that chgval writes."""
    return {"index", "id"} <= set(names) and bool({"value", "noise_score", "kept"} & set(names))


def report_name(source: str) -> str:
    """Return what messages call a table that the user named: "-" is standard input."""
    return "standard input" if source == STANDARD_STREAM else source


def read_table(
    source: str, columns: Sequence[str] | None = None, kind: TableKind = VALUES
) -> tuple[pa.Table, dict[str, Any]]:
    """Read columns of a table of chgval in any of its formats.

    Args:
        source: a file, or "-" for standard input.
        columns: of its schema; None reads all that there are, also beyond its schema.
        kind: which table it is.
    Returns:
        The columns, those of the schema in its types, and the metadata (empty for CSV and JSON lines).
    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    name = report_name(source)
    wanted = kind.schema
    if columns is not None:
        wanted = pa.schema([kind.schema.field(column) for column in columns])
    if source == STANDARD_STREAM and sys.stdin is None:
        raise DataError(f"{name}: is closed; pipe {kind.what} into it, or name a file.")
    try:
        buffer = pa.py_buffer(sys.stdin.buffer.read()) if source == STANDARD_STREAM else pa.memory_map(source)
        file = pa.BufferReader(buffer) if source == STANDARD_STREAM else buffer
        table = _parse(file, wanted, whole=columns is None, others_are_text=kind.others_are_text)
        table.validate(full=True)  # nothing else looks whether offsets lie within the file, and text is UTF-8
        missing = [column for column in wanted.names if column not in table.column_names]
        if missing:
            file.seek(0)
            has = set(_parse(file, wanted, whole=True, others_are_text=True).column_names)
            other = next((known for known in KINDS if has.issuperset(known.schema.names)), None)
            if other is not None:
                raise DataError(
                    f"{name}: is what chgval {other.command} writes ({other.what}); pass {kind.what}, as "
                    f"chgval {kind.command} writes."
                )
            raise DataError(
                f"{name}: no column '{missing[0]}'; expected {kind.what} of this version of chgval. Make "
                f"it anew with chgval {kind.command}."
            )
        more = [field for field in table.schema if columns is None and field.name not in wanted.names]
        schema = pa.schema([*wanted, *more])
        return table.select(schema.names).cast(schema), _metadata(table.schema)
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file; expected the output of chgval {kind.command}.") from error
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise DataError(
            f"{name}: cannot be read as {kind.what} ({first_line(error)}); expected the output of chgval "
            f"{kind.command}, as Parquet, CSV in UTF-8, JSON lines or Arrow."
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
        named: dict[str, Any] = {column: data[column] for column in columns}
        label_columns = data["label_columns"]
        for setting in ("split", "features", "images_root"):
            named[setting] = data.get(setting)
        texts = [data["source"], *label_columns]
        if not (isinstance(label_columns, list) and all(isinstance(text, str) for text in texts)):
            raise TypeError("names are text")
        if not all(isinstance(name, str | None) for name in named.values()):
            raise TypeError("names are text")
        for setting in ("features", "images_root"):
            named[setting] = None if named[setting] is None else Path(named[setting])
        return DataConfig(source=data["source"], label_columns=tuple(label_columns), **named)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{report_name(source)}: does not say which dataset it is about, as CSV and JSON lines cannot; "
            "pass the report as Parquet or Arrow, or --dataset."
        ) from error


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    metadata = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
    if not isinstance(metadata, dict) or not _is_as_written(metadata):
        raise ValueError("what it says of its run is not in the form that chgval writes")
    return metadata


def _is_as_written(metadata: dict[str, Any]) -> bool:
    """Say whether metadata, which a stranger may have written, have the types that chgval writes."""
    settings, verdict = metadata.get("settings", {}), metadata.get("verdict", {})
    classes = metadata.get("class_names", [])
    if not (isinstance(settings, dict) and isinstance(verdict, dict) and isinstance(classes, list)):
        return False
    groups = [settings.get(name, {}) for name in ("data", "train", "tracker")]
    annotators = verdict.get("annotators", [])
    texts = [metadata.get(name) for name in ("root", "fingerprint", "command")]
    return (
        all(isinstance(text, str | None) for text in texts)
        and all(isinstance(group, dict) for group in groups)
        and all(isinstance(name, str) for name in classes)
        and isinstance(metadata.get("epochs"), int | None)
        and (not verdict or isinstance(verdict.get("explained"), float | int))
        and isinstance(annotators, list)
        and all(isinstance(who, dict) and {"name", "labels", "wrong"} <= who.keys() for who in annotators)
    )


def _parse(file: pa.NativeFile, wanted: pa.Schema, *, whole: bool, others_are_text: bool) -> pa.Table:
    """Read what is there of the wanted columns, or all, in whatever format the first bytes show."""
    start = file.read(6)
    file.seek(0)
    if not start:
        raise ValueError("it is empty")
    if start.startswith(b"PAR1"):
        parquet = pq.ParquetFile(file)
        there = parquet.schema_arrow.names
        return parquet.read(None if whole else [name for name in wanted.names if name in there])
    if start == b"ARROW1":
        return pa.ipc.open_file(file).read_all()
    # Other programs write integers beside nulls as 5.0. All of ours are exact as floats.
    as_floats = pa.schema(
        [field.with_type(pa.float64()) if pa.types.is_integer(field.type) else field for field in wanted]
    )
    if start.startswith(b"{"):
        # Columns that are missing would come back as nulls.
        names = json.loads(file.read(LONGEST_LINE).split(b"\n", 1)[0])
        file.seek(0)
        there = pa.schema([field for field in as_floats if field.name in names])
        return pajson.read_json(file, parse_options=pajson.ParseOptions(explicit_schema=there))
    return _parse_csv(file, as_floats, whole=whole, others_are_text=others_are_text)


def _parse_csv(file: pa.NativeFile, wanted: pa.Schema, *, whole: bool, others_are_text: bool) -> pa.Table:
    """Read CSV as chgval writes it, or as a spreadsheet does that has read it."""
    if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.seek(0)
        file = pa.BufferReader(file.read().decode("utf-16").encode())
    file.seek(0)
    first = file.read(LONGEST_LINE).decode("utf-8-sig", "replace").splitlines()[0]
    file.seek(0)
    delimiter = max(DELIMITERS, key=first.count)
    types = {field.name: field.type for field in wanted}
    if others_are_text:
        types = dict.fromkeys(next(csv.reader([first], delimiter=delimiter)), pa.string()) | types
    convert = pacsv.ConvertOptions(
        column_types=types,
        include_columns=None if whole else wanted.names,
        null_values=[""],  # a class may be called NA
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,  # reports write null as nothing, and an empty id as ""
    )
    parse = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    table = without_marks(pacsv.read_csv(file, parse_options=parse, convert_options=convert))
    empty = functools.reduce(pc.and_, [column.is_null() for column in table.columns])
    return table.filter(pc.invert(empty))  # as spreadsheets write rows that were emptied


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

"""The Parquet files that a source names, what columns they have, and their rows a few at a time."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from chgval.data.formats.parquet.columns import class_names, huggingface_features, is_image, is_text
from chgval.data.splits import named, split_in
from chgval.errors import DataError, first_few, first_line
from chgval.files import METADATA_KEY, as_text

READ_BUFFER = 65_536
SHOWN_CLASSES = 5
# Files whose ends are read at a time: on other machines, each is waited for.
FILES_AT_A_TIME = 16
# Google's library tries for a quarter of an hour by default, and hears no signal meanwhile.
SECONDS_FOR_GOOGLE = 20
# What lies in a folder of tables whose files hold earlier versions of the rows too.
TABLE_FORMATS = {"_delta_log": "Delta", ".hoodie": "Hudi", "metadata/version-hint.text": "Iceberg"}
# What files that are not Parquet begin with.
BEGINNINGS = {
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"RIFF": "an image",
    b"BM": "an image",
    b"PK\x03\x04": "an archive",
    b"\x1f\x8b": "an archive",
    b"ARROW1": "an Arrow file",
    b"\x93NUMPY": "a NumPy file",
}
ADVICE = {
    "an image": "pass the folder of its class folder",
    "an archive": "unpack it, and pass the folder",
    "an Arrow file": "write it as Parquet",
    "a NumPy file": "write its rows as a column of lists in a Parquet file, beside labels",
}


class Conflict(NamedTuple):
    """Two files that have a column in types without a common one."""

    first: str
    first_type: pa.DataType
    second: str
    second_type: pa.DataType


@dataclass(frozen=True, slots=True)
class Shards:
    """Parquet files of one dataset.

    Attributes:
        filesystem: where they are.
        files: in order.
        schemas: of each file that has rows, by file.
        schema: of all; each column has a type that holds what the files have.
        doubled: columns that a file has twice; they are in no schema.
        conflicts: columns whose types in the files have nothing in common, by name.
        partitions: columns that stand in the names of folders only, such as label=cat.
    """

    filesystem: pafs.FileSystem
    files: Sequence[str]
    schemas: Mapping[str, pa.Schema]
    schema: pa.Schema
    doubled: Sequence[str]
    conflicts: Mapping[str, Conflict]
    partitions: Sequence[str]

    def class_names(self, source: str, column: str) -> list[str] | None:
        """Return the names that a column's integers stand for, the same in all files; None without any.

        Raises:
            DataError: the files have different lists, so that a number would mean several classes.
        """
        lists = {file: class_names(schema, column) for file, schema in self._having(column)}
        longest = max(lists, key=lambda file: len(lists[file] or ()), default=None)
        names = lists[longest] if longest is not None else None
        for file, other in lists.items():
            if names is not None and (other is None or names[: len(other)] != other):
                raise DataError(
                    f"{source}: the files name other classes: {longest} has {_listed(names)}, {file} has "
                    f"{_listed(other)}; a number would mean two classes. Give all files one list, or use "
                    "names as labels."
                )
        return names

    def check_types(self, source: str, columns: Iterable[str | None]) -> None:
        """Raise DataError where files have one of these columns in types without a common one."""
        for name in columns:
            if name is not None and name in self.conflicts:
                first, first_type, second, second_type = self.conflicts[name]
                raise DataError(
                    f"{source}: the files disagree about the type of '{name}': {first} has {first_type}, "
                    f"{second} has {second_type}; give all files one type."
                )

    def _having(self, column: str) -> Iterable[tuple[str, pa.Schema]]:
        for file, schema in self.schemas.items():
            if column in schema.names and not pa.types.is_null(schema.field(column).type):
                yield file, schema


def open_shards(source: str, split: str | None = None) -> tuple[Shards, list[str]]:
    """Find the files that a path, glob, folder or URI names, and say what a person should know of them.

    Args:
        source: what the user named.
        split: which split is read, where names of files tell. Default: that for training.
    Raises:
        DataError: there are none, or one cannot be read.
    """
    try:
        path = local_path(source)
        if path is None:
            filesystem, root = pafs.FileSystem.from_uri(_patient_uri(source))
            base, files = _remote_files(filesystem, root)
        else:
            filesystem = pafs.LocalFileSystem()
            base, files = _local_files(path)
    except (MemoryError, DataError):
        raise
    except Exception as error:  # file systems of others raise errors of any kind
        raise DataError(
            f"{source}: cannot be opened ({first_line(error)}); expected a file, a glob or a folder of "
            "*.parquet, on this machine or as a URI of s3://, gs://, abfs://, hdfs:// or file://."
        ) from error
    if not files:
        raise DataError(
            f"{source}: no Parquet files found, besides reports of chgval; expected a file, a glob or a "
            "folder of *.parquet."
        )
    chosen, notes = _of_split(source, base, files, split)
    return _shards(source, filesystem, chosen), notes


def _of_split(
    source: str, base: str, files: Sequence[str], wanted: str | None
) -> tuple[Sequence[str], list[str]]:
    """Return the files of one split, and a note where there are others."""
    # What says which split a file is of lies below what the user named, not above it.
    names = {file: os.path.relpath(file, base).removesuffix(".parquet") for file in files}
    if wanted is not None:
        chosen = named(wanted, names)
        if not chosen:
            raise DataError(f"{source}: --split {wanted}: the name of no file says so; there is {files[0]}.")
        what = f"split {wanted}"
    else:
        splits = {file: split_in(names[file]) for file in files}
        found = [split for split in splits.values() if split is not None]
        chosen = [file for file in files if splits[file] == "train"]
        if not chosen and len(set(found)) > 1:
            raise DataError(
                f"{source}: its files are of the splits {', '.join(sorted(set(found)))}, and none is for "
                f"training; pass --split {found[0]}."
            )
        chosen, what = chosen or list(files), "training split"
    if len(chosen) == len(files):
        return files, []
    rest = next(file for file in files if file not in set(chosen))
    others = f"{len(files) - len(chosen):,} others, such as {Path(rest).name}"
    return chosen, [f"reading the {what} only ({len(chosen):,} files; not {others}); --split takes another"]


def _shards(source: str, filesystem: pafs.FileSystem, files: Sequence[str]) -> Shards:
    with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        found = list(pool.map(lambda file: _schema_and_rows(source, filesystem, file), files))
    doubled: dict[str, None] = {}
    every, filled = {}, {}
    for file, (schema, num_rows) in zip(files, found, strict=True):
        twice = [name for name, count in Counter(schema.names).items() if count > 1]
        doubled |= dict.fromkeys(twice)
        once = pa.schema([field for field in schema if field.name not in twice], schema.metadata)
        every[file] = once
        if num_rows:
            filled[file] = once
    schemas = filled or every
    conflicts: dict[str, Conflict] = {}
    fields = [
        _common_field(name, schemas, conflicts)
        for name in dict.fromkeys(name for schema in every.values() for name in schema.names)
        if name not in doubled and any(name in schema.names for schema in schemas.values())
    ]
    best = max(schemas.values(), key=_described)
    schema = pa.schema(fields, best.metadata)
    partitions = {part.partition("=")[0] for file in files for part in Path(file).parts[:-1] if "=" in part}
    return Shards(filesystem, files, schemas, schema, list(doubled), conflicts, sorted(partitions))


def _described(schema: pa.Schema) -> int:
    """Return how many classes the metadata name: of lists that go on each other, the longest has all."""
    return sum(len(class_names(schema, name) or ()) for name in huggingface_features(schema))


def _schema_and_rows(source: str, filesystem: pafs.FileSystem, path: str) -> tuple[pa.Schema, int]:
    try:
        with filesystem.open_input_file(path) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            return parquet.schema_arrow, parquet.metadata.num_rows
    except UnicodeEncodeError as error:
        raise DataError(f"{as_text(path)}: its name is no UTF-8, and cannot be opened; rename it.") from error
    except (OSError, pa.ArrowException) as error:
        begin = _first_bytes(filesystem, path)
        kind = next((kind for beginning, kind in BEGINNINGS.items() if begin.startswith(beginning)), None)
        if kind is not None:
            raise DataError(f"{path}: is {kind}, and no Parquet; {ADVICE[kind]}.") from error
        if begin and not begin.startswith(b"PAR1"):
            raise DataError(f"{path}: is no Parquet file, as its first bytes tell.") from error
        where = "" if path == source else f"{source}: "
        raise DataError(
            f"{where}{path}: cannot be read as Parquet ({first_line(error)}); the file may be truncated."
        ) from error


def _first_bytes(filesystem: pafs.FileSystem, path: str) -> bytes:
    try:
        with filesystem.open_input_stream(path) as file:
            first: bytes = file.read(8)
            return first
    except (OSError, pa.ArrowException):
        return b""


def _common_field(name: str, schemas: Mapping[str, pa.Schema], conflicts: dict[str, Conflict]) -> pa.Field:
    """Return a field that holds what all files have; note a conflict where there is none."""
    having = {file: schema.field(name) for file, schema in schemas.items() if name in schema.names}
    first_file, first = next(
        ((file, field) for file, field in having.items() if not pa.types.is_null(field.type)),
        next(iter(having.items())),
    )
    common = first
    for file, field in having.items():
        merged = _common_type(common.type, field.type)
        if merged is None:
            conflicts.setdefault(name, Conflict(first_file, first.type, file, field.type))
        else:
            common = common.with_type(merged)
    return common


def _common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    if first == second:
        return first
    if pa.types.is_null(first) or pa.types.is_null(second):
        return second if pa.types.is_null(first) else first
    if is_text(first) and is_text(second):
        return pa.large_string()
    if is_text(first) or is_text(second):
        return None
    plain = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (first, second)]
    try:
        schemas = [pa.schema([pa.field("x", kind)]) for kind in plain]
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except pa.ArrowException:
        return None


def _listed(names: list[str] | None) -> str:
    return "no list" if names is None else f"{len(names):,} ({first_few(names, SHOWN_CLASSES)})"


def parquet_files(folder: Path) -> list[str]:
    """Return the Parquet files below a folder, sorted, without hidden ones and reports of chgval itself.

    Raises:
        DataError: it is a table whose files hold more than its rows.
    """
    files = []
    for file in sorted(folder.rglob("*.parquet")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith((".", "_")) for part in parts)
        if not hidden and file.is_file() and not _is_report(file):
            files.append(str(file))
    for place in {folder, *(Path(file).parent for file in files)}:
        for mark, kind in TABLE_FORMATS.items():
            if (place / mark).exists():
                raise DataError(
                    f"{place}: is a {kind} table, whose files hold earlier versions of its rows too; export "
                    "it to Parquet, and pass that."
                )
    return files


def has_images(file: str) -> bool:
    """Say whether a Parquet file has a column that can hold images."""
    try:
        return any(is_image(field.type) for field in _local_schema(Path(file)))
    except (OSError, pa.ArrowException):
        return False


def _local_schema(file: Path) -> pa.Schema:
    with file.open("rb") as opened:  # Arrow opens no names that are not UTF-8
        return pq.read_schema(opened)


def _is_report(file: Path) -> bool:
    try:
        return METADATA_KEY in (_local_schema(file).metadata or {})
    except (OSError, pa.ArrowException):
        return False  # whatever is wrong with it will be told when it is read


def _local_files(source: str) -> tuple[str, list[str]]:
    """Return the folder that the user named, in the widest sense, and the files."""
    path = Path(source)
    if path.is_dir():
        return source, parquet_files(path)
    if path.is_file():
        return str(path.parent), [source]
    found = glob.glob(source, recursive=True)  # noqa: PTH207 (the pattern may be absolute)
    files = sorted(file for file in found if Path(file).is_file() and not _is_report(Path(file)))
    return _before_magic(source), files


def local_files(source: str) -> set[Path]:
    """Return what the user named on this machine: files, without links."""
    path = local_path(source)
    return set() if path is None else {Path(file).resolve() for file in _local_files(path)[1]}


def local_path(source: str) -> str | None:
    """Return a path or glob as it is, that of a URI of this machine, and None for other machines."""
    if source.startswith("file://"):
        return unquote(source.removeprefix("file://").removeprefix("localhost"))
    return None if "://" in source else source


def _patient_uri(source: str) -> str:
    """Return a URI with a limit to how long it is tried, where there is none by default."""
    if not source.startswith("gs://") or "retry_limit_seconds" in source:
        return source
    return f"{source}{'&' if '?' in source else '?'}retry_limit_seconds={SECONDS_FOR_GOOGLE}"


def is_part_of(source: str, target: Path) -> bool:
    """Say whether a local file or folder is, or would be, among the files that the user named."""
    path = local_path(source)
    if path is None:
        return False
    if Path(path).exists():
        return target.resolve().is_relative_to(Path(path).resolve())
    pattern, new = str(Path(path).absolute()), (target.absolute(), target.absolute() / "train.parquet")
    matches = (fnmatch.fnmatch(str(f), pattern) if "**" in pattern else f.match(pattern) for f in new)
    return target.resolve() in local_files(path) or any(matches)


def _remote_files(filesystem: pafs.FileSystem, root: str) -> tuple[str, list[str]]:
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.Directory:
        found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
        return root, sorted(info.path for info in found if info.is_file and info.path.endswith(".parquet"))
    if info.is_file or not glob.has_magic(root):
        return root.rpartition("/")[0] or "/", [root] if info.is_file else []
    base = _before_magic(root)
    found = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
    return base, sorted(info.path for info in found if info.is_file and fnmatch.fnmatch(info.path, root))


def _before_magic(pattern: str) -> str:
    """Return the folder that a glob starts from."""
    folder, slash, _ = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")
    return folder or slash or "."


def read_batches(
    shards: Shards, columns: list[str] | None, rows: int
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Read columns (None: all) in order, a bounded number of rows at a time, each with the path of its file.

    Raises DataError where a file is damaged, or lacks a column.

    File by file and unbuffered, because a dataset's own scanner holds a whole row group of images and more.
    """
    for path in shards.files:
        try:
            with shards.filesystem.open_input_file(path) as file:
                parquet = pq.ParquetFile(file, buffer_size=READ_BUFFER, pre_buffer=False)
                for batch in parquet.iter_batches(rows, columns=columns, use_threads=False):
                    for column in batch.columns:  # nothing else looks whether text is UTF-8
                        # A dictionary, which comes with every batch, is looked at where it is used.
                        column.validate(full=columns is not None or not pa.types.is_dictionary(column.type))
                    yield path, batch if columns is None else batch.select(columns)
        except MemoryError:
            raise
        except (OSError, KeyError, pa.ArrowException) as error:
            what = "it" if columns is None else ", ".join(columns)
            raise DataError(
                f"{path}: reading {what} failed ({first_line(error)}); the file may be damaged, or its "
                "columns may differ from those of the other files."
            ) from error

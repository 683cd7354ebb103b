"""The files of a table of samples: what columns they have together, and their rows a few at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa

from chgval.data.splits import named, split_in
from chgval.data.tables.columns import class_names, huggingface_features, is_text
from chgval.errors import DataError, first_few

SHOWN_CLASSES = 5
# Files whose columns are read at a time: on other machines, each is waited for.
FILES_AT_A_TIME = 16


class Reader(Protocol):
    """Reads the files of one format."""

    def columns_and_rows(self, file: str) -> tuple[pa.Schema, int]:
        """Return the columns of a file, and how many rows it has.

        Raises:
            DataError: it cannot be read.
        """
        ...

    def batches(self, file: str, columns: list[str] | None, rows: int) -> Iterator[pa.RecordBatch]:
        """Yield columns (None: all) of a file, in order, at most so many rows at a time.

        Raises:
            DataError: the file is damaged, or lacks a column.
        """
        ...


class Conflict(NamedTuple):
    """Two files that have a column in types without a common one."""

    first: str
    first_type: pa.DataType
    second: str
    second_type: pa.DataType


@dataclass(frozen=True, slots=True)
class Shards:
    """Files of one table.

    Attributes:
        reader: of their format.
        files: in order.
        images_root: folder below which paths of images lie; None: that of the file that names them.
        is_local: whether they are on this machine, so that paths in them may be followed.
        schemas: of each file that has rows, by file.
        schema: of all; each column has a type that holds what the files have.
        doubled: columns that a file has twice; they are in no schema.
        conflicts: columns whose types in the files have nothing in common, by name.
        partitions: columns that stand in the names of folders only, such as label=cat.
    """

    reader: Reader
    files: Sequence[str]
    images_root: Path | None
    is_local: bool
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

    def batches(self, columns: list[str] | None, rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield columns (None: all) in order, at most so many rows at a time, each with the path of its file.

        Raises:
            DataError: a file is damaged, or lacks a column.
        """
        for file in self.files:
            for batch in self.reader.batches(file, columns, rows):
                yield file, batch

    def folder_of(self, file: str) -> Path | None:
        """Return the folder below which paths of images in a file lie; None if none may be followed."""
        if self.images_root is not None:
            return self.images_root
        return Path(file).parent if self.is_local else None

    def _having(self, column: str) -> Iterable[tuple[str, pa.Schema]]:
        for file, schema in self.schemas.items():
            if column in schema.names and not pa.types.is_null(schema.field(column).type):
                yield file, schema


def files_of_split(
    source: str, base: str, files: Sequence[str], wanted: str | None
) -> tuple[Sequence[str], list[str]]:
    """Return the files of one split, as their names tell, and a note where there are others.

    Args:
        source: what the user named.
        base: folder that the user named, in the widest sense.
        files: all that there are.
        wanted: the split. Default: that for training.
    Raises:
        DataError: there are none of it.
    """
    # What says which split a file is of lies below what the user named, not above it.
    names = {file: _without_ending(os.path.relpath(file, base)) for file in files}
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


def _without_ending(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122 (one Path for each file takes seconds)


def open_shards(
    reader: Reader, files: Sequence[str], *, images_root: Path | None, is_local: bool = True
) -> Shards:
    """Find out which columns files have together.

    Args:
        reader: of their format.
        files: in the order of their rows.
        images_root: folder below which paths of images lie. Default: that of each file.
        is_local: whether they are on this machine.
    Raises:
        DataError: one cannot be read.
    """
    with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        found = list(pool.map(reader.columns_and_rows, files))
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
    return Shards(
        reader, files, images_root, is_local, schemas, schema, list(doubled), conflicts, sorted(partitions)
    )


def _described(schema: pa.Schema) -> int:
    """Return how many classes the metadata name: of lists that go on each other, the longest has all."""
    return sum(len(class_names(schema, name) or ()) for name in huggingface_features(schema))


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

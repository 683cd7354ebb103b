"""Write a dataset anew, without some of its rows or with other labels, in the form that it has."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from chgval.config import DataConfig, Link
from chgval.data.columns import huggingface_features, is_image, is_text
from chgval.data.dataset import class_indices
from chgval.data.image_folder import FolderRows, as_text, list_image_folder
from chgval.data.open import kind_of
from chgval.data.parquet import (
    COLUMN_ROWS,
    IMAGE_ROWS,
    ParquetRows,
    open_parquet,
    read_batches,
    read_beside,
)
from chgval.errors import DataError, OutputError, SettingsError
from chgval.files import check_free, check_new_folder, check_writable, could_not_write, new_folder, replacing
from chgval.records import IntArray

# Readers take a row group whole, and Hugging Face's own writer keeps files below half a gigabyte.
ROW_GROUP_BYTES = 32 * 2**20
SHARD_BYTES = 500 * 10**6
RELABELLED_FILE = "relabelled.csv"


@dataclass(frozen=True, slots=True)
class Changes:
    """What shall become of every row of a dataset.

    Attributes:
        ids, labels_N: what the rows are, to see whether it is this dataset: names, and classes (-1: unknown).
        kept_N: which rows are written.
        new_labels_N: the class that a row gets; -1 leaves it its own.
    """

    ids: Sequence[str]
    labels_N: IntArray
    kept_N: NDArray[np.bool_]
    new_labels_N: IntArray


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What became of the rows.

    Attributes:
        num_written: rows that the new dataset has.
        vanished: classes that have no rows any more.
        unreadable: files that should have been copied, and could not be read.
    """

    num_written: int
    vanished: Sequence[str]
    unreadable: Sequence[str]


def check_rewritable(data: DataConfig, target: Path, *, overwrite: bool) -> None:
    """Raise an error where the dataset could not be written there; leave all as it is.

    Args:
        data: the dataset.
        target: a folder; or, for Parquet, one file that ends in .parquet.
        overwrite: whether a file may be replaced.
    Raises:
        DataError: the dataset does not exist.
        SettingsError: it is built in, or a folder of images shall become a file.
        OutputError: something is in the way, or the new dataset would lie within the old one.
    """
    kind = kind_of(data)
    if kind == "digits":
        raise SettingsError(f"{data.source}: is built in; only folders and Parquet files are written anew.")
    if kind == "folder" and _is_one_file(target):
        raise SettingsError(f"{target}: the images of {data.source} are copied to a folder; name a folder.")
    with could_not_write(target):
        if target.resolve().is_relative_to(Path(data.source).resolve()):
            raise OutputError(f"{target}: is, or lies within, the dataset {data.source}; pass another place.")
    if _is_one_file(target):
        check_free(target, overwrite=overwrite)
        check_writable(target)
    else:
        check_new_folder(target)


def rewrite(data: DataConfig, changes: Changes, target: Path, link: Link = "copy") -> Rewritten:
    """Write a dataset anew. It appears under its name only when it is complete.

    Of a folder of images, files are copied or linked; a relabelled image goes to the folder of its new class,
    under a name that says which class it was, and relabelled.csv lists them. Parquet files keep their schema
    and metadata; where rows are relabelled, a column original_<label> keeps what was there.

    Args:
        data: the dataset.
        changes: what becomes of its rows.
        target: as for check_rewritable, which the caller has asked.
        link: how the files of a folder get there; Parquet files are always written.
    Raises:
        DataError: the dataset cannot be read, or is not the one that the changes are for.
        OutputError: it cannot be written.
    """
    with could_not_write(target):
        if kind_of(data) == "folder":
            return _rewrite_folder(data, changes, target, link)
        return _rewrite_parquet(data, changes, target)


def _rewrite_folder(data: DataConfig, changes: Changes, target: Path, link: Link) -> Rewritten:
    rows = list_image_folder(Path(data.source))
    _check_same(data.source, changes, rows.ids, rows.labels_N)
    readable_N = np.array([os.access(path, os.R_OK) for path in rows.paths])
    is_moved_N = changes.new_labels_N >= 0
    relabelled = []
    with new_folder(target) as folder:
        # Files that keep their place go first, so that no relabelled one takes it.
        for moved in (False, True):
            for row in np.flatnonzero(changes.kept_N & readable_N & (is_moved_N == moved)).tolist():
                path = Path(rows.paths[row])
                place = path.relative_to(rows.root)
                if moved:
                    place = _new_place(folder, place, rows.folders[changes.new_labels_N[row]])
                    relabelled.append((row, place))
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                _place(path, folder / place, link)
        if relabelled:
            _list_relabelled(rows, relabelled, folder / RELABELLED_FILE)
    unreadable = [rows.ids[row] for row in np.flatnonzero(changes.kept_N & ~readable_N).tolist()]
    return _rewritten(changes, changes.kept_N & readable_N, rows.class_names, unreadable)


def _place(path: Path, place: Path, link: Link) -> None:
    match link:
        case "copy":
            shutil.copy2(path, place)
        case "hard":
            place.hardlink_to(path.resolve())
        case "sym":
            place.symlink_to(path.resolve())


def _new_place(folder: Path, place: Path, class_folder: str) -> Path:
    """Return where a relabelled image goes: below its new class, its old one in its name."""
    new_place = Path(class_folder, *place.parts[1:])
    stem = f"{place.stem}.was-{place.parts[0]}"
    while (folder / new_place.with_name(stem + place.suffix)).exists():
        stem += "-too"
    return new_place.with_name(stem + place.suffix)


def _list_relabelled(rows: FolderRows, relabelled: Sequence[tuple[int, Path]], path: Path) -> None:
    table = pa.table(
        {
            "file_name": [as_text(place.as_posix()) for _, place in relabelled],
            "label_name": [as_text(place.parts[0]) for _, place in relabelled],
            "original_file_name": [rows.ids[row] for row, _ in relabelled],
            "original_label_name": [rows.class_names[rows.labels_N[row]] for row, _ in relabelled],
        }
    )
    pacsv.write_csv(table, path)


def _rewrite_parquet(data: DataConfig, changes: Changes, target: Path) -> Rewritten:
    rows = open_parquet(data.source, data)
    ids = rows.ids or rows.row_numbers()
    labels_N, class_names = class_indices(rows.raw_labels, rows.class_names, data.source, ids)
    _check_same(data.source, changes, rows.ids, labels_N)
    schema = _new_schema(rows, relabels=bool((changes.new_labels_N >= 0).any()))
    groups = _row_groups(_changed(rows, changes, schema, _stored_labels(rows, labels_N, class_names)))
    if _is_one_file(target):
        with replacing(target) as file:
            _write_shard(file, schema, next(groups, schema.empty_table()), groups, None)
    else:
        with new_folder(target) as folder:
            _write_shards(folder, schema, groups)
    return _rewritten(changes, changes.kept_N, class_names, [])


def _new_schema(rows: ParquetRows, *, relabels: bool) -> pa.Schema:
    """Return the schema of the files, with a column of original labels where there will be other ones."""
    schema, label = rows.shards.schema, rows.label_column
    original = _original(label)
    if not relabels or original in schema.names:
        return schema
    metadata = dict(schema.metadata or {})
    if label in huggingface_features(schema):
        description = json.loads(metadata[b"huggingface"])
        features = description["info"]["features"]
        features[original] = features[label]
        metadata[b"huggingface"] = json.dumps(description).encode()
    return schema.append(schema.field(label).with_name(original)).with_metadata(metadata)


def _stored_labels(rows: ParquetRows, labels_N: IntArray, class_names: Sequence[str]) -> dict[int, object]:
    """Return what the files write for every class; for one without rows, its name or its index."""
    kind = rows.shards.schema.field(rows.label_column).type
    unseen: Sequence[object] = class_names if is_text(kind) else range(len(class_names))
    return {**dict(enumerate(unseen)), **dict(zip(labels_N.tolist(), rows.raw_labels, strict=True))}


def _changed(
    rows: ParquetRows, changes: Changes, schema: pa.Schema, stored: dict[int, object]
) -> Iterator[pa.Table]:
    """Yield the rows that are kept, a few at a time, with their new labels and all their images embedded."""
    names, label = rows.shards.schema.names, rows.label_column
    image_columns = [name for name in names if is_image(schema.field(name).type)]
    is_local = isinstance(rows.shards.filesystem, pafs.LocalFileSystem)
    start = 0
    for path, batch in read_batches(rows.shards, names, IMAGE_ROWS if image_columns else COLUMN_ROWS):
        stop = start + len(batch)
        kept_B, new_labels_B = changes.kept_N[start:stop], changes.new_labels_N[start:stop]
        start = stop
        columns = dict(zip(names, batch.columns, strict=True))
        if schema.names != names:
            columns[_original(label)] = columns[label]
        if (new_labels_B >= 0).any():
            labels = zip(columns[label].to_pylist(), new_labels_B.tolist(), strict=True)
            changed = [given if new < 0 else stored[new] for given, new in labels]
            columns[label] = pa.array(changed, columns[label].type)
        for name in image_columns if is_local else ():
            columns[name] = _embedded(columns[name], Path(path).parent)
        yield pa.table(columns).filter(pa.array(kept_B)).cast(schema)


def _embedded(images: pa.Array, folder: Path) -> pa.Array:
    """Put images that lie beside their Parquet file into it: from elsewhere the path would not lead there."""
    if not pa.types.is_struct(images.type) or not images.field("bytes").null_count:
        return images
    items = images.to_pylist()
    for item in items:
        if item and item["bytes"] is None and item.get("path"):
            encoded = read_beside(folder, item["path"])
            item["bytes"] = encoded if isinstance(encoded, bytes) else None
    return pa.array(items, images.type)


def _row_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Gather tables to the size of a row group."""
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        held.append(table)
        size += table.nbytes
        if size >= ROW_GROUP_BYTES:
            yield pa.concat_tables(held)
            held, size = [], 0
    if held:
        yield pa.concat_tables(held)


def _write_shards(folder: Path, schema: pa.Schema, groups: Iterator[pa.Table]) -> None:
    """Write files as Hugging Face datasets names them: train-00000-of-00002.parquet, ..."""
    parts: list[Path] = []
    group: pa.Table | None = next(groups, schema.empty_table())
    while group is not None:
        parts.append(folder / f"{len(parts)}.part")
        with parts[-1].open("wb") as file:
            group = _write_shard(file, schema, group, groups, SHARD_BYTES)
    for number, part in enumerate(parts):
        part.rename(folder / f"train-{number:05d}-of-{len(parts):05d}.parquet")


def _write_shard(
    file: BinaryIO, schema: pa.Schema, group: pa.Table | None, groups: Iterator[pa.Table], largest: int | None
) -> pa.Table | None:
    """Write a group and those after it until the file is large enough; return the first that was not written.

    Images are compressed already: their bytes are written as they are, and without a dictionary.
    """
    written = 0
    with pq.ParquetWriter(file, schema, **_encodings(schema)) as writer:
        while group is not None and (largest is None or written < largest):
            writer.write_table(group, row_group_size=max(1, group.num_rows))
            written += group.nbytes
            group = next(groups, None)
    return group


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    leaves = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    paths = [leaves.column(number).path for number in range(len(leaves))]
    image_columns = {field.name for field in schema if is_image(field.type)}
    others = [path for path in paths if path.split(".")[0] not in image_columns]
    compression = {path: "snappy" if path in others else "none" for path in paths}
    return {"compression": compression, "use_dictionary": others, "write_page_index": True}


def _check_same(source: str, changes: Changes, ids: Sequence[str] | None, labels_N: IntArray) -> None:
    """Raise DataError where rows are not those that the changes are for."""
    advice = "it changed since, or was another dataset. Value it anew"
    if len(labels_N) != len(changes.labels_N):
        raise DataError(
            f"{source}: has {len(labels_N):,} rows where the report has {len(changes.labels_N):,}; {advice}."
        )
    differs_N = labels_N != changes.labels_N
    if ids is not None:
        differs_N |= np.array(ids, dtype=object) != np.array(changes.ids, dtype=object)
    if differs_N.any():
        row = int(differs_N.argmax())
        raise DataError(
            f"{source}: row {row:,} ({ids[row] if ids else 'without id'}, class {labels_N[row]}) is not that "
            f"of the report ({changes.ids[row]}, class {changes.labels_N[row]}); {advice}."
        )


def _rewritten(
    changes: Changes, written_N: NDArray[np.bool_], class_names: Sequence[str], unreadable: Sequence[str]
) -> Rewritten:
    labels_N = np.where(changes.new_labels_N >= 0, changes.new_labels_N, changes.labels_N)
    before, after = np.unique(changes.labels_N), labels_N[written_N]
    vanished = [class_names[label] for label in np.setdiff1d(before, after) if label >= 0]
    return Rewritten(int(written_N.sum()), vanished, unreadable)


def _original(label_column: str) -> str:
    return f"original_{label_column}"


def _is_one_file(target: Path) -> bool:
    return target.suffix == ".parquet"

"""Tables written anew as Parquet: their schema and metadata stay, and so does what is not relabelled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from chgval.config import DataConfig
from chgval.data.dataset import fingerprint
from chgval.data.decode import Encoded
from chgval.data.formats.base import (
    KnownRows,
    Rewritten,
    RowChanges,
    check_classes,
    check_fingerprint,
    is_one_file,
    rewritten,
)
from chgval.data.tables.columns import (
    IMAGE_NAMES,
    IMAGE_TYPE,
    huggingface_features,
    is_image,
    is_list,
    is_text,
    original_column,
)
from chgval.data.tables.images import IMAGE_ROWS, ImageColumn, bytes_and_path, files_named, read_beside
from chgval.data.tables.read import (
    COLUMN_ROWS,
    Labelled,
    SeenImages,
    TableRows,
    images_of,
    read_vectors_of,
)
from chgval.errors import DataError, first_line
from chgval.files import new_folder, output_errors, replacing, sync

# Readers take a row group whole, and Hugging Face's own writer keeps files below half a gigabyte.
ROW_GROUP_BYTES = 32 * 2**20
SHARD_BYTES = 500 * 10**6


def write_parquet(
    rows: TableRows,
    data: DataConfig,
    known: KnownRows,
    changes: RowChanges,
    target: Path,
    notes: Sequence[str],
) -> Rewritten:
    """Write the kept rows of a table to a folder of shards, or one file; see `Format.write`."""
    labelled = rows.labelled(rows.ids or rows.row_numbers())
    class_names = labelled.class_names
    check_classes(rows.source, changes, class_names)
    images = images_of(rows, data)
    schema = _new_schema(rows, images, relabels=bool((changes.new_labels_N >= 0).any()))
    seen = SeenImages()
    groups = _row_groups(_changed(rows, images, changes, schema, labelled, seen))
    with output_errors(target), _arrow_errors(rows.source):
        if is_one_file(target):
            with replacing(target) as file:
                _write_shard(file, schema, next(groups, schema.empty_table()), groups, None)
                check_contents(rows, data, known, labelled, seen)
        else:
            with new_folder(target) as folder:
                _write_shards(folder, schema, groups)
                check_contents(rows, data, known, labelled, seen)
    return rewritten(known, changes, changes.kept_N, class_names, [*rows.notes, *notes], [])


@contextmanager
def _arrow_errors(source: str) -> Iterator[None]:
    """Turn what Parquet cannot hold, such as objects without fields, into DataError."""
    try:
        yield
    except pa.ArrowException as error:
        raise DataError(
            f"{source}: cannot be written as Parquet ({first_line(error)}); leave that column out."
        ) from error


def _new_schema(rows: TableRows, images: ImageColumn | None, *, relabels: bool) -> pa.Schema:
    """Return the schema of all files, with images that were named, and original labels beside new ones.

    Raises:
        DataError: the files disagree about the types of their columns, or have columns twice.
    """
    shards, label, schema = rows.shards, rows.label_columns[0], rows.shards.schema
    for name, (first, first_type, second, second_type) in shards.conflicts.items():
        raise DataError(
            f"{rows.source}: the files do not fit each other: '{name}' is {first_type} in {first}, and "
            f"{second_type} in {second}."
        )
    if shards.doubled:
        raise DataError(
            f"{rows.source}: has two columns called '{shards.doubled[0]}', and cannot be written anew so; "
            "rename one."
        )
    if images is not None and images.holds_names:
        schema = schema.append(pa.field(_embedded_column(schema), IMAGE_TYPE))
    original = _original_column(schema, label)
    if not relabels or original in schema.names:
        return schema
    metadata = dict(schema.metadata or {})
    if label in huggingface_features(schema):
        description = json.loads(metadata[b"huggingface"])
        features = description["info"]["features"]
        features[original] = features[label]
        metadata[b"huggingface"] = json.dumps(description).encode()
    return schema.append(schema.field(label).with_name(original)).with_metadata(metadata)


def _original_column(schema: pa.Schema, label: str) -> str:
    """Return the column of original labels; one of that name and another type is somebody else's."""
    name = original_column(label)
    while name in schema.names and schema.field(name).type != schema.field(label).type:
        name += "_"
    return name


def _stored_labels(kind: pa.DataType, rows: TableRows, labelled: Labelled) -> dict[int, object]:
    """Return what the files write for every class; for one without rows, its name or its index."""
    if is_list(kind):  # of one label each
        stored = _stored_labels(kind.value_type, rows, labelled)
        return {label: [written] for label, written in stored.items()}
    names = labelled.class_names
    unseen: Sequence[object] = names if is_text(kind) else range(len(names))
    seen = zip(labelled.labels_N.tolist(), rows.raw_labels_A[0], strict=True)
    return {**dict(enumerate(unseen)), **dict(seen)}


def _changed(
    rows: TableRows,
    images: ImageColumn | None,
    changes: RowChanges,
    schema: pa.Schema,
    labelled: Labelled,
    seen: SeenImages,
) -> Iterator[pa.Table]:
    """Yield the rows that are kept, a few at a time, with their new labels and all their images embedded."""
    label, original = rows.label_columns[0], _original_column(schema, rows.label_columns[0])
    adds_original = original in schema.names and original not in rows.shards.schema.names
    stored = _stored_labels(schema.field(label).type, rows, labelled)
    image_columns = [field.name for field in schema if is_image(field.type)]
    start = 0
    for file, batch in rows.shards.batches(None, IMAGE_ROWS if image_columns else COLUMN_ROWS):
        stop = start + len(batch)
        kept_B, new_labels_B = changes.kept_N[start:stop], changes.new_labels_N[start:stop]
        start = stop
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        folder = rows.shards.folder_of(file)
        for name in image_columns:
            if name in columns and folder is not None:
                columns[name] = _embedded(columns[name], folder)
        if images is not None and images.holds_names:
            columns[_embedded_column(rows.shards.schema)] = _read_named(columns[images.name], images, folder)
        elif images is not None:
            for cell in columns[images.name]:
                encoded, path = bytes_and_path(cell)
                seen.add(path, encoded)
        if adds_original:
            columns[original] = columns[label]
        try:
            if (new_labels_B >= 0).any():
                labels = zip(columns[label].to_pylist(), new_labels_B.tolist(), strict=True)
                changed = [given if new < 0 else stored[new] for given, new in labels]
                columns[label] = pa.array(changed, schema.field(label).type)
            table = pa.table({name: columns.get(name, pa.nulls(len(batch))) for name in schema.names})
            yield table.cast(schema).filter(pa.array(kept_B))
        except pa.ArrowException as error:
            raise DataError(f"{file}: does not fit the other files ({first_line(error)}).") from error


def _embedded(images: pa.Array, folder: Path) -> pa.Array:
    """Put images that lie beside their file into it: from elsewhere the path would not lead there."""
    if not pa.types.is_struct(images.type) or not images.field("bytes").null_count:
        return images
    items = images.to_pylist()
    for item in items:
        if item and item["bytes"] is None and item.get("path"):
            item["bytes"] = _bytes_or_none(read_beside(folder, item["path"]))
    return pa.array(items, images.type)


def _read_named(names: pa.Array, images: ImageColumn, folder: Path | None) -> pa.Array:
    """Return the images that a column names."""
    paths = [bytes_and_path(name, images.ending)[1] for name in names]
    read = [_bytes_or_none(read_beside(folder, path)) if folder and path else None for path in paths]
    items = [{"bytes": encoded, "path": path} for encoded, path in zip(read, paths, strict=True)]
    return pa.array(items, IMAGE_TYPE)


def _bytes_or_none(encoded: Encoded) -> bytes | None:
    return encoded if isinstance(encoded, bytes) else None


def _embedded_column(schema: pa.Schema) -> str:
    """Return what the column of images is called that is added to one of names."""
    return next(name for name in (*IMAGE_NAMES, "embedded_image") if name not in schema.names)


def _row_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Gather tables to the size of a row group."""
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        if table.num_rows:
            held.append(table)
            size += _num_bytes(table)
        if size >= ROW_GROUP_BYTES:
            yield pa.concat_tables(held)
            held, size = [], 0
    if held:
        yield pa.concat_tables(held)


def _num_bytes(table: pa.Table) -> int:
    """Return about how many bytes a table adds; each part of a dictionary column holds the dictionary."""
    sizes = (
        8 * table.num_rows if pa.types.is_dictionary(column.type) else column.nbytes
        for column in table.columns
    )
    return sum(sizes)


def _write_shards(folder: Path, schema: pa.Schema, groups: Iterator[pa.Table]) -> None:
    """Write files as Hugging Face datasets names them: train-00000-of-00002.parquet, ..."""
    parts: list[Path] = []
    group: pa.Table | None = next(groups, schema.empty_table())
    while group is not None:
        parts.append(folder / f"{len(parts)}.part")
        with parts[-1].open("wb") as file:
            group = _write_shard(file, schema, group, groups, SHARD_BYTES)
        sync(parts[-1])
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
            written += _num_bytes(group)
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


def check_contents(
    rows: TableRows, data: DataConfig, known: KnownRows, labelled: Labelled, seen: SeenImages | None = None
) -> None:
    """Raise DataError where contents are not those of the report, although their labels are.

    Args:
        rows: the table.
        data: its settings.
        known: what it must still be.
        labelled: its labels.
        seen: images that are embedded in it, if they have been read.
    """
    images, seen = images_of(rows, data), seen or SeenImages()
    paths: Sequence[str | None] = seen.paths
    contents: Sequence[int] | bytes = seen.digests
    if images is not None and images.holds_names:
        files, paths = files_named(rows.shards, images)
        contents = [] if data.features else files.digests()
    if data.takes_features:
        contents = read_vectors_of(rows, data)[0].tobytes()
    ids = rows.ids_beside(paths)
    found = fingerprint(ids, labelled.labels_NA, labelled.class_names, contents)
    check_fingerprint(rows.source, known, found)

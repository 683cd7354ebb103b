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
from chgval.data.columns import (
    find_image_column,
    huggingface_features,
    is_image,
    is_list,
    is_text,
    original_column,
)
from chgval.data.dataset import fingerprint
from chgval.data.decode import UnreadableImageError
from chgval.data.image_folder import FolderRows, as_text, folder_fingerprint, list_image_folder
from chgval.data.images import leads_into, open_image_file
from chgval.data.open import kind_of
from chgval.data.parquet import (
    COLUMN_ROWS,
    IMAGE_ROWS,
    Labelled,
    ParquetRows,
    SeenImages,
    bytes_and_path,
    ids_from_paths,
    is_part_of,
    open_parquet,
    read_batches,
    read_beside,
    read_vectors,
)
from chgval.errors import DataError, OutputError, SettingsError, first_line
from chgval.files import (
    check_file,
    check_new_folder,
    new_folder,
    output_errors,
    replacing,
    sync,
)
from chgval.spreadsheets import with_marks
from chgval.types import IntArray

# Readers take a row group whole, and Hugging Face's own writer keeps files below half a gigabyte.
ROW_GROUP_BYTES = 32 * 2**20
SHARD_BYTES = 500 * 10**6
RELABELLED_FILE = "relabelled.csv"
# Bytes of a name that become part of another one.
LONGEST_STEM = 50
ADVICE = "it changed since, or was another dataset. Value it anew"


@dataclass(frozen=True, slots=True)
class KnownRows:
    """What is known of a dataset from when it was read, to see whether it is still the same.

    Attributes:
        ids, labels_N: names and classes (-1: unknown) of all rows.
        fingerprint: of the dataset, if that is known.
    """

    ids: Sequence[str]
    labels_N: IntArray
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class RowChanges:
    """What shall become of every row of a dataset.

    Attributes:
        kept_N: which rows are written.
        new_labels_N: the class that a row gets; -1 leaves it its own.
    """

    kept_N: NDArray[np.bool_]
    new_labels_N: IntArray


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What became of the rows.

    Attributes:
        num_written: rows that the new dataset has.
        vanished: classes that have no rows any more.
        unreadable: files that should have been copied, and could not be read.
        notes: what a person should know about how the dataset was read.
    """

    num_written: int
    vanished: Sequence[str]
    unreadable: Sequence[str]
    notes: Sequence[str]


def check_rewritable(
    data: DataConfig, target: Path, *, overwrite: bool, link: Link = "copy", may_be_there: bool = False
) -> None:
    """Raise an error where the dataset could not be written there; leave all as it is.

    Args:
        data: the dataset.
        target: a folder; or, for Parquet, one file that ends in .parquet.
        overwrite: whether a file may be replaced.
        link: how the files of a folder get there.
        may_be_there: whether it may have been written there already; whether it was is seen when it has been
            written again.
    Raises:
        DataError: the dataset does not exist, or has links that lead out of it.
        SettingsError: it is built in, or a folder of images shall become a file.
        OutputError: something is in the way, or the new dataset would be part of the old one.
    """
    kind = kind_of(data)
    if kind == "digits":
        raise SettingsError(f"{data.source}: is built in; only folders and Parquet files are written anew.")
    if kind == "folder" and _is_one_file(target):
        raise SettingsError(f"{target}: the images of {data.source} are copied to a folder; name a folder.")
    with output_errors(target):
        if kind == "folder":
            rows = list_image_folder(Path(data.source))
            places = [Path(data.source), *{Path(path).parent for path in rows.paths}]
            taken = any(target.resolve().is_relative_to(place.resolve()) for place in places)
        else:
            taken = is_part_of(data.source, target)
        if taken:
            raise OutputError(f"{target}: is part of the dataset {data.source}; pass another place.")
        if kind == "folder" and link != "sym":
            for path in rows.paths:
                _check_inside(Path(path), rows.root)
    if _is_one_file(target):
        check_file(target, overwrite=overwrite or may_be_there)
    elif not (may_be_there and target.is_dir()):
        check_new_folder(target)


def check_same(data: DataConfig, known: KnownRows) -> None:
    """Raise DataError where the rows, their ids or their labels are not those that are known of."""
    if kind_of(data) == "folder":
        rows = list_image_folder(Path(data.source))
        _check_rows(data.source, known, rows.ids, rows.labels_N)
    else:
        _open_same(data, known)


def rewrite(
    data: DataConfig, known: KnownRows, changes: RowChanges, target: Path, link: Link = "copy"
) -> Rewritten:
    """Write a dataset anew. It appears under its name only when it is complete.

    Of a folder of images, files are copied or linked; a relabelled image goes to the folder of its new class,
    under a name that says which class it was, and relabelled.csv lists them. Parquet files keep their schema
    and metadata; where rows are relabelled, a column original_<label> keeps what was there.

    Args:
        data: the dataset.
        known: what it must still be.
        changes: what becomes of its rows.
        target: as for check_rewritable, which the caller has asked.
        link: how the files of a folder get there; Parquet files are always written.
    Raises:
        DataError: the dataset cannot be read, is another by now, or has links that lead out of it.
        OutputError: it cannot be written.
    """
    if kind_of(data) == "folder":
        return _rewrite_folder(data, known, changes, target, link)
    return _rewrite_parquet(data, known, changes, target)


def _rewrite_folder(
    data: DataConfig, known: KnownRows, changes: RowChanges, target: Path, link: Link
) -> Rewritten:
    rows = list_image_folder(Path(data.source))
    _check_rows(data.source, known, rows.ids, rows.labels_N)
    _check_fingerprint(data.source, known, folder_fingerprint(rows))
    _check_classes(data.source, changes, rows.class_names)
    readable_N = np.array([_is_readable(Path(path)) for path in rows.paths])
    is_moved_N = changes.new_labels_N >= 0
    relabelled = []
    with output_errors(target), new_folder(target) as folder:
        # Files that keep their place go first, so that no relabelled one takes it.
        for moved in (False, True):
            for row in np.flatnonzero(changes.kept_N & readable_N & (is_moved_N == moved)).tolist():
                path = Path(rows.paths[row])
                if link != "sym":
                    _check_inside(path, rows.root)
                place = path.relative_to(rows.root)
                if moved:
                    place = _new_place(folder, place, rows.folders[changes.new_labels_N[row]])
                    relabelled.append((row, place))
                _place(path, folder / place, link)
        if relabelled:
            _list_relabelled(rows, relabelled, folder / RELABELLED_FILE)
    unreadable = [rows.ids[row] for row in np.flatnonzero(changes.kept_N & ~readable_N).tolist()]
    return _rewritten(known, changes, changes.kept_N & readable_N, rows.class_names, rows.notes, unreadable)


def _is_readable(path: Path) -> bool:
    try:
        open_image_file(path).close()
    except UnreadableImageError:
        return False
    return True


def _check_inside(path: Path, root: Path) -> None:
    """Raise DataError where a link leads out of the dataset: that file is nothing that it may hand on."""
    if not leads_into(path, root):
        raise DataError(
            f"{path}: leads out of the dataset, to {os.path.realpath(path)}; put the file there, or use "
            "chgval select --link sym, which only makes the same links."
        )


def _place(path: Path, place: Path, link: Link) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        match link:
            case "copy":
                shutil.copy2(path, place)
            case "hard":
                place.hardlink_to(path.resolve())
            case "sym":
                place.symlink_to(path.resolve())
    except (OSError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "pass --link copy" if link == "hard" else "make room, or leave that file out"
        raise OutputError(f"{path}: cannot be put into a new folder ({reason}); {advice}.") from error


def _new_place(folder: Path, place: Path, class_folder: str) -> Path:
    """Return where a relabelled image goes: below its new class, its old one in its name."""
    new_place = Path(class_folder, *place.parts[1:])
    # Names may have 255 bytes; what they end in tells the class.
    stem = f"{_cut(place.stem)}.was-{_cut(place.parts[0])}"
    while (folder / new_place.with_name(stem + place.suffix)).exists():
        stem += "-too"
    return new_place.with_name(stem + place.suffix)


def _cut(name: str) -> str:
    """Return as much of a name as fits into LONGEST_STEM bytes, in whole characters."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= LONGEST_STEM else encoded[:LONGEST_STEM].decode("utf-8", "ignore")


def _list_relabelled(rows: FolderRows, relabelled: Sequence[tuple[int, Path]], path: Path) -> None:
    table = pa.table(
        {
            "file_name": [as_text(place.as_posix()) for _, place in relabelled],
            "label_name": [as_text(place.parts[0]) for _, place in relabelled],
            "original_file_name": [rows.ids[row] for row, _ in relabelled],
            "original_label_name": [rows.class_names[rows.labels_N[row]] for row, _ in relabelled],
        }
    )
    pacsv.write_csv(with_marks(table), path)
    sync(path)


def _rewrite_parquet(data: DataConfig, known: KnownRows, changes: RowChanges, target: Path) -> Rewritten:
    rows, labelled = _open_same(data, known)
    class_names = labelled.class_names
    _check_classes(data.source, changes, class_names)
    schema = _new_schema(rows, relabels=bool((changes.new_labels_N >= 0).any()))
    seen = SeenImages()
    groups = _row_groups(_changed(data, rows, changes, schema, labelled, seen))
    with output_errors(target):
        if _is_one_file(target):
            with replacing(target) as file:
                _write_shard(file, schema, next(groups, schema.empty_table()), groups, None)
                _check_seen(data, known, rows, labelled, seen)
        else:
            with new_folder(target) as folder:
                _write_shards(folder, schema, groups)
                _check_seen(data, known, rows, labelled, seen)
    return _rewritten(known, changes, changes.kept_N, class_names, rows.notes, [])


def _open_same(data: DataConfig, known: KnownRows) -> tuple[ParquetRows, Labelled]:
    """Return the rows and their classes, if the rows are those that are known of."""
    rows = open_parquet(data.source, data)
    labelled = rows.labelled(rows.ids or rows.row_numbers())
    _check_rows(data.source, known, rows.ids, labelled.labels_N)
    return rows, labelled


def _new_schema(rows: ParquetRows, *, relabels: bool) -> pa.Schema:
    """Return the schema of all files, with a column of original labels where there will be other ones.

    Raises:
        DataError: the files disagree about the types of their columns.
    """
    shards, label = rows.shards, rows.label_columns[0]
    try:
        schemas = [pq.read_schema(path, filesystem=shards.filesystem) for path in shards.files]
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{rows.source}: the files do not fit each other ({first_line(error)}).") from error
    schema = schema.with_metadata(shards.schema.metadata)
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


def _stored_labels(kind: pa.DataType, rows: ParquetRows, labelled: Labelled) -> dict[int, object]:
    """Return what the files write for every class; for one without rows, its name or its index."""
    if is_list(kind):  # of one label each
        stored = _stored_labels(kind.value_type, rows, labelled)
        return {label: [written] for label, written in stored.items()}
    names = labelled.class_names
    unseen: Sequence[object] = names if is_text(kind) else range(len(names))
    seen = zip(labelled.labels_N.tolist(), rows.raw_labels_A[0], strict=True)
    return {**dict(enumerate(unseen)), **dict(seen)}


def _changed(
    data: DataConfig,
    rows: ParquetRows,
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
    valued = None
    if data.features_column is None:
        valued = find_image_column(data.source, rows.shards.schema, data.image_column)
    is_local = isinstance(rows.shards.filesystem, pafs.LocalFileSystem)
    start = 0
    for path, batch in read_batches(rows.shards, None, IMAGE_ROWS if image_columns else COLUMN_ROWS):
        stop = start + len(batch)
        kept_B, new_labels_B = changes.kept_N[start:stop], changes.new_labels_N[start:stop]
        start = stop
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for name in image_columns if is_local else ():
            if name in columns:
                columns[name] = _embedded(columns[name], Path(path).parent)
        if valued is not None:
            _note_images(columns[valued], seen)
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
            raise DataError(f"{path}: does not fit the other files ({first_line(error)}).") from error


def _note_images(images: pa.Array, seen: SeenImages) -> None:
    for cell in images:
        encoded, path = bytes_and_path(cell)
        seen.add(path, encoded)


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


def _check_rows(source: str, known: KnownRows, ids: Sequence[str] | None, labels_N: IntArray) -> None:
    """Raise DataError where rows are not those that are known of; ids are None if rows have none."""
    if len(labels_N) != len(known.labels_N):
        raise DataError(
            f"{source}: has {len(labels_N):,} rows where the report has {len(known.labels_N):,}; {ADVICE}."
        )
    differs_N = labels_N != known.labels_N
    if ids is not None:
        differs_N |= np.array(ids, dtype=object) != np.array(known.ids, dtype=object)
    if differs_N.any():
        row = int(differs_N.argmax())
        raise DataError(
            f"{source}: row {row:,} ({ids[row] if ids else 'without id'}, class {labels_N[row]}) is not that "
            f"of the report ({known.ids[row]}, class {known.labels_N[row]}); {ADVICE}."
        )


def _check_seen(
    data: DataConfig, known: KnownRows, rows: ParquetRows, labelled: Labelled, seen: SeenImages
) -> None:
    """Raise DataError where contents were not those of the report, although their labels were."""
    if data.features_column is None:
        ids = rows.ids or ids_from_paths(seen.paths)
        contents: Sequence[int] | bytes = seen.digests
    else:
        ids = rows.ids or rows.row_numbers()
        contents = read_vectors(data.source, rows.shards, data.features_column, len(rows))[0].tobytes()
    found = fingerprint(ids, labelled.labels_NA, labelled.class_names, contents)
    _check_fingerprint(data.source, known, found)


def _check_fingerprint(source: str, known: KnownRows, found: str) -> None:
    if known.fingerprint is not None and found != known.fingerprint:
        raise DataError(f"{source}: its contents or class names are not those of the report; {ADVICE}.")


def _check_classes(source: str, changes: RowChanges, class_names: Sequence[str]) -> None:
    """Raise DataError where rows shall get a class that the dataset does not have."""
    largest = int(changes.new_labels_N.max(initial=-1))
    if largest >= len(class_names):
        raise DataError(
            f"{source}: the report suggests class {largest:,} where there are {len(class_names):,}; value it "
            "anew."
        )


def _rewritten(
    known: KnownRows,
    changes: RowChanges,
    written_N: NDArray[np.bool_],
    class_names: Sequence[str],
    notes: Sequence[str],
    unreadable: Sequence[str],
) -> Rewritten:
    labels_N = np.where(changes.new_labels_N >= 0, changes.new_labels_N, known.labels_N)
    before, after = np.unique(known.labels_N), labels_N[written_N]
    vanished = [class_names[label] for label in np.setdiff1d(before, after) if label >= 0]
    return Rewritten(int(written_N.sum()), vanished, unreadable, notes)


def _is_one_file(target: Path) -> bool:
    return target.suffix == ".parquet"

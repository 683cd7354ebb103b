"""The rows of a table: their labels, ids and contents, in the conventions of Hugging Face datasets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from chgval.config import DataConfig
from chgval.data.annotations import majority
from chgval.data.dataset import (
    Dataset,
    Embeddings,
    LargeImages,
    PixelImages,
    class_indices,
    digest,
    fingerprint,
)
from chgval.data.decode import Encoded
from chgval.data.decode_once import as_it_is, decode_once
from chgval.data.features import read_features
from chgval.data.images import (
    LARGEST_KEPT_SIZE,
    PROBED_DEPTHS,
    PROBED_IMAGES,
    SpooledImages,
    choose_size,
    depth_notes,
    keep_encoded,
    load_files,
)
from chgval.data.tables.columns import (
    IMAGE_NAMES,
    LABEL_NAMES,
    check_column,
    find_id_column,
    find_label_columns,
    is_list,
    is_vector,
)
from chgval.data.tables.images import (
    ImageColumn,
    encoded_images,
    files_named,
    find_images,
    image_paths,
)
from chgval.data.tables.shards import Shards
from chgval.detection.signals import Annotations
from chgval.errors import DataError, first_few, first_line
from chgval.types import IntArray

# Rows handed on at a time: what bounds the memory, whatever the size of a row group.
COLUMN_ROWS = 65_536
SHOWN_ANNOTATORS = 5


@dataclass(frozen=True, slots=True)
class SeenImages:
    """Paths, and digests of the bytes, of images that were read: what the fingerprint is made of."""

    paths: list[str | None] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)

    def add(self, path: str | None, encoded: Encoded | None) -> None:
        """Take in the next image."""
        self.paths.append(path)
        self.digests.append(digest(encoded) if isinstance(encoded, bytes) else 0)

    def noting(self, images: Iterable[tuple[Encoded, str | None]]) -> Iterator[Encoded]:
        """Take in images, and hand them on."""
        for encoded, path in images:
            self.add(path, encoded)
            yield encoded


@dataclass(frozen=True, slots=True)
class TableRows:
    """All rows of a table, in order, without their contents.

    Attributes:
        source: what the user named.
        shards: its files.
        label_columns: names of the columns of labels.
        id_column: name of the column of ids, if there is one.
        raw_labels_A: labels as they are stored, None for null and NaN, of each of A annotators.
        annotators: their names, if there are several.
        class_names: names that integer labels index, if the files have them.
        ids: of the column of ids, if there is one.
        notes: what a person should know about how the source was read.
    """

    source: str
    shards: Shards
    label_columns: tuple[str, ...]
    id_column: str | None
    raw_labels_A: Sequence[Sequence[object]]
    annotators: tuple[str, ...]
    class_names: Sequence[str] | None
    ids: Sequence[str] | None
    notes: Sequence[str]

    def __len__(self) -> int:
        return len(self.raw_labels_A[0])

    def row_numbers(self) -> list[str]:
        """Return ids for rows that have no others."""
        return [str(row) for row in range(len(self))]

    def ids_beside(self, paths: Sequence[str | None]) -> Sequence[str]:
        """Return the ids: of their column, or paths of images if these tell rows apart, or numbers."""
        return self.ids or ids_from_paths(paths) or self.row_numbers()

    def labelled(self, ids: Sequence[str]) -> Labelled:
        """Return the labels as class indices; see class_indices."""
        labels_NA, names_C = class_indices(self.raw_labels_A, self.class_names, self.source, ids)
        if not self.annotators:
            return Labelled(labels_NA[:, 0], labels_NA, names_C, None)
        annotations = Annotations(self.annotators, labels_NA, len(self.label_columns) > 1)
        return Labelled(majority(annotations), labels_NA, names_C, annotations)


class Labelled(NamedTuple):
    """Labels of all rows as class indices: the one of each row, all that it has, and what they mean."""

    labels_N: IntArray
    labels_NA: IntArray
    class_names: list[str]
    annotations: Annotations | None


def open_rows(source: str, shards: Shards, notes: Sequence[str], config: DataConfig) -> TableRows:
    """Read labels and ids of a table.

    Args:
        source: what the user named.
        shards: its files.
        notes: what a person should know of them.
        config: names of columns, where the user gave them.
    Raises:
        DataError: nothing to read, or a column is missing or of the wrong type.
    """
    notes = list(notes)
    schema = shards.schema
    asked = (*(config.label_columns or LABEL_NAMES), config.id_column, config.features_column)
    for name in (*asked, *((config.image_column,) if config.image_column else IMAGE_NAMES)):
        if name in shards.doubled:
            raise DataError(f"{source}: has two columns called '{name}'; rename one.")
    for name in config.label_columns or ("label",):
        if name in shards.partitions and name not in schema.names:
            raise DataError(
                f"{source}: the column '{name}' stands in the names of folders only ({name}=...), which are "
                "not read; write it into the files."
            )
    label_columns = find_label_columns(source, schema, config.label_columns)
    id_column = find_id_column(source, schema, config.id_column)
    wanted = dict.fromkeys(name for name in (*label_columns, id_column) if name is not None)
    columns = _table(source, shards, list(wanted))
    if not columns.num_rows:
        raise DataError(f"{source}: no rows; expected at least two samples of different classes.")
    raw_labels_A, annotators = _raw_labels(source, columns, label_columns)
    if annotators:
        who = f"{len(annotators):,} annotators"
        if len(label_columns) == 1:
            who = f"up to {who} a row"
        shown = first_few(label_columns, SHOWN_ANNOTATORS)
        notes.append(f"labels of {who} ({shown}); training on the majority")
    return TableRows(
        source=source,
        shards=shards,
        label_columns=label_columns,
        id_column=id_column,
        raw_labels_A=raw_labels_A,
        annotators=annotators,
        class_names=_common_class_names(source, shards, label_columns),
        ids=columns[id_column].cast(pa.string()).fill_null("").to_pylist() if id_column else None,
        notes=notes,
    )


def read_rows(rows: TableRows, config: DataConfig, largest_size: int) -> Dataset:
    """Read the contents of all rows.

    Args:
        rows: the table.
        config: names of columns and the image size, where the user gave them.
        largest_size: the largest image size to choose.
    Raises:
        DataError: a column is missing or of the wrong type, or a label is out of range.
    """
    images = images_of(rows, config)
    if images is not None:
        rows.shards.check_types(rows.source, [images.name])
    read = _read_contents(rows, images, config, largest_size)
    ids = rows.ids_beside(read.paths)
    labelled = rows.labelled(ids)
    return Dataset(
        source=rows.source,
        ids=ids,
        labels_N=labelled.labels_N,
        class_names=labelled.class_names,
        content=read.content,
        problems=read.problems,
        fingerprint=fingerprint(ids, labelled.labels_NA, labelled.class_names, read.digests),
        notes=[*rows.notes, *read.notes],
        annotations=labelled.annotations,
        columns={
            "image_column": None if images is None else images.name,
            "features_column": config.features_column,
            "label_columns": rows.label_columns,
            "id_column": rows.id_column,
        },
    )


class Contents(NamedTuple):
    """What a model is fed of all rows, why some have none, what the fingerprint is made of, and paths."""

    content: PixelImages | LargeImages | Embeddings
    problems: dict[int, str]
    digests: Sequence[int] | bytes
    paths: Sequence[str | None]
    notes: Sequence[str] = ()


def images_of(rows: TableRows, config: DataConfig) -> ImageColumn | None:
    """Return the column of images, if the rows have images; see `find_images`."""
    if config.features_column is not None:
        return None
    return find_images(rows.source, rows.shards, config.image_column, may_lack=config.features is not None)


def read_vectors_of(rows: TableRows, config: DataConfig) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Return the embeddings of a column, or of a file beside the rows, and why some rows have none."""
    if config.features is not None:
        return read_features(config.features, len(rows), rows.source)
    if config.features_column is None:
        raise ValueError("no embeddings were asked for")
    return read_vectors(rows.source, rows.shards, config.features_column, len(rows))


def _read_contents(
    rows: TableRows, images: ImageColumn | None, config: DataConfig, largest_size: int
) -> Contents:
    shards, size, most = rows.shards, config.image_size, config.max_pixels
    if config.takes_features:
        vectors_ND, problems = read_vectors_of(rows, config)
        paths = [] if images is None or rows.ids else image_paths(shards, images)
        return Contents(Embeddings(vectors_ND), problems, vectors_ND.tobytes(), paths)
    if images is None:
        raise ValueError("neither images nor embeddings")
    if images.holds_names:
        files, names = files_named(shards, images)
        loaded = load_files(files, config, largest_size)
        digests = files.digests() if loaded.digests is None else loaded.digests
        return Contents(loaded.content, loaded.problems, digests, names, loaded.notes)
    seen = SeenImages()
    if size is None:
        probed = encoded_images(shards, images, limit=PROBED_IMAGES)
        size = choose_size((encoded for encoded, _ in probed), largest_size, most)
    stream = seen.noting(encoded_images(shards, images))
    if size <= LARGEST_KEPT_SIZE:
        loaded = decode_once(stream, as_it_is, len(rows), size, most, workers=config.workers)
    else:
        spooled = SpooledImages(stream)
        loaded = keep_encoded(spooled, size, spooled.problems, most)
    probed = encoded_images(shards, images, limit=PROBED_DEPTHS)
    notes = depth_notes((encoded for encoded, _ in probed), most)
    return Contents(loaded.content, loaded.problems, seen.digests, seen.paths, notes)


def pictures_of(rows: TableRows, config: DataConfig, wanted: Sequence[int]) -> Iterator[bytes | None]:
    """Yield the encoded images of rows, in their order; None where there is none to read.

    Reads as far as the last of the rows, a few at a time.
    """
    images = images_of(rows, config)
    if images is None:
        yield from [None] * len(wanted)
        return
    stream = encoded_images(rows.shards, images, limit=max(wanted, default=-1) + 1)
    numbers = set(wanted)
    found = {row: encoded for row, (encoded, _) in enumerate(stream) if row in numbers}
    for row in wanted:
        encoded = found.get(row)
        yield encoded if isinstance(encoded, bytes) else None


def row_ids(rows: TableRows, config: DataConfig) -> Sequence[str]:
    """Return the ids that rows have when they are read, without reading what else is in them."""
    images = None if rows.ids else images_of(rows, config)
    paths = [] if images is None else image_paths(rows.shards, images)
    return rows.ids_beside(paths)


def ids_from_paths(paths: Sequence[str | None]) -> list[str]:
    """Return the paths inside the image column if they tell all rows apart, else nothing."""
    names = [path for path in paths if path]
    return names if len(set(names)) == len(paths) else []


def _common_class_names(source: str, shards: Shards, columns: Sequence[str]) -> list[str] | None:
    """Return the class names that all columns of labels have, if any; empty ones need none."""
    filled = [name for name in columns if not pa.types.is_null(shards.schema.field(name).type)]
    named = [shards.class_names(source, name) for name in filled]
    if any(names != named[0] for names in named):
        raise DataError(
            f"{source}: columns {', '.join(columns)} do not name the same classes; --label-column needs "
            "columns that do."
        )
    return named[0] if named else None


def _raw_labels(
    source: str, columns: pa.Table, names: tuple[str, ...]
) -> tuple[list[list[object]], tuple[str, ...]]:
    """Return the labels of each annotator, and the annotators' names if there are several."""
    if not is_list(columns[names[0]].type):
        several = names if len(names) > 1 else ()
        return [_plain_labels(source, name, columns[name]) for name in names], several
    lists = columns[names[0]].combine_chunks()
    flat = iter(_plain_labels(source, names[0], pa.chunked_array([lists.flatten()])))
    lengths = pc.list_value_length(lists).fill_null(0).to_pylist()
    most = max(lengths, default=0)
    if most <= 1:
        return [[next(flat, None) if length else None for length in lengths]], ()
    padded = ([*itertools.islice(flat, length), *[None] * (most - length)] for length in lengths)
    return [list(column) for column in zip(*padded, strict=True)], tuple(
        f"{names[0]}_{position}" for position in range(1, most + 1)
    )


def _plain_labels(source: str, name: str, column: pa.ChunkedArray) -> list[object]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), None, column)
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{source}: column '{name}' holds fractions ({first_line(error)}); labels are classes, so "
                "pass a column of integers or strings with --label-column."
            ) from error
    labels: list[object] = column.to_pylist()
    return labels


def _table(source: str, shards: Shards, columns: list[str]) -> pa.Table:
    shards.check_types(source, columns)
    schema = pa.schema([shards.schema.field(name) for name in columns])
    parts = [pa.Table.from_batches([batch]) for _, batch in shards.batches(columns, COLUMN_ROWS)]
    try:
        return pa.concat_tables([part.cast(schema) for part in parts]) if parts else schema.empty_table()
    except (pa.ArrowException, ValueError) as error:
        raise DataError(
            f"{source}: the files disagree about the types of {', '.join(columns)} ({first_line(error)})."
        ) from error


def read_vectors(
    source: str, shards: Shards, column: str, num_rows: int
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Return the embeddings, shape (N, D), zeros where there are none, and why a row has none, by row.

    Raises:
        DataError: the column is missing, holds no numbers, or not as many in every row.
    """
    check_column(source, shards.schema, "--features-column", column, is_vector, "lists of numbers")
    vectors_ND: NDArray[np.float32] | None = None
    problems: dict[int, str] = {}
    start = 0
    for _, batch in shards.batches([column], COLUMN_ROWS):
        lists = batch.column(0)
        lengths = pc.list_value_length(lists)
        for offset in pc.indices_nonzero(pc.is_null(lists)).to_pylist():
            problems[start + offset] = "no features in this row"
        present = lists.drop_null()
        if len(present):
            distinct = pc.unique(lengths.drop_null()).to_pylist()
            width = vectors_ND.shape[1] if vectors_ND is not None else distinct[0]
            if distinct != [width]:
                wrong = next(i for i, n in enumerate(lengths.to_pylist()) if n not in (None, width))
                raise DataError(
                    f"{source}: column '{column}' has {width} numbers in its first rows and "
                    f"{lengths[wrong].as_py()} in row {start + wrong:,}; embeddings need one length."
                )
            if width == 0:
                raise DataError(f"{source}: column '{column}' holds empty lists; embeddings need numbers.")
            if vectors_ND is None:
                vectors_ND = np.zeros((num_rows, width), dtype=np.float32)
            numbers = present.flatten().cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
            rows = start + np.flatnonzero(lists.is_valid().to_numpy(zero_copy_only=False))
            vectors_ND[rows] = numbers.reshape(len(rows), width)
        start += len(batch)
    if vectors_ND is None:
        raise DataError(f"{source}: column '{column}' is null in every row; embeddings need numbers.")
    for row in np.flatnonzero(~np.isfinite(vectors_ND).all(1)).tolist():
        problems[row] = "features are not finite numbers"
        vectors_ND[row] = 0
    return vectors_ND, problems

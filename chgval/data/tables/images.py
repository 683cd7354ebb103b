"""The column of images of a table: encoded images themselves, or names of files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from chgval.data.decode import Encoded, UnreadableImageError
from chgval.data.images import EXTENSIONS, ImageFiles, leads_into, read_image_file
from chgval.data.tables.columns import IMAGE_NAMES, find_image_column, is_image, is_text, vector_columns
from chgval.data.tables.shards import Shards
from chgval.errors import DataError

# Names that columns of file names have; the last ones also when the names lack their endings.
PATH_NAMES = ("file_name", "filename", "image_path", "img_path", "filepath", "file_path", "path", "file")
BARE_NAMES = (*IMAGE_NAMES, "image_name", "image_id", "img_id", "id", "id_code")
# Rows handed on at a time: what bounds the memory, whatever the size of a row group.
IMAGE_ROWS = 16
# Rows whose names are looked at to see what a column holds.
PROBED_NAMES = 100
SHOWN_PLACES = 3


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """A column of images.

    Attributes:
        name: of the column.
        holds_names: whether it holds names of files, not images.
        ending: what the names lack to be those of files.
    """

    name: str
    holds_names: bool = False
    ending: str = ""


def find_images(
    source: str, shards: Shards, name: str | None, *, may_lack: bool = False
) -> ImageColumn | None:
    """Return the column of images: the named one, or by metadata, type, name and what it holds.

    None is returned only where there is none and there `may_lack` one.

    Raises:
        DataError: there is none, several could be it, the named one cannot be, or it names files that are
            not there.
    """
    schema = shards.schema
    if name is not None and name in schema.names and _may_name(schema.field(name).type):
        return _names_in(source, shards, [name], [], may_lack=may_lack)
    if name is None and not any(is_image(field.type) for field in schema):
        texts = [field.name for field in schema if _may_name(field.type)]
        lower = {column.lower(): column for column in texts}
        known = [lower[name] for name in (*PATH_NAMES, *BARE_NAMES) if name in lower]
        others = [column for column in texts if column not in known]
        vectors = vector_columns(schema)
        found = _names_in(source, shards, known, others, may_lack=may_lack, vectors=vectors)
        if found is not None or may_lack:
            return found
    return ImageColumn(find_image_column(source, schema, name))


def _may_name(kind: pa.DataType) -> bool:
    return is_text(kind) or bool(pa.types.is_integer(kind))


def _names_in(
    source: str,
    shards: Shards,
    known: Sequence[str],
    others: Sequence[str],
    *,
    may_lack: bool,
    vectors: Sequence[str] = (),
) -> ImageColumn | None:
    """Return the first column that names files that are there.

    Args:
        source: the dataset, for messages.
        shards: its files.
        known: columns called as those of file names are; their texts may lack the ending.
        others: columns that are looked at after those.
        may_lack: whether there may be none.
        vectors: columns that may hold embeddings, which texts without the ending of an image are ids of.
    Raises:
        DataError: one looks like names of files, and there are none.
    """
    columns = [*known, *others]
    folder, names = _first_names(shards, columns)
    if folder is None:
        return None  # on another machine, where no names are followed
    for column in columns:
        given = names.get(column, [])
        if any(_is_there(folder, name) for name in given if name.lower().endswith(EXTENSIONS)):
            return ImageColumn(column, holds_names=True)
        if column in others:  # a class may be called as a file is, without its ending
            continue
        counts = {
            ending: sum(_is_there(folder, f"{name}{ending}") for name in given) for ending in EXTENSIONS
        }
        best = max(counts, key=lambda ending: counts[ending])
        if counts[best]:
            return ImageColumn(column, holds_names=True, ending=best)
    for column in columns:
        given = names.get(column, [])
        looks_like = given and all(name.lower().endswith(EXTENSIONS) for name in given)
        if (looks_like or (known == [column] and not others and not vectors)) and not may_lack:
            raise _not_there(source, folder, column, given, vectors)
    return None


def _first_names(shards: Shards, columns: Sequence[str]) -> tuple[Path | None, dict[str, list[str]]]:
    """Return the folder below which the first names lie, and the first names of every column."""
    file = shards.files[0]
    names: dict[str, list[str]] = {}
    has = [column for column in columns if file not in shards.schemas or column in shards.schemas[file].names]
    for batch in shards.reader.batches(file, has, PROBED_NAMES):
        for name in has:
            values = batch.column(batch.schema.get_field_index(name)).to_pylist()
            names[name] = [str(value) for value in values if value is not None]
        if len(batch):
            break
    return shards.folder_of(file), names


def _is_there(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file() and leads_into(folder / name, folder)
    except (OSError, ValueError):  # names that can be none of files
        return False


def _not_there(
    source: str, folder: Path, column: str, names: Sequence[str], vectors: Sequence[str]
) -> DataError:
    """Return what is wrong with names none of which is one of a file in the folder, and what to do."""
    first = names[0] if names else ""
    advice = "put the table into their folder, or pass that as --images-root"
    try:
        if not folder.is_dir():
            advice = "there is no such folder"
        elif "://" in first:
            advice = "images are not fetched; download them, and name the files"
        elif "\\" in first:
            advice = "write / where it has \\"
        elif (folder / first).is_file():  # somewhere else
            common = os.path.commonpath([os.path.dirname(os.path.realpath(folder / name)) for name in names])  # noqa: PTH120
            advice = f"they lead out of it; pass --images-root {common}"
        elif first and ".." not in Path(first).parts and not Path(first).is_absolute():
            places = sorted(str(folder / path.name) for path in folder.iterdir() if (path / first).is_file())
            if places:
                advice = f"pass --images-root {' or '.join(places[:SHOWN_PLACES])}"
    except (OSError, ValueError):  # names that can be none of files
        pass
    if vectors:
        advice += f"; or --features-column {vectors[0]}, if that holds embeddings of them"
    return DataError(
        f"{source}: column '{column}' names no file in {folder} (the first is {first!r}); {advice}."
    )


def files_named(shards: Shards, images: ImageColumn) -> tuple[ImageFiles, list[str | None]]:
    """Return the files that a column names, and the names with their endings.

    A name that leads out of the folder is none: a table from a stranger could name any file.
    """
    paths: list[str] = []
    names: list[str | None] = []
    refused: dict[int, str] = {}
    for file, batch in shards.batches([images.name], PROBED_NAMES):
        folder = shards.folder_of(file)
        for value in batch.column(0).to_pylist():
            name = None if value is None or value == "" else f"{value}{images.ending}"
            if name is None or folder is None:
                refused[len(paths)] = "no image in this row"
            else:
                reason = why_not_beside(folder, name)
                if reason is not None:
                    refused[len(paths)] = reason
            names.append(name)
            paths.append(os.path.join(folder or "", name or ""))  # noqa: PTH118 (many)
    return ImageFiles(paths, refused), names


def why_not_beside(folder: Path, name: str) -> str | None:
    """Return why a name is none of a file below the folder of its table, if it is not."""
    try:
        if not leads_into(folder / name, folder):
            return f"{name}: lies outside of {folder}"
    except ValueError as error:  # a name with a zero byte
        return f"{name}: {error}"
    return None


def image_paths(shards: Shards, images: ImageColumn) -> list[str | None]:
    """Return the path inside the column of every image."""
    if images.holds_names:
        return files_named(shards, images)[1]
    return [path for _, path in encoded_images(shards, images)]


def encoded_images(
    shards: Shards, images: ImageColumn, limit: int | None = None
) -> Iterator[tuple[Encoded, str | None]]:
    """Yield every image's bytes, and its path inside the column."""
    cells = (
        (folder, cell)
        for file, batch in shards.batches([images.name], IMAGE_ROWS)
        for folder in [shards.folder_of(file)]
        for cell in batch.column(0)
    )
    for folder, cell in itertools.islice(cells, limit):
        embedded, path = bytes_and_path(cell, images.ending)
        if embedded is not None:
            encoded: Encoded = embedded
        elif path and folder is not None:
            encoded = read_beside(folder, path)
        else:
            encoded = UnreadableImageError("no image in this row")
        yield encoded, path


def bytes_and_path(cell: pa.Scalar, ending: str = "") -> tuple[bytes | None, str | None]:
    """Return what one cell of an image column holds; asked for one at a time, as images may be large."""
    image = cell.as_py()
    if isinstance(image, dict):
        return image.get("bytes"), image.get("path")
    if isinstance(image, str | int):
        return None, f"{image}{ending}" if image != "" else None
    return image, None


def read_beside(folder: Path, path: str) -> Encoded:
    """Return an image that was not embedded: its path is relative to the folder of the file that names it.

    One that leads out of that folder is none: a file from a stranger could name any.
    """
    reason = why_not_beside(folder, path)
    if reason is not None:
        return UnreadableImageError(reason)
    try:
        return read_image_file(folder / path)
    except UnreadableImageError as error:
        return UnreadableImageError(f"{path}: {error}")

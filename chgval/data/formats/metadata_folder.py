"""A folder of images with metadata.csv, .jsonl or .parquet: Hugging Face's `imagefolder` with labels."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from chgval.config import DataConfig
from chgval.data.dataset import Dataset
from chgval.data.formats.base import dataset_format
from chgval.data.formats.csv import Csv
from chgval.data.formats.json_lines import JsonLines
from chgval.data.images import EXTENSIONS, holds_images
from chgval.data.sources import is_folder
from chgval.data.splits import split_of
from chgval.data.tables.columns import find_label_columns
from chgval.data.tables.format import TableFormat
from chgval.data.tables.images import ImageColumn, files_named
from chgval.data.tables.read import read_rows
from chgval.data.tables.shards import Shards, files_of_split, open_shards
from chgval.data.tables.text import WholeTables
from chgval.errors import DataError, first_line

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# The column that names the image of a row.
FILE_NAME = "file_name"


@dataset_format
class MetadataFolder(TableFormat):
    """Metadata in the folder, or in its folders of splits; names are below the folder of the metadata."""

    written_as = "a folder with metadata is written anew as Parquet, with its images in it"

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Say whether there are metadata that name files and labels; class folders have labels themselves."""
        if not is_folder(config.source):
            return False
        files = _metadata_files(Path(config.source))
        if not files:
            return False
        try:
            schema = _load(files[0]).schema
            find_label_columns(config.source, schema, config.label_columns)
        except DataError:  # class folders do without
            return bool(config.label_columns) or not holds_images(Path(config.source))
        return FILE_NAME in schema.names

    def files(self) -> list[str]:
        """Return the files of metadata."""
        return _metadata_files(Path(self.source))

    def open(self) -> tuple[Shards, list[str]]:
        """Read the metadata."""
        files, notes = files_of_split(self.source, self.source, self.files(), self.config.split)
        shards = open_shards(WholeTables(_load), files, images_root=self.config.images_root)
        return shards, [*notes, f"labels are those of {Path(files[0]).name}"]

    def read(self, largest_size: int) -> Dataset:
        """Read all rows; images without one are counted."""
        rows = self.rows()
        dataset, shards = read_rows(rows, self.config, largest_size), rows.shards
        named = {os.path.normpath(path) for path in files_named(shards, ImageColumn(FILE_NAME))[0].paths}
        paths = (path for file in shards.files for path in Path(file).parent.rglob("*"))
        images = {os.path.normpath(path) for path in paths if path.suffix.lower() in EXTENSIONS}
        lacking = len(images - named)
        return dataset.with_notes([f"{lacking:,} images have no row and are left out"] if lacking else [])


def _metadata_files(folder: Path) -> list[str]:
    """Return the metadata of a folder, or of its folders of splits; metadata in class folders are none."""
    for name in NAMES:
        if (folder / name).is_file():
            return [str(folder / name)]
        found = [*folder.glob(f"*/{name}"), *folder.glob(f"data/*/{name}")]
        of_splits = sorted(str(path) for path in found if split_of(path.parent.name))
        if of_splits:
            return of_splits
    return []


def _load(file: str) -> pa.Table:
    for ending, load in ((".csv", Csv.load), (".jsonl", JsonLines.load)):
        if file.endswith(ending):
            return load(file)
    try:
        return pq.read_table(file, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({first_line(error)}).") from error

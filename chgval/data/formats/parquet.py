"""Parquet files, globs, folders of shards and URIs, in the conventions of Hugging Face datasets."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from chgval.config import DataConfig
from chgval.data.dataset import Dataset
from chgval.data.formats.base import dataset_format
from chgval.data.images import holds_images
from chgval.data.sources import before_magic, local_path, matching
from chgval.data.tables.columns import is_image
from chgval.data.tables.format import TableFormat
from chgval.data.tables.shards import Shards, files_of_split, open_shards
from chgval.errors import DataError, first_line
from chgval.files import METADATA_KEY, as_text

READ_BUFFER = 65_536
# Google's library tries for a quarter of an hour by default, and hears no signal meanwhile.
SECONDS_FOR_GOOGLE = 20
# What lies in a folder of tables whose files hold earlier versions of the rows too.
TABLE_FORMATS = {"_delta_log": "Delta", ".hoodie": "Hudi", "metadata/version-hint.text": "Iceberg"}
# What files that are not Parquet begin with, and what to do with them.
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
    b"\x89HDF": "an HDF5 file",
}
ADVICE = {
    "an image": "pass the folder of its class folder",
    "an archive": "unpack it, and pass the folder",
    "an Arrow file": "write it as Parquet",
    "a NumPy file": "pass the dataset that it belongs to, and this file as --features",
    "an HDF5 file": "write its rows as a Parquet file, or its images to class folders",
}
# Endings of files that hold samples for other programs.
OTHER_ENDINGS = {
    ".tfrecord": "a TFRecord file",
    ".safetensors": "a file of tensors",
    ".pkl": "a pickle",
    ".pt": "a file of PyTorch",
    ".pth": "a file of PyTorch",
}
OTHER_ADVICE = {
    "a TFRecord file": "write its images to class folders, or its rows as Parquet",
    "a file of tensors": "pass the dataset that it belongs to, and this file as --features",
    "a pickle": "it could run any program; write its rows as Parquet",
    "a file of PyTorch": "write its samples as Parquet, or its features as .npy for --features",
}


@dataclass(frozen=True, slots=True)
class ParquetReader:
    """Reads Parquet files of a file system; see `Reader`."""

    source: str
    filesystem: pafs.FileSystem

    def columns_and_rows(self, file: str) -> tuple[pa.Schema, int]:
        """See `Reader`."""
        try:
            with self.filesystem.open_input_file(file) as opened:
                parquet = pq.ParquetFile(opened, pre_buffer=False)
                return parquet.schema_arrow, parquet.metadata.num_rows
        except UnicodeEncodeError as error:
            raise DataError(
                f"{as_text(file)}: its name is no UTF-8, and cannot be opened; rename it."
            ) from error
        except (OSError, pa.ArrowException) as error:
            raise self._what_is_wrong(file, error) from error

    def _what_is_wrong(self, file: str, error: Exception) -> DataError:
        begin = self._first_bytes(file)
        kind = next((kind for beginning, kind in BEGINNINGS.items() if begin.startswith(beginning)), None)
        if kind is not None:
            return DataError(f"{file}: is {kind}, and no Parquet; {ADVICE[kind]}.")
        ending, is_parquet = Path(file).suffix.lower(), begin.startswith(b"PAR1")
        kind = OTHER_ENDINGS.get(ending)
        if kind is not None and not is_parquet:
            return DataError(f"{file}: is {kind}, which is not read; {OTHER_ADVICE[kind]}.")
        if begin and not is_parquet:
            if ending == ".parquet":
                return DataError(f"{file}: is no Parquet file, though it is called one.")
            return DataError(
                f"{file}: is no dataset that is read: expected a folder of class folders, or a file that "
                "ends in .parquet, .csv, .tsv, .jsonl or .tar."
            )
        where = "" if file == self.source else f"{self.source}: "
        return DataError(
            f"{where}{file}: cannot be read as Parquet ({first_line(error)}); the file may be truncated."
        )

    def _first_bytes(self, file: str) -> bytes:
        try:
            with self.filesystem.open_input_stream(file) as opened:
                first: bytes = opened.read(8)
                return first
        except (OSError, pa.ArrowException):
            return b""

    def batches(self, file: str, columns: list[str] | None, rows: int) -> Iterator[pa.RecordBatch]:
        """See `Reader`.

        Unbuffered, because a dataset's own scanner holds a whole row group of images and more.
        """
        try:
            with self.filesystem.open_input_file(file) as opened:
                parquet = pq.ParquetFile(opened, buffer_size=READ_BUFFER, pre_buffer=False)
                for batch in parquet.iter_batches(rows, columns=columns, use_threads=False):
                    for column in batch.columns:  # nothing else looks whether text is UTF-8
                        # A dictionary, which comes with every batch, is looked at where it is used.
                        column.validate(full=columns is not None or not pa.types.is_dictionary(column.type))
                    yield batch if columns is None else batch.select(columns)
        except MemoryError:
            raise
        except (OSError, KeyError, pa.ArrowException) as error:
            what = "it" if columns is None else ", ".join(columns)
            raise DataError(
                f"{file}: reading {what} failed ({first_line(error)}); the file may be damaged, or its "
                "columns may differ from those of the other files."
            ) from error


@dataset_format
class Parquet(TableFormat):
    """Parquet files. Written anew they keep their schema and metadata.

    Where rows are relabelled, a column original_<label> keeps what was there.
    """

    is_fallback = True

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Say whether something is there, as what is nothing else is taken for Parquet."""
        source = config.source
        try:
            exists = Path(source).exists()
        except OSError as error:
            raise DataError(f"{source}: cannot be opened ({error.strerror}).") from error
        return bool(source) and (exists or "://" in source or glob.has_magic(source))

    def read(self, largest_size: int) -> Dataset:
        """Read all rows, with their images or embeddings."""
        dataset = super().read(largest_size)
        if Path(self.source).is_dir() and holds_images(Path(self.source)):
            return dataset.with_notes(["reading its Parquet files; images in class folders are left out"])
        return dataset

    def files(self) -> list[str]:
        """Return the files, if they are on this machine."""
        path = local_path(self.source)
        return [] if path is None else _local_files(path)[1]

    def open(self) -> tuple[Shards, list[str]]:
        """Find the files that a path, glob, folder or URI names, and which columns they have."""
        source = self.source
        path = local_path(source)
        try:
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
        chosen, notes = files_of_split(source, base, files, self.config.split)
        reader = ParquetReader(source, filesystem)
        root_of_images = self.config.images_root
        return open_shards(reader, chosen, images_root=root_of_images, is_local=path is not None), notes


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
    return before_magic(source), [file for file in matching(source) if not _is_report(Path(file))]


def _patient_uri(source: str) -> str:
    """Return a URI with a limit to how long it is tried, where there is none by default."""
    if not source.startswith("gs://") or "retry_limit_seconds" in source:
        return source
    return f"{source}{'&' if '?' in source else '?'}retry_limit_seconds={SECONDS_FOR_GOOGLE}"


def _remote_files(filesystem: pafs.FileSystem, root: str) -> tuple[str, list[str]]:
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.Directory:
        found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
        return root, sorted(info.path for info in found if info.is_file and info.path.endswith(".parquet"))
    if info.is_file or not glob.has_magic(root):
        return root.rpartition("/")[0] or "/", [root] if info.is_file else []
    base = before_magic(root)
    found = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
    return base, sorted(info.path for info in found if info.is_file and fnmatch.fnmatch(info.path, root))

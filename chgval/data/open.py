"""The one entry to all kinds of datasets."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Literal

from chgval.config import DataConfig, OutputConfig
from chgval.data.dataset import Dataset
from chgval.data.digits import read_digits
from chgval.data.image_folder import EXTENSIONS, holds_images, list_image_folder, read_image_folder
from chgval.data.parquet import has_images, local_files, parquet_files, read_parquet
from chgval.errors import DataError, OutputError, SettingsError
from chgval.files import output_errors

Kind = Literal["digits", "parquet", "folder"]


def open_dataset(config: DataConfig, largest_size: int, *, least_classes: int = 2) -> Dataset:
    """Read what the user named, whatever kind of dataset it is.

    Args:
        config: the source and how to read it.
        largest_size: the largest image size to choose where the user gave none.
        least_classes: that must have samples.
    Raises:
        DataError: it does not exist, is of no known kind, or holds nothing to learn from; with
            on_error "fail" also if any row cannot be read.
    """
    dataset = _read(config, largest_size)
    dataset.check(least_classes)
    if dataset.problems and config.on_error == "fail":
        row, reason = next(iter(dataset.problems.items()))
        raise DataError(
            f"{config.source}: {len(dataset.problems):,} of {len(dataset):,} samples cannot be read "
            f"(the first, {dataset.ids[row]}: {reason}); fix them, or leave out --on-error fail."
        )
    return dataset


def kind_of(config: DataConfig) -> Kind:
    """Say what kind of dataset the user named.

    Raises:
        DataError: it does not exist.
        SettingsError: it has no columns, and the user named some.
    """
    source = config.source
    if source.startswith("builtin:"):
        if source != "builtin:digits":
            raise DataError(f"{source}: no such built-in dataset; there is builtin:digits.")
        if config.names_columns or config.image_size is not None:
            raise SettingsError("builtin:digits has no columns, and one image size; leave those options out.")
        return "digits"
    path = Path(source)
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as error:
        raise DataError(f"{source}: cannot be opened ({error.strerror}).") from error
    if not source or not (exists or "://" in source or glob.has_magic(source)):
        raise DataError(f"{source}: no such file or folder.")
    if not is_folder or _is_parquet_folder(path, config):
        return "parquet"
    if config.names_columns:
        raise SettingsError(f"{source} is a folder of images; only Parquet files have columns to name.")
    return "folder"


def check_not_read(config: DataConfig, output: OutputConfig) -> None:
    """Raise OutputError where an output would replace a file of the dataset."""
    path = Path(output.path)
    with output_errors(path):
        if output.to_stdout or not path.is_file():
            return
        match kind_of(config):
            case "parquet":
                files = local_files(config.source)
            case "folder" if path.suffix.lower() in EXTENSIONS:
                files = {Path(file).resolve() for file in list_image_folder(Path(config.source)).paths}
            case _:
                files = set()
        if path.resolve() in files:
            raise OutputError(f"{path}: is a file of the dataset {config.source}; pass another --output.")


def _read(config: DataConfig, largest_size: int) -> Dataset:
    match kind_of(config):
        case "digits":
            return read_digits()
        case "parquet":
            return read_parquet(config.source, config, largest_size)
        case "folder":
            return read_image_folder(Path(config.source), config, largest_size)


def _is_parquet_folder(folder: Path, config: DataConfig) -> bool:
    """Say whether Parquet files are the dataset, or lie among images as a table about them."""
    files = parquet_files(folder)
    return bool(files) and (config.names_columns or has_images(files[0]) or not holds_images(folder))

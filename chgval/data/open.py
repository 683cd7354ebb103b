"""The one entry to datasets of all formats: reading them, and writing them anew."""

from __future__ import annotations

from pathlib import Path

from chgval.config import DataConfig, Link, OutputConfig
from chgval.data.dataset import Dataset
from chgval.data.formats import Format, format_of
from chgval.data.formats.base import is_one_file
from chgval.errors import DataError, OutputError
from chgval.files import check_file, check_new_folder, output_errors


def open_dataset(data: DataConfig | Format, largest_size: int, *, least_classes: int = 2) -> Dataset:
    """Read what the user named, whatever its format.

    Args:
        data: the source and how to read it, or what `format_of` made of that.
        largest_size: the largest image size to choose where the user gave none.
        least_classes: that must have samples.
    Raises:
        DataError: it does not exist, is in no known format, or holds nothing to learn from; with
            on_error "fail" also if any row cannot be read.
    """
    source = format_of(data) if isinstance(data, DataConfig) else data
    dataset = source.read(largest_size)
    dataset.check(least_classes)
    dataset = dataset.with_notes(dataset.name_notes())
    check_all_read(dataset, source.config)
    return dataset


def check_all_read(dataset: Dataset, config: DataConfig) -> None:
    """Raise DataError where a sample cannot be read, if that is an error (on_error "fail")."""
    if dataset.problems and config.on_error == "fail":
        row, reason = next(iter(dataset.problems.items()))
        raise DataError(
            f"{dataset.source}: {len(dataset.problems):,} of {len(dataset):,} samples cannot be read "
            f"(the first, {dataset.ids[row]}: {reason}); fix them, or leave out --on-error fail."
        )


def check_not_read(source: Format, output: OutputConfig) -> None:
    """Raise OutputError where an output would replace a file of the dataset."""
    path = Path(output.path)
    with output_errors(path):
        if not output.to_stdout and path.is_file() and path.resolve() in source.local_files():
            raise OutputError(f"{path}: is a file of the dataset {source.source}; pass another --output.")


def check_rewritable(
    source: Format, target: Path, *, overwrite: bool, link: Link = "copy", may_be_there: bool = False
) -> None:
    """Raise an error where the dataset could not be written anew there; leave all as it is.

    Args:
        source: the dataset.
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
    with output_errors(target):
        source.check_target(target, link)
    if is_one_file(target):
        check_file(target, overwrite=overwrite or may_be_there)
    elif not (may_be_there and target.is_dir()):
        check_new_folder(target)

"""Parquet files, globs, folders of shards and URIs, in the conventions of Hugging Face datasets."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from chgval.config import DataConfig, Link
from chgval.data.dataset import Dataset
from chgval.data.formats.base import Format, KnownRows, Rewritten, RowChanges, dataset_format
from chgval.data.formats.parquet.read import pictures_of, read_parquet
from chgval.data.formats.parquet.shards import is_part_of, local_files
from chgval.data.formats.parquet.write import open_same, write_parquet
from chgval.data.images import holds_images
from chgval.errors import DataError, OutputError


@dataset_format
class Parquet(Format):
    """Parquet files. Written anew they keep their schema and metadata.

    Where rows are relabelled, a column original_<label> keeps what was there.
    """

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
        dataset = read_parquet(self.source, self.config, largest_size)
        if Path(self.source).is_dir() and holds_images(Path(self.source)):
            return dataset.with_notes(["reading its Parquet files; images in class folders are left out"])
        return dataset

    def local_files(self) -> set[Path]:
        """Return the files, if they are on this machine."""
        return local_files(self.source)

    def pictures(self, rows: Sequence[int]) -> Iterator[bytes | None]:
        """Yield what the column of images holds, or names beside its file."""
        if self.config.features_column is not None:
            yield from [None] * len(rows)
        else:
            yield from pictures_of(self.source, self.config, rows)

    def check_target(self, target: Path, link: Link) -> None:
        """See `Format`."""
        if is_part_of(self.source, target):
            raise OutputError(f"{target}: is part of the dataset {self.source}; pass another place.")

    def check_same(self, known: KnownRows) -> None:
        """See `Format`."""
        open_same(self.config, known)

    def write(
        self,
        known: KnownRows,
        changes: RowChanges,
        target: Path,
        link: Link,
    ) -> Rewritten:
        """See `Format`."""
        return write_parquet(self.config, known, changes, target)

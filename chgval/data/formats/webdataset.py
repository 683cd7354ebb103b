"""Tar files of samples, as WebDataset has them: files of one name and several endings are a sample."""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from chgval.config import DataConfig
from chgval.data.formats.base import dataset_format
from chgval.data.images import EXTENSIONS, LARGEST_ENCODED, holds_images
from chgval.data.sources import before_magic, is_folder, matching
from chgval.data.tables.columns import IMAGE_TYPE, as_column
from chgval.data.tables.format import TableFormat
from chgval.data.tables.shards import Shards, files_of_split, open_shards
from chgval.errors import DataError, first_line

ENDINGS = (".tar", ".tar.gz", ".tgz")
KEY, IMAGE, LABEL = "__key__", "image", "label"
# Files of a sample that hold its class, and those that hold any columns.
LABEL_ENDINGS, JSON_ENDING = ("cls", "label", "cls.txt", "label.txt"), "json"
# Other files of a sample become a column of text, if they are small.
TEXT_ENDINGS, LONGEST_TEXT = ("txt", "id", "key"), 2**16


@dataclass(slots=True)
class Sample:
    """The files of one sample: its image, where it is in the tar file, and what the others say."""

    key: str
    images: list[tarfile.TarInfo] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> tarfile.TarInfo | None:
        """The image; of several the one with the plainest ending: KEY.jpg, not KEY.mask.png."""
        return min(self.images, key=lambda image: image.name.rpartition("/")[2].count("."), default=None)


def _samples_in(file: str) -> list[Sample]:
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if not member.isfile() or not stem or not ending:
                    continue
                sample = samples.setdefault(f"{folder}{slash}{stem}", Sample(f"{folder}{slash}{stem}"))
                try:
                    _take(tar, member, ending.lower(), sample)
                except (ValueError, RecursionError) as error:  # of JSON, or of text that is no UTF-8
                    raise DataError(
                        f"{file}: {member.name} cannot be read ({first_line(error)}); fix it or leave it out."
                    ) from error
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(
            f"{file}: cannot be read as a tar file of samples ({first_line(error)}); it may be truncated."
        ) from error
    return list(samples.values())


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, sample: Sample) -> None:
    """Take a file of a sample in; images are only noted."""
    if f".{ending}".endswith(EXTENSIONS):
        sample.images.append(member)
        return
    opened = tar.extractfile(member)
    if opened is None or (ending in TEXT_ENDINGS and member.size > LONGEST_TEXT):
        return
    if ending == JSON_ENDING:
        found = json.loads(opened.read())
        if isinstance(found, dict):
            sample.columns.update(found)
        else:
            sample.columns[LABEL] = found
    elif ending in (*LABEL_ENDINGS, *TEXT_ENDINGS):
        text = opened.read().decode("utf-8").strip()
        sample.columns[LABEL if ending in LABEL_ENDINGS else ending] = text


@dataclass(frozen=True, slots=True)
class TarReader:
    """Reads tar files, which are listed once each; see `Reader`."""

    _samples: dict[str, list[Sample]] = field(default_factory=dict)

    def samples(self, file: str) -> list[Sample]:
        """Return the samples of a file."""
        if file not in self._samples:
            self._samples[file] = _samples_in(file)
        return self._samples[file]

    def columns_and_rows(self, file: str) -> tuple[pa.Schema, int]:
        """See `Reader`."""
        table = self._without_images(file)
        return table.schema.append(pa.field(IMAGE, IMAGE_TYPE)), table.num_rows

    def batches(self, file: str, columns: list[str] | None, rows: int) -> Iterator[pa.RecordBatch]:
        """See `Reader`."""
        table, samples = self._without_images(file), self.samples(file)
        there = [*table.column_names, IMAGE]
        names = there if columns is None else columns
        missing = [name for name in names if name not in there]
        if missing:
            raise DataError(f"{file}: has no '{missing[0]}', as other files of the dataset have.")
        images = _read_images(file, samples) if IMAGE in names else None
        for start in range(0, len(samples), rows):
            part = table.slice(start, rows)
            arrays = {name: part[name].combine_chunks() for name in names if name != IMAGE}
            if images is not None:
                read = list(itertools.islice(images, rows))
                arrays[IMAGE] = pa.array(read, IMAGE_TYPE)
            yield pa.record_batch([arrays[name] for name in names], names)

    def _without_images(self, file: str) -> pa.Table:
        samples = self.samples(file)
        names = dict.fromkeys(name for sample in samples for name in sample.columns)
        columns: dict[str, Any] = {KEY: [sample.key for sample in samples]}
        for name in names:
            if name not in (KEY, IMAGE):
                columns[name] = _column(file, name, [sample.columns.get(name) for sample in samples])
        return pa.table(columns)


def _read_images(file: str, samples: list[Sample]) -> Iterator[dict[str, object] | None]:
    """Yield the image of each sample; opened once, as a compressed file is read from its start again."""
    try:
        with tarfile.open(file) as tar:
            for sample in samples:
                member = sample.image
                if member is None or member.size > LARGEST_ENCODED:
                    yield None
                    continue
                opened = tar.extractfile(member)
                yield {"bytes": None if opened is None else opened.read(), "path": member.name}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{file}: reading its images failed ({first_line(error)}).") from error


def _column(file: str, name: str, values: list[Any]) -> pa.Array:
    """Return the values of a column; text of whole numbers is numbers, as files hold only text."""
    texts = [value for value in values if value is not None]
    if all(isinstance(text, str) and re.fullmatch(r"-1|0|[1-9]\d{0,17}", text) for text in texts):
        return pa.array([None if value is None else int(value) for value in values], pa.int64())
    return as_column(file, name, values)


@dataset_format
class WebDataset(TableFormat):
    """Tar files, a glob, or a folder of them. Labels are in KEY.cls or in KEY.json."""

    written_as = "tar files are written anew as Parquet"

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Say whether the source is called as tar files are, or is a folder of them."""
        source = config.source
        if is_folder(source):
            return bool(_tars_in(source)) and not holds_images(Path(source))
        return "://" not in source and source.lower().endswith(ENDINGS)

    def files(self) -> list[str]:
        """Return the tar files."""
        if is_folder(self.source):
            return _tars_in(self.source)
        return matching(self.source)

    def open(self) -> tuple[Shards, list[str]]:
        """Find the tar files and their columns."""
        files = self.files()
        if not files:
            raise DataError(f"{self.source}: no such file.")
        base = self.source if is_folder(self.source) else before_magic(self.source)
        chosen, notes = files_of_split(self.source, base, files, self.config.split)
        reader = TarReader()
        shards = open_shards(reader, chosen, images_root=None)
        several = [s for file in chosen for s in reader.samples(file) if len(s.images) > 1]
        if several and several[0].image is not None:
            taken = several[0].image.name
            notes = [*notes, f"{len(several):,} samples have several images; one is taken, such as {taken}"]
        return shards, notes


def _tars_in(folder: str) -> list[str]:
    return sorted(
        str(path)
        for path in Path(folder).iterdir()
        if path.name.lower().endswith(ENDINGS) and not path.name.startswith(".") and path.is_file()
    )

"""What `save_to_disk` of Hugging Face datasets writes: a folder of Arrow files, or one for each split."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from chgval.config import DataConfig
from chgval.data.formats.base import dataset_format
from chgval.data.images import leads_into
from chgval.data.sources import is_folder
from chgval.data.splits import named, split_of
from chgval.data.tables.format import TableFormat
from chgval.data.tables.shards import Shards, open_shards
from chgval.errors import DataError, first_line

# In the folder of a dataset: which files it consists of; in that of several: the names of their folders.
STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"


class ArrowReader:
    """Reads Arrow streams, without loading them; see `Reader`."""

    def columns_and_rows(self, file: str) -> tuple[pa.Schema, int]:
        """See `Reader`."""
        with _opened(file) as stream:
            return stream.schema, sum(batch.num_rows for batch in stream)

    def batches(self, file: str, columns: list[str] | None, rows: int) -> Iterator[pa.RecordBatch]:
        """See `Reader`."""
        with _opened(file) as stream:
            for batch in stream:
                part = batch if columns is None else batch.select(columns)
                for start in range(0, len(part), rows):
                    yield part.slice(start, rows)


@contextmanager
def _opened(file: str) -> Iterator[pa.RecordBatchStreamReader]:
    """Map a file to memory while it is read; errors of Arrow become DataError."""
    try:
        with pa.memory_map(file) as mapped:
            yield pa.ipc.open_stream(mapped)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"{file}: cannot be read as an Arrow stream ({first_line(error)}); the file may be damaged. Save "
            "the dataset anew."
        ) from error


@dataset_format
class SaveToDisk(TableFormat):
    """A saved Dataset, or DatasetDict, of whose splits one is read."""

    written_as = "a dataset of save_to_disk is written anew as Parquet"

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Say whether the folder holds what the library writes."""
        folder = Path(config.source)
        if not is_folder(config.source):
            return False
        is_dataset = (folder / STATE_FILE).is_file() and "_data_files" in _json(folder / STATE_FILE)
        return is_dataset or (folder / SPLITS_FILE).is_file()

    def files(self) -> list[str]:
        """Return the Arrow files of the split that is read."""
        folder, _ = self._split()
        found = _json(folder / STATE_FILE)
        try:
            files = [folder / part["filename"] for part in found["_data_files"]]
            if not files or not all(leads_into(file, folder) for file in files):
                raise KeyError("_data_files")
            return list(map(str, files))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{folder / STATE_FILE}: names no files in its folder; save the dataset anew."
            ) from error

    def open(self) -> tuple[Shards, list[str]]:
        """Find the files of the split that is read."""
        _, notes = self._split()
        return open_shards(ArrowReader(), self.files(), images_root=self.config.images_root), notes

    def _split(self) -> tuple[Path, list[str]]:
        """Return the folder of one split, and a note where there are others."""
        root, wanted = Path(self.source), self.config.split
        if not (root / SPLITS_FILE).is_file():
            own = _json(root / STATE_FILE).get("_split")
            if wanted is not None and wanted != own:
                raise DataError(f"{root}: --split {wanted}: it is {own or 'no split'}; leave --split out.")
            return root, []
        splits = [str(name) for name in _json(root / SPLITS_FILE).get("splits") or []]
        splits = [name for name in splits if leads_into(root / name, root)]
        if wanted is not None:
            chosen = named(wanted, {name: name for name in splits})
        else:
            chosen = [name for name in splits if split_of(name) == "train"] or splits
        if len(chosen) != 1:
            asked = "" if wanted is None else f"--split {wanted}: "
            raise DataError(
                f"{root}: {asked}it has the splits {', '.join(splits) or '(none)'}; pass one as --split."
            )
        others = [name for name in splits if name != chosen[0]]
        beside = f" (beside it: {', '.join(others)})" if others else ""
        return root / chosen[0], [f"reading {root / chosen[0]} only{beside}; --split takes another"]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); save the dataset anew.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no object; save the dataset anew.")
    return found

"""A folder of class folders, in the order of torchvision's ImageFolder."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from chgval.config import DataConfig, Link
from chgval.data.dataset import Dataset, Embeddings, LargeImages, PixelImages, fingerprint
from chgval.data.decode import UnreadableImageError
from chgval.data.features import read_features
from chgval.data.formats.base import (
    Format,
    KnownRows,
    ListedRows,
    Rewritten,
    RowChanges,
    check_classes,
    check_fingerprint,
    check_rows,
    dataset_format,
    is_one_file,
    rewritten,
)
from chgval.data.formats.parquet import has_images, parquet_files
from chgval.data.images import (
    EXTENSIONS,
    TORCHVISION_EXTENSIONS,
    ImageFiles,
    holds_images,
    leads_into,
    load_files,
    open_image_file,
)
from chgval.data.sources import is_folder, matching
from chgval.data.splits import named, split_of
from chgval.errors import DataError, OutputError, SettingsError, first_few
from chgval.files import (
    EPOCHS_ENDING,
    TRAINING_FILE,
    TRAINING_STATE_FILE,
    as_text,
    new_folder,
    output_errors,
    part_of,
    sync,
)
from chgval.spreadsheets import with_marks
from chgval.types import IntArray

RELABELLED_FILE = "relabelled.csv"
# Bytes of a name that become part of another one.
LONGEST_STEM = 50
# What operating systems, file servers and archives put beside one's own files, besides hidden names.
LEFTOVERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"}
SHOWN_NAMES = 3
# What tables of names and labels end in.
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".json")


@dataclass(frozen=True, slots=True)
class FolderRows:
    """All images of a folder of class folders, in order, without their contents.

    Attributes:
        root: folder of the class folders.
        paths: of the files.
        ids: paths below the root, as text.
        labels_N: class of every file as an index into class_names.
        folders: names of the class folders.
        class_names: the same as text.
        notes: what a person should know about how the folder was read.
    """

    root: Path
    paths: Sequence[str]
    ids: Sequence[str]
    labels_N: IntArray
    folders: Sequence[str]
    class_names: Sequence[str]
    notes: Sequence[str]


@dataclass(slots=True)
class LeftOut:
    """What a folder holds that is no sample.

    Attributes:
        hidden: names of hidden files and folders, and of what systems leave behind.
        endings: how many files have each ending that no image has.
        num_loose: images that lie outside of class folders.
        num_only_here: samples that torchvision's ImageFolder does not list.
        num_only_there: images that ImageFolder lists.
    """

    hidden: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    num_loose: int = 0
    num_only_here: int = 0
    num_only_there: int = 0

    def hide(self, folder: str, name: str, *, is_listed: bool = True) -> None:
        """Leave a file or folder out that ImageFolder may list."""
        self.hidden.append(name)
        path = os.path.join(folder, name)  # noqa: PTH118 (one Path for each file takes seconds)
        if is_listed:
            below = [name, *(name for _, _, names in os.walk(path) for name in names)]
            self.num_only_there += sum(name.lower().endswith(TORCHVISION_EXTENSIONS) for name in below)

    def notes(self) -> list[str]:
        """Return what a person should know of it."""
        notes = []
        if self.hidden:
            names = sorted(set(self.hidden))
            notes.append(f"{len(self.hidden):,} hidden files and folders are left out ({_some(names)})")
        if self.endings:
            counts = [f"{ending or 'none'} {count:,}" for ending, count in self.endings.most_common()]
            notes.append(
                f"{self.endings.total():,} files in class folders have no ending of images and are left out "
                f"({_some(counts)})"
            )
        if self.num_loose:
            notes.append(f"{self.num_loose:,} images outside of class folders are left out")
        if self.num_only_here or self.num_only_there:
            lacks = f" lacks {self.num_only_here:,} of these images" if self.num_only_here else ""
            lists = f" lists {self.num_only_there:,} others" if self.num_only_there else ""
            both = " and" if lacks and lists else ""
            notes.append(f"positions are not those of torchvision's ImageFolder, which{lacks}{both}{lists}")
        return notes


def list_image_folder(root: Path, split: str | None = None) -> FolderRows:
    """List ROOT/<class>/**/<image>.

    Args:
        root: the folder. Where it holds folders of splits, one of them is listed.
        split: which one. Default: that for training.
    Raises:
        DataError: there are no class folders, or no images in them, or it is not clear which split to read.
    """
    root, notes = _enter_split(root, split)
    folders = _subfolders(root)
    own = sorted(set(_all_subfolders(root)) - set(folders))
    if own:
        notes.append(f"{len(own)} folders that chgval wrote are no classes ({_some(own)})")
    if not folders:
        raise DataError(
            f"{root}: no class folders and no Parquet files found; expected {root}/<class>/<image>, or a "
            f"folder of *.parquet files.{_tables_in(root)}"
        )
    left_out = LeftOut()
    _look_beside_classes(root, left_out)
    samples = [
        (path, label) for label, name in enumerate(folders) for path in _images_below(root / name, left_out)
    ]
    if not samples:
        raise DataError(
            f"{root}: {len(folders)} class folders but no images in them; images end in "
            f"{', '.join(EXTENSIONS)}."
        )
    paths, above = [path for path, _ in samples], os.path.join(root, "")  # noqa: PTH118 (ends in a separator)
    left_out.num_only_here = sum(not path.lower().endswith(TORCHVISION_EXTENSIONS) for path in paths)
    present, labels_N = np.unique([label for _, label in samples], return_inverse=True)
    empty = [name for label, name in enumerate(folders) if label not in present]
    if empty:
        notes.append(f"folders without images are left out: {_some(empty)}")
    folders = [folders[label] for label in present]
    return FolderRows(
        root=root,
        paths=paths,
        # Not with Path: one for each of a million files takes seconds.
        ids=[as_text(path.removeprefix(above).replace(os.sep, "/")) for path in paths],
        labels_N=labels_N,
        folders=folders,
        class_names=[as_text(name) for name in folders],
        notes=[*notes, *left_out.notes()],
    )


def _enter_split(root: Path, wanted: str | None) -> tuple[Path, list[str]]:
    """Return the folder of class folders, and a note where that is the one of a split.

    A folder is taken for that of a split by its name, if it holds folders itself and stands alone or beside
    another split: `train` may be a class.
    """
    names = _subfolders(root)
    if wanted is not None:
        found = named(wanted, {name: name for name in names})
        if len(found) != 1:
            raise DataError(
                f"{root}: --split {wanted}: {len(found) or 'none'} of its folders is that; there is "
                f"{', '.join(map(as_text, names)) or 'no folder'}."
            )
        return root / found[0], [f"reading {root / found[0]} only"]
    splits = [name for name in names if split_of(name) and _subfolders(root / name)]
    training = [name for name in splits if split_of(name) == "train"]
    others = [name for name in names if name not in training]
    if len(training) == 1 and others and not any(map(split_of, others)):
        return root, [f"{training[0]} is taken for a class; --split {training[0]} reads it alone"]
    if len(training) == 1:
        beside = f" (beside it: {_some(others)})" if others else ""
        return root / training[0], [f"reading {root / training[0]} only{beside}; --split takes another"]
    if splits and len(splits) == len(names):
        raise DataError(
            f"{root}: holds the splits {', '.join(splits)}, and not one for training; pass --split "
            f"{splits[0]}, or {root / splits[0]}."
        )
    if len(names) > 1 and all(split_of(name) for name in names):
        expected = next((name for name in names if split_of(name) == "train"), names[0])
        raise DataError(
            f"{root}: its folders {', '.join(names)} are splits, and no class folders are in them; expected "
            f"{root / expected}/<class>/<image>.{_tables_in(root)}"
        )
    return root, []


def _tables_in(root: Path) -> str:
    """Return what to pass where a folder holds a table that may name its images."""
    tables = sorted(path for path in root.iterdir() if path.suffix.lower() in TABLE_ENDINGS)
    return f" If {tables[0]} names images and labels, pass that." if tables else ""


def _look_beside_classes(root: Path, left_out: LeftOut) -> None:
    with os.scandir(root) as entries:
        for entry in entries:
            if _is_leftover(entry.name):
                left_out.hide(str(root), entry.name, is_listed=_is_folder(entry))
            elif entry.is_file() and entry.name.lower().endswith(EXTENSIONS):
                left_out.num_loose += 1


def _is_leftover(name: str) -> bool:
    """Say whether a file or folder is nobody's own: hidden, or of a system, a file server or an archive."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def _some(names: Sequence[str]) -> str:
    return first_few([as_text(name) for name in names], SHOWN_NAMES)


def read_image_folder(rows: FolderRows, config: DataConfig, largest_size: int) -> Dataset:
    """Read what `list_image_folder` lists.

    Args:
        rows: what it has listed.
        config: the image size, where the user gave it, and how many pixels an image may have.
        largest_size: the largest side to choose.
    """
    images = ImageFiles(rows.paths)
    content: PixelImages | LargeImages | Embeddings
    notes, digests = rows.notes, None
    if config.features is not None:
        vectors_ND, problems = read_features(config.features, len(images), config.source)
        content = Embeddings(vectors_ND)
    else:
        loaded = load_files(images, config, largest_size)
        content, problems, digests = loaded.content, loaded.problems, loaded.digests
        notes = [*notes, *loaded.notes]
    return Dataset(
        source=config.source,
        ids=rows.ids,
        labels_N=rows.labels_N,
        class_names=rows.class_names,
        content=content,
        problems=problems,
        fingerprint=folder_fingerprint(rows, config, digests),
        notes=notes,
        root=str(rows.root),
    )


def _subfolders(root: Path) -> list[str]:
    """Return the folders that may be classes: not hidden ones, nor what chgval wrote."""
    return [name for name in _all_subfolders(root) if not _is_output(root / name)]


def _all_subfolders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if _is_folder(entry) and not _is_leftover(entry.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _is_output(folder: Path) -> bool:
    """Say whether a folder holds the epochs of a report, or a training."""
    if folder.suffix == EPOCHS_ENDING:
        return any(folder.glob("epoch=*"))
    state_file = folder / TRAINING_STATE_FILE
    return any(path.exists() for path in (folder / TRAINING_FILE, state_file, part_of(state_file)))


def _images_below(class_folder: Path, left_out: LeftOut) -> list[str]:
    """Return the images below a class folder, sorted by folder, then by name; links are followed.

    A folder that links lead into a second time is left out: its images would count twice, and a link to a
    folder above it would never end.

    Raises:
        DataError: a folder cannot be listed.
    """
    seen = set()
    folders = []
    for folder, subfolders, names in os.walk(class_folder, onerror=_raise_unlisted, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        hidden = {name for name in (*subfolders, *names) if _is_leftover(name)}
        for name in sorted(hidden):
            left_out.hide(folder, name)
        subfolders[:] = sorted(set(subfolders) - hidden)
        images = sorted(name for name in names if name not in hidden and name.lower().endswith(EXTENSIONS))
        left_out.endings.update(
            os.path.splitext(name)[1].lower()  # noqa: PTH122 (one Path for each file takes seconds)
            for name in set(names) - hidden - set(images)
        )
        folders.append((folder, images))
    return [os.path.join(folder, name) for folder, names in sorted(folders) for name in names]  # noqa: PTH118


def images_anywhere(source: str) -> list[str]:
    """Return the images of a folder, at any depth, or those that a glob matches; none of something else.

    Raises:
        DataError: a folder cannot be listed.
    """
    if is_folder(source):
        return _images_below(Path(source), LeftOut())
    return [path for path in matching(source) if path.lower().endswith(EXTENSIONS)]


def _raise_unlisted(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or move it out of the "
        "dataset."
    ) from error


def folder_fingerprint(rows: FolderRows, config: DataConfig, digests: Sequence[int] | None = None) -> str:
    """Return the fingerprint of a dataset of these rows, without reading large files whole.

    Args:
        rows: the rows.
        config: how they are read.
        digests: of all files, if these have been read.
    """
    contents: Sequence[int] | bytes
    if config.features is not None:
        contents = read_features(config.features, len(rows.paths), config.source)[0].tobytes()
    else:
        contents = ImageFiles(rows.paths).digests() if digests is None else digests
    return fingerprint(rows.ids, rows.labels_N, rows.class_names, contents)


@dataset_format
class ImageFolder(Format):
    """ROOT/CLASS/**/IMAGE. Written anew, files are copied or linked.

    A relabelled image goes to the folder of its new class, under a name that says which class it was, and
    relabelled.csv lists them.
    """

    is_fallback = True

    @classmethod
    def matches(cls, config: DataConfig) -> bool:
        """Say whether it is a folder; Parquet files in it may be tables about its images."""
        path = Path(config.source)
        if not is_folder(config.source):
            return False
        files = parquet_files(path)
        if files and (config.names_columns or has_images(files[0]) or not holds_images(path)):
            return False
        if config.names_columns:
            raise SettingsError(
                f"{config.source} is a folder of images; only tables have columns to name, and --images-root."
            )
        return True

    @cached_property
    def rows(self) -> FolderRows:
        """All images, as they were when they were first listed."""
        return list_image_folder(Path(self.source), self.config.split)

    def read(self, largest_size: int) -> Dataset:
        """Read all images."""
        return read_image_folder(self.rows, self.config, largest_size)

    def listed(self) -> ListedRows:
        """Return all images."""
        return ListedRows(self.rows.ids, self.rows.labels_N, self.rows.class_names)

    def local_files(self) -> set[Path]:
        """Return all images."""
        return {Path(file).resolve() for file in self.rows.paths}

    def pictures(self, rows: Sequence[int]) -> Iterator[bytes | None]:
        """Yield the files."""
        return ImageFiles(self.rows.paths).pictures(rows)

    def check_target(self, target: Path, link: Link) -> None:
        """See `Format`."""
        if is_one_file(target):
            raise SettingsError(
                f"{target}: the images of {self.source} are copied to a folder; name a folder."
            )
        places = [Path(self.source), *{Path(path).parent for path in self.rows.paths}]
        if any(target.resolve().is_relative_to(place.resolve()) for place in places):
            raise OutputError(f"{target}: is part of the dataset {self.source}; pass another place.")
        if link != "sym":
            for path in self.rows.paths:
                _check_inside(Path(path), self.rows.root)

    def check_same(self, known: KnownRows) -> None:
        """See `Format`."""
        check_rows(self.source, known, self.rows.ids, self.rows.labels_N)

    def write(self, known: KnownRows, changes: RowChanges, target: Path, link: Link) -> Rewritten:
        """See `Format`."""
        return _write_folder(self.config, self.rows, known, changes, target, link)


def _write_folder(
    config: DataConfig, rows: FolderRows, known: KnownRows, changes: RowChanges, target: Path, link: Link
) -> Rewritten:
    source = config.source
    check_rows(source, known, rows.ids, rows.labels_N)
    check_fingerprint(source, known, folder_fingerprint(rows, config))
    check_classes(source, changes, rows.class_names)
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
    return rewritten(known, changes, changes.kept_N & readable_N, rows.class_names, rows.notes, unreadable)


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
            f"{path}: leads out of the dataset, to {os.path.realpath(path)}; put the file there, or pass "
            "--link sym, which only makes the same links."
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

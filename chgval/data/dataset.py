"""What a dataset is, whatever it was read from.

Shape legend: N input rows, S side of a square image, D numbers of an embedding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from chgval.data.decode import Pixels
from chgval.data.pixel_file import PixelFile
from chgval.detection.signals import Annotations
from chgval.errors import DataError, first_few
from chgval.types import IntArray, State

# Fewer samples say nothing about whether labels are ids.
SMALLEST_TO_JUDGE = 20
# What programs write where there is no label.
UNKNOWN_NAMES = {"na", "n/a", "nan", "none", "null", "<na>"}


class EncodedImages(Protocol):
    """Encoded images that can be read in any order, from several processes."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> bytes:
        """Return the file's bytes. Raises UnreadableImageError where there are none."""
        ...


@dataclass(frozen=True)
class PixelImages:
    """Small images, decoded once: uint8, shape (N, 3, S, S). Unreadable rows are black."""

    pixels_N3SS: Pixels | PixelFile


@dataclass(frozen=True)
class LargeImages:
    """Images that are decoded anew whenever they are used, to squares of `size`.

    One of more than `max_pixels` is refused.
    """

    encoded: EncodedImages
    size: int
    max_pixels: int


@dataclass(frozen=True)
class Embeddings:
    """Vectors that some other model computed: float32, shape (N, D). Unreadable rows are zero."""

    vectors_ND: NDArray[np.float32]


@dataclass(frozen=True)
class Dataset:
    """All input rows, in order, and what the model is fed for them.

    Attributes:
        source: where it was read from, as the user named it.
        ids: name of every row: a path, a value of the id column, or the row's number.
        labels_N: class of every row as an index into class_names; -1 where unknown.
        class_names: in the order of the class indices.
        content: what the model is fed.
        problems: why a row cannot be read, by row. Loaders add to it what they find later.
        fingerprint: changes when rows, labels, class names or contents change; of a file of its own, when
            its size or its first or last bytes do.
        flips: whether the mirror image of a sample still belongs to its class.
        notes: what a person should know about how the source was read.
        root: folder that the ids are paths below, if they are.
        annotations: what every annotator said, if there are several; labels_N is then their majority.
        columns: where images, labels and ids are in a table, by the names of the settings.
    """

    source: str
    ids: Sequence[str]
    labels_N: IntArray
    class_names: Sequence[str]
    content: PixelImages | LargeImages | Embeddings
    fingerprint: str
    problems: dict[int, str] = field(default_factory=dict)
    flips: bool = True
    notes: Sequence[str] = ()
    root: str | None = None
    annotations: Annotations | None = None
    columns: Mapping[str, str | tuple[str, ...] | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels_N)

    def named_columns(self) -> list[tuple[str, str]]:
        """Return what columns of a table hold, and which, for a person to read."""
        what = {
            "image_column": "images",
            "features_column": "features",
            "label_columns": "labels",
            "id_column": "ids",
        }
        return [
            (what[setting], name if isinstance(name, str) else ", ".join(name))
            for setting, name in self.columns.items()
            if name is not None
        ]

    @property
    def num_classes(self) -> int:
        """Classes that the dataset knows, with or without samples."""
        return len(self.class_names)

    @property
    def input_size(self) -> int:
        """Side of the images in pixels, or length of the embeddings."""
        match self.content:
            case PixelImages(pixels):
                return int(pixels.shape[-1])
            case LargeImages(_, size, _):
                return size
            case Embeddings(vectors):
                return int(vectors.shape[1])

    def usable_rows(self) -> IntArray:
        """Rows with a known label whose content is not known to be unreadable."""
        usable = self.labels_N >= 0
        usable[list(self.problems)] = False
        return usable.nonzero()[0]

    def only(self, rows: IntArray) -> Dataset:
        """Return the same dataset in which only these rows have a label, so that others are not used."""
        labels_N = np.full_like(self.labels_N, -1)
        labels_N[rows] = self.labels_N[rows]
        return dataclasses.replace(self, labels_N=labels_N)

    def statuses(self) -> list[str]:
        """Return what became of every row: valued, unlabelled or unreadable."""
        statuses = ["valued" if label >= 0 else "unlabelled" for label in self.labels_N]
        for row in self.problems:
            statuses[row] = "unreadable"
        return statuses

    def state_dict(self) -> State:
        """Return what has been found out about the samples since they were opened."""
        return {"problems": {str(row): reason for row, reason in self.problems.items()}}

    def load_state_dict(self, state: State) -> None:
        """Take over what another run found out about the same samples.

        Raises:
            ValueError: it is no state of such a run.
        """
        problems = {int(row): reason for row, reason in state["problems"].items()}
        if not all(0 <= row < len(self) and isinstance(reason, str) for row, reason in problems.items()):
            raise ValueError("problems of samples that there are not")
        self.problems.update(problems)

    def with_notes(self, notes: Sequence[str]) -> Dataset:
        """Return the same dataset with more that a person should know."""
        return dataclasses.replace(self, notes=[*self.notes, *notes])

    def name_notes(self) -> list[str]:
        """Return what is odd about the names of the classes."""
        notes = []
        alike: dict[str, list[str]] = {}
        for name in self.class_names:
            alike.setdefault(as_seen(name), []).append(name)
        for names in alike.values():
            if len(names) > 1:
                shown = " and ".join(map(ascii, names[:2]))
                notes.append(f"classes {shown} look the same; they differ in spaces or in Unicode's spelling")
        unknown = [name for name in self.class_names if name.lower() in UNKNOWN_NAMES]
        if unknown and len(self.class_names) > 2:
            shown = first_few(unknown, 3)
            notes.append(f"{shown}: taken for classes; if these labels are unknown, leave them empty")
        if "" in self.class_names:
            count = int((self.labels_N == list(self.class_names).index("")).sum())
            notes.append(f"{count:,} labels are empty text, a class of its own; unknown labels are null")
        labelled = int((self.labels_N >= 0).sum())
        if labelled > SMALLEST_TO_JUDGE and 2 * len(np.unique(self.labels_N[self.labels_N >= 0])) > labelled:
            notes.append(
                f"{self.num_classes:,} classes of {labelled:,} labelled samples: labels that tell samples "
                "apart, such as ids, are no classes"
            )
        return notes

    def check(self, least_classes: int = 2) -> None:
        """Raise DataError where there is nothing to learn from; for tests one class is enough."""
        if not len(self):
            raise DataError(f"{self.source}: no samples found.")
        if len(self.problems) == len(self):
            row, reason = next(iter(self.problems.items()))
            raise DataError(
                f"{self.source}: none of the {len(self):,} samples could be read "
                f"(the first, {self.ids[row]}: {reason})."
            )
        usable = self.usable_rows()
        if not len(usable):
            raise DataError(f"{self.source}: no readable sample has a label; expected labels.")
        present = np.unique(self.labels_N[usable])
        if len(present) < least_classes:
            raise DataError(
                f"{self.source}: all {len(usable):,} usable samples have the label "
                f"'{self.class_names[present[0]]}'; expected at least two classes."
            )


def as_seen(name: str) -> str:
    """Return a name without what no one sees: spaces around it, and which of Unicode's spellings it has."""
    return unicodedata.normalize("NFC", name).strip()


def class_indices(
    raw_A: Sequence[Sequence[object]], class_names: Sequence[str] | None, source: str, ids: Sequence[str]
) -> tuple[IntArray, list[str]]:
    """Turn labels as they were stored into class indices.

    Args:
        raw_A: strings, integers, booleans or None, one per row, of each of A annotators.
        class_names: the dataset's own list of names, which integer labels index. Without one the classes
            are the distinct labels, sorted.
        source: the dataset, for messages.
        ids: name of every row, for messages.
    Returns:
        int64 class indices (-1 for None and for the integer -1), shape (N, A), and the class names.
    Raises:
        DataError: an integer label lies outside the class list.
    """
    labels_AN = np.empty((len(raw_A), len(ids)), dtype=np.int64)
    if class_names is None:
        distinct = sorted({label for raw in raw_A for label in raw if not _unknown(label)})  # type: ignore[type-var]
        index = {label: position for position, label in enumerate(distinct)}
        for labels_N, raw in zip(labels_AN, raw_A, strict=True):
            labels_N[:] = [-1 if _unknown(label) else index[label] for label in raw]
        return labels_AN.T, [str(label) for label in distinct]
    names = list(class_names)
    by_name = {name: position for position, name in enumerate(names)}
    for labels_N, raw in zip(labels_AN, raw_A, strict=True):
        for row, label in enumerate(raw):
            position = by_name.get(label) if isinstance(label, str) else -1 if _unknown(label) else label
            if not isinstance(position, int) or not -1 <= position < len(names):
                raise DataError(
                    f"{source}: row {row:,} ({ids[row]}) has the label {label!r}, outside the class list of "
                    f"{len(names)} names ({first_few(names, 5)}); fix "
                    "the label, or set it to -1 if it is unknown."
                )
            labels_N[row] = position
    return labels_AN.T, names


def _unknown(label: object) -> bool:
    return label is None or (isinstance(label, int) and not isinstance(label, bool) and label == -1)


def digest(*pieces: bytes) -> int:
    """Return 64 bits that stand for the bytes of an image in the fingerprint."""
    hashed = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        hashed.update(piece)
    return int.from_bytes(hashed.digest(), "little", signed=True)


def fingerprint(
    ids: Sequence[str], labels_NA: IntArray, class_names: Sequence[str], contents: Sequence[int] | bytes
) -> str:
    """Return a hash of rows, labels and classes, and of their contents or (for images) their digests."""
    hashed = hashlib.blake2b(digest_size=16)
    for text in (*class_names, "", *ids):
        hashed.update(text.encode() + b"\0")
    hashed.update(np.ascontiguousarray(labels_NA, dtype="<i8").tobytes())
    hashed.update(contents if isinstance(contents, bytes) else np.asarray(contents, dtype="<i8").tobytes())
    return hashed.hexdigest()

"""`chgval detect-issues`: what is wrong with samples besides their labels.

Shape legend: N rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from chgval import progress
from chgval.config import DataConfig, IssuesConfig
from chgval.data.dataset import Embeddings
from chgval.data.decode import UnreadableImageError, grey_square
from chgval.data.formats import Format, format_of
from chgval.data.formats.image_folder import images_anywhere
from chgval.data.images import ImageFiles
from chgval.data.sources import is_folder
from chgval.detection.duplicates import (
    LEAST_SIDE,
    THUMBNAIL_SIDE,
    Pairs,
    Thumbnails,
    copies_between,
    copies_within,
    groups_of,
    near_between,
    near_within,
    other_labels,
)
from chgval.detection.outliers import LEAST_FACTOR, outlier_factors
from chgval.errors import ChgvalError, DataError, SettingsError
from chgval.files import as_text, locked
from chgval.reports.decisions import DROP, UNSURE
from chgval.reports.files import (
    check_output,
    with_metadata,
    write_table,
)
from chgval.reports.report import Report, read_whole_report
from chgval.reports.tables import ISSUES_SCHEMA, or_null
from chgval.runs.image_quality import PROPERTIES, explained_by_labels, image_quality
from chgval.runs.report import features_of_page
from chgval.runs.rewriting import same_dataset
from chgval.runs.summaries import MOST_SHOWN
from chgval.types import FloatArray, IntArray

# What issues are called in tables, on the page and in the summary.
OUTLIER, COPY, CONFLICT, LEAK = "outlier", "copy", "copy with another label", "in the test set"
# Similarity from which on nobody needs to look whether it is a copy.
PLAIN_SIMILARITY = 0.9
# Share of a property's variance between classes from which on it is told: it says much of the label.
TOLD_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Issues:
    """What was found.

    Attributes:
        table: as it was, or would be, written: one row per input row.
        counts: rows that each was found in, in the order of the summary.
        explained: share of each property's variance that lies between classes, where images were looked at.
        notes: what was not looked for, and why.
        outliers: id, label and factor of the worst.
        conflicts: id, label, the other's label and its id, of copies.
    """

    table: pa.Table
    counts: dict[str, int]
    explained: dict[str, float]
    notes: list[str]
    outliers: list[tuple[str, str, str]]
    conflicts: list[tuple[str, str, str, str]]

    @property
    def told(self) -> dict[str, float]:
        """Those of `explained` that a model could take for the class."""
        return {name: share for name, share in self.explained.items() if share >= TOLD_SHARE}


def run_detect_issues(config: IssuesConfig) -> Issues:
    """Find outliers, copies and images that are also in a test set; write them if there is an output.

    Raises:
        ChgvalError: the report or a dataset cannot be read, or do not fit each other, or the output is in the
            way.
    """
    with locked(*config.outputs):
        if config.output is not None:
            check_output(config.output, *config.inputs)
        report = read_whole_report(config.source)
        source = same_dataset(config.source, report.table, report.metadata, config.dataset)
        tested = None if config.against is None else _test_set(source.config, config.against)
        found = _find(report, source, tested, config)
        if config.output is not None:
            metadata = {**report.metadata, "command": progress.command(), "goes_with_labels": found.told}
            write_table(config.output, with_metadata(found.table, metadata))
        return found


def thumbnails_of(name: str, pictures: Iterable[bytes | None], num_rows: int, max_pixels: int) -> Thumbnails:
    """Read all images, grey and small.

    Args:
        name: what they are of.
        pictures: encoded; None for one that cannot be read.
        num_rows: how many there are.
        max_pixels: that one may have.
    """
    grey_NTT = np.zeros((num_rows, THUMBNAIL_SIDE, THUMBNAIL_SIDE), dtype=np.uint8)
    is_known_N, has_details_N = np.zeros((2, num_rows), dtype=bool)
    with progress.counting(f"images of {name}", num_rows) as tell:
        for row, encoded in enumerate(pictures):
            if encoded is not None:
                with suppress(UnreadableImageError):  # the report has a reason for it
                    grey_NTT[row], shorter = grey_square(encoded, THUMBNAIL_SIDE, max_pixels)
                    is_known_N[row], has_details_N[row] = True, shorter >= LEAST_SIDE
            tell(row + 1)
    return Thumbnails(grey_NTT, is_known_N, has_details_N)


def conflicts_in(source: Format, labels_N: IntArray) -> IntArray:
    """Return, for every image of a dataset, the row of a copy with another label; -1 for none."""
    pairs, _ = copies_within(_thumbnails(source, len(labels_N)))
    return other_labels(groups_of(pairs, len(labels_N)), labels_N)


def _thumbnails(source: Format, num_rows: int) -> Thumbnails:
    pictures = source.pictures(range(num_rows))
    return thumbnails_of(source.source, pictures, num_rows, source.config.max_pixels)


@dataclass(frozen=True, slots=True)
class _TestSet:
    """What the samples of a dataset are compared with. Its labels are not looked at.

    Attributes:
        name: what the user named.
        ids: of its rows.
        content: the dataset, or images without labels.
    """

    name: str
    ids: Sequence[str]
    content: Format | ImageFiles

    def pictures(self) -> Iterator[bytes | None]:
        """Yield its encoded images; None for one that cannot be read."""
        return self.content.pictures(range(len(self.ids)))

    def vectors(self) -> NDArray[np.float32]:
        """Return its embeddings. Raises DataError where it holds images."""
        if isinstance(self.content, ImageFiles):
            raise DataError(f"{self.name}: holds images; expected embeddings, as the report is about.")
        return _vectors(self.content)


@dataclass(frozen=True, slots=True)
class _Compared:
    """What is alike in a dataset, and what of it is in a test set.

    Attributes:
        pairs: of copies.
        leaks: pairs of a row and one of the test set; None without one.
        readable: rows whose images can be read; none of embeddings.
    """

    pairs: Pairs
    leaks: Pairs | None
    readable: IntArray


def _compare(
    source: Format, num_rows: int, features_ND: NDArray[np.floating] | None, tested: _TestSet | None
) -> _Compared:
    """Compare the samples of a dataset with each other, and with those of a test set of the same kind."""
    if source.config.takes_features and features_ND is not None:
        leaks = None
        if tested is not None:
            test_MD = tested.vectors()
            if test_MD.shape[1] != features_ND.shape[1]:
                raise DataError(
                    f"{tested.name}: has embeddings of {test_MD.shape[1]:,} numbers where the report is "
                    f"about {features_ND.shape[1]:,}; embed both by the same network."
                )
            leaks = near_between(features_ND, test_MD)
        return _Compared(near_within(features_ND), leaks, np.zeros(0, dtype=np.int64))
    thumbnails = _thumbnails(source, num_rows)
    progress.say("comparing")
    pairs, least = copies_within(thumbnails)
    leaks = None
    if tested is not None:
        most = source.config.max_pixels
        test = thumbnails_of(tested.name, tested.pictures(), len(tested.ids), most)
        leaks = copies_between(thumbnails, test, least)
    return _Compared(pairs, leaks, np.flatnonzero(thumbnails.is_known_N))


def _test_set(data: DataConfig, source: str) -> _TestSet:
    """Return a test set, read by the columns of the dataset if it has these.

    Args:
        data: the dataset.
        source: what the user named.
    Raises:
        ChgvalError: it cannot be read, or is of another kind.
    """
    if data.features is not None:
        raise SettingsError(
            f"--against: {data.source} was valued by embeddings in a file of their own ({data.features}), "
            "and there are none of the test set; value a table with a column of them, as chgval embed does."
        )
    same = dataclasses.replace(data, source=source, split=None, images_root=None)
    if same.takes_features and is_folder(source):
        raise DataError(
            f"{source}: is a folder of images; the report is about embeddings. Run chgval embed on it."
        )
    if same.names_columns and not same.takes_features:
        with suppress(ChgvalError):  # in another form than the dataset
            return _listed_set(same)
        same = DataConfig(source=source, max_pixels=data.max_pixels)
    try:
        return _listed_set(same)
    except ChgvalError:
        paths = [] if same.takes_features else images_anywhere(source)
        if not paths:
            raise
        progress.say(f"note: {source} is taken as {len(paths):,} images without labels")
        return _TestSet(source, [as_text(path) for path in paths], ImageFiles(paths))


def _listed_set(data: DataConfig) -> _TestSet:
    found = format_of(data)
    return _TestSet(data.source, found.listed().ids, found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What was found in each row.

    Attributes:
        flags: which rows have each issue, by its name.
        pairs: of copies.
        copy_of_N: the first row of each copy; -1 for none.
        conflict_N: a copy with another label; -1 for none.
        leak_N, leak_similarity_N: the row of the test set that each is, and how similar; -1 and NaN for none.
        factor_N: outlier factors; NaN for none.
        scores: of properties of images, by the name of their column.
    """

    flags: dict[str, NDArray[np.bool_]]
    pairs: Pairs
    copy_of_N: IntArray
    conflict_N: IntArray
    leak_N: IntArray
    leak_similarity_N: FloatArray
    factor_N: FloatArray
    scores: dict[str, FloatArray]


def _find(report: Report, source: Format, tested: _TestSet | None, config: IssuesConfig) -> Issues:
    if config.quality and source.config.takes_features:
        raise SettingsError(
            f"--quality: looks at images, and {source.source} holds embeddings; leave it out."
        )
    num_rows, labels_N = len(report), report.integers("label")
    features_ND = _features(report, source, config)
    compared = _compare(source, num_rows, features_ND, tested)
    factor_N, notes = _outliers(features_ND, num_rows)
    group_N = groups_of(compared.pairs, num_rows)
    conflict_N = other_labels(group_N, labels_N)
    leak_N, leak_similarity_N = _best(compared.leaks, num_rows)
    flags: dict[str, NDArray[np.bool_]] = {
        **({} if compared.leaks is None else {LEAK: leak_N >= 0}),
        CONFLICT: conflict_N >= 0,
        COPY: (group_N >= 0) & (conflict_N < 0),
        **({} if features_ND is None else {OUTLIER: np.nan_to_num(factor_N) >= LEAST_FACTOR}),
    }
    explained: dict[str, float] = {}
    scores: dict[str, FloatArray] = {}
    if config.quality:
        progress.say("looking for dark, blurry and odd images")
        quality = image_quality(source, compared.readable, num_rows)
        for name in PROPERTIES:
            flags[name.replace("_", " ")] = quality.flags[name]
            scores[f"{name}_score"] = quality.scores[name]
            explained[name.replace("_", " ")] = explained_by_labels(quality.scores[name], labels_N)
    found = _Found(
        flags=flags,
        pairs=compared.pairs,
        copy_of_N=np.where(group_N == np.arange(num_rows), -1, group_N),
        conflict_N=conflict_N,
        leak_N=leak_N,
        leak_similarity_N=leak_similarity_N,
        factor_N=factor_N,
        scores=scores,
    )
    ids, names = report["id"], np.where(labels_N < 0, "", report["label_name"])
    counts = {name: int(flags_N.sum()) for name, flags_N in flags.items()}
    worst = np.argsort(-np.nan_to_num(factor_N), kind="stable")[: min(MOST_SHOWN, counts.get(OUTLIER, 0))]
    doubled = np.flatnonzero(flags[CONFLICT])[:MOST_SHOWN]
    return Issues(
        table=_table(report, found, [] if tested is None else tested.ids),
        counts=counts,
        explained=explained,
        notes=notes,
        outliers=[(ids[row], names[row], f"{factor_N[row]:.1f}") for row in worst],
        conflicts=[
            (ids[row], names[row], names[other], ids[other])
            for row, other in zip(doubled, conflict_N[doubled], strict=True)
        ],
    )


def _table(report: Report, found: _Found, test_ids: Sequence[str]) -> pa.Table:
    """Return what was found, as docs/reports.md describes it: one row per input row."""
    num_rows, ids = len(report), report["id"]
    _, similarity_N = _best(_both_ways(found.pairs), num_rows)
    table = pa.table(
        {
            **{name: report.table[name] for name in ("index", "id", "label", "label_name")},
            "issues": _listed(found.flags, num_rows),
            "outlier_factor": or_null(found.factor_N),
            "copy_of": or_null(found.copy_of_N),
            "copy_of_id": [None if row < 0 else ids[row] for row in found.copy_of_N.tolist()],
            "copy_similarity": or_null(similarity_N),
            "conflicts_with": or_null(found.conflict_N),
            "test_id": [None if row < 0 else test_ids[row] for row in found.leak_N.tolist()],
            "test_similarity": or_null(found.leak_similarity_N),
            "decision": _proposed(
                found.flags,
                _is_plain_copy(found.pairs, found.copy_of_N, report.integers("label")),
                np.nan_to_num(found.leak_similarity_N) >= PLAIN_SIMILARITY,
                found.copy_of_N,
            ),
            "new_label_name": pa.nulls(num_rows, pa.string()),
        },
        schema=ISSUES_SCHEMA,
    )
    for name, score_N in found.scores.items():
        table = table.append_column(name, or_null(score_N))
    return table


def _outliers(features_ND: NDArray[np.floating] | None, num_rows: int) -> tuple[FloatArray, list[str]]:
    """Return the outlier factor of each row, NaN where there is none, and a note where none has one."""
    reason = "the run kept no features. Value with --write-features, or pass --features."
    factor_N = np.full(num_rows, np.nan)
    if features_ND is not None:
        factor_N = outlier_factors(features_ND)
        reason = "too few samples have features."
    return factor_N, [] if np.isfinite(factor_N).any() else [f"outliers were not looked for: {reason}"]


def _features(report: Report, source: Format, config: IssuesConfig) -> NDArray[np.floating] | None:
    """Return what the user named, what the run kept, or the embeddings that were valued."""
    kept = features_of_page(config.features, report, config.source)
    return _vectors(source) if kept is None and source.config.takes_features else kept


def _vectors(source: Format) -> NDArray[np.float32]:
    """Return the embeddings of a dataset; NaN where a row has none.

    Raises:
        DataError: it holds images.
    """
    dataset = source.read(largest_size=0)
    if not isinstance(dataset.content, Embeddings):
        raise DataError(f"{source.source}: holds images; expected embeddings, as the report is about.")
    vectors_ND = dataset.content.vectors_ND.copy()
    vectors_ND[list(dataset.problems)] = np.nan
    return vectors_ND


def _both_ways(pairs: Pairs) -> Pairs:
    return Pairs(
        np.concatenate([pairs.first_P, pairs.second_P]),
        np.concatenate([pairs.second_P, pairs.first_P]),
        np.concatenate([pairs.similarity_P, pairs.similarity_P]),
    )


def _best(pairs: Pairs | None, num_rows: int) -> tuple[IntArray, FloatArray]:
    """Return the most similar row of each first row, and how similar it is; -1 and NaN for none."""
    best_N, similarity_N = np.full(num_rows, -1), np.full(num_rows, np.nan)
    if pairs is not None:
        order = np.lexsort((-pairs.second_P, pairs.similarity_P))  # the last that is written stays
        best_N[pairs.first_P[order]] = pairs.second_P[order]
        similarity_N[pairs.first_P[order]] = pairs.similarity_P[order]
    return best_N, similarity_N


def _listed(found: dict[str, NDArray[np.bool_]], num_rows: int) -> list[str | None]:
    """Return the names of what was found in each row, in one text; None for nothing."""
    texts: list[list[str]] = [[] for _ in range(num_rows)]
    for name, flags_N in found.items():
        for row in np.flatnonzero(flags_N).tolist():
            texts[row].append(name)
    return [", ".join(names) or None for names in texts]


def _is_plain_copy(pairs: Pairs, copy_of_N: IntArray, labels_N: IntArray) -> NDArray[np.bool_]:
    """Return which rows are plainly copies of the row that stays, and lose no label by going."""
    is_plain_P = pairs.similarity_P >= PLAIN_SIMILARITY
    is_of_first_P = is_plain_P & (copy_of_N[pairs.second_P] == pairs.first_P)
    is_plain_N = np.zeros(len(copy_of_N), dtype=bool)
    is_plain_N[pairs.second_P[is_of_first_P]] = True
    return is_plain_N & ((labels_N[copy_of_N] >= 0) | (labels_N < 0))


def _proposed(
    found: dict[str, NDArray[np.bool_]],
    is_plain_copy_N: NDArray[np.bool_],
    is_plain_leak_N: NDArray[np.bool_],
    copy_of_N: IntArray,
) -> list[str | None]:
    """Return what could be decided: plain copies but the first, and plain leaks, go; people look at more."""
    none_N = np.zeros(len(copy_of_N), dtype=bool)
    leaks_N, copies_N = found.get(LEAK, none_N), found[COPY] & (copy_of_N >= 0)
    drops_N = (leaks_N & is_plain_leak_N) | (copies_N & is_plain_copy_N)
    unsure_N = ~drops_N & (leaks_N | copies_N | found[CONFLICT] | found.get(OUTLIER, none_N))
    return [
        DROP if drops else UNSURE if unsure else None for drops, unsure in zip(drops_N, unsure_N, strict=True)
    ]

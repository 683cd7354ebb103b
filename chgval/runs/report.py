"""`chgval report`: a page on which people look at the most suspicious samples, and decide."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from chgval import progress
from chgval.config import DetectConfig, OutputConfig, ReportConfig, default_name
from chgval.detection.neighbours import nearest_sure
from chgval.detection.signals import NoiseRate
from chgval.errors import ChgvalError, DataError
from chgval.files import check_file, locked, output_errors, replacing
from chgval.reports.figures import confusion, epoch_curves, extremes, threshold_curve, value_histogram
from chgval.reports.files import features_of, read_table, report_name
from chgval.reports.html import SMALL_SIDE, Page, PageSample, render
from chgval.reports.plots import (
    check_folder,
    confusion_plot,
    epochs_plot,
    histogram_plot,
    save_plots,
    threshold_plot,
)
from chgval.reports.report import Report, read_whole_report
from chgval.reports.tables import ISSUES
from chgval.runs.assessment import Assessment, assess
from chgval.runs.summaries import count_statuses
from chgval.types import IntArray

if TYPE_CHECKING:  # these take long to load, and are not always needed
    from matplotlib.figure import Figure

    from chgval.data.formats import Format

# Sides of pictures: of samples to review, of those of a class, and of neighbours.
PICTURE_SIDE, CLASS_PICTURE_SIDE, NEIGHBOUR_SIDE = 160, 96, 80
# Surely labelled samples beside each, of its class and of the suggested one.
NEIGHBOURS = 3
# Of each class, samples of the lowest and of the highest values; of all classes together.
SHOWN_OF_CLASS, SHOWN_OF_CLASSES = 6, 300
# Samples on the page: the flagged ones, as many again, and so many more to set a threshold by.
MORE_SAMPLES = 100
# Names of the figures that are also written as files.
PLOTS = ("thresholds", "confusion", "values", "epochs")
# Entries of a setting that is shown.
LONGEST_LIST = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What the command line says of a page.

    Attributes:
        num_samples, num_pictures: on it, to review.
        num_flagged: of them.
        num_bytes: of the file.
        decisions: name of the file that decisions are downloaded as.
        dataset: that they can be applied to; None if it is not known, or built in.
    """

    num_samples: int
    num_pictures: int
    num_flagged: int
    num_bytes: int
    decisions: str
    dataset: str | None


def run_report(config: ReportConfig) -> Written:
    """Write the review page of a values report.

    Raises:
        ChgvalError: the report cannot be read, the dataset is not that of the report, or the output is in the
            way.
    """
    with locked(config.target):
        check_file(config.target, overwrite=config.overwrite)
        if config.plots is not None:
            check_folder(config.plots, PLOTS, overwrite=config.overwrite)
        report = read_whole_report(config.source)
        issues = None if config.issues is None else read_issues(config.issues, report)
        source = dataset_of_page(config, report)
        found = assess(report, DetectConfig(source=config.source, output=None, all_rows=True))
        features_ND = features_of_page(config.features, report, config.source)
        return write_page(report, found, source, config, features_ND, issues)


def write_page(
    report: Report,
    found: Assessment,
    source: Format | None,
    config: ReportConfig,
    features_ND: NDArray[np.floating] | None,
    issues: PageIssues | None = None,
) -> Written:
    """Write the page of a report.

    Args:
        report: all rows, in input order.
        found: what was decided about all of them.
        source: its dataset, if that is there.
        config: the settings.
        features_ND: by which neighbours are found, if there are any.
        issues: what else was found, if it was looked for.
    Raises:
        ChgvalError: the dataset or the epochs cannot be read, or the page cannot be written.
    """
    page = page_of(report, found, source, config, features_ND, issues)
    text = render(page).encode("utf-8", "backslashreplace")
    with output_errors(config.target), replacing(config.target) as file:
        file.write(text)
    if config.plots is not None:
        save_plots(_plots(page), config.plots)
    flagged = int(found.flagged_N[[sample.index for sample in page.samples]].sum())
    pictures = sum(sample.picture is not None for sample in page.samples)
    dataset = config.dataset or report.dataset
    return Written(
        num_samples=len(page.samples),
        num_pictures=pictures,
        num_flagged=flagged,
        num_bytes=len(text),
        decisions=page.decisions,
        dataset=None if dataset is None or dataset.startswith("builtin:") else dataset,
    )


def write_and_tell(
    report: Report,
    found: Assessment,
    source: Format | None,
    config: ReportConfig,
    features_ND: NDArray[np.floating] | None,
) -> None:
    """Write the page that another command makes on its way, and say what is on it; see `write_page`."""
    written = write_page(report, found, source, config, features_ND)
    progress.say(f"{written.num_samples:,} samples, {written.num_pictures:,} pictures -> {config.target}")


def dataset_of_page(config: ReportConfig, report: Report) -> Format | None:
    """Return the dataset that a report is about, if it is there and still the same; else say why not.

    Raises:
        DataError: the user named one that is not it.
    """
    from chgval.runs.rewriting import same_dataset

    try:
        return same_dataset(config.source, report.table, report.metadata, config.dataset)
    except ChgvalError as error:
        if config.dataset is not None:
            raise
        progress.warn(f"no pictures: {error}")
        return None


def page_of(
    report: Report,
    found: Assessment,
    source: Format | None,
    config: ReportConfig,
    features_ND: NDArray[np.floating] | None,
    issues: PageIssues | None = None,
) -> Page:
    """Return what the page of a report shows; see `write_page`."""
    num_flagged = int(found.flagged_N.sum())
    rows = _rows_to_review(found, config.top, issues)
    label_N, value_N = report.integers("label"), report.values
    class_names = report.class_names
    count = max(1, min(SHOWN_OF_CLASS, SHOWN_OF_CLASSES // (2 * max(1, len(class_names)))))
    ends = extremes(value_N, label_N, len(class_names), count)[: SHOWN_OF_CLASSES // 2]
    name = config.dataset or report.dataset or config.source
    epochs = None
    if config.source != "-":
        beside = OutputConfig(path=config.source).epochs_folder if Path(config.source).suffix else None
        epochs = None if beside is None else epoch_curves(beside, rows, len(report))
    samples = _samples(report, found, source, rows, PICTURE_SIDE)
    neighbours: list[PageSample] = []
    if features_ND is not None:
        samples, neighbours = _with_neighbours(samples, report, found, source, features_ND)
    if issues is not None:
        samples, neighbours = _with_issues(samples, neighbours, issues, report, found, source)
    of_classes = np.concatenate([np.concatenate([low, high]) for _, low, high in ends])
    shown = dict(
        zip(of_classes.tolist(), _samples(report, found, source, of_classes, CLASS_PICTURE_SIDE), strict=True)
    )
    notes = [*report.notes, *(() if issues is None else issues.notes)]
    if all(sample.picture is None for sample in samples):
        notes.append("There are no pictures on this page: " + _why_no_pictures(source, report))
    left_out = num_flagged - int(found.flagged_N[rows].sum())
    if left_out:
        notes.append(
            f"The {len(rows):,} most suspicious samples are on this page; {left_out:,} more are flagged."
        )
    curve = threshold_curve(found.score_N, found.cut)
    if num_flagged and found.cut is None:
        notes.append(
            f"What flagged these {num_flagged:,} samples is no threshold of the score: others of a higher "
            "score are not flagged."
        )
    return Page(
        title=default_name(name, "").rstrip(".") or name,
        summary=_summary(report, found.rate, num_flagged),
        notes=notes,
        provenance=_provenance(report, name),
        key=_key(report),
        ids_are_unique=len(set(report["id"])) == len(report),
        decisions=f"{default_name(name, 'decisions')}.csv",
        class_names=class_names,
        samples=samples,
        cut=int(np.searchsorted(curve.thresholds_T, 1 if found.cut is None else found.cut)),
        curve=curve,
        confusion=confusion(label_N, report.integers("suggested_label"), found.flagged_N),
        histogram=value_histogram(value_N, label_N, len(class_names)),
        extremes=[
            (label, [shown[row] for row in low.tolist()], [shown[row] for row in high.tolist()])
            for label, low, high in ends
        ],
        epochs=epochs,
        neighbours=neighbours,
    )


def _rows_to_review(found: Assessment, most: int, issues: PageIssues | None) -> IntArray:
    """Return the flagged rows, those with issues, and others to set a threshold by.

    Of all these, the most suspicious first; rows without a score last.
    """
    scored = found.order[np.isfinite(found.score_N[found.order])]
    is_flagged = found.flagged_N[scored]
    with_issues = np.zeros(0, dtype=np.int64) if issues is None else issues.rows
    others = scored[~is_flagged][: int(is_flagged.sum()) + MORE_SAMPLES]
    wanted = np.concatenate([scored[is_flagged], with_issues, others])
    _, first = np.unique(wanted, return_index=True)
    wanted = wanted[np.sort(first)][:most]
    return found.order[np.isin(found.order, wanted)]


@dataclass(frozen=True, slots=True)
class PageIssues:
    """What `chgval detect-issues` found in a dataset.

    Attributes:
        texts: of every row; None where nothing was found.
        group_N: the first row of the copies that a row is one of; -1 for none.
        test_ids: of the sample of the test set that a row is a copy of, if it is.
        notes: what else is to be known of the dataset.
    """

    texts: Sequence[str | None]
    group_N: IntArray
    test_ids: Sequence[str | None]
    notes: Sequence[str]

    @property
    def rows(self) -> IntArray:
        """The rows in which something was found."""
        return np.array([row for row, text in enumerate(self.texts) if text is not None], dtype=np.int64)


def read_issues(path: str, report: Report) -> PageIssues:
    """Read what `chgval detect-issues` found in the dataset of a report.

    Raises:
        DataError: it cannot be read, or is about another dataset.
    """
    table, metadata = read_table(path, kind=ISSUES)
    same = table.num_rows == len(report) and all(
        table[name].to_pylist() == list(report[name]) for name in ("id", "label_name")
    )
    if not same:
        raise DataError(
            f"{report_name(path)}: is not about the rows of this report; run chgval detect-issues on it."
        )
    copy_of_N = pc.fill_null(table["copy_of"], -1).to_numpy().copy()
    firsts = np.unique(copy_of_N[copy_of_N >= 0])
    if len(firsts) and firsts.max() >= len(report):
        raise DataError(f"{report_name(path)}: row {firsts.max():,} is none of its rows.")
    copy_of_N[firsts] = firsts
    shares = metadata.get("goes_with_labels")
    notes = [
        f"How {name} images are goes with their labels ({share:.0%} of its variance lies between classes): a "
        "model may learn that instead."
        for name, share in (shares.items() if isinstance(shares, dict) else ())
        if isinstance(share, float)
    ]
    return PageIssues(table["issues"].to_pylist(), copy_of_N, table["test_id"].to_pylist(), notes)


def features_of_page(path: Path | None, report: Report, source: str) -> NDArray[np.floating] | None:
    """Return the features that the user named, or the run kept, if there are any.

    Args:
        path: of a file that the user named.
        report: the report.
        source: where it is.
    """
    if path is None:
        return features_of(report.metadata, source, len(report))
    from chgval.data.features import read_features

    features_ND, problems = read_features(path, len(report), report_name(source))
    features_ND[list(problems)] = np.nan
    return features_ND


def _with_neighbours(
    samples: Sequence[PageSample],
    report: Report,
    found: Assessment,
    source: Format | None,
    features_ND: NDArray[np.floating],
) -> tuple[list[PageSample], list[PageSample]]:
    """Return samples that know which of the neighbours, returned too, are surely of either class."""
    rows, label_N = np.array([sample.index for sample in samples], dtype=np.int64), report.integers("label")
    near = [
        nearest_sure(features_ND, label_N, found.score_N, rows, wanted_N[rows], NEIGHBOURS)
        for wanted_N in (label_N, report.integers("suggested_label"))
    ]
    shown = np.unique(np.concatenate([part[part >= 0] for part in near]))
    neighbours = _samples(report, found, source, shown, NEIGHBOUR_SIDE)
    placed = zip(samples, *(_places(part, shown) for part in near), strict=True)
    return [
        dataclasses.replace(sample, near_given=given, near_suggested=suggested)
        for sample, given, suggested in placed
    ], neighbours


def _with_issues(
    samples: Sequence[PageSample],
    neighbours: Sequence[PageSample],
    issues: PageIssues,
    report: Report,
    found: Assessment,
    source: Format | None,
) -> tuple[list[PageSample], list[PageSample]]:
    """Return samples that know what else was found in them, and the neighbours with the copies of them."""
    members: dict[int, list[int]] = {}
    for row in np.flatnonzero(issues.group_N >= 0).tolist():
        members.setdefault(int(issues.group_N[row]), []).append(row)
    copies = {
        sample.index: [
            row for row in members.get(int(issues.group_N[sample.index]), []) if row != sample.index
        ]
        for sample in samples
    }
    shown = np.unique([row for rows in copies.values() for row in rows[:NEIGHBOURS]]).astype(np.int64)
    place = {row: len(neighbours) + at for at, row in enumerate(shown.tolist())}
    return [
        dataclasses.replace(
            sample,
            issues=issues.texts[sample.index],
            test_id=issues.test_ids[sample.index],
            copies=[place[row] for row in copies[sample.index][:NEIGHBOURS]],
        )
        for sample in samples
    ], [*neighbours, *_samples(report, found, source, shown, NEIGHBOUR_SIDE)]


def _places(near_RK: IntArray, shown: IntArray) -> list[list[int]]:
    """Return where the neighbours of each sample are among all that are shown."""
    return [np.searchsorted(shown, near[near >= 0]).tolist() for near in near_RK]


def _samples(
    report: Report, found: Assessment, source: Format | None, rows: IntArray, side: int
) -> list[PageSample]:
    """Return rows as the page shows them, with pictures of at most that side."""
    from chgval.data.decode import UnreadableImageError, thumbnail

    numbers = rows.tolist()
    encoded = [None] * len(numbers) if source is None else source.pictures(numbers)
    suggested, sure = report.integers("suggested_label"), report.scores("suggested_probability")
    label, value, percentile = report.integers("label"), report.values, report.scores("percentile")
    ids = report["id"]
    samples = []
    for row, picture in zip(numbers, encoded, strict=True):
        small, is_small = None, False
        if picture is not None:
            with suppress(UnreadableImageError):  # the page has a place without a picture then
                small, is_small = thumbnail(picture, side, SMALL_SIDE)
        samples.append(
            PageSample(
                index=row,
                id=ids[row],
                given=int(label[row]),
                suggested=int(suggested[row]),
                score=float(found.score_N[row]),
                sure=float(sure[row]),
                value=float(value[row]),
                percentile=float(percentile[row]),
                is_flagged=bool(found.flagged_N[row]),
                picture=small,
                is_small=is_small,
            )
        )
    return samples


def _plots(page: Page) -> dict[str, Figure]:
    """Return the figures of a page."""
    figures = {
        "thresholds": threshold_plot(page.curve),
        "confusion": confusion_plot(page.confusion, page.class_names),
        "values": histogram_plot(page.histogram, page.class_names),
    }
    if page.epochs is not None:
        figures["epochs"] = epochs_plot(page.epochs, [sample.id for sample in page.samples])
    return figures


def _summary(report: Report, rate: NoiseRate, num_flagged: int) -> str:
    wrong = f"About {rate.rate:.1%} of the labels are wrong ({rate.low:.1%} to {rate.high:.1%})"
    if rate.is_unknown:
        wrong = "It is not known how many of the labels are wrong"
    return f"{wrong}; {num_flagged:,} are flagged. {len(report):,} samples: {count_statuses(report)}."


def _why_no_pictures(source: Format | None, report: Report) -> str:
    if source is None and report.dataset is None:
        return "the report does not say which dataset it is about; chgval report --dataset does."
    if source is None:
        return (
            "the dataset is not where it was valued, or is another by now; chgval report --dataset says "
            "where it is."
        )
    return "the dataset has none, or they cannot be read."


def _provenance(report: Report, name: str) -> list[tuple[str, str]]:
    metadata = report.metadata
    shown = {
        "dataset": name,
        "command": metadata.get("command"),
        "chgval": metadata.get("chgval_version", metadata.get("version")),
        "fingerprint": metadata.get("fingerprint"),
        "epochs": metadata.get("epochs"),
        **_settings_shown(metadata.get("settings", {})),
    }
    return [(what, str(text)) for what, text in shown.items() if text is not None]


def _settings_shown(settings: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Return the settings of a run by name, as train.epochs; not the statistics of embeddings, long lists."""
    shown: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            shown |= _settings_shown(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and len(value) > LONGEST_LIST):
            shown[f"{prefix}{name}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return shown


def _key(report: Report) -> str:
    """Return what tells reports apart: decisions about one are none about another."""
    names = "\n".join(map(str, report["id"])) + "\n".join(map(str, report["label_name"]))
    named = f"{report.metadata.get('fingerprint')}\n{names}"
    return hashlib.blake2b(named.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()

"""The figures of the review page, and of comparisons, as pictures for papers and slides: with matplotlib.

Numbers come from chgval.reports.figures; nothing is computed here.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chgval.errors import OutputError, SettingsError
from chgval.files import check_free, output_errors, replacing
from chgval.reports.figures import Confusion, EpochCurves, Histogram, ThresholdCurve
from chgval.types import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (6.4, 4.0)
PIXELS_PER_INCH = 150
# Classes of a figure whose names are still told apart; curves of single samples.
MOST_NAMES, MOST_SAMPLES = 10, 5
ENDINGS = (".png", ".svg")


def check_plots() -> None:
    """Raise SettingsError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "figures need the matplotlib library; install it with pip install 'chgval[plots]'."
        ) from error


def check_folder(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Raise OutputError where figures cannot be written; leave all as it is."""
    check_plots()
    with output_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder}: is a file; figures go to a folder.")
    if not folder.exists():
        check_free(folder, overwrite=False)
    for name in names:
        for ending in ENDINGS:
            if folder.exists():
                check_free(folder / f"{name}{ending}", overwrite=overwrite)


def save_plots(figures: Mapping[str, Figure], folder: Path) -> None:
    """Write each figure as PNG and SVG.

    Raises:
        OutputError: they cannot be written.
    """
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        for ending in ENDINGS:
            path = folder / f"{name}{ending}"
            with output_errors(path), replacing(path) as file:
                file.write(_drawn(figure, ending))


def as_svg(figure: Figure) -> str:
    """Return a figure as an element for a page."""
    text = _drawn(figure, ".svg").decode()
    return text[text.index("<svg") :]


def threshold_plot(curve: ThresholdCurve) -> Figure:
    """Draw how many samples a threshold flags, and how many of them are wrong by their scores."""
    figure, axes = _axes("flagged from this noise score on", "samples")
    axes.plot(curve.thresholds_T, curve.counts_T, "--", color="0.5", label="flagged")
    axes.plot(curve.thresholds_T, curve.sums_T, label="wrong among them")
    axes.set_ylim(0, max(1.0, min(curve.counts_T[0], 2 * curve.sums_T[0])) * 1.05)
    axes.legend()
    return figure


def confusion_plot(confusion: Confusion, class_names: Sequence[str]) -> Figure:
    """Draw the flagged samples by label and suggestion."""
    figure, axes = _axes("suggested", "label")
    names = [class_names[label] for label in confusion.labels]
    if names:
        image = axes.imshow(confusion.counts_KK, cmap="Blues")
        figure.colorbar(image, label="flagged samples")
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    return figure


def histogram_plot(histogram: Histogram, class_names: Sequence[str]) -> Figure:
    """Draw how often values are, of all samples and of the classes, if these are few."""
    figure, axes = _axes("value", "samples")
    axes.stairs(histogram.counts, histogram.edges, fill=True, color="0.85", label="all")
    if len(class_names) <= MOST_NAMES:
        for name, counts in zip(class_names, histogram.class_counts, strict=True):
            axes.stairs(counts, histogram.edges, label=_label(name))
    axes.legend(fontsize="small")
    return figure


def epochs_plot(curves: EpochCurves, ids: Sequence[str]) -> Figure:
    """Draw the values of the first samples by epoch, and between which 80 % of all lie."""
    figure, axes = _axes("epoch", "value")
    axes.fill_between(curves.numbers, curves.low, curves.high, color="0.85", label="80 % of all")
    axes.plot(curves.numbers, curves.middle, "--", color="0.5", label="median")
    for name, value_E in zip(ids[:MOST_SAMPLES], curves.values_EN.T, strict=False):
        axes.plot(curves.numbers, value_E, label=_label(name))
    axes.legend(fontsize="small")
    return figure


def learning_plot(curves: Mapping[str, tuple[FloatArray, FloatArray]], across: str) -> Figure:
    """Draw the accuracies of trainings.

    Args:
        curves: where each was tested, and its accuracy there, by the name of the training.
        across: what they are drawn over.
    """
    figure, axes = _axes(across, "test accuracy")
    for name, (at, accuracy) in curves.items():
        axes.plot(at, accuracy, label=_label(name))
    axes.legend(fontsize="small")
    return figure


def ranks_plot(first_N: FloatArray, second_N: FloatArray, names: tuple[str, str], what: str) -> Figure:
    """Draw how two reports rank the same rows: each axis goes from the lowest to the highest."""
    figure, axes = _axes(f"{what} in {names[0]}, percentile", f"in {names[1]}")
    bins = np.linspace(0, 100, 51)
    axes.hist2d(first_N, second_N, bins=[bins, bins], cmap="Blues")
    axes.set_aspect("equal")
    return figure


def _axes(across: str, up: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # without pyplot, which looks for a screen

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(across, parse_math=False)
    axes.set_ylabel(up, parse_math=False)
    return figure, axes


def _label(name: str) -> str:
    """Return a name that matplotlib shows as it is: dollars are mathematics to it, and _ hides a label."""
    return " " + name.replace("$", r"\$")


def _drawn(figure: Figure, ending: str) -> bytes:
    from matplotlib import rc_context

    file = io.BytesIO()
    # Text stays text, and the same figure is the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "chgval"}):
        metadata = {"Date": None} if ending == ".svg" else None
        figure.savefig(file, format=ending[1:], dpi=PIXELS_PER_INCH, metadata=metadata)
    return file.getvalue()

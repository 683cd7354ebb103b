"""The review page: one HTML file with all that it shows in it, which asks for nothing else.

The template, its style and its script lie in templates/. Everything that comes from data goes through
Jinja's escaping, or into a block of JSON of which the script makes text.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from chgval.reports.figures import Confusion, EpochCurves, Histogram, ThresholdCurve
from chgval.types import FloatArray

# Digits of numbers in the page.
DIGITS = 4
# Sides up to which a picture is shown in its pixels, not smoothed.
SMALL_SIDE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSample:
    """A sample on the page.

    Attributes:
        index, id: of its row.
        given, suggested: classes; -1 for none.
        score: noise score, and `sure` the probability of the suggestion; NaN for none.
        value, percentile: of it among all; NaN for none.
        is_flagged: whether its label is held to be wrong.
        picture: WebP; None if there is none.
        is_small: whether the picture is shown in its pixels.
        issues: what else was found in it, in words separated by commas; None for nothing.
        test_id: sample of a test set that it is a copy of.
        copies: places in `Page.neighbours` of its copies.
        near_given, near_suggested: places in `Page.neighbours` of the nearest samples that are surely of
            either class.
    """

    index: int
    id: str
    given: int
    suggested: int
    score: float
    sure: float
    value: float
    percentile: float
    is_flagged: bool
    picture: bytes | None
    is_small: bool
    issues: str | None = None
    test_id: str | None = None
    copies: Sequence[int] = ()
    near_given: Sequence[int] = ()
    near_suggested: Sequence[int] = ()

    def as_json(self) -> dict[str, Any]:
        """Return it as the script reads it."""
        return {
            "index": self.index,
            "id": self.id,
            "given": self.given,
            "suggested": self.suggested,
            "score": self.score if math.isfinite(self.score) else None,  # thresholds are exact
            "sure": _number(self.sure),
            "value": _number(self.value),
            "percentile": _number(self.percentile),
            "picture": None if self.picture is None else _data_uri(self.picture),
            "flagged": self.is_flagged,
            "small": self.is_small,
            "issues": self.issues,
            "test_id": self.test_id,
            "copies": list(self.copies),
            "near": [list(self.near_given), list(self.near_suggested)],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a review page shows.

    Attributes:
        title: name of the dataset.
        summary: sentences on the whole of it.
        notes: sentences to read before acting on it.
        provenance: names and texts on where it comes from.
        key: under which a browser keeps decisions.
        ids_are_unique: whether an id says which row is meant.
        decisions: name of the file that they are downloaded as.
        class_names: of all classes.
        samples: the most suspicious first.
        cut: place in the curve of the score from which on samples are flagged.
        curve, confusion, histogram: see chgval.reports.figures.
        extremes: class, lowest and highest samples of each class that is shown.
        epochs: values of `samples` by epoch, if they are known.
        neighbours: samples that are surely of their class, near to some of `samples`.
    """

    title: str
    summary: str
    notes: Sequence[str]
    provenance: Sequence[tuple[str, str]]
    key: str
    ids_are_unique: bool
    decisions: str
    class_names: Sequence[str]
    samples: Sequence[PageSample]
    cut: int
    curve: ThresholdCurve
    confusion: Confusion
    histogram: Histogram
    extremes: Sequence[tuple[int, Sequence[PageSample], Sequence[PageSample]]]
    epochs: EpochCurves | None
    neighbours: Sequence[PageSample]


def render(page: Page) -> str:
    """Return the page as HTML."""
    script = _own("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only what is compared with its hash may run.
    return _template("report.html").render(
        page=page,
        data=_data(page),
        style=_own("report.css"),
        script=script,
        script_hash=f"sha256-{digest}",
    )


def render_comparison(
    headings: Sequence[str],
    lines: Sequence[Sequence[str]],
    different: Sequence[Sequence[str]],
    figures: Mapping[str, str],
) -> str:
    """Return a page of things side by side.

    Args:
        headings: of the table.
        lines: of it.
        different: lines of the second table; empty leaves it out.
        figures: SVG by name; as images, so that nothing in them runs.
    """
    pictures = {
        name.replace(
            "-", " "
        ).capitalize(): f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
        for name, svg in figures.items()
    }
    return _template("comparison.html").render(
        headings=headings,
        lines=lines,
        different=different,
        figures=list(pictures.items()),
        style=_own("report.css"),
    )


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("chgval.reports"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(name)


def _own(name: str) -> Markup:
    """Return a style or script of the package, which needs no escaping."""
    return Markup((files("chgval.reports") / "templates" / name).read_text("utf-8"))  # noqa: S704


def _data(page: Page) -> dict[str, Any]:
    samples = [sample.as_json() for sample in page.samples]
    epochs = None
    if page.epochs is not None:
        curves = page.epochs
        epochs = {
            "numbers": curves.numbers,
            "low": _numbers(curves.low),
            "middle": _numbers(curves.middle),
            "high": _numbers(curves.high),
        }
        for sample, value_E in zip(samples, curves.values_EN.T, strict=True):
            sample["epochs"] = _numbers(value_E)
    return {
        "key": page.key,
        "ids_are_unique": page.ids_are_unique,
        "decisions": page.decisions,
        "classes": list(page.class_names),
        "samples": samples,
        "cut": page.cut,
        "curve": {
            "thresholds": page.curve.thresholds_T.tolist(),
            "counts": page.curve.counts_T.tolist(),
            "sums": _numbers(page.curve.sums_T),
        },
        "confusion": {
            "labels": page.confusion.labels,
            "counts": page.confusion.counts_KK.tolist(),
            "flagged": page.confusion.num_classes,
        },
        "histogram": {
            "low": _number(page.histogram.edges[0]),
            "high": _number(page.histogram.edges[-1]),
            "all": page.histogram.counts.tolist(),
            "classes": [counts.tolist() for counts in page.histogram.class_counts],
        },
        "extremes": [
            {
                "label": label,
                "lowest": [sample.as_json() for sample in lowest],
                "highest": [sample.as_json() for sample in highest],
            }
            for label, lowest, highest in page.extremes
        ],
        "epochs": epochs,
        "neighbours": [sample.as_json() for sample in page.neighbours],
    }


def _numbers(numbers: FloatArray) -> list[float | None]:
    return [_number(number) for number in np.asarray(numbers).tolist()]


def _number(number: float) -> float | None:
    """Return a number with the digits that a person reads; JSON has none for NaN."""
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


def _data_uri(picture: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}"

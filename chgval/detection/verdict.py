"""How far a run's verdict on labels can be trusted, in numbers for its report and in sentences for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chgval.detection.calibration import estimate_rate
from chgval.detection.settings import SETTINGS
from chgval.detection.signals import Annotations, NoiseSignals
from chgval.types import IntArray

SHOWN_CLASSES = 5


def verdict_of(
    noise: NoiseSignals,
    labels_N: IntArray,
    predicted_N: IntArray,
    class_names: Sequence[str],
    annotations: Annotations | None = None,
) -> dict[str, Any]:
    """Return what is kept of a verdict in a report's metadata, ready for JSON: how far it can be trusted.

    And how often each annotator is wrong, where there are several.

    Args:
        noise: what the run says of every label.
        labels_N: given classes, shape (N,); -1 where there are none.
        predicted_N: predicted classes, the same.
        class_names: of all classes.
        annotations: labels of several annotators, if there are any.
    """
    never = np.setdiff1d(labels_N[labels_N >= 0], predicted_N)
    known_N = np.isfinite(noise.noise_score_N)
    rate = None
    if known_N.any():
        found = estimate_rate(noise.noise_score_N[known_N], noise.noise_score_std_N[known_N])
        rate = dataclasses.asdict(found)
    return {
        "explained": noise.explained,
        "memorised": noise.memorised,
        "never_predicted": [class_names[label] for label in never],
        "rate": rate,
        "annotators": [] if annotations is None else _annotators(noise, annotations),
    }


def _annotators(noise: NoiseSignals, annotations: Annotations) -> list[dict[str, Any]]:
    scores_NA = np.full(annotations.labels_NA.shape, np.nan)
    if noise.consensus is not None:
        scores_NA = noise.consensus.scores_NA
    columns = {name: [place] for place, name in enumerate(annotations.names)}
    if not annotations.are_told_apart:  # a place in a list is nobody in particular
        columns = {"all together": list(range(len(annotations.names)))}
    told = []
    for name, places in columns.items():
        score = scores_NA[:, places]
        score = score[np.isfinite(score)]
        labels = int((annotations.labels_NA[:, places] >= 0).sum())
        told.append({"name": name, "labels": labels, "wrong": float(score.mean()) if len(score) else None})
    return told


def annotators_shown(verdict: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return share of wrong labels, number of labels and name of annotators, the worst first.

    The worst gave the most wrong labels beyond the mean share: a single label says little of anybody.

    Args:
        verdict: as `verdict_of` made it; empty where a report does not tell.
    """
    judged = [who for who in verdict.get("annotators", []) if who["wrong"] is not None]
    wrong, labels = sum(who["wrong"] * who["labels"] for who in judged), sum(who["labels"] for who in judged)
    judged.sort(key=lambda who: -who["labels"] * (who["wrong"] - wrong / max(1, labels)))
    return [(f"{who['wrong']:.1%}", f"{who['labels']:,}", who["name"]) for who in judged]


def notes_on(verdict: Mapping[str, Any]) -> list[str]:
    """Return the sentences that a person should read before acting on flags; none if all is well.

    Args:
        verdict: as `verdict_of` made it; empty where a report does not tell, as a CSV file.
    """
    if not verdict:
        return []
    if verdict["explained"] < SETTINGS.least_explained:
        return [
            "nothing can be said about these labels: the model tells the classes apart hardly better than "
            "chance. Train longer (--epochs), on larger images (--image-size), or value embeddings."
        ]
    notes = []
    if verdict["memorised"] > SETTINGS.most_memorised:
        notes.append(
            "the network has learned many labels by heart, so wrong ones are harder to tell. Train with "
            "augmentation (--augment crop-flip), for fewer epochs, or value embeddings."
        )
    rate = verdict.get("rate")
    if rate is not None and rate["high"] - rate["low"] >= SETTINGS.widest_rate:
        notes.append(
            f"anything from {rate['low']:.0%} to {rate['high']:.0%} of the labels may be wrong, so flags may "
            "end too early or too late: go by the order. Train longer (--epochs), on larger images "
            "(--image-size), or value embeddings, for a surer estimate."
        )
    never = verdict["never_predicted"]
    if never:
        more = f" and {len(never) - SHOWN_CLASSES:,} more" if len(never) > SHOWN_CLASSES else ""
        notes.append(
            f"never predicted: {', '.join(never[:SHOWN_CLASSES])}{more}. Their labels cannot be judged; they "
            "may have too few samples, or need more epochs."
        )
    return notes

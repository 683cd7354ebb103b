"""What is decided about the labels of a values report: scores, flags, and the order to look in.

Shape legend: N rows, K rows that have a score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chgval.config import DetectConfig
from chgval.detection.calibration import calibrated_by, estimate_rate
from chgval.detection.rules import REGISTRY as RULES
from chgval.detection.rules import Judged
from chgval.detection.signals import NoiseRate
from chgval.errors import DataError
from chgval.reports.files import report_name
from chgval.reports.report import Report
from chgval.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Assessment:
    """What was decided about every row of a report.

    Attributes:
        score_N: noise scores; NaN where a row has none.
        flagged_N: which rows are flagged.
        order: the rows that are asked for and all that are more suspicious, the most suspicious first; rows
            without a score last.
        rate: estimated share of wrong labels.
    """

    score_N: FloatArray
    flagged_N: NDArray[np.bool_]
    order: IntArray
    rate: NoiseRate

    @property
    def cut(self) -> float | None:
        """The lowest flagged score, from which on all are flagged; None where flags follow no such cut."""
        flagged = self.score_N[self.flagged_N]
        lowest = float(flagged.min(initial=np.inf))
        return lowest if len(flagged) and int((self.score_N >= lowest).sum()) == len(flagged) else None


def can_be_assessed(report: Report) -> bool:
    """Say whether a report has a noise score."""
    return bool((np.isfinite(report.noise_scores) & np.isfinite(report.values)).any())


def assess(
    report: Report, config: DetectConfig, below_threshold_N: NDArray[np.bool_] | None = None
) -> Assessment:
    """Score the rows of a values report, rank them and cut.

    Args:
        report: COLUMNS of a values report.
        config: the score and what decides on flags.
        below_threshold_N: which margins are below those of threshold samples, if these were trained.
    Raises:
        DataError: no row has a score.
    """
    score_N, value_N = report.noise_scores, report.values
    known = np.flatnonzero(np.isfinite(score_N) & np.isfinite(value_N))
    if not len(known):
        raise DataError(f"{report_name(config.source)}: no row has a noise score; nothing was valued in it.")
    if config.score == "chg":
        score_N[known] = calibrated_by(value_N[known], score_N[known])
    rate = estimate_rate(score_N[known], report.scores("noise_score_std")[known])
    flagged_N = np.zeros(len(score_N), dtype=bool)
    if config.expected_noise is None:
        rule = config.rule
        if isinstance(rule, float):
            flagged_N[known] = score_N[known] >= rule
        else:
            judged = Judged(
                score_K=score_N[known],
                value_K=value_N[known],
                loss_K=report.scores("loss_mean")[known],
                label_K=report.integers("label")[known],
                confident_label_K=report.integers("confident_label")[known],
                below_threshold_K=None if below_threshold_N is None else below_threshold_N[known],
            )
            flagged_N[known] = RULES[rule].flag(judged)
    if config.all_rows or config.duplicates or config.expected_noise is not None:
        ranked = np.arange(len(score_N))
    else:  # sorting a million rows takes longer than all else that is done with them
        ranked = np.flatnonzero(score_N >= score_N[flagged_N].min(initial=np.inf))
    # Samples of one score, as those have that nothing can be said about, are ordered by their value.
    ties_N = np.where(np.isfinite(score_N), value_N, 0)[ranked]
    order = ranked[np.lexsort((ties_N, -score_N[ranked]))]
    if config.expected_noise is not None:
        flagged_N[order[: round(config.expected_noise * len(known))]] = True
    return Assessment(score_N, flagged_N, order, rate)

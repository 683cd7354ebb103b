"""The functions behind the commands: the same settings, results instead of files and text.

Every option of a command is a keyword of its function: `--batch-size 64` is `batch_size=64`. A file is
written only where a path for it is given. Messages go to the logger "chgval". Ctrl-C raises
KeyboardInterrupt; a run with an output keeps its state first, and resume=True resumes it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from chgval.config import (
    ApplyConfig,
    CompareConfig,
    DetectConfig,
    EmbedConfig,
    IssuesConfig,
    MergeConfig,
    ReportConfig,
    SelectConfig,
    TrainingConfig,
    ValueConfig,
)
from chgval.errors import SettingsError
from chgval.interruption import Interrupted
from chgval.settings import build, check_known, keywords_of

if TYPE_CHECKING:
    from chgval.reports.report import Report
    from chgval.runs.apply import Applied
    from chgval.runs.compare import Comparison
    from chgval.runs.detect_noise import Suspects
    from chgval.runs.embedding import Embedded
    from chgval.runs.issues import Issues
    from chgval.runs.report import Written
    from chgval.runs.select import Selection
    from chgval.runs.train import Trained

ConfigT = TypeVar("ConfigT")
ResultT = TypeVar("ResultT")


def value(data: str | Path, *, output: str | Path | None = None, **settings: Any) -> Report:
    """Train once on a dataset and return what every sample is worth.

        >>> report = value("builtin:digits", epochs=1)
        >>> len(report), report["status"][0]
        (1797, 'valued')

    Args:
        data: folder of class folders; Parquet file, glob, folder or URI; or builtin:digits.
        output: file of the report; None writes none, and an interrupted run cannot be resumed.
        settings: options of `chgval value`, such as epochs=20.
    Raises:
        ChgvalError: a setting, the data or the output are not as they should be.
    """
    from chgval.runs.value import run_value

    return _run(run_value, _config(ValueConfig, data, output, settings))


def detect_noise(data: str | Path, *, output: str | Path | None = None, **settings: Any) -> Suspects:
    """Return the samples whose label is probably wrong, worst first.

    Args:
        data: a values report, or a dataset, which is valued first.
        output: file of the suspects; None writes none.
        settings: options of `chgval detect-noise`, such as threshold=0.9.
    Raises:
        ChgvalError: a setting, the data or an output are not as they should be.
    """
    from chgval.runs.detect_noise import run_detect_noise

    return _run(run_detect_noise, _config(DetectConfig, data, output, settings))


def embed(data: str | Path, *, output: str | Path, **settings: Any) -> Embedded:
    """Write what a pretrained network makes of images, for `value(..., features_column="embedding")`.

    Args:
        data: as for `value`.
        output: file of the embeddings: Parquet, JSON lines or Arrow.
        settings: options of `chgval embed`, such as arch="resnet50", weights="DEFAULT".
    Raises:
        ChgvalError: the data or the weights cannot be read, or the output is in the way.
    """
    from chgval.runs.embedding import run_embed

    return _run(run_embed, _config(EmbedConfig, data, output, settings))


def detect_issues(values: str | Path, *, output: str | Path | None = None, **settings: Any) -> Issues:
    """Return outliers, copies, and samples that are also in a test set.

    Args:
        values: a values report; with `write_features`, for outliers.
        output: file of the table; None writes none.
        settings: options of `chgval detect-issues`, such as against="test/".
    Raises:
        ChgvalError: the report or a dataset cannot be read, do not fit each other, or the output is in the
            way.
    """
    from chgval.runs.issues import run_detect_issues

    return _run(run_detect_issues, _config(IssuesConfig, values, output, settings))


def select(data: str | Path, *, output: str | Path | None = None, **settings: Any) -> Selection:
    """Return the part of a dataset that is worth most.

    Args:
        data: a values report, or a dataset, which is valued first.
        output: file of the manifest; None writes none.
        settings: options of `chgval select`, such as fraction=0.3.
    Raises:
        ChgvalError: a setting, the data or an output are not as they should be.
    """
    from chgval.runs.select import run_select

    return _run(run_select, _config(SelectConfig, data, output, settings))


def train(data: str | Path, *, output: str | Path, **settings: Any) -> Trained:
    """Train a model, on everything or on what is worth it, and keep it in a folder.

    Args:
        data: as for `value`.
        output: folder for the model, its settings and metrics.
        settings: options of `chgval train`, such as fraction=0.3, holdout=0.1.
    Raises:
        ChgvalError: a setting, the data or the folder are not as they should be.
    """
    from chgval.runs.train import run_train

    return _run(run_train, _config(TrainingConfig, data, output, settings))


def report(values: str | Path, *, output: str | Path | None = None, **settings: Any) -> Written:
    """Write a page to look at the most suspicious samples, and decide.

    Args:
        values: a values report.
        output: HTML file; None names it after the report.
        settings: options of `chgval report`, such as dataset="photos/".
    Raises:
        ChgvalError: the report cannot be read, the dataset is another, or the output is in the way.
    """
    from chgval.runs.report import run_report

    return _run(run_report, _config(ReportConfig, values, output, settings))


def merge(reports: Sequence[str | Path], *, output: str | Path | None = None, **settings: Any) -> Report:
    """Return what several runs on the same rows say together; see `chgval merge`.

    Args:
        reports: files of two or more values reports.
        output: file of the merged report; None writes none.
        settings: options of `chgval merge`, such as overwrite=True.
    Raises:
        ChgvalError: a report cannot be read, is about other rows, or the output is in the way.
    """
    from chgval.runs.merge import run_merge

    return _run(run_merge, _config(MergeConfig, [str(path) for path in reports], output, settings))


def compare(
    sources: Sequence[str | Path], *, output: str | Path | None = None, **settings: Any
) -> Comparison:
    """Return trainings side by side, or how differently two reports rank the same rows.

    Args:
        sources: folders of trainings, or two values reports.
        output: page to write; None writes none.
        settings: options of `chgval compare`, such as plots="figures/".
    Raises:
        ChgvalError: something is neither, or the reports are about other rows, or an output is in the way.
    """
    from chgval.runs.compare import run_compare

    return _run(run_compare, _config(CompareConfig, [str(path) for path in sources], output, settings))


def apply(
    decisions: str | Path, dataset: str | Path, *, output: str | Path | None = None, **settings: Any
) -> Applied:
    """Write a dataset as people decided: rows to drop left out, others under their new label.

    Args:
        decisions: table with the columns id, label_name, decision and new_label_name.
        dataset: as for `value`.
        output: folder or file of the corrected dataset; None names it after the dataset.
        settings: options of `chgval apply`, such as labels_only=True.
    Raises:
        ChgvalError: decisions and dataset do not fit each other, or an output is in the way.
    """
    from chgval.runs.apply import run_apply

    return _run(run_apply, _config(ApplyConfig, decisions, output, {"dataset": str(dataset), **settings}))


def _run(run: Callable[[ConfigT], ResultT], config: ConfigT) -> ResultT:
    """Run a command; Ctrl-C is what it always is in Python, with what became of the work as its message."""
    try:
        return run(config)
    except Interrupted as interruption:
        if interruption.signum == signal.SIGINT:
            raise KeyboardInterrupt(str(interruption)) from interruption
        raise


def _config(
    config_class: type[ConfigT],
    data: str | Path | list[str],
    output: str | Path | None,
    given: dict[str, Any],
) -> ConfigT:
    """Make settings from keywords, which are called as the options are."""
    paths = keywords_of(config_class)
    check_known(given, paths)
    about_output = [name for name, path in paths.items() if path[0] == "output" and name in given]
    if output is None and about_output:
        raise SettingsError(f"{about_output[0]}: is about the output; pass output= too.")
    given = {**given, "data": data if isinstance(data, list) else str(data)}
    if output is not None:
        given["output"] = str(output)
    values = {paths[name]: value for name, value in given.items()}
    return build(config_class, values, without=() if output is not None else ("output",))

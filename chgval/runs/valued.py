"""What detection and selection start from: a values report, or a dataset that is valued now."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chgval import progress
from chgval.config import STANDARD_STREAM, DataConfig, DetectConfig, SelectConfig
from chgval.errors import OutputError, SettingsError
from chgval.files import check_apart, check_file, locked
from chgval.reports.files import check_output, in_input_order, is_report, read_table, report_name
from chgval.reports.report import Report

if TYPE_CHECKING:  # these import torch, which reports do without
    from chgval.data.dataset import Dataset
    from chgval.data.formats import Format
    from chgval.runs.unfinished import Unfinished
    from chgval.runs.value import Valued


@dataclass(frozen=True, slots=True)
class Input:
    """Values of a dataset, wherever they came from.

    Attributes:
        report: its columns that were asked for.
        values: file of the report; None if it is in none.
        source: the dataset that it is about; None unless it will be written anew.
        valued: the run behind it, and its unfinished state, if it was valued now.
    """

    report: Report
    values: str | None
    source: Format | None
    valued: tuple[Valued, Unfinished] | None = None


@contextmanager
def values_of(
    command: str,
    config: DetectConfig | SelectConfig,
    columns: Sequence[str],
    *,
    in_order: bool,
    on_dataset: Callable[[Dataset], None] = lambda _: None,
    needs_training: bool = False,
) -> Iterator[Input]:
    """Read the report that the user named, or value the dataset; what is written meanwhile is locked.

    All that can be wrong with outputs is told before anything is read.

    Args:
        command: its name.
        config: its settings.
        columns: of the report.
        in_order: whether rows must be all there, and are then in the order of the input.
        on_dataset: is given the dataset before it is valued, to check it.
        needs_training: whether a report that is there already is not enough.
    Raises:
        ChgvalError: the input is neither, or an output is in the way.
    """
    if is_report(config.source):
        if config.values is not None:
            raise SettingsError(
                f"--values: is for a dataset; {report_name(config.source)} is a report itself."
            )
        config.check_report_is_enough(f"{report_name(config.source)} is a report, and nothing is trained")
        with locked(*config.outputs, config.state_file):
            yield _read(config, columns, in_order=in_order)
    elif config.reads_values and not needs_training:
        with locked(*config.outputs, config.state_file):
            yield _read_values(config, columns)
    else:
        with _value(command, config, columns, on_dataset) as given:
            yield given


def _read(config: DetectConfig | SelectConfig, columns: Sequence[str], *, in_order: bool) -> Input:
    _check_outputs(config)
    table, metadata = read_table(config.source, columns)
    source = None
    if in_order or config.target is not None:
        table = in_input_order(table, config.source)
    if config.target is not None:
        from chgval.runs.rewriting import dataset_behind  # imports torch

        source = dataset_behind(
            config.source,
            table,
            metadata,
            config.target,
            dataset=config.dataset,
            overwrite=config.overwrites,
            link=config.link or "copy",
        )
    return Input(Report(table, metadata), None if config.source == STANDARD_STREAM else config.source, source)


def _read_values(config: DetectConfig | SelectConfig, columns: Sequence[str]) -> Input:
    """Read the report that is kept of a dataset, once it is known to be of that dataset, as it is now."""
    values = str(config.values)
    if not is_report(values):
        raise OutputError(
            f"{values}: is there, and is no values report; pass --overwrite, or another name as --values."
        )
    data = dataclasses.replace(config, data=DataConfig())  # columns are those of the dataset
    data.check_report_is_enough(f"{values} is there and is read")
    _check_outputs(config, values)
    table, metadata = read_table(values, columns)
    table = in_input_order(table, values)
    from chgval.runs.rewriting import dataset_of_values  # imports torch

    progress.say(f"note: reading the values report {values}; --overwrite values the dataset anew")
    return Input(Report(table, metadata), values, dataset_of_values(config, table, metadata))


def _check_outputs(config: DetectConfig | SelectConfig, *also_read: str) -> None:
    """Raise OutputError where something cannot be written, if nothing is trained."""
    if config.target is not None:
        check_apart(config.target, config.files)
    for output in config.tables:
        check_output(output, *config.inputs, *also_read)
    for path in config.also_written:
        check_file(path, overwrite=config.overwrites)


@contextmanager
def _value(
    command: str,
    config: DetectConfig | SelectConfig,
    columns: Sequence[str],
    on_dataset: Callable[[Dataset], None],
) -> Iterator[Input]:
    # These import torch, which reports do without.
    from chgval.data.formats import format_of
    from chgval.data.open import check_not_read, check_rewritable
    from chgval.runs.session import read_dataset
    from chgval.runs.unfinished import unfinished_run
    from chgval.runs.value import check_outputs, value_dataset

    if config.dataset is not None:
        raise SettingsError(f"--dataset: is for a report; {config.source} is a dataset itself.")
    if config.values is not None and not Path(config.values).exists():
        progress.say(f"note: {config.values} is not there; {config.source} is valued now, and it is written")
    value = config.value
    with unfinished_run(command, config) as unfinished:
        source = format_of(value.data)
        if config.target is not None:
            check_apart(config.target, config.files)
            check_rewritable(
                source,
                config.target,
                overwrite=unfinished.overwrites,
                link=config.link or "copy",
                may_be_there=unfinished.may_have_written(config.target),
            )
        for table in config.tables:
            check_output(unfinished.replaceable(table), *config.inputs)
            check_not_read(source, table)
        for path in config.also_written:
            if not unfinished.is_own(path):
                check_file(path, overwrite=config.overwrites)
        kept = None if value.output is None else unfinished.replaceable(value.output)
        check_outputs(value, source, kept, unfinished)
        dataset = read_dataset(source, value.train)
        on_dataset(dataset)
        valued = value_dataset(value, dataset, kept, unfinished)
        report = Report(valued.report.table.select(columns), valued.report.metadata)
        is_file = kept is not None and not kept.to_stdout
        yield Input(report, kept.path if kept is not None and is_file else None, source, (valued, unfinished))

import csv
import dataclasses
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from chgval.config import OutputConfig
from chgval.detection.signals import NoiseSignals
from chgval.errors import DataError, OutputError, SettingsError
from chgval.files import METADATA_KEY
from chgval.reports.files import ReportWriter, read_table, with_metadata, write_names, write_table
from chgval.reports.tables import VALUES_SCHEMA, InputRows, values_table
from chgval.valuation.signals import SIGNAL_NAMES, EpochSignals, RunSignals

NAN = float("nan")


def rows_and_signals():
    """Five rows: three valued, two of them the same, one unlabelled, one unreadable."""
    rows = InputRows(
        ids=["a", 'b,"c"', "c", "=d", "e"],
        labels_N=np.array([0, 1, -1, 1, 0]),
        class_names=["x", "y"],
        statuses=["valued", "valued", "unlabelled", "unreadable", "valued"],
        reasons=[None, None, None, "empty file", None],
    )
    floats = np.array([0.5, -1.0, NAN, NAN, 0.5])
    signals = RunSignals(
        num_epochs_N=np.array([3, 3, 0, 0, 3]), value_N=floats, value_std_N=floats, value_stderr_N=floats,
        means=dict.fromkeys(SIGNAL_NAMES, floats),
        forgetting_events_N=np.array([0, 2, 0, 0, 1]), predicted_label_N=np.array([0, 0, -1, -1, 1]),
        predicted_probability_N=floats,
    )  # fmt: skip
    noise = NoiseSignals(
        noise_score_N=np.array([0.9, 0.25, NAN, NAN, 0.0]), noise_score_std_N=floats,
        suggested_label_N=np.array([1, 0, -1, -1, 1]), suggested_probability_N=floats,
        confident_label_N=np.array([1, -1, -1, -1, 0]),
    )  # fmt: skip
    return rows, signals, noise


def report():
    return values_table(*rows_and_signals())


def epoch_signals(epoch):
    floats = np.array([0.25, NAN])
    return EpochSignals(
        value_N=floats * epoch,
        signals=dict.fromkeys(SIGNAL_NAMES, floats),
        predicted_label_N=np.array([1, -1]),
    )


def test_every_row_is_there_with_nulls_where_nothing_is_known():
    rows = report().to_pylist()
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["status"] for row in rows] == ["valued", "valued", "unlabelled", "unreadable", "valued"]
    assert [row["rank"] for row in rows] == [1, 3, None, None, 2]  # equal values by index
    assert [row["percentile"] for row in rows] == [100.0, 0.0, None, None, 50.0]
    assert [row["label_name"] for row in rows] == ["x", "y", None, "y", "x"]
    assert [row["predicted_name"] for row in rows] == ["x", "x", None, None, "y"]
    assert [row["forgetting_events"] for row in rows] == [0, 2, None, None, 1]
    assert rows[3]["reason"] == "empty file" and rows[3]["value"] is None and rows[2]["label"] == -1


@pytest.mark.parametrize("name", ["values.parquet", "values.arrow", "values.jsonl", "values.csv"])
def test_a_report_read_back_is_what_was_written(tmp_path, name):
    table = report()
    ReportWriter(OutputConfig(path=str(tmp_path / name))).write(table, {"seed": 7, "class_names": ["é"]})
    path = tmp_path / name
    assert {p.name for p in tmp_path.iterdir()} == {name}
    if name.endswith("parquet"):
        read = pq.read_table(path)
    elif name.endswith("arrow"):
        read = pa.ipc.open_file(path).read_all()
    elif name.endswith("jsonl"):
        assert [json.loads(line) for line in path.read_text().splitlines()] == table.to_pylist()
        return
    else:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        # What a spreadsheet would run begins with an apostrophe.
        assert [row["id"] for row in rows] == ["a", 'b,"c"', "c", "'=d", "e"]
        assert read_table(str(path), ["id"])[0]["id"].to_pylist() == table["id"].to_pylist()
        assert [row["value"] for row in rows] == ["0.5", "-1", "", "", "0.5"]
        return
    assert read.equals(table)
    metadata = json.loads(read.schema.metadata[METADATA_KEY])
    assert metadata == {"report_version": 3, "seed": 7, "class_names": ["é"]}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_report_that_pandas_has_read_and_written_means_the_same(tmp_path, ending):
    """Integers beside nulls are written as 5.0; a class may be called as pandas calls what is missing."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    rows, signals, noise = rows_and_signals()
    rows = dataclasses.replace(rows, class_names=["NA", "null"])
    table = values_table(rows, signals, noise, per_class=False)
    ours, theirs = tmp_path / f"ours.{ending}", tmp_path / f"theirs.{ending}"
    write_table(OutputConfig(path=str(ours)), table)
    if ending == "csv":
        frame = pandas.read_csv(ours, keep_default_na=False, na_values=[""])
        assert str(frame["confident_label"].dtype) == "float64"
        frame.to_csv(theirs, index=False)
    else:
        pandas.read_json(ours, lines=True).to_json(theirs, orient="records", lines=True)
    again, _ = read_table(str(theirs))
    expected, _ = read_table(str(ours))
    for name in ("index", "id", "label", "label_name", "status", "confident_label", "forgetting_events"):
        assert again[name].to_pylist() == expected[name].to_pylist(), name
    np.testing.assert_allclose(again["value"].to_numpy(), expected["value"].to_numpy(), atol=1e-9)


def test_listings_are_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("latin-1"))
    write_names(OutputConfig(path=str(tmp_path / "names.csv")), ["犬/6.png", "caf\udce9.png"], "\n")
    assert (tmp_path / "names.csv").read_bytes() == "犬/6.png\n".encode() + b"caf\xe9.png\n"


def test_epochs_can_be_read_while_the_run_continues(tmp_path):
    writer = ReportWriter(OutputConfig(path=str(tmp_path / "v.parquet")))
    for epoch in (1, 2):
        writer.write_epoch(epoch, epoch_signals(epoch), {"seed": 0})
        parts = pads.dataset(tmp_path / "v.epochs", partitioning="hive").to_table().to_pylist()
        assert [(row["epoch"], row["index"], row["value"]) for row in parts] == [
            (e, i, v) for e in range(1, epoch + 1) for i, v in ((0, 0.25 * e), (1, None))
        ]
    assert parts[0]["predicted_label"] == 1 and parts[1]["predicted_label"] is None


def test_an_output_in_the_way_is_not_replaced_unless_asked(tmp_path):
    path = tmp_path / "v.parquet"
    first = ReportWriter(OutputConfig(path=str(path)))
    first.write_epoch(1, epoch_signals(1), {})
    with pytest.raises(OutputError, match=r"v\.epochs: exists already; pass --overwrite"):
        ReportWriter.check(OutputConfig(path=str(path)))
    ReportWriter.check(OutputConfig(path=str(path)), resumes=True)
    first.write(report(), {})
    with pytest.raises(OutputError, match=r"v\.parquet: exists already"):
        ReportWriter.check(OutputConfig(path=str(path)))
    (tmp_path / "v.epochs/mine.txt").write_text("kept")
    ReportWriter(OutputConfig(path=str(path), overwrite=True))
    assert [p.name for p in (tmp_path / "v.epochs").iterdir()] == ["mine.txt"]
    assert path.exists()  # until there is a new one


def test_a_failed_write_leaves_the_old_report_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "v.parquet"
    path.write_text("old")
    writer = ReportWriter(OutputConfig(path=str(path), overwrite=True))

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OutputError, match=r"v\.parquet: cannot be written \(No space left on device\)"):
        writer.write(report(), {})
    assert path.read_text() == "old" and not list(tmp_path.glob(".*"))


def test_outputs_that_cannot_be_written_are_found_at_once(tmp_path):
    with pytest.raises(OutputError, match=r"there is no folder .*absent; create it first"):
        ReportWriter.check(OutputConfig(path=str(tmp_path / "absent/v.parquet")))
    with pytest.raises(OutputError, match="is a folder"):
        (tmp_path / "folder.csv").mkdir()
        ReportWriter.check(OutputConfig(path=str(tmp_path / "folder.csv")))
    with pytest.raises(OutputError, match=r"v\.parquet: cannot be written"):
        ReportWriter.check(OutputConfig(path="/proc/v.parquet"))
    with pytest.raises(
        SettingsError, match=r"report\.xlsx: the ending says no format; end it in one of \.parquet"
    ):
        OutputConfig(path="report.xlsx")
    assert OutputConfig(path="report.xlsx", format="csv").resolved_format == "csv"
    assert OutputConfig(path="-").resolved_format == "parquet"


def test_many_names_of_several_lines_come_back_from_csv(tmp_path):
    """More than a block of them: readers split a file where a line ends, unless they are told."""
    names = [f"a\nb,{'x' * 40}\n{number}" for number in range(60_000)]
    count = len(names)
    table = pa.table(
        {"index": range(count), "id": names, "label": [0] * count},
        schema=pa.schema([VALUES_SCHEMA.field(name) for name in ("index", "id", "label")]),
    )
    write_table(OutputConfig(path=str(tmp_path / "v.csv")), table)
    read, _ = read_table(str(tmp_path / "v.csv"), ("index", "id", "label"))
    assert read.equals(table)


@pytest.mark.parametrize(
    "metadata",
    [
        {"settings": [1]},
        {"settings": {"data": "x"}},
        {"settings": {"tracker": 4}},
        {"class_names": 5},
        {"verdict": [1]},
        {"verdict": {"explained": 1.0, "annotators": 3}},
        {"epochs": "x"},
    ],
)
def test_metadata_of_other_types_are_named(tmp_path, metadata):
    table = pa.table({field.name: pa.nulls(0, field.type) for field in VALUES_SCHEMA})
    pq.write_table(with_metadata(table, metadata), tmp_path / "v.parquet")
    with pytest.raises(DataError, match="what it says of its run is not in the form that chgval writes"):
        read_table(str(tmp_path / "v.parquet"))

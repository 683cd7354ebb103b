"""Labels of several annotators, from the columns of a dataset to those of a report."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from tests.commands import invoke

RATES = {"ann": 0.05, "bob": 0.2, "cy": 0.4}
NAMES = [*"abcdefghij"]
COLUMNS = [part for name in RATES for part in ("--label-column", name)]
FAST = ["--features-column", "pixels", "--epochs", 5, "--seed", 0]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """Digits that three annotators labelled, with the truth; who gives lists gives a tenth of them less."""
    rng = np.random.default_rng(0)
    digits = load_digits()
    true_N = digits.target
    columns = {}
    for name, rate in RATES.items():
        given_N = np.where(
            rng.random(len(true_N)) < rate, (true_N + rng.integers(1, 10, len(true_N))) % 10, true_N
        )
        columns[name] = [NAMES[label] for label in given_N]
    columns["bob"][0] = columns["cy"][0] = columns["ann"][1] = None
    columns["ann"][2] = columns["bob"][2] = columns["cy"][2] = None
    lists = [[label for label in row if label] for row in zip(*columns.values(), strict=True)]
    table = pa.table({"pixels": list(digits.data.astype(np.float32)), **columns, "lists": lists})
    path = tmp_path_factory.mktemp("crowd") / "digits.parquet"
    pq.write_table(table, path)
    return path, np.array(NAMES)[true_N], columns


@pytest.fixture(scope="module")
def valued(crowd, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "v.parquet"
    result = invoke("value", crowd[0], *COLUMNS, *FAST, "-o", out)
    assert result.exit_code == 0, result.stderr
    return out, result.stderr


def test_a_report_tells_the_consensus_and_the_score_of_each_label(crowd, valued):
    _, true_N, columns = crowd
    report, said = valued
    table = pq.read_table(report)
    assert table.num_rows == len(true_N)
    consensus_N = table["consensus_name"].to_numpy(zero_copy_only=False)
    majority_N = table["label_name"].to_numpy(zero_copy_only=False)
    assert (consensus_N == true_N).mean() > 0.99 > (majority_N == true_N).mean() + 0.02
    probability_N = table["consensus_probability"].to_numpy()
    assert np.nanmean(probability_N) == pytest.approx((consensus_N == true_N).mean(), abs=0.02)
    for name, rate in RATES.items():
        assert table[f"label_name_of_{name}"].to_pylist() == columns[name]
        score_N = table[f"noise_score_of_{name}"].to_numpy()
        assert np.nanmean(score_N) == pytest.approx(rate, abs=0.03)
        np.testing.assert_array_equal(np.isnan(score_N), [label is None for label in columns[name]])
    # Nobody labelled row 2.
    assert table["status"][2].as_py() == "unlabelled" and table["consensus_name"][2].as_py() is None
    # The worst annotator is named first.
    told = said.partition("Annotators")[2].splitlines()[2:5]
    assert [line.split()[1:] for line in told] == [["1,795", "cy"], ["1,795", "bob"], ["1,795", "ann"]]
    assert "note: labels of 3 annotators (ann, bob, cy); training on the majority" in said
    metadata = json.loads(pq.read_schema(report).metadata[b"chgval"])
    assert metadata["settings"]["data"]["label_columns"] == list(RATES)


def test_issues_are_applied_to_the_columns_that_they_are_about(crowd, valued, tmp_path):
    issues = tmp_path / "i.parquet"
    result = invoke("detect-issues", valued[0], "-o", issues)
    assert result.exit_code == 0, result.stderr
    decided = pq.read_table(issues)
    drops = [None] * decided.num_rows
    drops[5] = "drop"
    place = decided.schema.get_field_index("decision")
    pq.write_table(decided.set_column(place, "decision", pa.array(drops, pa.string())), issues)
    before = pq.read_table(crowd[0])
    for name, piped in ((issues, None), ("-", issues.read_bytes())):
        new = tmp_path / f"{piped is None}.parquet"
        result = invoke("apply", name, "--dataset", crowd[0], "-o", new, input=piped)
        assert result.exit_code == 0, result.stderr
        assert pq.read_table(new).equals(pa.concat_tables([before.slice(0, 5), before.slice(6)]))


def test_lists_of_labels_are_annotators_who_are_not_told_apart(crowd, tmp_path):
    path, true_N, _ = crowd
    out = tmp_path / "v.csv"
    result = invoke("value", path, "--label-column", "lists", *FAST, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "labels of up to 3 annotators a row (lists)" in result.stderr
    table = pacsv.read_csv(out)
    assert (table["consensus_name"].to_numpy(zero_copy_only=False) == true_N).mean() > 0.95
    assert {f"label_name_of_lists_{n}" for n in (1, 2, 3)} < set(table.column_names)
    told = result.stderr.partition("Annotators")[2].splitlines()[2]
    assert told.split()[1:] == ["5,385", "all", "together"]


def test_suspects_of_such_a_report_are_rows_whose_majority_is_wrong(crowd, valued, tmp_path):
    path, true_N, _ = crowd
    suspects, cleaned = tmp_path / "s.parquet", tmp_path / "clean.parquet"
    result = invoke("detect-noise", valued[0], "--cleaned", cleaned, "-o", suspects)
    assert result.exit_code == 0 and "Annotators" in result.stderr, result.stderr
    rows = pq.read_table(suspects)["index"].to_numpy()
    wrong = pq.read_table(valued[0])["label_name"].to_numpy(zero_copy_only=False) != true_N
    assert wrong[rows].mean() > 0.8 and len(rows) > 0.8 * wrong.sum() > 0
    kept = np.setdiff1d(np.arange(len(true_N)), rows)
    assert pq.read_table(cleaned).equals(pq.read_table(path).take(kept))
    relabel = ["--relabel", 0.5, "--cleaned", tmp_path / "other.parquet", "-o", tmp_path / "t.parquet"]
    for source in ([valued[0]], [path, *COLUMNS, *FAST]):
        result = invoke("detect-noise", *source, *relabel)
        assert result.exit_code == 2 and "--relabel: several annotators labelled each row" in result.stderr
    assert not (tmp_path / "other.parquet").exists()


def test_nothing_is_said_where_nothing_is_asked_for(valued, tmp_path):
    result = invoke("detect-noise", valued[0], "-q", "-o", tmp_path / "s.parquet")
    assert result.exit_code == 0 and result.stderr == ""


def test_what_is_tested_on_has_a_column_of_its_own(crowd, tmp_path):
    path, true_N, _ = crowd
    table = pq.read_table(path, columns=["pixels"]).append_column("label", pa.array(true_N))
    pq.write_table(table.slice(0, 300), tmp_path / "gold.parquet")
    args = [*COLUMNS, *FAST, "--test", tmp_path / "gold.parquet", "-o", tmp_path / "trained"]
    result = invoke("train", path, *args)
    assert result.exit_code == 0, result.stderr
    metrics = pq.read_table(tmp_path / "trained/metrics.parquet").to_pylist()
    assert metrics[-1]["test_accuracy"] > 0.9, metrics[-1]


def test_a_dataset_of_which_one_annotator_changed_a_label_is_another(crowd, valued, tmp_path):
    """Even where the majority is the same."""
    table = pq.read_table(crowd[0])
    table = table.append_column("row", pa.array(range(len(table))))
    cy = table["cy"].to_pylist()
    agree = (pc.field("ann") == pc.field("bob")) & (pc.field("bob") == pc.field("cy"))
    row = table.filter(agree)["row"][0].as_py()
    cy[row] = "a" if cy[row] != "a" else "b"
    place = table.column_names.index("cy")
    pq.write_table(table.set_column(place, "cy", pa.array(cy)), tmp_path / "changed.parquet")
    args = ["--dataset", tmp_path / "changed.parquet", "--cleaned", tmp_path / "c.parquet"]
    result = invoke("detect-noise", valued[0], *args, "-o", tmp_path / "s.parquet")
    assert result.exit_code == 1 and "contents or class names are not those of the report" in result.stderr

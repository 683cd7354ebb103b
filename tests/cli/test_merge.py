"""`chgval merge`: what several runs say together."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import rankdata

import chgval
from tests.commands import invoke

SEEDS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Embeddings with every tenth label wrong and a row that cannot be read, and reports of some seeds."""
    root = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    true = np.arange(300) % 3
    vectors_ND = (rng.normal(size=(300, 5)) + 2 * np.eye(3, 5)[true]).astype(np.float32)
    vectors_ND[7] = np.nan
    labels = np.where(np.arange(300) % 10 == 0, (true + 1) % 3, true)
    names = np.array(["ant", "bee", "cow"])
    table = {"v": list(vectors_ND), "label": names[labels], "id": [f"row-{n}" for n in range(300)]}
    pq.write_table(pa.table(table), root / "d.parquet")
    for seed in range(SEEDS):
        settings = {"features_column": "v", "arch": "mlp", "epochs": 4, "seed": seed}
        chgval.value(root / "d.parquet", output=root / f"{seed}.parquet", **settings)
    return root


def reports_of(root):
    return [root / f"{seed}.parquet" for seed in range(SEEDS)]


def test_columns_are_means_over_runs_and_the_error_is_over_runs(runs, tmp_path):
    result = invoke("merge", *reports_of(runs), "-o", tmp_path / "m.parquet")
    assert result.exit_code == 0, result.stderr
    merged = pd.read_parquet(tmp_path / "m.parquet")
    all_runs = pd.concat(pd.read_parquet(path) for path in reports_of(runs))
    by_row = all_runs.groupby("index")
    for column in ("value", "noise_score", "loss_mean", "margin_mean", "el2n_mean", "label_probability_mean"):
        np.testing.assert_allclose(merged[column], by_row[column].mean(), rtol=1e-12)
    np.testing.assert_allclose(merged.value_std, by_row.value.std(), rtol=1e-9)
    np.testing.assert_allclose(merged.value_stderr, by_row.value.sem(), rtol=1e-9)
    variance = by_row.noise_score_std.apply(lambda std: (std**2).mean()) + by_row.noise_score.var(ddof=0)
    np.testing.assert_allclose(merged.noise_score_std, np.sqrt(variance), rtol=1e-9)
    known = merged.value.notna()
    assert known.sum() == 299 and merged.reason[7] == all_runs.reason.iloc[7]
    np.testing.assert_array_equal(merged["rank"][known], rankdata(-merged.value[known], method="ordinal"))
    assert (merged.num_epochs == by_row.num_epochs.sum()).all()
    for what in ("predicted", "suggested"):
        sums = all_runs.pivot_table(
            index="index", columns=f"{what}_label", values=f"{what}_probability", aggfunc="sum"
        )
        rows = sums.index
        np.testing.assert_array_equal(merged[f"{what}_label"][rows], sums.idxmax(axis=1))
        np.testing.assert_allclose(merged[f"{what}_probability"][rows], sums.max(axis=1) / SEEDS)
    metadata = json.loads(pq.read_schema(tmp_path / "m.parquet").metadata[b"chgval"])
    assert [run["seed"] for run in metadata["merged"]] == list(range(SEEDS))
    assert [run["epochs"] for run in metadata["merged"]] == [4] * SEEDS


def test_the_error_is_that_of_a_bootstrap_over_runs(runs):
    values_RN = np.stack([chgval.read_report(path).values for path in reports_of(runs)])
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, SEEDS, (20_000, SEEDS))
    bootstrap_N = values_RN[drawn].mean(1).std(0)
    stderr_N = chgval.merge(reports_of(runs)).scores("value_stderr")
    known_N = np.isfinite(stderr_N)
    # A bootstrap of R draws from R knows the variance short by (R - 1) / R.
    expected_N = bootstrap_N * np.sqrt(SEEDS / (SEEDS - 1))
    np.testing.assert_allclose(stderr_N[known_N], expected_N[known_N], rtol=0.03)


def test_other_commands_take_a_merged_report(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    merged = chgval.merge(reports_of(runs), output="m.parquet")
    assert len(chgval.detect_noise("m.parquet").table)
    assert chgval.select("m.parquet", fraction=0.5).kept_N.sum() == 150
    assert chgval.report("m.parquet", output="r.html").num_samples
    assert merged.notes == chgval.read_report(runs / "0.parquet").notes
    refused = invoke("merge", "m.parquet", runs / "0.parquet", "-o", "n.parquet")
    assert refused.exit_code == 1 and "m.parquet: is merged already" in refused.stderr
    for path in reports_of(runs):
        chgval.read_report(path).save(path.with_suffix(".csv"), overwrite=True)
    from_csv = chgval.merge([path.with_suffix(".csv") for path in reports_of(runs)])
    mixed = [runs / "0.parquet", runs / "1.csv"]
    assert invoke("merge", *mixed, "-o", "mixed.csv").exit_code == 0
    csvs = [runs / "0.csv", runs / "1.csv"]
    assert invoke("merge", *csvs, "-o", "csvs.jsonl").exit_code == 0
    for column in ("value", "noise_score", "predicted_label", "suggested_label", "rank"):
        np.testing.assert_array_equal(from_csv[column], merged[column])


def test_labels_of_several_annotators_are_merged(tmp_path):
    rng = np.random.default_rng(0)
    true = np.arange(120) % 2
    names = np.array(["x", "y"])
    table = {"v": list(rng.normal(size=(120, 4)) + 3 * true[:, None])}
    for who in ("Ada", "Bob", "Cy"):
        table[who] = names[np.where(rng.random(120) < 0.2, 1 - true, true)]
    pq.write_table(pa.table(table), tmp_path / "d.parquet")
    files = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    settings = {"features_column": "v", "arch": "linear", "epochs": 3, "label_column": ["Ada", "Bob", "Cy"]}
    for seed, file in enumerate(files):
        chgval.value(tmp_path / "d.parquet", output=file, seed=seed, **settings)
    merged, runs = chgval.merge(files), [chgval.read_report(file) for file in files]
    one = {**settings, "label_column": ["Ada"]}
    chgval.value(tmp_path / "d.parquet", output=tmp_path / "one.parquet", **one)
    refused = invoke("merge", files[0], tmp_path / "one.parquet", "-o", tmp_path / "n.parquet")
    assert refused.exit_code == 1 and "one.parquet: " in refused.stderr and "Traceback" not in refused.stderr
    for who in ("Ada", "Bob", "Cy"):
        column = f"noise_score_of_{who}"
        np.testing.assert_allclose(merged[column], np.mean([run[column] for run in runs], axis=0))
        assert list(merged[f"label_name_of_{who}"]) == list(table[who])
    assert (merged["consensus_name"] == names[true]).mean() > 0.95
    wrong = {who["name"]: who["wrong"] for who in merged.verdict["annotators"]}
    for who in runs[0].verdict["annotators"]:
        assert abs(wrong[who["name"]] - who["wrong"]) < 0.02


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("0.parquet",), 2, "0.parquet: is one report; name two or more"),
        (("0.parquet", "0.parquet"), 2, "names a report twice"),
        (("0.parquet", "x.parquet"), 1, "x.parquet: no such file"),
        (("0.parquet", "d.parquet"), 1, "d.parquet: is no values report; value the dataset first"),
        (("0.parquet", "few.parquet"), 1, "few.parquet: has 299 rows where 0.parquet has 300"),
        (("0.parquet", "order.parquet"), 1, "order.parquet: row 1 is row-2 (cow), and is row-1 (bee)"),
        (("0.parquet", "classes.parquet"), 1, "classes.parquet: has other classes"),
        (("0.parquet", "kind.parquet"), 1, "utility is loss, and is chg in 0.parquet"),
        (("0.parquet", "1.parquet", "-o", "0.parquet", "--overwrite"), 1, "0.parquet: is the input itself"),
    ],
)
def test_what_cannot_be_merged_is_named(runs, tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    for name in ("0.parquet", "1.parquet", "d.parquet"):
        (tmp_path / name).write_bytes((runs / name).read_bytes())
    report = chgval.read_report("0.parquet")
    table, metadata = report.table, report.metadata
    for name, changed in (("few", table.slice(0, 299)), ("order", table.take([0, 2, 1, *range(3, 300)]))):
        changed = changed.set_column(0, table.schema.field(0), pa.array(range(len(changed))))
        chgval.Report(changed, metadata).save(f"{name}.parquet")
    chgval.Report(table, {**metadata, "class_names": ["bee", "ant", "cow"]}).save("classes.parquet")
    settings = {**metadata["settings"], "utility": "loss"}
    chgval.Report(table, {**metadata, "settings": settings}).save("kind.parquet")
    result = invoke("merge", *args)
    assert result.exit_code == code and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_the_same_run_twice_is_told(runs, tmp_path):
    (tmp_path / "copy.parquet").write_bytes((runs / "0.parquet").read_bytes())
    result = invoke("merge", runs / "0.parquet", tmp_path / "copy.parquet", "-o", tmp_path / "m.csv")
    assert result.exit_code == 0 and "the same run twice says nothing new" in result.stderr

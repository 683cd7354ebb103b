"""`chgval compare`, and figures as files."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.stats import kendalltau

import chgval
from tests.commands import invoke
from tests.pictures import write_folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    write_folder(root / "photos", 12)
    settings = {"arch": "resnet8", "epochs": 3, "holdout": 0.25}
    chgval.train(root / "photos", output=root / "full", **settings)
    chgval.train(root / "photos", output=root / "part", fraction=0.5, strategy="random", **settings)
    chgval.train(root / "photos", output=root / "untested", arch="resnet8", epochs=1)
    return root


def test_trainings_stand_side_by_side(trained, tmp_path):
    args = [trained / name for name in ("full", "part", "untested")]
    result = invoke("compare", *args, "-o", tmp_path / "c.html", "--plots", tmp_path / "figures")
    assert result.exit_code == 0, result.stderr
    found = chgval.compare(args)
    for fact, name in zip(found.facts, ("full", "part", "untested"), strict=True):
        metrics = pd.read_parquet(trained / name / "metrics.parquet")
        assert fact["epochs"] == len(metrics) and fact["seconds"] == pytest.approx(metrics.seconds.sum())
        assert fact["samples"] == metrics.num_samples.iloc[-1]
        if name == "untested":
            assert fact["accuracy"] is None
        else:
            assert fact["accuracy"] == metrics.test_accuracy.iloc[-1]
            assert f"{fact['accuracy']:.2%}" in result.stderr
    assert found.facts[1]["samples"] == 9 and found.facts[0]["samples"] == 18
    text = (tmp_path / "c.html").read_text()
    assert text.count("data:image/svg+xml") == 2 and "http://" not in text and "<script" not in text
    for name in ("accuracy-by-epoch", "accuracy-by-time"):
        assert Image.open(tmp_path / f"figures/{name}.png").size == (960, 600)
        drawn = "".join(ET.parse(tmp_path / f"figures/{name}.svg").getroot().itertext())  # noqa: S314 (own file)
        assert "test accuracy" in drawn and str(trained / "full") in drawn and "untested" not in drawn


def test_two_reports_are_compared_by_rank(tmp_path):
    rng = np.random.default_rng(0)
    true = np.arange(200) % 2
    vectors = (rng.normal(size=(200, 4)) + 3 * true[:, None]).tolist()
    labels = np.where(np.arange(200) % 10 == 0, 1 - true, true)
    pq.write_table(pa.table({"v": vectors, "label": labels}), tmp_path / "d.parquet")
    files = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    for seed, file in enumerate(files):
        settings = {"features_column": "v", "arch": "mlp", "epochs": 2, "seed": seed}
        chgval.value(tmp_path / "d.parquet", output=file, **settings)
    result = invoke("compare", *files, "--plots", tmp_path / "figures")
    assert result.exit_code == 0, result.stderr
    found = chgval.compare(files)
    facts = {fact["what"]: fact["number"] for fact in found.facts}
    first, second = (pd.read_parquet(file) for file in files)
    ranks = [report.value.rank() for report in (first, second)]
    assert facts["rank correlation of values"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert np.sign(facts["rank correlation of values"]) == np.sign(kendalltau(*ranks).statistic)
    best = [set(report.nlargest(60, "value").index) for report in (first, second)]
    assert facts["in common of the best 30%"] == len(best[0] & best[1]) / 60
    flagged = [set(chgval.detect_noise(file).table["id"].to_pylist()) for file in files]
    shared = len(flagged[0] & flagged[1]) / len(flagged[0] | flagged[1])
    assert facts["flagged by both, of those by either"] == pytest.approx(shared)
    moved = (ranks[0] - ranks[1]).abs()
    assert found.different[0][0] == str(moved.idxmax())
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "value.png",
        "value.svg",
        "noise-score.png",
        "noise-score.svg",
    }
    same = chgval.compare([files[0], files[0]])
    assert {fact["number"] for fact in same.facts if "flagged by /" not in fact["what"]} == {1.0}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("full",), 2, "full: is one; name two or more"),
        (("full", "photos"), 1, "photos: is neither the folder of a training nor a values report"),
        (("full", "v.parquet"), 1, "some are trainings, some reports; compare like with like"),
        (("v.parquet", "v.parquet", "v.parquet"), 1, "are 3 reports; compare two, or merge them"),
        (("v.parquet", "w.parquet"), 1, "w.parquet: has 4 rows where v.parquet has 24"),
        (("full", "part", "-o", "c.pdf"), 2, "c.pdf: is a page for browsers"),
        (("full", "part", "--plots", "v.parquet"), 1, "v.parquet: is a file; figures go to a folder"),
        (("full", "part", "./full"), 1, "./full: is full; name each once"),
        (("full", "broken"), 1, "broken: cannot be read as a training"),
    ],
)
def test_what_cannot_be_compared_is_named(trained, tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(trained)
    if not (trained / "v.parquet").exists():
        report = chgval.value("photos", epochs=1, arch="resnet8", output="v.parquet")
        chgval.Report(report.table.slice(0, 4), report.metadata).save("w.parquet")
        (trained / "broken").mkdir()
        (trained / "broken/training.json").write_text("{}")
    result = invoke("compare", *args)
    assert result.exit_code == code and message in result.stderr, result.stderr


def test_figures_of_the_page_are_files_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("$cat$", "_dog")):
        for seed in range(10):
            path = tmp_path / "photos" / name / f"{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((16, 16), 20 + 60 * number).save(path)
    chgval.value("photos", epochs=2, arch="resnet8", output="v.parquet")
    result = invoke("report", "v.parquet", "-o", "r.html", "--plots", "figures")
    assert result.exit_code == 0, result.stderr
    names = {"thresholds", "confusion", "values", "epochs"}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == names
    drawn = (tmp_path / "figures/values.svg").read_text()
    assert "$cat$" in drawn and "_dog" in drawn  # names as they are
    assert invoke("report", "v.parquet", "-o", "s.html", "--plots", "figures").exit_code == 1
    before = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert invoke("report", "v.parquet", "-o", "s.html", "--plots", "figures", "--overwrite").exit_code == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert {name for name in before if name.endswith("svg") and before[name] != after[name]} == set()
    # The curve that is drawn is the one of the page.
    [page] = re.findall(r'"sums": \[([^]]*)\]', (tmp_path / "s.html").read_text())
    assert len(page.split(",")) >= 201

"""The functions behind the commands, and what importing and calling them leaves alone."""

import logging
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cleanlab.filter import find_label_issues as cleanlabs
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import cross_val_predict

import chgval
from chgval.training.loop import Trainer
from tests.commands import invoke

FAST = {"epochs": 2, "batch_size": 16}


def test_importing_loads_nothing_and_changes_nothing():
    code = """
import sys, warnings, signal
before = list(warnings.filters), signal.getsignal(signal.SIGTERM)
import chgval
assert not {"torch", "numpy", "pyarrow", "PIL", "typer", "rich"} & set(sys.modules), "heavy"
names = [getattr(chgval, name) for name in chgval.__all__]
import chgval.runs.value, chgval.data.loader
import PIL.Image
assert not PIL.Image.OPEN, "plugins of Pillow"
ours = [f for f in warnings.filters if f not in before[0] and "torch" not in str(f) and "PIL" in str(f)]
assert not ours and signal.getsignal(signal.SIGTERM) == before[1], ours
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_public_names_are_those_that_are_loaded():
    assert set(chgval.__all__) == set(chgval._HOMES) and set(chgval.__all__) <= set(dir(chgval))
    with pytest.raises(AttributeError, match="no attribute 'Valuer'"):
        chgval.Valuer  # noqa: B018


def test_functions_give_what_commands_write_and_say_nothing(image_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    state, filters = torch.get_rng_state(), list(warnings.filters)
    report = chgval.value(image_folder, **FAST)
    suspects = chgval.detect_noise(image_folder, all=True, **FAST)
    kept = chgval.select(image_folder, fraction=0.3, **FAST)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert torch.equal(state, torch.get_rng_state()) and warnings.filters == filters

    options = ["--epochs", "2", "--batch-size", "16", "-q"]
    for command, more in (("value", []), ("detect-noise", ["--all"]), ("select", ["--fraction", "0.3"])):
        result = invoke(command, image_folder, *options, *more, "-o", f"{command}.parquet")
        assert result.exit_code == 0, result.stderr
    assert report.table.equals(pq.read_table("value.parquet"))
    assert suspects.table.equals(pq.read_table("detect-noise.parquet"))
    assert kept.table.equals(pq.read_table("select.parquet"))
    np.testing.assert_array_equal(kept.indices, np.flatnonzero(pq.read_table("select.parquet")["kept"]))
    assert report.metadata["command"] == "Python" and suspects.rate.low <= suspects.rate.rate


def test_outputs_are_written_where_they_are_named_and_runs_are_logged(image_folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="chgval"):
        report = chgval.value(image_folder, output=tmp_path / "v.parquet", **FAST)
    assert {path.name for path in tmp_path.iterdir()} == {"v.parquet", "v.epochs"}
    assert sum("epoch 2/2" in line for line in caplog.messages) == 1
    assert chgval.read_report(tmp_path / "v.parquet").table.equals(report.table)
    trained = chgval.train(image_folder, output=tmp_path / "t", holdout=0.2, **FAST)
    assert len(trained.epochs) == 2 and 0 <= trained.evaluation.accuracy <= 1
    assert (trained.folder / "model.safetensors").is_file()


def test_ctrl_c_is_that_of_python_and_leaves_a_run_to_resume(image_folder, tmp_path, monkeypatch):
    step, steps = Trainer._make_step, []

    def interrupted(self, *args):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    output = tmp_path / "v.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_make_step", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"is kept in .*v\.checkpoint; resume with resume=True"):
            chgval.value(image_folder, output=output, **FAST)
    resumed = chgval.value(image_folder, output=output, resume=True, **FAST)
    assert resumed.table.equals(chgval.value(image_folder, **FAST).table)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "epoch: no such setting; did you mean epochs?"),
        ({"xyz": 3}, "xyz: no such setting; expected some of all"),
        ({"epochs": 0}, "--epochs 0: must be 1 or more (Passes over the data"),
        ({"epochs": 2.5}, "--epochs 2.5: expected a whole number"),
        ({"epochs": "many"}, "--epochs many: expected a whole number"),
        ({"schedule": "steps"}, "--schedule steps: expected one of one-cycle, cosine"),
        ({"mean": (0.5, 0.5)}, "--mean (0.5, 0.5): expected three numbers"),
        ({"threshold": "often"}, "--threshold often: expected aum, auto"),
        ({"duplicates": "yes"}, "--duplicates yes: expected True or False"),
        ({"epochs": float("nan")}, "--epochs nan: expected a whole number"),
        ({"label_column": 3}, "--label-column 3: expected a name, or a list of names"),
        ({"relabel": 0}, "--relabel: is about what --cleaned writes"),
        ({"overwrite": True}, "overwrite: is about the output; pass output= too"),
    ],
)
def test_mistakes_are_told_as_on_the_command_line(settings, message):
    with pytest.raises(chgval.ChgvalError, match=re.escape(message)):
        chgval.detect_noise("builtin:digits", **settings)


def test_settings_may_be_what_python_has(image_folder, tmp_path):
    """Paths, numbers as thresholds, one name for a list of names, tuples of numbers."""
    report = chgval.value(
        Path(image_folder),
        mean=(0.5, 0.5, 0.5),
        std=[0.2, 0.2, 0.2],
        write_probs=str(tmp_path / "p.npy"),
        **FAST,
    )
    assert np.load(tmp_path / "p.npy").shape == (len(report), 2)
    report.save(tmp_path / "v.parquet")
    assert len(chgval.select(tmp_path / "v.parquet", count=np.int64(3)).indices) == 3
    suspects = chgval.detect_noise(tmp_path / "v.parquet", threshold=0.0)
    assert suspects.table.num_rows == len(report)


@pytest.fixture(scope="module")
def cross_validated():
    bunch = load_digits()
    rng = np.random.default_rng(0)
    wrong_N = rng.random(len(bunch.target)) < 0.15
    labels_N = np.where(wrong_N, (bunch.target + rng.integers(1, 10, len(wrong_N))) % 10, bunch.target)
    model = LogisticRegression(max_iter=500, C=0.1)
    pixels_ND = bunch.data / 16
    return labels_N, cross_val_predict(model, pixels_ND, labels_N, method="predict_proba"), pixels_ND, wrong_N


def test_label_issues_of_given_probabilities_beside_cleanlab(cross_validated):
    labels_N, probabilities_NC, pixels_ND, wrong_N = cross_validated
    issues = chgval.find_label_issues(labels_N, probabilities_NC)
    theirs = [
        cleanlabs(labels_N, probabilities_NC, filter_by=f) for f in ("prune_by_noise_rate", "prune_by_class")
    ]
    assert f1_score(wrong_N, issues) >= max(f1_score(wrong_N, mask) for mask in theirs)
    assert issues.rate.low <= wrong_N.mean() <= issues.rate.high
    assert abs(issues.noise_scores.mean() - wrong_N.mean()) < 0.03
    # As cleanlab's result, it is a mask.
    np.testing.assert_array_equal(labels_N[issues], labels_N[issues.is_issue])
    ranked = issues.ranked()
    assert set(ranked) == set(np.flatnonzero(issues)) and len(ranked) == issues.is_issue.sum()
    assert (np.diff(issues.noise_scores[ranked]) <= 0).all()
    suggested = issues.suggested_labels[issues.is_issue & wrong_N]
    assert (suggested == load_digits().target[issues.is_issue & wrong_N]).mean() > 0.9
    with_features = chgval.find_label_issues(labels_N, probabilities_NC, features=pixels_ND)
    assert roc_auc_score(wrong_N, with_features.noise_scores) >= roc_auc_score(wrong_N, issues.noise_scores)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0.5, 1.0], [[1, 0], [0, 1]], "labels: float64"),
        ([0, 1, 1], [[1, 0], [0, 1]], r"pred_probs: shape \(2, 2\) for 3 labels"),
        ([0, 2], [[1, 0], [0, 1]], "labels: class 2 where pred_probs have 2 columns"),
        ([0, 1], [[3, -1], [0, 1]], "must be probabilities"),
        ([-1, -1], [[1, 0], [0, 1]], "there is nothing to say"),
    ],
)
def test_labels_and_probabilities_that_do_not_fit_are_told(labels, probabilities, message):
    with pytest.raises(chgval.ChgvalError, match=message):
        chgval.find_label_issues(labels, probabilities)


def test_a_row_without_whole_probabilities_is_unknown_alone(cross_validated):
    labels_N, probabilities_NC, *_ = cross_validated
    broken_NC = probabilities_NC.copy()
    broken_NC[5, 3], broken_NC[6] = np.nan, np.nan
    issues = chgval.find_label_issues(labels_N.astype(np.uint8), broken_NC)
    assert np.isnan(issues.noise_scores[[5, 6]]).all() and not issues.is_issue[[5, 6]].any()
    others = np.setdiff1d(np.arange(len(labels_N)), [5, 6])
    whole = chgval.find_label_issues(labels_N, probabilities_NC)
    assert (issues.is_issue[others] == whole.is_issue[others]).mean() > 0.99


def test_a_report_of_annotators_is_read_whole(tmp_path):
    digits = load_digits()
    labels = dict.fromkeys(("ann", "bob"), digits.target[:200])
    pq.write_table(pa.table({"e": list(digits.data[:200]), **labels}), tmp_path / "e.parquet")
    report = chgval.value(
        tmp_path / "e.parquet", features_column="e", label_column=["ann", "bob"], epochs=1,
        output=tmp_path / "v.parquet",
    )  # fmt: skip
    again = chgval.read_report(tmp_path / "v.parquet")
    assert again.table.equals(report.table) and "label_name_of_ann" in again.table.column_names

"""`chgval train` as a user sees it: the folder it leaves, tests, choices, subsets and messages."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, recall_score
from torch import nn

from chgval.training.models import CIFARResNet
from tests.commands import invoke, start, wait_for
from tests.pictures import write_folder

DOCS = Path(__file__).parents[2] / "docs"
FAST = ("--epochs", 4, "--arch", "resnet8", "--batch-size", 16)


def train(data, folder, *arguments):
    result = invoke("train", data, "-o", folder, *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads((folder / "training.json").read_text()), result.stderr


def subsets(folder):
    """What was chosen, by the epoch before which it was."""
    return {
        int(path.parent.name.removeprefix("epoch=")): pq.read_table(path)
        for path in (folder / "subsets").glob("epoch=*/subset.parquet")
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("train") / "photos", per_class=20)


@pytest.fixture(scope="module")
def more_photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("test") / "photos", per_class=9)


@pytest.mark.parametrize("arch", ["resnet18", "resnet8"])
def test_the_example_of_the_docs_predicts_the_same(arch, photos, more_photos, tmp_path, monkeypatch):
    """Plain torchvision code reads the model; the test's figures are scikit-learn's of its predictions."""
    known, _ = train(photos, tmp_path / "trained", "--arch", arch, "--epochs", 2, "--test", more_photos, "-q")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more-photos").symlink_to(more_photos)
    page = (DOCS / "training.md").read_text()
    example = page[page.index("```python\n") + 10 :].partition("```")[0]
    if arch == "resnet8":
        stem = [
            line
            for line in example.splitlines()
            if line.startswith(("model = ", "model.conv1", "model.maxp"))
        ]
        example = example.replace("\n".join(stem), "model = CIFARResNet(1, len(known['class_names']))")
    found = {"CIFARResNet": CIFARResNet}
    exec(example, found)  # noqa: S102
    logits_NC, labels = found["logits"], found["labels"]
    predicted = logits_NC.argmax(1)
    test = known["test"]
    assert test["num_samples"] == len(labels)
    assert test["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert list(test["class_accuracies"].values()) == pytest.approx(
        recall_score(labels, predicted, average=None, zero_division=0)
    )
    assert test["loss"] == pytest.approx(
        nn.functional.cross_entropy(logits_NC, torch.tensor(labels)).item(), rel=1e-4
    )


def test_a_valuation_starts_from_the_weights(photos, tmp_path):
    """The pass before the first epoch sees the losses that the test saw."""
    known, _ = train(photos, tmp_path / "trained", *FAST, "--test", photos, "-q")
    result = invoke(
        "value", photos, "--weights", tmp_path / "trained" / "model.safetensors", "--arch", "resnet8",
        "--epochs", 1, "--mode", "exact", "-o", tmp_path / "v.parquet", "-q",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    losses_N = pq.read_table(tmp_path / "v.parquet")["loss_mean"].to_numpy()
    assert losses_N.mean() == pytest.approx(known["test"]["loss"], rel=1e-4)


def test_every_epoch_has_its_row_and_every_choice_its_file(photos, more_photos, tmp_path):
    known, _ = train(
        photos, tmp_path / "trained", *FAST, "--strategy", "chg", "--fraction", 0.25, "--select-every", 2,
        "--test", more_photos, "--test-every", 2, "-q",
    )  # fmt: skip
    metrics = pq.read_table(tmp_path / "trained" / "metrics.parquet")
    assert metrics["epoch"].to_pylist() == [1, 2, 3, 4] and set(metrics["num_samples"].to_pylist()) == {10}
    assert [accuracy is None for accuracy in metrics["test_accuracy"].to_pylist()] == [True, False] * 2
    assert metrics["test_accuracy"][-1].as_py() == known["test"]["accuracy"]
    assert (
        known["settings"]["strategy"] == "chg"
        and known["settings"]["select_every"] == 2
        and known["epochs"] == 4
    )
    chosen = subsets(tmp_path / "trained")
    assert sorted(chosen) == [1, 3]
    for table in chosen.values():
        assert len(table) == 10 and np.bincount(table["label"]).tolist() == [5, 5]
        assert np.mean(table["weight"].to_numpy()) == pytest.approx(1)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(photos, tmp_path):
    models = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(photos, tmp_path / name, *FAST, "--fraction", 0.3, "--seed", seed, "-q")
        models.append((tmp_path / name / "model.safetensors").read_bytes())
    assert models[0] == models[1] != models[2]


def test_what_is_held_out_is_tested_on_and_never_trained_on(photos, tmp_path):
    known, shown = train(photos, tmp_path / "trained", *FAST, "--holdout", 0.2, "--strategy", "random",
                         "--fraction", 1)  # fmt: skip
    assert known["test"]["num_samples"] == 8 and "8 samples" in shown
    trained_on = subsets(tmp_path / "trained")[1]
    assert len(trained_on) == 32 and np.bincount(trained_on["label"]).tolist() == [16, 16]
    # Glister compares with them.
    train(
        photos,
        tmp_path / "glister",
        *FAST,
        "--holdout",
        0.2,
        "--strategy",
        "glister",
        "--fraction",
        0.5,
        "-q",
    )
    held = set(range(40)) - set(trained_on["index"].to_pylist())
    assert not held & set(subsets(tmp_path / "glister")[1]["index"].to_pylist())


def test_what_is_held_out_does_not_depend_on_the_subset(photos, tmp_path):
    """A manifest that keeps one half of each class: held-out samples are of both halves."""
    rows = np.array([*range(10), *range(20, 30)])
    ids = sorted(str(path.relative_to(photos)) for path in photos.glob("*/*"))
    labels = [0] * 10 + [1] * 10
    columns = {"index": rows, "id": [ids[row] for row in rows], "label": labels}
    manifest = tmp_path / "subset.csv"
    pa.csv.write_csv(pa.table({**columns, "weight": [1.0] * 20, "kept": [True] * 20}), manifest)
    train(photos, tmp_path / "all", *FAST, "--holdout", 0.4, "--strategy", "random", "--fraction", 1, "-q")
    trained_on = set(subsets(tmp_path / "all")[1]["index"].to_pylist())
    assert len(trained_on) == 24 and trained_on & set(rows) and trained_on - set(rows)
    known, _ = train(photos, tmp_path / "part", *FAST, "--holdout", 0.4, "--subset", manifest, "-q")
    assert known["test"]["num_samples"] == 16
    metrics = pq.read_table(tmp_path / "part" / "metrics.parquet")
    assert set(metrics["num_samples"].to_pylist()) == {len(trained_on & set(rows.tolist()))}


@pytest.mark.parametrize(
    ("strategy", "epochs", "known_from"),
    [("chg", 12, 1), ("auto", 12, 4), ("glister", 12, 1), ("adaptive-random", 40, 31)],
)
def test_unreadable_images_are_not_chosen_once_they_are_known(strategy, epochs, known_from, tmp_path):
    """Of large images only the header is read at first; with given statistics none is decoded before."""
    root = write_folder(tmp_path / "photos", 8, size=70)
    for name in ("cat/002.png", "dog/003.png", "dog/004.png"):
        (root / name).write_bytes((root / name).read_bytes()[:2000])
    held = ("--holdout", 0.2) if strategy == "glister" else ()
    known, shown = train(
        root, tmp_path / "trained", "--arch", "resnet8", "--epochs", epochs, "--image-size", 66, "--workers",
        0, "--mean", "0.3,0.3,0.3", "--std", "0.2,0.2,0.2", "--strategy", strategy, "--fraction", 0.5,
        "--select-every", 3, *held,
    )  # fmt: skip
    assert "3 of 16 samples could not be read; they were not trained on" in shown
    tables = subsets(tmp_path / "trained")
    assert sorted(tables) == list(range(1, epochs + 1, 3))
    for table in tables.values():
        assert not {2, 11, 12} & set(table["index"].to_pylist())
    readable = 13 - (known["test"]["num_samples"] if held else 0)
    used = pq.read_table(tmp_path / "trained" / "metrics.parquet")["num_samples"].to_pylist()
    assert set(used[known_from - 1 :]) == {round(0.5 * readable)}


@pytest.mark.parametrize("arch", ["linear", "mlp"])
def test_embeddings_are_trained_and_tested_on(arch, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    vectors = rng.normal(size=(400, 5)) + 4 * np.eye(5)[labels]
    for name, part in (("train", slice(300)), ("test", slice(300, 400))):
        table = pa.table({"emb": list(vectors[part]), "label": labels[part]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    known, _ = train(
        tmp_path / "train.parquet", tmp_path / "trained", "--features-column", "emb", "--arch", arch,
        "--fraction", 0.5, "--test", tmp_path / "test.parquet", "-q",
    )  # fmt: skip
    nearest = np.linalg.norm(vectors[300:, None] - 4 * np.eye(5)[:3], axis=2).argmin(1)
    best_possible = (nearest == labels[300:]).mean()
    assert known["test"]["num_samples"] == 100 and known["test"]["accuracy"] > best_possible - 0.05


def test_test_data_say_how_they_were_read(photos, tmp_path):
    known, shown = train("builtin:digits", tmp_path / "digits", "--epochs", 1, "--test", "builtin:digits")
    assert known["test"]["num_samples"] == 1797 and "holds exactly the training samples" in shown
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "train").symlink_to(photos)
    write_folder(splits / "test", 9)
    _, shown = train(photos, tmp_path / "trained", *FAST, "--test", splits)
    assert "note: " in shown and "splits/train" in shown
    result = invoke("train", photos, *FAST, "--test", "builtin:digits", "-o", tmp_path / "none", "-q")
    assert result.exit_code == 1 and "has samples of 8 pixels, the training data of 12" in result.stderr


def test_classes_that_are_not_trained_on_are_named(tmp_path):
    """A class of one sample can be held out whole, and a small part has no room for small classes."""
    root = write_folder(tmp_path / "photos", 20)
    (root / "zebra").mkdir()
    (root / "zebra" / "only.png").write_bytes((root / "dog" / "000.png").read_bytes())
    _, shown = train(root, tmp_path / "all", *FAST)
    assert "no samples to train on" not in shown
    _, shown = train(root, tmp_path / "part", *FAST, "--fraction", 0.3)
    assert "warning: no samples to train on: zebra" in shown
    _, shown = train(root, tmp_path / "held", *FAST, "--holdout", 0.6)
    assert "warning: no samples to train on: zebra" in shown


def test_training_stops_at_the_accuracy_asked_for(photos, tmp_path):
    known, shown = train(photos, tmp_path / "trained", *FAST, "--test", photos, "--target-accuracy", 0.3)
    reached = known["target"]
    metrics = pq.read_table(tmp_path / "trained" / "metrics.parquet")
    accuracies = metrics["test_accuracy"].to_pylist()
    assert accuracies[-1] >= 0.3 and all(accuracy < 0.3 for accuracy in accuracies[:-1])
    assert reached["epoch"] == len(accuracies) == known["epochs"] and "accuracy 30.0% reached" in shown
    assert reached["seconds"] == pytest.approx(sum(metrics["seconds"].to_pylist()), abs=2e-3)


def test_a_subset_is_trained_on_with_its_weights(photos, tmp_path):
    values, manifest = tmp_path / "values.parquet", tmp_path / "subset.parquet"
    assert invoke("value", photos, *FAST, "-o", values, "-q").exit_code == 0
    assert invoke("select", values, "--fraction", 0.5, "--weigh", "-o", manifest, "-q").exit_code == 0
    train(photos, tmp_path / "trained", *FAST, "--subset", manifest, "-q")
    metrics = pq.read_table(tmp_path / "trained" / "metrics.parquet")
    assert set(metrics["num_samples"].to_pylist()) == {20}
    kept = pq.read_table(manifest).filter(pa.compute.field("kept"))
    plain = kept.set_column(kept.schema.get_field_index("weight"), "weight", pa.array([1.0] * len(kept)))
    models = [(tmp_path / "trained" / "model.safetensors").read_bytes()]
    for name, table in (("same", kept), ("plain", plain)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        train(photos, tmp_path / name, *FAST, "--subset", tmp_path / f"{name}.parquet", "-q")
        models.append((tmp_path / name / "model.safetensors").read_bytes())
    assert models[0] == models[1] != models[2]


def test_a_manifest_of_other_data_is_refused(photos, more_photos, tmp_path):
    values, manifest = tmp_path / "values.parquet", tmp_path / "subset.parquet"
    assert invoke("value", more_photos, *FAST, "-o", values, "-q").exit_code == 0
    assert invoke("select", values, "--fraction", 0.5, "-o", manifest, "-q").exit_code == 0
    result = invoke("train", photos, *FAST, "--subset", manifest, "-o", tmp_path / "trained")
    assert result.exit_code == 1 and "was made of another dataset" in result.stderr
    assert not (tmp_path / "trained").exists()
    # As CSV it does not say what it was made of, but its rows do.
    csv = tmp_path / "subset.csv"
    assert invoke("select", values, "--fraction", 0.5, "-o", csv, "-q").exit_code == 0
    result = invoke("train", photos, *FAST, "--subset", csv, "-o", tmp_path / "trained")
    assert result.exit_code == 1 and "has another number or label" in result.stderr


def test_classes_of_the_test_data_are_found_by_name(photos, more_photos, tmp_path):
    """A test folder without the first class numbers the others differently."""
    classes = sorted(path.name for path in more_photos.iterdir())
    part = tmp_path / "part"
    part.mkdir()
    for name in classes[1:]:
        (part / name).symlink_to(more_photos / name)
    known, _ = train(photos, tmp_path / "all", *FAST, "--test", more_photos, "-q")
    partly, _ = train(photos, tmp_path / "some", *FAST, "--test", part, "-q")
    accuracies = known["test"]["class_accuracies"]
    assert partly["test"]["class_accuracies"] == {**accuracies, classes[0]: None}
    (part / "unheard-of").symlink_to(more_photos / classes[0])
    result = invoke("train", photos, *FAST, "--test", part, "-o", tmp_path / "none")
    assert result.exit_code == 1 and "'unheard-of' is none of the training data's" in result.stderr


def test_an_earlier_training_is_replaced_only_when_asked(photos, tmp_path):
    folder = tmp_path / "trained"
    train(photos, folder, *FAST, "--strategy", "random", "--fraction", 0.5, "-q")
    refused = invoke("train", photos, *FAST, "-o", folder)
    assert refused.exit_code == 1 and "holds an earlier training; pass --overwrite" in refused.stderr
    train(photos, folder, *FAST, "--overwrite", "-q")
    assert not (folder / "subsets").exists()
    # An interrupted training has no model yet.
    (folder / "model.safetensors").unlink()
    train(photos, folder, *FAST, "--overwrite", "-q")
    assert (folder / "model.safetensors").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    refused = invoke("train", photos, *FAST, "-o", other, "--overwrite")
    assert refused.exit_code == 1 and "no earlier training" in refused.stderr
    assert (other / "thesis.txt").read_text() == "mine"


def test_an_interruption_keeps_what_there_is(photos, tmp_path):
    """Ctrl-C while training: the settings and the epochs so far are there, and can be replaced."""
    folder = tmp_path / "trained"
    args = ["train", photos, "-o", folder, "-q", "--arch", "resnet8", "--epochs", 5000, "--fraction", 0.5]
    process = start(*args)
    wait_for(folder / "metrics.parquet", process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert json.loads((folder / "training.json").read_text())["settings"]["fraction"] == 0.5
    assert pq.read_table(folder / "metrics.parquet")["epoch"][0].as_py() == 1 and 1 in subsets(folder)
    train(photos, folder, *FAST, "--overwrite", "-q")


def test_a_model_that_diverges_is_told_before_it_chooses(photos, tmp_path):
    """The only step of the first epoch ends in weights that predict nothing finite; its loss was fine."""
    result = invoke(
        "train", photos, "--arch", "resnet8", "--batch-size", 64, "--epochs", 2, "--lr", 1e38, "-q",
        "--strategy", "chg", "--fraction", 0.5, "--select-every", 1, "-o", tmp_path / "trained",
    )  # fmt: skip
    assert result.exit_code == 1 and "the model predicts NaN or infinite logits; try a lower --lr" in re.sub(
        r"\s+", " ", result.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--strategy", "best"), 2, "--strategy best: expected one of full, adaptive-random"),
        (("--strategy", "chg"), 2, "--strategy chg: pass the --fraction"),
        (("--strategy", "full", "--fraction", 0.3), 2, "full training has none"),
        (("--fraction", 1.5), 2, "--fraction 1.5: must be above 0 and at most 1 (Share of the"),
        (("--strategy", "glister", "--fraction", 0.3), 2, "pass --holdout 0.1"),
        (("--holdout", 1), 2, "--holdout 1: must be above 0 and below 1 (Share"),
        (("--holdout", 0.001), 2, "leaves nothing on one side"),
        (("--target-accuracy", 0.9), 2, "pass --test or --holdout"),
        (("--target-accuracy", 90, "--test", "x"), 2, "must be above 0 and at most 1 (Stop when"),
        (("--subset", "nowhere.parquet"), 1, "nowhere.parquet: no such file"),
        (
            ("--subset", "x.parquet", "--strategy", "chg", "--fraction", 0.3),
            2,
            "leave out --fraction and --strategy",
        ),
        (("--test", "nowhere"), 1, "nowhere: no such file or folder"),
        (("-o", "no/where"), 1, "no/where"),
    ],
)
def test_mistakes_are_told_in_one_line(photos, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    result = invoke("train", photos, *FAST, "-q", *arguments)
    assert result.exit_code == code, result.stderr
    assert len(result.stderr.splitlines()) == 1 and message in re.sub(r"\s+", " ", result.stderr)
    assert list(tmp_path.iterdir()) == []


def write_digits(path, images, labels):
    """Write digits as Parquet: 8 by 8 gray images, and their pixels as embeddings."""
    from io import BytesIO

    from PIL import Image

    encoded = []
    for image in images:
        file = BytesIO()
        Image.fromarray((image * (255 / 16)).round().astype(np.uint8)).convert("RGB").save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    pixels = list(images.reshape(len(images), -1).astype(np.float32))
    pq.write_table(pa.table({"image": encoded, "label": labels, "pixels": pixels}), path)


@pytest.mark.parametrize(("arch", "seed"), [("resnet8", 0), ("mlp", 1), ("linear", 2)])
def test_training_without_the_labels_that_are_found_wrong_beats_training_on_all(arch, seed, tmp_path):
    """Value, detect, select, train: on real digits of which 30 % have another label."""
    bunch = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(bunch.target))
    images, labels = bunch.images[order], bunch.target[order]
    given = labels.copy()
    wrong = rng.random(len(labels)) < 0.3
    given[wrong] = (labels[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    data, test = tmp_path / "train.parquet", tmp_path / "test.parquet"
    write_digits(data, images[600:], given[600:])
    write_digits(test, images[:600], labels[:600])
    form = ["--augment", "none"] if arch == "resnet8" else ["--features-column", "pixels"]
    settings = ("--epochs", 20, "--arch", arch, *form, "--seed", seed, "-q")

    values, suspects, subset = (tmp_path / f"{name}.parquet" for name in ("values", "suspects", "subset"))
    for step in (
        ("value", data, *settings, "-o", values),
        ("detect-noise", values, "-o", suspects, "-q"),
        ("select", values, "--fraction", 0.7, "--drop", suspects, "-o", subset, "-q"),
    ):
        result = invoke(*step)
        assert result.exit_code == 0, result.stderr
    cleaned, _ = train(data, tmp_path / "cleaned", *settings, "--subset", subset, "--test", test)
    on_all, _ = train(data, tmp_path / "all", *settings, "--test", test)
    assert cleaned["test"]["accuracy"] > on_all["test"]["accuracy"] + 0.03

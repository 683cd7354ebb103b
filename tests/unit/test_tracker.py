"""The library door: a tracker in a loop of one's own, and in those of other libraries."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import chgval
from chgval.config import DataConfig, TrainConfig
from chgval.errors import TrackerError
from chgval.runs.session import prepare, read_dataset
from chgval.training.loop import schedule_factor
from tests.commands import invoke

NUM_DIGITS, NUM_CLASSES, EPOCHS = 600, 10, 3


@pytest.fixture(scope="module")
def digits():
    """Pixels from 0 to 1, given labels, and which of these are wrong."""
    bunch = load_digits()
    rng = np.random.default_rng(0)
    true_N = bunch.target[:NUM_DIGITS]
    wrong_N = rng.random(NUM_DIGITS) < 0.1
    labels_N = np.where(wrong_N, (true_N + rng.integers(1, 10, NUM_DIGITS)) % 10, true_N)
    return (bunch.data[:NUM_DIGITS] / 16).astype(np.float32), labels_N, wrong_N


@pytest.fixture(scope="module")
def parquet(digits, tmp_path_factory):
    pixels_ND, labels_N, _ = digits
    path = tmp_path_factory.mktemp("tracker") / "digits.parquet"
    pq.write_table(pa.table({"pixels": list(pixels_ND), "label": labels_N}), path)
    return path


def train_plainly(digits, on_batch, epochs=EPOCHS, on_epoch=lambda: None, width=32):
    """A textbook loop; `on_batch` is given indices and logits, `on_epoch` is called after each epoch."""
    pixels_ND, labels_N, _ = digits
    inputs_ND, targets_N = torch.from_numpy(pixels_ND), torch.from_numpy(labels_N)
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = torch.nn.Linear(width, NUM_CLASSES)
        model = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    take = on_batch(model, head)
    for _ in range(epochs):
        for indices in torch.randperm(len(labels_N), generator=generator).split(32):
            logits = model(inputs_ND[indices])
            loss = torch.nn.functional.cross_entropy(logits, targets_N[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            take(indices, logits)
        on_epoch()
    return model, inputs_ND


def test_a_plain_loop_gives_the_values_of_the_command(parquet):
    """The same first weights, batches and learning rates; the loop and the optimizer are plain torch."""
    report = chgval.value(parquet, features_column="pixels", arch="linear", epochs=EPOCHS, seed=3)

    train = TrainConfig(arch="linear", epochs=EPOCHS, seed=3)
    data = DataConfig(source=str(parquet), features_column="pixels")
    run = prepare(data, train, read_dataset(data, train))
    recipe, loader = run.recipe, run.loader
    head = run.model.head
    tracker = chgval.Tracker(run.dataset.labels_N, head=head)
    optimizer = torch.optim.SGD(
        run.model.parameters(), lr=1, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True
    )
    total, step = EPOCHS * loader.num_batches(loader.rows), 0
    for _ in range(EPOCHS):
        for batch in loader.training_batches(loader.rows, run.generator):
            optimizer.param_groups[0]["lr"] = recipe.lr * schedule_factor("one-cycle", (step + 0.5) / total)
            loss = torch.nn.functional.cross_entropy(head(batch.inputs_B), batch.labels_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tracker.update(batch.indices_B)
            step += 1
        tracker.end_epoch()
    tracked = tracker.result()
    scale = np.abs(report.values).max()
    np.testing.assert_allclose(tracked.values, report.values, rtol=1e-6, atol=1e-6 * scale)
    for name in ("loss_mean", "margin_mean", "el2n_mean", "value_std"):
        np.testing.assert_allclose(tracked[name], report[name], rtol=1e-4, atol=1e-5)


def test_features_from_the_head_are_those_that_are_passed(digits):
    def by_head(model, head):
        tracker = trackers["head"] = chgval.Tracker(digits[1], head=head)
        return lambda indices, logits: tracker.update(indices, logits)

    def by_hand(model, head):
        tracker = trackers["hand"] = chgval.Tracker(digits[1], num_classes=NUM_CLASSES)
        seen = []
        model[1].register_forward_hook(lambda _, __, output: seen.append(output))
        return lambda indices, logits: tracker.update(indices, logits, seen[-1])

    trackers = {}
    for way, name in ((by_head, "head"), (by_hand, "hand")):
        train_plainly(digits, way, on_epoch=lambda name=name: trackers[name].end_epoch())
    np.testing.assert_array_equal(trackers["head"].result().values, trackers["hand"].result().values)


def tracked(digits, epochs=12):
    trackers = []

    def start(_, head):
        trackers.append(chgval.Tracker(digits[1], head=head, averaged_from=epochs // 2 + 1))
        return trackers[0].update

    model, inputs_ND = train_plainly(digits, start, epochs, lambda: trackers[0].end_epoch())
    return trackers[0], model.eval(), inputs_ND


def test_noise_scores_find_wrong_labels_and_a_pass_after_training_makes_them_better(digits):
    _, labels_N, wrong_N = digits
    tracker, model, inputs_ND = tracked(digits)
    first = tracker.result()
    assert roc_auc_score(wrong_N, first.noise_scores) > 0.95
    with torch.no_grad():
        for indices in torch.arange(NUM_DIGITS).split(100):
            tracker.observe(indices, model(inputs_ND[indices]))
    report = tracker.result()
    assert roc_auc_score(wrong_N, report.noise_scores) > 0.97
    assert abs(report.noise_scores.mean() - wrong_N.mean()) < 0.03 and report.notes == []
    assert set(report["status"]) == {"valued"}
    np.testing.assert_array_equal(report["label"], labels_N)


def test_samples_that_were_not_observed_are_told(digits, caplog):
    tracker, model, inputs_ND = tracked(digits, 2)
    with torch.no_grad():
        tracker.observe(torch.arange(400), model(inputs_ND[:400]))
    report = tracker.result()
    assert np.isnan(report.noise_scores).sum() == NUM_DIGITS - 400
    assert [record.message for record in caplog.records] == [
        "200 of 600 samples were not shown to observe and have no score; show it all of them, or none"
    ]


def test_a_saved_result_is_a_report_like_any_other(digits, tmp_path):
    tracker, *_ = tracked(digits, 4)
    report = tracker.result()
    for name in ("values.parquet", "values.csv"):
        report.save(tmp_path / name)
        again = chgval.read_report(tmp_path / name)
        np.testing.assert_array_equal(again.values, report.values)
        assert again.table.select(report.table.column_names).equals(report.table)
    assert report.to_pandas()["value"].to_numpy() == pytest.approx(report.values)
    for command in (["detect-noise"], ["select", "--fraction", "0.3"]):
        result = invoke(*command, tmp_path / "values.parquet", "-o", tmp_path / f"{command[0]}.csv")
        assert result.exit_code == 0, result.stderr
    suspects = chgval.detect_noise(tmp_path / "values.parquet", all=True)
    assert suspects.table.num_rows == NUM_DIGITS
    with pytest.raises(chgval.ChgvalError, match=r"values\.parquet: exists already"):
        report.save(tmp_path / "values.parquet")


def test_samples_without_label_or_never_seen_are_told(digits):
    pixels_ND, labels_N, _ = digits
    labels_N = labels_N.copy()
    labels_N[5] = -1
    tracker = chgval.Tracker(labels_N, num_classes=NUM_CLASSES, has_bias=False)
    seen = np.setdiff1d(np.arange(20), [5, 7])
    logits = torch.randn(len(seen), NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    tracker.update(seen, logits, torch.from_numpy(pixels_ND[seen]))
    tracker.end_epoch()
    report = tracker.result()
    assert report["status"][5] == "unlabelled" and report["status"][7] == "unseen"
    assert np.isfinite(report.values[seen]).all() and np.isnan(report.values[[5, 7]]).all()


def ended_twice():
    tracker = chgval.Tracker([0, 1])
    tracker.update([0, 1], torch.eye(2), torch.zeros(2, 4))
    tracker.end_epoch()
    tracker.end_epoch()


def of_another_pass():
    head = torch.nn.Linear(4, 2)
    tracker = chgval.Tracker([0, 1], head=head)
    logits = head(torch.rand(2, 4))
    head(torch.rand(2, 4))
    tracker.update([0, 1], logits)


def updated_twice():
    head = torch.nn.Linear(4, 2)
    tracker = chgval.Tracker([0, 1], head=head)
    head(torch.rand(2, 4))
    tracker.update([0, 1])
    tracker.update([0, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chgval.Tracker([0.5, 1.0]), "labels: torch.float64 of shape"),
        (lambda: chgval.Tracker([0, 3], num_classes=3), "labels: up to 3, 3 classes"),
        (lambda: chgval.Tracker([0, 1], ids=["a"]), "ids: 1 for 2 labels"),
        (lambda: chgval.Tracker([0, 1], utility="money"), "expected one of chg, gradient, hardness"),
        (lambda: chgval.Tracker([0, 1]).update([0], torch.zeros(1, 2)), "nothing went through the head"),
        (
            lambda: chgval.Tracker([0, 1]).update([0, 1], torch.zeros(1, 2), torch.zeros(1, 4)),
            r"update: \(2,\) indices, logits of shape \(1, 2\)",
        ),
        (lambda: chgval.Tracker([0, 1]).end_epoch(), "the epoch saw no sample"),
        (lambda: ended_twice(), "the epoch saw no sample"),
        (lambda: of_another_pass(), "are not what the head returned last"),
        (lambda: updated_twice(), "nothing went through the head"),
        (
            lambda: chgval.Tracker([0, 1]).update([True, False], torch.zeros(2, 2), torch.zeros(2, 4)),
            "indices are torch.bool",
        ),
        (lambda: chgval.Tracker([0, 1]).result(), "none before the first end_epoch"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(TrackerError, match=message):
        make()


def test_lightning_trains_as_without_and_values_as_a_plain_loop(digits):
    """The same steps by Lightning's own loop, with the callback, and by a plain one."""
    pl = pytest.importorskip("pytorch_lightning")
    from chgval.integrations.lightning import TrackerCallback

    pixels_ND, labels_N, _ = digits
    plain = {}

    def start(_, head):
        plain["tracker"] = chgval.Tracker(labels_N, head=head)
        return plain["tracker"].update

    batches = [
        torch.randperm(NUM_DIGITS, generator=generator).split(32)
        for generator in [torch.Generator().manual_seed(1)]
        for _ in range(EPOCHS)
    ]
    expected, _ = train_plainly(digits, start, on_epoch=lambda: plain["tracker"].end_epoch())

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.head = torch.nn.Linear(32, NUM_CLASSES)
                self.body = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())

        def training_step(self, batch, _):
            inputs, targets, _ = batch
            return torch.nn.functional.cross_entropy(self.head(self.body(inputs)), targets)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    class Batches(torch.utils.data.IterableDataset):
        def __init__(self):
            self.epochs = iter(batches)

        def __iter__(self):
            for indices in next(self.epochs):
                yield torch.from_numpy(pixels_ND)[indices], torch.from_numpy(labels_N)[indices], indices

    module = Module()
    tracker = chgval.Tracker(labels_N, head=module.head)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, callbacks=[TrackerCallback(tracker)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Batches(), batch_size=None))
    for own, other in zip(module.body.parameters(), expected[0].parameters(), strict=True):
        torch.testing.assert_close(own, other)
    values = plain["tracker"].result().values
    np.testing.assert_allclose(tracker.result().values, values, rtol=1e-5, atol=1e-6 * np.abs(values).max())


def test_the_hugging_face_trainer_values_every_sample(digits, tmp_path):
    """Its own loop; the values are those of the logits and features that it computed, by theorem 1."""
    transformers = pytest.importorskip("transformers")
    from chgval.integrations.huggingface import TrackerCallback

    pixels_ND, labels_N, wrong_N = digits
    seen = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
            self.classifier = torch.nn.Linear(32, NUM_CLASSES)

        def forward(self, pixels, labels):
            features = self.body(pixels)
            logits = self.classifier(features)
            seen.append((labels, logits.detach(), features.detach()))
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [
        {"pixels": pixels, "labels": int(label), "index": index}
        for index, (pixels, label) in enumerate(zip(pixels_ND, labels_N, strict=True))
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model()
    tracker = chgval.Tracker(labels_N, head=model.classifier)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=6, per_device_train_batch_size=32, learning_rate=0.01,
        remove_unused_columns=False, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[TrackerCallback(tracker)])
    trainer.train()
    report = tracker.result()
    assert (report["num_epochs"] == 6).all()
    assert roc_auc_score(wrong_N, -report.values) > 0.9
    losses = [
        torch.nn.functional.cross_entropy(logits, labels, reduction="none") for labels, logits, _ in seen
    ]
    assert report["loss_mean"].mean() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert not model._forward_hooks and not model._forward_pre_hooks
    with pytest.raises(TrackerError, match="no column 'index'"):
        without = [{name: row[name] for name in ("pixels", "labels")} for row in rows]
        transformers.Trainer(
            model, arguments, train_dataset=without, callbacks=[TrackerCallback(tracker)]
        ).train()


def test_a_loop_in_mixed_precision_has_the_closed_form_in_full(digits):
    """end_epoch may be called where autocast is on: its products are not rounded to bfloat16."""
    _, labels_N, _ = digits
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_DIGITS, NUM_CLASSES, generator=generator)
    features = torch.rand(NUM_DIGITS, 32, generator=generator)
    values = []
    for is_mixed in (False, True):
        tracker = chgval.Tracker(labels_N, num_classes=NUM_CLASSES)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            tracker.update(np.arange(NUM_DIGITS), logits, features)
            values.append(tracker.end_epoch().value_N)
    np.testing.assert_array_equal(*values)


def test_samples_without_a_label_are_no_players(digits):
    """Whether the loop passes them or not; any number below 0 is none."""
    pixels_ND, labels_N, _ = digits
    labels_N = np.where(np.arange(NUM_DIGITS) % 3 == 0, -100, labels_N)
    logits = torch.randn(NUM_DIGITS, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    values = []
    for rows in (np.arange(NUM_DIGITS), np.flatnonzero(labels_N >= 0)):
        tracker = chgval.Tracker(labels_N, num_classes=NUM_CLASSES)
        tracker.update(rows, logits[rows], torch.from_numpy(pixels_ND[rows]))
        tracker.end_epoch()
        report = tracker.result()
        values.append(report.values)
    np.testing.assert_array_equal(*values)
    assert np.isnan(report.values[labels_N < 0]).all()


def test_a_copy_of_the_model_talks_to_the_same_tracker(digits):
    """As a moving average of the weights is one: its logits come with its own features."""
    tracker, model, inputs_ND = tracked(digits, 2)
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        average.module[0].weight.mul_(0)
        average.module[0].bias.fill_(1)
        tracker.observe(torch.arange(NUM_DIGITS), average(inputs_ND))
    np.testing.assert_array_equal(tracker._observed_ND.numpy(), np.ones((NUM_DIGITS, 32)))

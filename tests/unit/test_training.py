import copy

import numpy as np
import pytest
import torch

from chgval.config import DataConfig, TrainConfig
from chgval.data.loader import make_loader
from chgval.data.open import open_dataset
from chgval.errors import DeviceMemoryError, NonFiniteError
from chgval.training.loop import Subset, Trainer, forward_all, schedule_factor
from chgval.training.models import InputShape, build_model
from chgval.training.recipe import Recipe, choose_arch, choose_recipe, largest_image_size
from chgval.training.records import EpochRecord, SplitRecord, StepRecord
from chgval.valuation.accumulator import ValueAccumulator
from tests import oracles

CPU = torch.device("cpu")


def recipe(**settings):
    defaults = {
        "epochs": 3, "batch_size": 16, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4,
        "schedule": "one-cycle", "augment": "none",
    }  # fmt: skip
    return Recipe(**{**defaults, **settings})


@pytest.fixture
def setup(image_folder):
    dataset = open_dataset(DataConfig(source=str(image_folder)), 64)
    loader = make_loader(dataset, batch_size=16, augment="none", device=CPU)
    model = build_model("resnet8", 2, InputShape(12), torch.Generator().manual_seed(0))
    return dataset, loader, model


def accumulator_for(dataset, model):
    return ValueAccumulator(torch.from_numpy(dataset.labels_N), 2, model.head.in_features)


def run(model, loader, accumulator=None, separate_pass=False, **settings):
    def before_epoch(epoch, is_resumed):
        if separate_pass:
            forward_all(model, loader, accumulator.update)

    trainer = Trainer(
        model,
        loader,
        recipe(**settings),
        device=CPU,
        generator=torch.Generator().manual_seed(1),
        observer=accumulator,
        sees_steps=not separate_pass,
        before_epoch=before_epoch,
    )
    return list(trainer.records())


def test_it_trains_exactly_like_a_plain_loop(setup):
    """The textbook loop with torch's own mean cross entropy ends with the same weights."""
    _, loader, model = setup
    plain = copy.deepcopy(model)
    run(model, loader)

    settings = recipe()
    optimizer = torch.optim.SGD(
        plain.parameters(), lr=settings.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    generator, step, total = torch.Generator().manual_seed(1), 0, 3 * loader.num_batches(loader.rows)
    plain.train()
    for _ in range(3):
        for batch in loader.training_batches(loader.rows, generator):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * schedule_factor("one-cycle", (step + 0.5) / total)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(plain(batch.inputs_B)[0], batch.labels_B).backward()
            optimizer.step()
            step += 1
    for trained, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)


def test_each_epoch_trains_on_its_subset_with_its_weights(setup):
    """The textbook loop over other rows in each epoch; the weights of a subset have a mean of 1."""
    dataset, loader, model = setup
    plain = copy.deepcopy(model)
    rows = [torch.arange(0, 40, 2), torch.arange(7, 37)]
    weights = [torch.linspace(0, 3, 20), torch.full((30,), 0.2)]
    subsets = [Subset.weighted(r, w, len(dataset), CPU) for r, w in zip(rows, weights, strict=True)]
    trainer = Trainer(
        model,
        loader,
        recipe(epochs=2),
        device=CPU,
        generator=torch.Generator().manual_seed(1),
        before_epoch=lambda epoch, _: subsets[epoch - 1],
    )
    assert [r.num_samples for r in trainer.records() if isinstance(r, EpochRecord)] == [20, 30]

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    generator = torch.Generator().manual_seed(1)
    plain.train()
    for epoch in range(2):
        scale = weights[epoch] / weights[epoch].mean()
        batches = list(loader.training_batches(rows[epoch], generator))
        for step, batch in enumerate(batches):
            progress = (epoch + (step + 0.5) / len(batches)) / 2
            optimizer.param_groups[0]["lr"] = 0.05 * schedule_factor("one-cycle", progress)
            optimizer.zero_grad()
            losses = torch.nn.functional.cross_entropy(
                plain(batch.inputs_B)[0], batch.labels_B, reduction="none"
            )
            of_row = {int(row): w for row, w in zip(rows[epoch], scale, strict=True)}
            sum(of_row[int(i)] * loss for i, loss in zip(batch.indices_B, losses, strict=True)).div(
                len(losses)
            ).backward()
            optimizer.step()
    for trained, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)


def test_weights_that_are_all_zero_count_alike():
    assert Subset.weighted(torch.arange(3), torch.zeros(3), 5, CPU).weights_N is None


@pytest.mark.parametrize("separate_pass", [False, True])
def test_valuing_does_not_change_what_is_trained(setup, separate_pass):
    dataset, loader, model = setup
    valued = copy.deepcopy(model)
    run(model, loader)
    run(valued, loader, accumulator_for(dataset, model), separate_pass=separate_pass)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), valued.parameters(), strict=True))


def test_exact_mode_is_algorithm_1(setup):
    """Losses and last-layer gradients by autograd, before each epoch; equation 3; the mean."""
    dataset, loader, model = setup
    copy_of_model = copy.deepcopy(model)
    accumulator = accumulator_for(dataset, model)
    records = run(model, loader, accumulator, separate_pass=True, epochs=2)
    values = [record.signals.value_N for record in records if isinstance(record, EpochRecord)]

    inputs = torch.cat([batch.inputs_B for batch in loader.plain_batches()])
    labels_N = torch.from_numpy(dataset.labels_N)
    expected = []
    for state in (copy_of_model, None):
        if state is None:  # the second epoch starts from where the first one ended
            events = Trainer(
                copy_of_model,
                loader,
                recipe(epochs=2),
                device=CPU,
                generator=torch.Generator().manual_seed(1),
            ).records()
            while not isinstance(next(events), EpochRecord):
                pass
        copy_of_model.eval()
        features_ND = copy_of_model.backbone(inputs).detach()
        x_ND = oracles.last_layer_gradients(copy_of_model.head, features_ND, labels_N, times_loss=True)
        expected.append(oracles.theorem_1(x_ND, x_ND.mean(0)))
        copy_of_model.train()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(values[0], expected[0], rtol=1e-4, atol=1e-6 * scale)
    np.testing.assert_allclose(values[1], expected[1], rtol=1e-3, atol=1e-5 * scale)
    np.testing.assert_allclose(accumulator.run_signals().value_N, np.mean(values, 0), rtol=1e-12)


def test_online_mode_sees_the_training_steps_themselves(setup):
    """With one batch an epoch, the first epoch's values are those of the first weights in training mode."""
    dataset, _, model = setup
    loader = make_loader(dataset, batch_size=len(dataset), augment="none", device=CPU)
    first = copy.deepcopy(model).train()
    records = run(model, loader, accumulator_for(dataset, model), epochs=1)
    inputs = torch.cat([batch.inputs_B for batch in loader.plain_batches()])
    features_ND = first.backbone(inputs).detach()
    x_ND = oracles.last_layer_gradients(
        first.head, features_ND, torch.from_numpy(dataset.labels_N), times_loss=True
    )
    expected = oracles.theorem_1(x_ND, x_ND.mean(0))
    np.testing.assert_allclose(
        records[-1].signals.value_N, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max()
    )


def test_records_say_what_happened(setup):
    dataset, loader, model = setup
    records = run(model, loader, accumulator_for(dataset, model), epochs=2)
    kinds = [type(record) for record in records]
    assert kinds == [StepRecord, EpochRecord] * 2
    for epoch, record in enumerate(records[1::2], start=1):
        assert record.epoch == epoch and record.num_samples == len(dataset)
        np.testing.assert_allclose(record.loss, record.signals.signals["loss"].mean(), rtol=1e-5)
        right = record.signals.predicted_label_N == dataset.labels_N
        assert record.accuracy == pytest.approx(right.mean())


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(setup):
    _, loader, model = setup
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"became nan at epoch 1, step 1 of 3; try a lower --lr \(it was 0\.05\)"
    ):
        run(model, loader)
    with pytest.raises(NonFiniteError, match="epoch 1, step 2 of 3"):
        run(build_model("resnet8", 2, InputShape(12), torch.Generator()), loader, lr=1e30, schedule="cosine")


class Limited(torch.nn.Module):
    """A model on a device that has memory for so many samples at a time."""

    def __init__(self, model, most):
        super().__init__()
        self.inner, self.most, self.sizes = model, most, []

    def forward(self, inputs_B):
        self.sizes.append(len(inputs_B))
        if len(inputs_B) > self.most:
            raise torch.OutOfMemoryError("not enough")
        return self.inner(inputs_B)


def test_without_memory_for_a_batch_its_parts_add_up_to_the_same(setup, monkeypatch):
    """Batches of 14, 13 and 13 in four parts; normalisation by the batch would see the parts."""
    dataset, loader, model = setup
    model = build_model("linear", 2, InputShape(12, is_embedding=True), torch.Generator().manual_seed(0))
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 144, 12))
    model.backbone = flat
    whole = copy.deepcopy(model)
    accumulators = [ValueAccumulator(torch.from_numpy(dataset.labels_N), 2, 12) for _ in range(2)]
    expected = run(whole, loader, accumulators[0], epochs=2)
    limited = Limited(model, 4)
    records = run(limited, loader, accumulators[1], epochs=2)
    assert limited.sizes[:3] == [14, 7, 4] and max(limited.sizes[3:]) == 4
    assert [r for r in records if isinstance(r, SplitRecord)] == [
        SplitRecord(batch_size=14, num_parts=2), SplitRecord(batch_size=14, num_parts=4),
    ]  # fmt: skip
    assert records[-1].loss == pytest.approx(expected[-1].loss, rel=1e-5)
    for split, together in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(split, together, rtol=1e-4, atol=1e-6)
    values = [accumulator.run_signals().value_N for accumulator in accumulators]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-3, atol=1e-5 * np.abs(values[0]).max())


def test_without_memory_for_two_samples_it_is_told(setup):
    _, loader, model = setup
    with pytest.raises(DeviceMemoryError, match="out of memory even for 3 samples at a time; pass a smaller"):
        run(Limited(model, 1), loader)


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
def test_schedules_stay_in_range_and_end_low(schedule):
    factors = [schedule_factor(schedule, (step + 0.5) / 1000) for step in range(1000)]
    assert max(factors) == pytest.approx(1, abs=0.01) and min(factors) > 0
    assert factors[-1] < 1e-4
    assert schedule_factor(schedule, 0.5) > 0
    peak = int(np.argmax(factors))
    assert peak == (0 if schedule == "cosine" else pytest.approx(250, abs=2))


def test_defaults_follow_data_model_and_device():
    given = choose_recipe(
        TrainConfig(epochs=7, batch_size=9, lr=0.3, augment="none"), 10**6,
        has_batch_norm=True, num_features=None, flips=True,
    )  # fmt: skip
    assert (given.epochs, given.batch_size, given.lr, given.augment) == (7, 9, 0.3, "none")
    small = choose_recipe(TrainConfig(), 100, has_batch_norm=True, num_features=None, flips=False)
    assert (small.epochs, small.batch_size, small.lr, small.augment) == (30, 10, 0.3, "crop")
    sizes = [
        choose_recipe(TrainConfig(), n, has_batch_norm=True, num_features=None, flips=True).batch_size
        for n in (50, 1_797, 10_000, 50_000)
    ]
    assert sizes == [8, 32, 66, 128]
    on_gpu = [
        choose_recipe(
            TrainConfig(), n, has_batch_norm=batch_norm, num_features=None, flips=True, image_size=size,
            device_type="cuda",
        )
        for n, size, batch_norm in (
            (1_797, 8, True), (50_000, 32, True), (10**6, 224, True), (50_000, 32, False),
        )
    ]  # fmt: skip
    assert [(r.batch_size, r.lr) for r in on_gpu] == [(32, 0.3), (512, 1.2), (256, 0.6), (128, 0.01)]
    plain = choose_recipe(TrainConfig(), 10**6, has_batch_norm=False, num_features=None, flips=True)
    assert (plain.epochs, plain.batch_size, plain.lr, plain.augment) == (15, 128, 0.01, "crop-flip")
    too_many = choose_recipe(
        TrainConfig(batch_size=10**6), 1_500, has_batch_norm=True, num_features=None, flips=True
    )
    assert (too_many.batch_size, too_many.lr) == (1_500, 1.2)
    wide = choose_recipe(TrainConfig(), 10**6, has_batch_norm=False, num_features=2048, flips=True)
    assert wide.lr < 0.01
    assert choose_arch(None, "cuda") == "linear"
    assert (choose_arch(32, "cpu"), choose_arch(32, "cuda")) == ("resnet8", "resnet18")
    assert (largest_image_size(None, "cpu"), largest_image_size("resnet50", "cpu")) == (64, 224)
    assert largest_image_size(None, "cuda") == 224

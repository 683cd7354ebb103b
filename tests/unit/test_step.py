"""The training step as a function: captured and replayed, out of memory, and in float16."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional

from chgval.data.loader import Batch
from chgval.training import optimizers
from chgval.training.graph import WARM_UP_STEPS, CapturedSteps
from chgval.training.models import InputShape, build_model
from chgval.training.optimizers import LossScale, NesterovSGD
from chgval.training.recipe import Recipe
from chgval.training.step import Step, Sums, WeightAverage
from chgval.valuation.accumulator import ValueAccumulator
from tests.recorded_graph import NOT_PERMITTED, replace_cuda

CPU = torch.device("cpu")
NUM_ROWS = 23


def recipe():
    return Recipe(
        epochs=2, batch_size=8, lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="cosine", augment="none"
    )


class Training:
    """A model, and all that its steps change."""

    def __init__(self, *, weighs=False, float16=False):
        self.model = build_model("resnet8", 3, InputShape(8), torch.Generator().manual_seed(0))
        self.model.backbone_dtype = torch.float16 if float16 else None
        self.average = WeightAverage(self.model, 20)
        self.accumulator = ValueAccumulator(torch.arange(NUM_ROWS) % 3, 3, 64)
        self.scale = LossScale(CPU) if float16 else None
        self.optimizer = NesterovSGD(self.model.parameters(), recipe(), CPU)
        self.sums = Sums(CPU)
        self.step = Step(self.model, self.optimizer, self.sums, self.scale, self.average, self.accumulator)
        self.weights_N = torch.linspace(0, 2, NUM_ROWS) if weighs else None
        self.num_parts = 1

    def make(self, batch, weights_B):
        return self.step(batch, weights_B, self.num_parts)

    def train(self, make, num_epochs=2, num_steps=12):
        """Steps of two sizes, at ever other rates; return the signals of each epoch."""
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(NUM_ROWS, 3, 8, 8, generator=generator)
        signals, outputs = [], []
        for epoch in range(num_epochs):
            self.sums.clear()
            self.model.train()
            for number in range(num_steps):
                size = 8 if number % 3 else 7
                rows_B = torch.randperm(NUM_ROWS, generator=generator)[:size]
                self.optimizer.lr.fill_(0.02 * (1 + number + epoch))
                batch = Batch(rows_B, images[rows_B], rows_B % 3)
                made = make(batch, None if self.weights_N is None else self.weights_N[rows_B])
                outputs.append([output.clone() for output in made])
            signals.append((self.accumulator.finish_epoch(), self.sums.read()))
        return signals, outputs

    def state(self):
        parts = {"model": self.model, "average": self.average.model, "optimizer": self.optimizer}
        return {
            f"{name}.{key}": tensor.clone()
            for name, part in parts.items()
            for key, tensor in part.state_dict().items()
        }


def assert_same(one, other):
    (signals, outputs), (other_signals, other_outputs) = one, other
    torch.testing.assert_close(outputs, other_outputs, rtol=0, atol=0)
    for (epoch, reading), (other_epoch, other_reading) in zip(signals, other_signals, strict=True):
        assert reading == other_reading
        torch.testing.assert_close(
            torch.from_numpy(epoch.value_N), torch.from_numpy(other_epoch.value_N), rtol=0, atol=0,
            equal_nan=True,
        )  # fmt: skip
        assert (epoch.predicted_label_N == other_epoch.predicted_label_N).all()


@pytest.mark.parametrize("settings", [{}, {"weighs": True}], ids=["alike", "weighted"])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_captured_steps_are_the_plain_ones(monkeypatch, settings, num_parts):
    """To the bit: weights, their average, momenta, values, sums, and what each step returns."""
    plain, captured = Training(**settings), Training(**settings)
    plain.num_parts = captured.num_parts = num_parts
    kind = replace_cuda(monkeypatch)
    steps = CapturedSteps(captured.make, CPU)
    expected = plain.train(plain.make)
    assert_same(captured.train(steps), expected)
    torch.testing.assert_close(captured.state(), plain.state(), rtol=0, atol=0)
    assert steps.failure is None and kind.num_replays == 2 * 12 - 2 * WARM_UP_STEPS


def test_what_cannot_be_captured_is_made_plainly_and_says_why(monkeypatch):
    plain, captured = Training(), Training()
    replace_cuda(monkeypatch)

    def make(batch, weights_B):
        outputs = captured.make(batch, weights_B)
        float(outputs[0].sum())  # waits for the device
        return outputs

    steps = CapturedSteps(make, CPU)
    assert_same(captured.train(steps), plain.train(plain.make))
    torch.testing.assert_close(captured.state(), plain.state(), rtol=0, atol=0)
    assert steps.failure == NOT_PERMITTED


class Abandoned:
    """Garbage as a run leaves it that was given up: in a cycle, and with a graph that CUDA frees."""

    def __init__(self, freed):
        self.itself, self.freed = self, freed

    def __del__(self):
        self.freed.append(torch.utils._python_dispatch._get_current_dispatch_mode() is not None)


def test_no_graph_of_an_earlier_run_is_freed_during_a_capture(monkeypatch):
    """It would end the capture. The step makes so much garbage that Python would collect it."""
    replace_cuda(monkeypatch)
    freed = []

    def step(batch, weights_B):
        Abandoned(freed)
        assert len([[] for _ in range(5000)]) == 5000
        return torch.zeros(len(batch.indices_B), 3), torch.zeros(len(batch.indices_B), 2)

    steps = CapturedSteps(step, CPU)
    rows_B = torch.arange(4)
    batch = Batch(rows_B, torch.zeros(4, 3), rows_B)
    before = gc.get_threshold()
    gc.set_threshold(100, 2, 2)
    try:
        for _ in range(2 * WARM_UP_STEPS):
            steps(batch, None)
    finally:
        gc.set_threshold(*before)
    assert steps.failure is None and gc.isenabled()
    gc.collect()
    assert len(freed) == WARM_UP_STEPS + 1 and not any(freed)


def test_without_memory_to_capture_the_step_is_for_the_caller_to_split(monkeypatch):
    captured, expected = Training(), Training()
    replace_cuda(monkeypatch)
    num_calls = 0

    def make(batch, weights_B):
        nonlocal num_calls
        num_calls += 1
        if num_calls == WARM_UP_STEPS + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return captured.make(batch, weights_B)

    steps, failures = CapturedSteps(make, CPU), []

    def split(batch, weights_B):
        try:
            return steps(batch, weights_B)
        except torch.OutOfMemoryError as error:
            failures.append(str(error))
        return steps(batch, weights_B)

    assert_same(captured.train(split), expected.train(expected.make))
    assert failures == ["CUDA out of memory"] and steps.failure is None


def test_graphs_of_other_sizes_are_freed_before_a_step_is_split(monkeypatch):
    """The second size comes when the first is captured; its first step finds no memory."""
    captured, expected = Training(), Training()
    kind = replace_cuda(monkeypatch)
    failed = []

    def make(batch, weights_B):
        if kind.num_replays and not failed:
            failed.append(len(batch.indices_B))
            raise RuntimeError("CUDA error: out of memory")
        return captured.make(batch, weights_B)

    steps = CapturedSteps(make, CPU)
    assert_same(captured.train(steps), expected.train(expected.make))
    assert failed == [7] and steps.failure is None and kind.num_replays > 5


@pytest.mark.parametrize("part", ["accumulator", "optimizer", "backward"])
def test_a_step_without_memory_changes_no_weights_and_can_be_made_again(monkeypatch, part):
    expected, failing = Training(), Training()
    num_calls = 0

    def fails_at_first(work):
        def run(*args, **named):
            nonlocal num_calls
            num_calls += 1
            if num_calls == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return work(*args, **named)

        return run

    place, name = {
        "accumulator": (ValueAccumulator, "update"),
        "optimizer": (NesterovSGD, "step"),
        "backward": (torch.Tensor, "backward"),
    }[part]
    monkeypatch.setattr(place, name, fails_at_first(getattr(place, name)))
    momentum = failing.model.backbone.norm.momentum

    def make(batch, weights_B):
        before = failing.state()
        try:
            return failing.make(batch, weights_B)
        except torch.OutOfMemoryError:
            after = failing.state()
            moved = {key for key in before if not torch.equal(before[key], after[key])}
            assert all("running_" in key or "num_batches" in key for key in moved)
            failing.model.load_state_dict(
                {key.removeprefix("model."): before[key] for key in before if key.startswith("model.")}
            )
            return failing.make(batch, weights_B)

    assert momentum == 0.1
    assert_same(failing.train(make), expected.train(expected.make))
    torch.testing.assert_close(failing.state(), expected.state(), rtol=0, atol=0)


def test_the_first_bad_loss_of_an_epoch_is_told():
    sums = Sums(CPU)
    for loss in (0.5, float("nan"), float("inf"), 0.25):
        sums.load_state_dict(sums.after(torch.tensor(loss), torch.tensor(2.0), torch.tensor(3)))
    reading = sums.read()
    assert (reading.bad_step, reading.num_right, reading.loss_sum) == (2, 12, 8.0)
    assert reading.bad_loss != reading.bad_loss
    sums.clear()
    sums.load_state_dict(sums.after(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1)))
    assert sums.read().bad_step == 0


def test_gradients_have_the_strides_of_their_weights(monkeypatch):
    """As the kernels of CUDA devices want them; those of 1x1 convolutions come with others at times."""
    seen = []

    def watched(parameters, gradients, momenta, **settings):
        seen.append([[tensor.stride() for tensor in group] for group in (parameters, gradients, momenta)])
        sgd(parameters, gradients, momenta, **settings)

    sgd = optimizers.sgd
    monkeypatch.setattr(optimizers, "sgd", watched)
    torch.manual_seed(0)
    model = nn.Conv2d(4, 3, 1).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    ours = NesterovSGD(model.parameters(), recipe(), CPU)
    ours.lr.fill_(0.1)
    for _ in range(3):
        gradient = torch.randn(3, 4, 1, 1)
        assert gradient.stride() != model.weight.stride()
        for layer in (model, plain):
            layer.weight.grad, layer.bias.grad = gradient.clone(), torch.ones(3)
        ours.step()
        theirs.step()
        torch.testing.assert_close(model.weight, plain.weight)
    assert all(parameters == gradients == momenta for parameters, gradients, momenta in seen)


def test_float16_with_a_scaled_loss_trains_as_with_the_scaler_of_torch():
    """Gradients overflow at the first scale, so that steps are left out and the scale falls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    plain = copy.deepcopy(model)
    settings = recipe()
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scaler = torch.amp.GradScaler("cpu")
    ours, scale = NesterovSGD(model.parameters(), settings, CPU), LossScale(CPU)
    ours.lr.fill_(0.1)
    scales = []
    for number in range(8):
        inputs, labels = torch.randn(16, 6) * (1e6 if number in (2, 5) else 1), torch.arange(16) % 3
        theirs.zero_grad()
        scaler.scale(functional.cross_entropy(plain(inputs), labels)).backward()
        if number == 2:
            plain[0].weight.grad[0, 0] = torch.inf
        scaler.step(theirs)
        scaler.update()
        ours.clear_gradients()
        (functional.cross_entropy(model(inputs), labels) * scale.value).backward()
        if number == 2:
            model[0].weight.grad[0, 0] = torch.inf
        ours.step(scale)
        scales.append(float(scale.value))
        assert scales[-1] == scaler.get_scale()
        for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(weight, expected)
    assert len(set(scales)) > 1

"""The CUDA path: on a GPU where there is one; elsewhere as far as fake and meta tensors can tell.

FakeTensorMode runs every operation on shapes, types and devices without memory or arithmetic, and raises when
tensors of two devices meet, as CUDA would.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from chgval.data.loader import Batch
from chgval.training import optimizers
from chgval.training.loop import forward_all
from chgval.training.models import CIFARResNet, InputShape, SplitModel, build_model
from chgval.training.optimizers import NesterovSGD
from chgval.training.recipe import Recipe
from chgval.training.step import Step, Sums, WeightAverage
from chgval.valuation.accumulator import ValueAccumulator
from chgval.valuation.closed_form import Factors, chg_values, coalition_sums, hardness_values
from tests import cuda_checks


def test_closed_form_stays_on_the_device_of_its_factors():
    with FakeTensorMode():
        factors = Factors(torch.randn(9000, 5, device="cuda"), torch.randn(9000, 7, device="cuda"))
        sums = coalition_sums(factors)
        values_N = chg_values(factors, sums + sums, target_CF=torch.zeros(5, 8, device="cuda"))
        hardness_N = hardness_values(torch.rand(9000, device="cuda"))
        assert sums.total_CF.device.type == "cuda"
        for values in (values_N, hardness_N):
            assert values.device.type == "cuda" and values.dtype == torch.float64 and values.shape == (9000,)


def test_a_mix_of_devices_raises():
    with FakeTensorMode():
        factors = Factors(torch.randn(90, 5, device="cuda"), torch.randn(90, 7, device="cuda"))
        with pytest.raises(RuntimeError, match="device"):
            chg_values(factors, target_CF=torch.zeros(5, 8))


def test_accumulator_takes_a_step_in_without_leaving_the_device():
    with FakeTensorMode():
        labels_N = torch.zeros(5000, dtype=torch.int64, device="cuda")
        accumulator = ValueAccumulator(labels_N, 5, 7, utility="chg")
        accumulator.update(
            torch.arange(100, device="cuda"),
            torch.randn(100, 5, device="cuda", dtype=torch.bfloat16),
            torch.randn(100, 7, device="cuda", dtype=torch.bfloat16),
        )
        signals, factors = accumulator._close_epoch()
        assert {figure.device.type for figure in signals.values()} == {"cuda"}
        sums = coalition_sums(factors)
        assert accumulator._values(factors, signals["loss"], sums).device.type == "cuda"


class FakeLoader:
    """Batches of a device that need not exist."""

    def __init__(self, device):
        self.device = device

    def plain_batches(self):
        for start in (0, 64):
            indices_B = torch.arange(start, start + 64, device=self.device)
            inputs_B = torch.randn(64, 3, 32, 32, device=self.device)
            labels_B = torch.zeros(64, dtype=torch.int64, device=self.device)
            yield Batch(indices_B, inputs_B.to(memory_format=torch.channels_last), labels_B)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_valuation_pass_runs_on_cuda_tensors_and_a_mix_up_raises():
    with FakeTensorMode():
        with torch.device("cuda"):
            network = CIFARResNet(1, 10)
            model = SplitModel(network, network.fc)
            network.fc = torch.nn.Identity()
            labels_N = torch.zeros(128, dtype=torch.int64)
        accumulator = ValueAccumulator(labels_N, 10, 64)
        forward_all(model, FakeLoader("cuda"), accumulator.update)
        assert accumulator._close_epoch()[0]["loss"].device.type == "cuda"
        with pytest.raises(RuntimeError, match="device"):
            forward_all(model, FakeLoader("cpu"), accumulator.update)


def recipe_of_step():
    return Recipe(
        epochs=1, batch_size=64, lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="cosine", augment="none"
    )


@pytest.fixture
def fused_on_meta(monkeypatch):
    """The optimizer's kernel for the meta device, which torch lacks: it changes tensors in place only."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_sgd_.tensor_lr", lambda *_, **__: None, "Meta")
    monkeypatch.setattr(optimizers, "FUSED", ("meta",))
    yield
    library._destroy()


@pytest.mark.parametrize("arch", ["resnet8", "resnet18"])
def test_a_training_step_runs_on_the_meta_device(arch, fused_on_meta):
    """On shapes alone: the step of the trainer itself, in two parts, with weights of samples."""
    model = build_model(arch, 10, InputShape(32), torch.Generator().manual_seed(0))
    model = model.to("meta", memory_format=torch.channels_last)
    device = torch.device("meta")
    optimizer = NesterovSGD(model.parameters(), recipe_of_step(), device)
    accumulator = ValueAccumulator(
        torch.zeros(64, dtype=torch.int64, device="meta"), 10, model.head.in_features
    )
    images = torch.empty(64, 3, 32, 32, device="meta", dtype=torch.uint8)
    labels_B = torch.zeros(64, dtype=torch.int64, device="meta")
    inputs = images.to(torch.float32, memory_format=torch.channels_last)
    batch = Batch(torch.arange(64, device="meta"), inputs, labels_B)
    average = WeightAverage(model, 10)
    step = Step(model, optimizer, Sums(device), average=average, observer=accumulator)
    logits_BC, features_BD = step(batch, torch.ones(64, device="meta"), 2)
    assert logits_BC.shape == (64, 10)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert features_BD.shape == (64, model.head.in_features)


def test_bfloat16_rounds_values_by_what_three_digits_allow(image_folder):
    """On the CPU; nine layers of relative errors of 1/256 each, at most added up."""
    assert 0 < cuda_checks.error_of(image_folder, "cpu", "bfloat16") < 9 / 256


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", cuda_checks.CHECKS, ids=lambda check: check.__name__)
def test_on_a_cuda_device(check, image_folder):
    check(image_folder)

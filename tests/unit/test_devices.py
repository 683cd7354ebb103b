"""Which device is taken, what it computes in, and how a whole training uses it."""

import numpy as np
import pytest
import torch
from torch import nn

from chgval.config import DataConfig, TrainConfig, ValueConfig
from chgval.data.dataset import Dataset, Embeddings, PixelImages
from chgval.errors import SettingsError
from chgval.runs.session import (
    device_for,
    make_trainer,
    make_valuing,
    prepare,
    prepared,
    read_dataset,
    settings_shown,
)
from chgval.training import devices
from chgval.training.devices import choose_precision, device_settings, has_room, kept_bytes, pick_device
from chgval.training.loop import Trainer, forward_all
from chgval.training.models import InputShape, SplitModel, build_model
from chgval.training.records import EpochRecord, PlainRecord
from tests.pictures import write_folder
from tests.recorded_graph import replace_cuda


@pytest.fixture
def a_gpu(monkeypatch):
    """This machine, as if it had a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def dataset_of(content, num_classes=10):
    count = len(content.vectors_ND) if isinstance(content, Embeddings) else len(content.pixels_N3SS)
    return Dataset(
        source="data",
        ids=[str(row) for row in range(count)],
        labels_N=np.arange(count) % num_classes,
        class_names=[str(label) for label in range(num_classes)],
        content=content,
        fingerprint="",
    )


def images(count, side):
    return dataset_of(PixelImages(np.zeros((count, 3, side, side), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("dataset", "settings", "expected"),
    [
        (images(1797, 8), {}, "cpu"),
        (images(1797, 8), {"device": "cuda"}, "cuda"),
        (images(1797, 8), {"epochs": 300}, "cuda"),
        (images(1797, 8), {"arch": "resnet18"}, "cuda"),
        (images(1000, 32), {}, "cuda"),
        (images(1000, 32), {"device": "cpu"}, "cpu"),
        (dataset_of(Embeddings(np.zeros((10_000, 64), dtype=np.float32))), {}, "cpu"),
        (dataset_of(Embeddings(np.zeros((10_000, 1024), dtype=np.float32)), 200), {}, "cuda"),
    ],
)
def test_small_data_stay_on_the_cpu_unless_the_user_says(a_gpu, dataset, settings, expected):
    assert device_for(TrainConfig(**settings), dataset).type == expected


def test_without_a_gpu_the_cpu_is_taken_and_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(SettingsError, match="--device cuda:3: this machine has 0 CUDA devices"):
        pick_device("cuda:3")
    with pytest.raises(SettingsError, match="--device mps: not available"):
        pick_device("mps")


def test_that_a_gpu_is_not_used_is_told(a_gpu):
    config = TrainConfig(epochs=1)
    dataset = read_dataset(DataConfig(source="builtin:digits"), config)
    with prepared(DataConfig(source="builtin:digits"), config, dataset) as run:
        told = dict(settings_shown(run, config))
        assert told["device"] == "cpu, done before cuda would be ready; --device cuda takes that"
        assert told["model"].endswith("on cpu, float32")
        assert "device" not in dict(settings_shown(run, TrainConfig(device="cpu")))


@pytest.mark.parametrize(
    ("name", "device", "capability", "batch_norm", "expected"),
    [
        ("auto", "cpu", None, True, "bfloat16"),
        ("float32", "cpu", None, True, "float32"),
        ("auto", "mps", None, True, "float32"),
        ("auto", "cuda", (9, 0), True, "float16"),
        ("auto", "cuda", (9, 0), False, "bfloat16"),
        ("auto", "cuda", (7, 5), True, "float16"),
        ("auto", "cuda", (7, 5), False, "float16"),
        ("auto", "cuda", (6, 1), True, "float32"),
        ("bfloat16", "cpu", None, True, "bfloat16"),
        ("tf32", "cuda", (8, 0), True, "tf32"),
        ("float32", "cuda", (9, 0), True, "float32"),
    ],
)
def test_numbers_are_those_that_the_device_has(name, device, capability, batch_norm, expected):
    found = choose_precision(name, device, capability, has_batch_norm=batch_norm, gains_on_cpu=True)
    assert found == expected


@pytest.mark.parametrize(
    ("has_amx", "arch", "size", "expected"),
    [
        (True, "resnet8", 32, "bfloat16"),
        (True, "resnet18", 24, "bfloat16"),
        (True, "resnet8", 16, "float32"),
        (True, "mobilenet_v3_small", 32, "float32"),  # convolutions of a channel each
        (True, "vgg11", 32, "float32"),  # no batch normalisation
        (False, "resnet8", 32, "float32"),
    ],
)
def test_a_cpu_takes_bfloat16_where_it_is_faster(tmp_path, monkeypatch, has_amx, arch, size, expected):
    monkeypatch.setattr(devices, "has_amx", lambda: has_amx)
    data = DataConfig(source=str(write_folder(tmp_path / "images", 8, size)))
    config = TrainConfig(epochs=1, arch=arch, device="cpu")
    with prepared(data, config, read_dataset(data, config)) as run:
        assert run.precision == expected
        assert (run.model.backbone_dtype == torch.bfloat16) is (expected == "bfloat16")


@pytest.mark.parametrize(
    ("name", "device", "capability", "has"),
    [
        ("bfloat16", "cuda", (7, 5), "float32, float16"),
        ("tf32", "cuda", (7, 0), "float32, float16"),
        ("float16", "cpu", None, "float32, bfloat16"),
        ("bfloat16", "mps", None, "float32"),
    ],
)
def test_numbers_that_a_device_has_not_are_refused(name, device, capability, has):
    with pytest.raises(SettingsError, match=f"--precision {name}: this {device} device has only {has}"):
        choose_precision(name, device, capability, has_batch_norm=True, gains_on_cpu=True)


def test_what_a_step_keeps_of_an_image():
    """By hand: what each layer needs for its gradients, and each tensor once."""
    size = 10
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten())
    model = SplitModel(backbone, nn.Linear(4 * size**2, 5))
    assert kept_bytes(model, size) == 4 * (3 + 4) * size**2  # the images, and what the ReLU returns
    model.backbone_dtype = torch.bfloat16
    assert kept_bytes(model, size) == 2 * (3 + 4) * size**2


@pytest.mark.parametrize("arch", ["resnet8", "mobilenet_v3_small", "vit_b_16", "densenet121"])
def test_what_a_step_keeps_is_what_autograd_holds_then(arch):
    """On the CPU: all storages that its graph holds, but for weights; attention keeps less there."""
    model = build_model(arch, 3, InputShape(64), torch.Generator().manual_seed(0)).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        model(torch.rand(2, 3, 64, 64))
    expected = sum(t.untyped_storage().nbytes() for pointer, t in held.items() if pointer not in own) / 2
    assert kept_bytes(model, 64) == pytest.approx(expected, rel=0.2)


def test_a_step_that_does_not_fit_is_refused_before_it_is_killed(image_folder, monkeypatch):
    data, config = DataConfig(source=str(image_folder)), TrainConfig(epochs=1, device="cpu")
    dataset = read_dataset(data, config)
    monkeypatch.setattr(devices, "total_memory", lambda: 10**5)
    with prepared(data, config, dataset):  # so little is not looked at
        pass
    monkeypatch.setattr(devices, "FITTING_PIXELS", 8 * 12**2 - 1)
    told = "a batch of 8 images of 12 px needs about 0 GiB of memory, and there are 0; pass a smaller"
    with pytest.raises(SettingsError, match=told), prepared(data, config, dataset):
        pass
    monkeypatch.setattr(devices, "total_memory", lambda: None)
    with prepared(data, config, dataset) as run:
        assert run.recipe.batch_size == 8


def test_settings_of_cudnn_are_put_back():
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    for precision, tf32 in (("float32", False), ("tf32", True)):
        with device_settings(torch.device("cuda"), precision):
            assert (cudnn.benchmark, cudnn.allow_tf32) == (True, tf32)
        assert (cudnn.benchmark, cudnn.allow_tf32) == before
    with device_settings(torch.device("cpu"), "float32"):
        assert (cudnn.benchmark, cudnn.allow_tf32) == before


def test_passes_without_training_search_for_no_kernels(image_folder):
    """A search takes longer than such a pass; training earns it back."""
    data, config = DataConfig(source=str(image_folder)), TrainConfig(epochs=1, arch="resnet8")
    seen = []
    with prepared(data, config, read_dataset(data, config)) as run:
        run.model.register_forward_hook(
            lambda *_: seen.append((run.model.training, torch.backends.cudnn.benchmark))
        )
        with device_settings(torch.device("cuda"), "float32"):
            list(make_trainer(run).records())
            forward_all(run.model, run.loader, lambda *_: None)
            assert torch.backends.cudnn.benchmark
    assert set(seen) == {(True, True), (False, False)}


def test_what_fits_is_what_the_device_has_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 4000))
    cuda = torch.device("cuda")
    assert has_room(cuda, 250, 0.25) and not has_room(cuda, 251, 0.25)
    assert has_room(torch.device("cpu"), 10**15, 0.25) and not has_room(torch.device("mps"), 1, 0.25)


def values_of(image_folder, **settings):
    config = ValueConfig(
        data=DataConfig(source=str(image_folder)),
        train=TrainConfig(arch="resnet8", epochs=3, batch_size=6, device="cpu", **settings),
    )
    run = prepare(config.data, config.train, read_dataset(config.data, config.train))
    accumulator, average, trainer = make_valuing(run, config)
    records = list(trainer.records())
    return records, accumulator.run_signals().value_N, average.model.state_dict()


def losses_of(records):
    return [record.loss for record in records if isinstance(record, EpochRecord)]


def test_a_whole_training_of_captured_steps_is_the_plain_one(image_folder, monkeypatch):
    """Loader, loop, accumulator and averages, to the bit; batches of 40 samples by 6 have two sizes."""
    plain, values_N, weights = values_of(image_folder)
    kind = replace_cuda(monkeypatch)
    monkeypatch.setattr(Trainer, "_on_cuda", True)
    captured, found_N, found = values_of(image_folder)
    np.testing.assert_array_equal(found_N, values_N)
    torch.testing.assert_close(found, weights, rtol=0, atol=0)
    assert not [record for record in captured if isinstance(record, PlainRecord)]
    losses, expected = (losses_of(records) for records in (captured, plain))
    assert losses == expected and kind.num_replays == 3 * 7 - 2 * 3


def test_a_network_that_cannot_be_captured_is_told_once_and_trained_all_the_same(image_folder, monkeypatch):
    forward = SplitModel.forward

    def looks_at_its_data(self, inputs):
        float(inputs.sum())
        return forward(self, inputs)

    _, values_N, _ = values_of(image_folder)
    replace_cuda(monkeypatch)
    monkeypatch.setattr(Trainer, "_on_cuda", True)
    monkeypatch.setattr(SplitModel, "forward", looks_at_its_data)
    records, found_N, _ = values_of(image_folder)
    told = [record for record in records if isinstance(record, PlainRecord)]
    assert [record.reason for record in told] == ["operation not permitted when stream is capturing"]
    np.testing.assert_array_equal(found_N, values_N)

import pickle

import pytest
import safetensors.torch
import torch
import torchvision
from safetensors.torch import save_file

from chgval.errors import ModelError
from chgval.training.models import SAFE_TORCH, InputShape, build_model, image_archs

reads_pickles = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH,
    reason="with this torch, weights are read from safetensors only",
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def count_convs(model):
    return sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())


@pytest.mark.parametrize(
    ("arch", "layers", "parameters"), [("resnet8", 8, 75_290), ("resnet20", 20, 269_722)]
)
def test_cifar_resnets_have_the_published_size(arch, layers, parameters):
    """He et al. 2016, table 6: 6n + 2 layers; ResNet-20 has 0.27 M parameters."""
    model = build_model(arch, 10, InputShape(32), generator())
    assert count_convs(model) + 1 == layers
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    "arch", ["resnet18", "mobilenet_v3_small", "vit_b_32", "vgg11_bn", "densenet121", "swin_t"]
)
def test_split_model_returns_what_the_whole_torchvision_model_computes(arch, tmp_path):
    """Same weights, same images: torchvision's own logits, and its last linear layer's own input."""
    whole = torchvision.models.get_model(arch, weights=None, num_classes=7).eval()
    safetensors.torch.save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    model = build_model(arch, 7, InputShape(224), generator(), str(tmp_path / "weights.safetensors")).eval()

    inputs_of_linear = []
    last = [m for m in whole.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.register_forward_hook(lambda _m, args, _out: inputs_of_linear.append(args[0]))
    images = torch.randn(2, 3, 224, 224, generator=generator(1))
    with torch.no_grad():
        logits, features = model(images)
        torch.testing.assert_close(logits, whole(images))
    torch.testing.assert_close(features, inputs_of_linear[0])
    torch.testing.assert_close(model.head(features), logits)


def test_small_images_keep_their_resolution():
    small = build_model("resnet18", 10, InputShape(32), generator())
    assert small.small_stem
    shapes = []
    small.backbone.layer1.register_forward_hook(lambda _m, _a, out: shapes.append(out.shape[2:]))
    small(torch.zeros(2, 3, 32, 32))
    assert shapes == [(32, 32)]
    large = build_model("resnet18", 10, InputShape(65), generator())
    assert not large.small_stem and large.backbone.conv1.stride == (2, 2)


def test_weights_come_from_the_generator_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    first, again, other = (build_model("resnet18", 3, InputShape(32), generator(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not torch.equal(first.backbone.conv1.weight, other.backbone.conv1.weight)


def test_head_stays_in_float32_behind_a_half_precision_backbone():
    model = build_model("resnet8", 10, InputShape(32), generator())
    model.backbone.to(torch.bfloat16)
    logits, features = model(torch.randn(4, 3, 32, 32, generator=generator()).bfloat16())
    assert logits.dtype == features.dtype == torch.float32
    torch.testing.assert_close(logits, features @ model.head.weight.T + model.head.bias)


@reads_pickles
def test_pretrained_weights_for_other_classes_keep_the_new_head(tmp_path):
    whole = torchvision.models.resnet18(num_classes=1000)
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    model = build_model("resnet18", 5, InputShape(224), generator(), str(tmp_path / "w.pt"))
    assert torch.equal(model.backbone.conv1.weight, whole.conv1.weight)
    assert model.head.weight.shape == (5, 512)


class Trap:
    def __reduce__(self):
        return (print, ("the pickle ran",))


@reads_pickles
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, capsys):
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"conv.weight": Trap()}, protocol=2))
    with pytest.raises(ModelError, match="cannot be read as tensors"):
        build_model("resnet8", 5, InputShape(32), generator(), str(tmp_path / "w.pt"))
    torch.save({"conv.weight": Trap()}, tmp_path / "zip.pt")
    with pytest.raises(ModelError, match="cannot be read as tensors"):
        build_model("resnet8", 5, InputShape(32), generator(), str(tmp_path / "zip.pt"))
    assert "the pickle ran" not in capsys.readouterr().out


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ModelError, match="--arch resnet9: no such model; choose resnet8, resnet20"):
        build_model("resnet9", 5, InputShape(32), generator())
    with pytest.raises(ModelError, match="linear: a model for embeddings, but the data are images"):
        build_model("linear", 5, InputShape(32), generator())
    with pytest.raises(ModelError, match="alexnet does not take images of 32 pixels"):
        build_model("alexnet", 5, InputShape(32), generator())
    with pytest.raises(ModelError, match="squeezenet1_0: has no linear last layer"):
        build_model("squeezenet1_0", 5, InputShape(224), generator())
    with pytest.raises(ModelError, match="vit_b_16 cannot be built for images of 33 pixels"):
        build_model("vit_b_16", 5, InputShape(33), generator())
    with pytest.raises(ModelError, match="resnet8: not a model for embeddings; choose one of linear, mlp"):
        build_model("resnet8", 5, InputShape(32, is_embedding=True), generator())
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"missing: conv.weight, .* unknown: a"):
        build_model("resnet8", 5, InputShape(32), generator(), str(tmp_path / "w.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"{}")
    with pytest.raises(ModelError, match=r"broken\.safetensors: cannot be read as tensors"):
        build_model("resnet8", 5, InputShape(32), generator(), str(tmp_path / "broken.safetensors"))
    with pytest.raises(ModelError, match=r"absent\.pt: no such file"):
        build_model("resnet8", 5, InputShape(32), generator(), str(tmp_path / "absent.pt"))


@reads_pickles
def test_weights_are_taken_out_of_what_trainings_keep(tmp_path):
    """Checkpoints hold more than weights, and parallel models put a prefix before their names."""
    whole, shape = torchvision.models.resnet18(num_classes=5).state_dict(), InputShape(96)
    parallel = {f"module.{name}": value for name, value in whole.items()}
    for kept in (whole, parallel, {"epoch": 1, "state_dict": parallel}, {"model": whole}):
        torch.save(kept, tmp_path / "w.pt")
        found = build_model("resnet18", 5, shape, generator(), str(tmp_path / "w.pt"))
        assert torch.equal(found.backbone.conv1.weight, whole["conv1.weight"])
        assert torch.equal(found.head.weight, whole["fc.weight"])


@reads_pickles
def test_files_that_are_no_state_dict_are_named(tmp_path):
    for number, junk in enumerate((b"aaaa", b".", b"\x80\x02.", b"")):
        (tmp_path / f"{number}.pt").write_bytes(junk)
        with pytest.raises(ModelError, match="cannot be read as tensors"):
            build_model("resnet8", 5, InputShape(32), generator(), tmp_path / f"{number}.pt")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pt")
    with pytest.raises(ModelError, match="expected a state dict"):
        build_model("resnet8", 5, InputShape(32), generator(), str(tmp_path / "numbered.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="expected a state dict"):
        build_model("resnet8", 5, InputShape(32), generator(), str(tmp_path / "list.pt"))


def test_every_listed_name_is_a_torchvision_classifier_or_ours():
    names = image_archs()
    assert {"resnet8", "resnet20", "resnet50", "vit_b_16", "efficientnet_b0"} <= set(names)
    assert not any("rcnn" in name or "raft" in name or "deeplab" in name for name in names)


def test_a_torch_that_weights_can_run_code_in_reads_safetensors_only(tmp_path, monkeypatch):
    whole = torchvision.models.resnet18(num_classes=3)
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    shape, generator = InputShape(96), torch.Generator()
    with pytest.raises(ModelError, match=r"can be made to run code by such a file .* upgrade torch to 2\.10"):
        build_model("resnet18", 3, shape, generator, tmp_path / "w.pt")
    assert build_model("resnet18", 3, shape, generator, tmp_path / "w.safetensors").head.out_features == 3

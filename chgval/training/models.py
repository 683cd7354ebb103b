"""Models that return (logits, last-layer inputs), whatever their architecture.

Every classifier is split at its last linear layer: the backbone ends where that layer begins, the head is the
layer itself. So nothing needs hooks, and the head can run in float32 while the backbone runs in bfloat16.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from chgval.errors import ModelError, first_line

# Images up to this side keep their resolution in the first layers (He et al. 2016, section 4.2).
SMALL_IMAGE_PIXELS = 64

IMAGE_ARCHS_OF_CHGVAL = ("resnet8", "resnet20")
EMBEDDING_ARCHS = ("linear", "mlp")
MLP_WIDTH = 256
# From here on, reading a state dict with weights_only runs no code of it.
SAFE_TORCH = (2, 10)
# Side of the images that most networks of torchvision are made for.
USUAL_SIZE = 224
# Weights of the auxiliary classifiers of GoogLeNet and Inception begin so.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# What torch's models for several devices put before the name of each weight.
PARALLEL_PREFIX = "module."


@dataclass(frozen=True, slots=True)
class InputShape:
    """What a model is fed: images of 3 x size x size, or embeddings of `size` numbers."""

    size: int
    is_embedding: bool = False

    def example(self, batch: int) -> Tensor:
        """Return a batch of zeros of this shape."""
        return torch.zeros((batch, self.size) if self.is_embedding else (batch, 3, self.size, self.size))


class SplitModel(nn.Module):
    """A classifier split at its last linear layer.

    Attributes:
        backbone: inputs -> last-layer inputs, shape (B, D).
        head: last-layer inputs -> logits, shape (B, C).
        head_name: of the layer in the network that was split.
        small_stem: whether the first layers were exchanged for those for small images.
        backbone_dtype: type that the backbone computes in; None is that of its weights, and of passes without
            training instead of float16.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Linear, *, head_name: str = "head", small_stem: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.head_name = head_name
        self.small_stem = small_stem
        self.backbone_dtype: torch.dtype | None = None

    def network_state(self) -> dict[str, Tensor]:
        """Return the weights of the network that was split, in its own names, on the host."""
        state = {**self.backbone.state_dict(), **self.head.state_dict(prefix=f"{self.head_name}.")}
        return {name: tensor.cpu().contiguous() for name, tensor in state.items()}

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logits of shape (B, C), last-layer inputs of shape (B, D)), both in the head's type.

        The backbone may run in bfloat16, the head does not: three digits are too few for logits whose
        differences the values are made of.
        """
        dtype = self.backbone_dtype
        if dtype == torch.float16 and not self.training:
            # Normalisation that has not seen the data yet leaves its range.
            dtype = None
        with nullcontext() if dtype is None else torch.autocast(inputs.device.type, dtype):
            features_BD = self.backbone(inputs)
        features_BD = features_BD.to(self.head.weight.dtype)
        return self.head(features_BD), features_BD


class CIFARResNet(nn.Module):
    """ResNet of 6n + 2 layers for small images, with parameter-free shortcuts.

    Source: He et al. 2016 (arXiv:1512.03385), section 4.2 and shortcut option A.

    Args:
        blocks_per_stage: n; 1 gives ResNet-8, 3 gives ResNet-20.
        num_classes: outputs of the last layer.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        width = 16
        for stage_width in (16, 32, 64):
            for _ in range(blocks_per_stage):
                blocks.append(_BasicBlock(width, stage_width))
                width = stage_width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (B, C), of images of shape (B, 3, H, W)."""
        hidden = self.blocks(functional.relu(self.norm(self.conv(images))))
        logits: Tensor = self.fc(hidden.mean((2, 3)))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.stride = 1 if width_in == width_out else 2
        self.extra_width = width_out - width_in
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)

    def forward(self, hidden: Tensor) -> Tensor:
        residual = functional.relu(self.norm1(self.conv1(hidden)))
        residual = self.norm2(self.conv2(residual))
        if self.extra_width:
            hidden = hidden[:, :, :: self.stride, :: self.stride]
            hidden = functional.pad(hidden, (0, 0, 0, 0, 0, self.extra_width))
        return functional.relu(residual + hidden)


# What comes before the names of networks of the timm library.
TIMM_PREFIX = "timm/"


def timm_library(arch: str) -> Any:
    """Return the timm library, if it is there and knows a network.

    Raises:
        ModelError: it is not installed, or does not.
    """
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            f"--arch {arch}: needs the timm library; install it with pip install 'chgval[timm]'."
        ) from error
    if not timm.is_model(arch.removeprefix(TIMM_PREFIX)):
        raise ModelError(f"--arch {arch}: timm {timm.__version__} has no such model; see timm.list_models().")
    return timm


def image_archs() -> list[str]:
    """Return the names of all architectures for images."""
    import torchvision  # takes longer to load than torch, and our own networks do without

    return [*IMAGE_ARCHS_OF_CHGVAL, *torchvision.models.list_models(module=torchvision.models)]


def check_names(arch: str | None, weights: str | None) -> None:
    """Raise ModelError for what can be known to be wrong before any data is read."""
    own = (*IMAGE_ARCHS_OF_CHGVAL, *EMBEDDING_ARCHS)
    is_timm = arch is not None and arch.startswith(TIMM_PREFIX)
    if arch is not None and is_timm:
        timm_library(arch)
    elif arch is not None and arch not in own and arch not in image_archs():
        raise ModelError(
            f"--arch {arch}: no such model; choose resnet8, resnet20 or a torchvision classification model "
            "such as resnet18, resnet50 or vit_b_16 (for embeddings: linear, mlp)."
        )
    if weights is None or Path(weights).is_file() or (is_timm and weights == "DEFAULT"):
        return
    if "." in weights or "/" in weights or Path(weights).exists():
        raise ModelError(f"--weights {weights}: no such file, or a folder.")
    if arch is not None:
        _named_weights(arch, weights)


def build_model(
    arch: str,
    num_classes: int,
    input_shape: InputShape,
    generator: torch.Generator,
    weights: str | None = None,
    *,
    small_stem: bool | None = None,
) -> SplitModel:
    """Build a classifier and split it at its last linear layer.

    Args:
        arch: a name of `image_archs` or EMBEDDING_ARCHS.
        num_classes: outputs of the last layer.
        input_shape: what the model will be fed.
        generator: the initial weights are drawn from it.
        weights: a safetensors file, or a state dict saved by torch.save, in the architecture's own names; or
            what torchvision calls its weights, such as DEFAULT. A last layer for another number of classes is
            left out.
        small_stem: whether the first layers are those for small images; None says so by the size.

    Raises:
        ModelError: no such architecture or file; it does not fit the input; the weights do not fit it.
    """
    check_names(arch, weights)
    # The layers draw their initial weights from the global generator; it is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        network = _build_network(arch, num_classes, input_shape)
        if small_stem is None:
            small_stem = not input_shape.is_embedding and input_shape.size <= SMALL_IMAGE_PIXELS
        has_small_stem = small_stem and _exchange_stem(network)
    if weights is not None:
        _fit_weights(network, read_weights(weights, arch), weights, arch, has_small_stem=has_small_stem)
    model = _split(network, arch)
    model.small_stem = has_small_stem
    _check_fit(model, arch, num_classes, input_shape)
    return model


def _build_network(arch: str, num_classes: int, input_shape: InputShape) -> nn.Module:
    if input_shape.is_embedding:
        if arch == "linear":
            return nn.Sequential(nn.Linear(input_shape.size, num_classes))
        if arch == "mlp":
            return nn.Sequential(
                nn.Linear(input_shape.size, MLP_WIDTH), nn.ReLU(), nn.Linear(MLP_WIDTH, num_classes)
            )
        raise ModelError(f"--arch {arch}: not a model for embeddings; choose one of linear, mlp.")
    if arch.startswith(TIMM_PREFIX):
        timm_network: nn.Module = timm_library(arch).create_model(
            arch.removeprefix(TIMM_PREFIX), num_classes=num_classes
        )
        return timm_network
    if arch == "resnet8":
        return CIFARResNet(1, num_classes)
    if arch == "resnet20":
        return CIFARResNet(3, num_classes)
    if arch in EMBEDDING_ARCHS:
        raise ModelError(
            f"--arch {arch}: a model for embeddings, but the data are images; pass --features-column, or "
            "choose resnet8, resnet20 or a torchvision classification model."
        )
    import torchvision

    builder = torchvision.models.get_model_builder(arch)
    options: dict[str, object] = {"weights": None, "num_classes": num_classes}
    parameters = inspect.signature(builder).parameters
    if "weights_backbone" in parameters:
        options["weights_backbone"] = None
    if arch in ("inception_v3", "googlenet"):  # their auxiliary classifiers would return more than logits
        options.update(aux_logits=False, init_weights=True)
    if arch.startswith("vit_"):
        options["image_size"] = input_shape.size
    try:
        network: nn.Module = builder(**options)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ModelError(
            f"--arch {arch} cannot be built for images of {input_shape.size} pixels "
            f"({str(error) or 'size not supported'}); pass another --image-size or --arch."
        ) from error
    return network


def _exchange_stem(network: nn.Module) -> bool:
    """Give the ResNets and DenseNets a 3x3 stride-1 first layer without pooling; say whether it was done."""
    if isinstance(network, CIFARResNet):
        return False
    import torchvision

    if isinstance(network, torchvision.models.ResNet):
        network.conv1 = _small_conv(network.conv1)
        network.maxpool = nn.Identity()
        return True
    if isinstance(network, torchvision.models.DenseNet):
        network.features.conv0 = _small_conv(network.features.conv0)
        network.features.pool0 = nn.Identity()
        return True
    return False


def _small_conv(conv: nn.Conv2d) -> nn.Conv2d:
    small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    return small


def read_weights(weights: str, arch: str) -> dict[str, Tensor]:
    """Return the state dict in a file, or of a name; that is fetched if it is not on this machine.

    Raises:
        ModelError: it cannot be read or fetched, or there is none of that name.
    """
    path = Path(weights)
    if not path.is_file():
        return _fetched(arch, weights)
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if path.suffix != ".safetensors" and version < SAFE_TORCH:
        raise ModelError(
            f"--weights {path}: torch {torch.__version__} can be made to run code by such a file (see "
            f"SECURITY.md); save it as .safetensors, or upgrade torch to {'.'.join(map(str, SAFE_TORCH))}."
        )
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise errors of any kind on files that are something else
        raise ModelError(
            f"--weights {path}: cannot be read as tensors ({type(error).__name__}); pass a safetensors file, "
            "or a state dict saved with torch.save(model.state_dict(), ...)."
        ) from error
    state = _unwrapped(state)
    if not state or not _is_state_dict(state):
        raise ModelError(
            f"--weights {path}: expected a state dict (names to tensors), found other contents "
            f"({type(state).__name__}); save model.state_dict()."
        )
    return state


def recognised_arch(state: dict[str, Tensor]) -> str | None:
    """Return the architecture whose weights, but for the last layer, are called and shaped so."""
    shapes = {name: tensor.shape for name, tensor in state.items() if not name.startswith(AUXILIARY)}
    for arch in image_archs():
        with suppress(ModelError), torch.device("meta"):  # some cannot be built without memory
            network = _build_network(arch, 2, InputShape(USUAL_SIZE))
            head_name = _head_name(network, arch)
            expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
            differing = [name for name in expected if shapes.get(name) != expected[name]]
            is_head_only = all(name.startswith(f"{head_name}.") for name in differing)
            if expected.keys() >= shapes.keys() and is_head_only:
                return arch
    return None


def _named_weights(arch: str, name: str) -> Any:
    """Return what torchvision has under that name.

    Raises:
        ModelError: it has none.
    """
    import torchvision

    if arch not in torchvision.models.list_models(module=torchvision.models):
        raise ModelError(f"--weights {name}: no such file, and --arch {arch} has no weights of a name.")
    known = torchvision.models.get_model_weights(arch)
    if name not in known.__members__:
        raise ModelError(
            f"--weights {name}: no such file; of --arch {arch} there are {', '.join(known.__members__)}."
        )
    return known[name]


def _fetched(arch: str, name: str) -> dict[str, Tensor]:
    """Return weights of that name: the only thing that is ever fetched, and only if it is not here yet.

    Raises:
        ModelError: there is no network, or the file is another than it should be.
    """
    if arch.startswith(TIMM_PREFIX):
        timm = timm_library(arch)
        try:
            with _quiet_retries():
                network = timm.create_model(arch.removeprefix(TIMM_PREFIX), pretrained=True)
        except Exception as error:  # of whatever timm fetches with
            raise ModelError(
                f"--weights {name}: cannot be fetched ({first_line(error)}). Where there is a network, save "
                f"timm.create_model('{arch.removeprefix(TIMM_PREFIX)}', pretrained=True).state_dict(), and "
                "pass that file as --weights."
            ) from error
        timm_state: dict[str, Tensor] = network.state_dict()
        return timm_state
    weights = _named_weights(arch, name)
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network; a file that is another
        here = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        raise ModelError(
            f"--weights {name}: cannot be fetched ({first_line(error)}). Fetch {weights.url} where there is "
            f"a network, and put it at {here}, or pass it as --weights."
        ) from error
    return state


@contextmanager
def _quiet_retries() -> Iterator[None]:
    """Say nothing of each attempt to fetch: where the last one fails, one message says so."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity  # what timm fetches with

    before = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(before)


def _fit_weights(
    network: nn.Module, state: dict[str, Tensor], weights: str, arch: str, *, has_small_stem: bool
) -> None:
    """Load a state dict, without a last layer for other classes.

    Raises:
        ModelError: it does not fit.
    """
    expected = network.state_dict()
    head_name = _head_name(network, arch)
    for name in (f"{head_name}.weight", f"{head_name}.bias"):
        if name in state and name in expected and state[name].shape != expected[name].shape:
            del state[name]
    # Classifiers that help to train a network are none of those that it is split into.
    state = {name: tensor for name, tensor in state.items() if not name.startswith(AUXILIARY)}
    missing = [name for name in expected if name not in state and not name.startswith(f"{head_name}.")]
    unknown = [name for name in state if name not in expected]
    wrong = [n for n in expected if n in state and state[n].shape != expected[n].shape]
    if missing or unknown or wrong:
        found = "; ".join(
            f"{title}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for title, names in (("missing", missing), ("unknown", unknown), ("other shape", wrong))
            if names
        )
        advice = "pass weights of this architecture, and the --image-size they were trained at."
        if has_small_stem and not missing and not unknown:
            advice = (
                f"images of up to {SMALL_IMAGE_PIXELS} pixels get a first layer of their own, which these "
                "weights have not. Pass --frozen, which enlarges images as the weights want them, or "
                "--image-size 224."
            )
        raise ModelError(f"--weights {weights}: does not fit --arch {arch} ({found}); {advice}")
    network.load_state_dict(state, strict=False)


def _unwrapped(state: Any) -> Any:
    """Return the weights out of what trainings keep beside them, without the prefix of parallel models."""
    if isinstance(state, dict):
        for name in ("state_dict", "model_state_dict", "model"):
            if state.get(name) and _is_state_dict(state[name]):
                state = state[name]
    if _is_state_dict(state) and all(name.startswith(PARALLEL_PREFIX) for name in state):
        state = {name.removeprefix(PARALLEL_PREFIX): value for name, value in state.items()}
    return state


def _is_state_dict(state: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    )


def _head_name(network: nn.Module, arch: str) -> str:
    names: list[str] = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ModelError(
            f"--arch {arch}: has no linear last layer, so it has no last-layer gradients; choose another."
        )
    return names[-1]


def _split(network: nn.Module, arch: str) -> SplitModel:
    name = _head_name(network, arch)
    head = network.get_submodule(name)
    assert isinstance(head, nn.Linear)  # noqa: S101 (that is how the name was found)
    parent_name, _, child_name = name.rpartition(".")
    setattr(network.get_submodule(parent_name), child_name, nn.Identity())
    return SplitModel(network, head, head_name=name)


def _check_fit(model: SplitModel, arch: str, num_classes: int, input_shape: InputShape) -> None:
    """Run one input through the model, to find a misfit before training does."""
    unfit = f"--arch {arch} does not take images of {input_shape.size} pixels"
    try:
        with torch.inference_mode():
            logits_BC, features_BD = model.eval()(input_shape.example(1))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ModelError(
            f"{unfit} ({first_line(error, longest=120)}); pass a larger --image-size or another --arch."
        ) from error
    finally:
        model.train()
    if logits_BC.shape != (1, num_classes) or features_BD.shape != (1, model.head.in_features):
        raise ModelError(
            f"--arch {arch}: its last linear layer does not return the logits, so it has no last-layer "
            "gradients; choose another."
        )

"""Pretrained networks: where their weights come from, and how images are prepared for them.

Shape legend: B images of a batch, D last-layer inputs, S side of the images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chgval.errors import ModelError
from chgval.training.models import (
    TIMM_PREFIX,
    InputShape,
    SplitModel,
    build_model,
    read_weights,
    recognised_arch,
    timm_library,
)

# Of a safetensors file that chgval wrote: what its network was, and was fed.
DESCRIPTION_KEY = "chgval"
DEFAULT_ARCH, DEFAULT_WEIGHTS = "resnet18", "DEFAULT"
# Side of the images, in pixels, that a description may name.
LARGEST_SIZE = 4096
# What a network is built with: its classes do not matter, only what is before them.
NUM_CLASSES = 1000
# Of the pixels, by colour.
Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Backbone:
    """A pretrained network up to its last linear layer.

    Attributes:
        arch: its architecture.
        model: in evaluation mode.
        prepare: makes a tensor of shape (3, S, S) of an RGB image.
        size: S.
    """

    arch: str
    model: SplitModel
    prepare: Callable[[Image.Image], Tensor]
    size: int

    @torch.inference_mode()
    def features(self, images_B3SS: Tensor) -> Tensor:
        """Return last-layer inputs, float32, shape (B, D)."""
        features_BD: Tensor = self.model.backbone(images_B3SS).float()
        return features_BD


def describe(
    arch: str, size: int, mean: list[float], std: list[float], *, small_stem: bool
) -> dict[str, str]:
    """Return what a file of weights says of its network, so that nobody needs to know it."""
    known = {"arch": arch, "image_size": size, "mean": mean, "std": std, "small_stem": small_stem}
    return {DESCRIPTION_KEY: json.dumps(known)}  # of several keys safetensors writes any one first


def described(weights: str | None) -> dict[str, Any]:
    """Return what a file of weights says of its network; nothing if it is not one that chgval wrote."""
    if weights is None or not weights.endswith(".safetensors") or not Path(weights).is_file():
        return {}
    try:
        with safe_open(weights, "pt") as file:
            found = json.loads((file.metadata() or {}).get(DESCRIPTION_KEY, "{}"))
    except (OSError, ValueError, SafetensorError):
        return {}  # whatever is wrong with it will be told when it is read
    return found if _is_as_written(found) else {}


def _is_as_written(known: Any) -> bool:
    """Say whether a description, which a stranger may have written, is one that `describe` makes."""
    if not isinstance(known, dict) or not isinstance(known.get("arch"), str):
        return False
    size, colours = known.get("image_size"), [known.get("mean"), known.get("std")]
    return (
        isinstance(size, int)
        and 0 < size <= LARGEST_SIZE
        and all(isinstance(part, list) and len(part) == 3 for part in colours)
        and all(isinstance(number, float) for part in colours for number in part or ())
        and all(number > 0 for number in colours[1] or ())
    )


def arch_of(weights: str | None) -> str | None:
    """Return the architecture that weights are of, if their file tells, or has the names of one.

    Raises:
        ModelError: the file cannot be read.
    """
    known = described(weights).get("arch")
    if known is None and weights is not None and Path(weights).is_file():
        return recognised_arch(read_weights(weights, ""))
    return known


def load_backbone(
    arch: str | None,
    weights: str | None,
    *,
    image_size: int | None,
    mean: Triple | None,
    std: Triple | None,
) -> Backbone:
    """Return a pretrained network, and how images are prepared for it.

    Args:
        arch: its architecture; None takes that which the file says, or a small one.
        weights: a file, or a name of torchvision's such as DEFAULT; None is that.
        image_size: side of the images; None takes that which the weights were trained with.
        mean: of their pixels, in the same way.
        std: deviation of their pixels, in the same way.
    Raises:
        ModelError: there are no such weights, or they do not fit the architecture.
    """
    weights = weights or DEFAULT_WEIGHTS
    known = described(weights)
    if arch is None:
        arch = arch_of(weights) or (DEFAULT_ARCH if weights == DEFAULT_WEIGHTS else None)
    if arch is None:
        raise ModelError(f"--weights {weights}: does not say which network it is of; name it with --arch.")
    if arch.startswith(TIMM_PREFIX):
        return _of_timm(arch, weights, image_size, mean, std)
    preset = _preset(arch)
    size = image_size or known.get("image_size") or preset["crop_size"]
    given = known or preset
    # Margins are cut off as the weights' own evaluation does, at whatever size.
    margin = 1.0 if known else preset["resize_size"] / preset["crop_size"]
    prepare = _transform(arch)(
        crop_size=size, resize_size=round(size * margin), mean=mean or given["mean"], std=std or given["std"]
    )
    model = build_model(
        arch,
        NUM_CLASSES,
        InputShape(size),
        torch.Generator().manual_seed(0),
        weights,
        small_stem=bool(known.get("small_stem")),
    )
    return Backbone(arch, model.eval(), prepare, size)


def normalisation(arch: str, weights: str) -> tuple[Triple, Triple] | tuple[None, None]:
    """Return mean and deviation of the pixels that weights were trained with; None if nobody can tell."""
    known = described(weights)
    if known:
        red, green, blue = known["mean"]
        mean = (red, green, blue)
        red, green, blue = known["std"]
        return mean, (red, green, blue)
    if not _has_presets(arch):
        return None, None
    preset = _preset(arch)
    return preset["mean"], preset["std"]


def _has_presets(arch: str) -> bool:
    import torchvision

    return arch in torchvision.models.list_models(module=torchvision.models)


def _transform(arch: str) -> Callable[..., Callable[[Image.Image], Tensor]]:
    """Return torchvision's own preparation of images; for a network that it has no weights of, another's."""
    import torchvision

    names = torchvision.models.get_model_weights(arch if _has_presets(arch) else DEFAULT_ARCH)
    transform: Callable[..., Callable[[Image.Image], Tensor]] = names["DEFAULT"].transforms
    return transform


def _preset(arch: str) -> dict[str, Any]:
    prepared: Any = _transform(arch)()
    [crop_size], [resize_size] = prepared.crop_size, prepared.resize_size
    return {
        "crop_size": crop_size,
        "resize_size": resize_size,
        "mean": tuple(prepared.mean),
        "std": tuple(prepared.std),
    }


def _of_timm(
    arch: str,
    weights: str,
    image_size: int | None,
    mean: Triple | None,
    std: Triple | None,
) -> Backbone:
    timm = timm_library(arch)
    network = timm.create_model(arch.removeprefix(TIMM_PREFIX))
    chosen = {"img_size": image_size, "mean": mean, "std": std}
    given = {name: value for name, value in chosen.items() if value is not None}
    config = timm.data.resolve_data_config(given, model=network)
    size = config["input_size"][-1]
    model = build_model(
        arch,
        network.num_classes,
        InputShape(size),
        torch.Generator().manual_seed(0),
        weights,
        small_stem=False,
    )
    return Backbone(arch, model.eval(), timm.data.create_transform(**config, is_training=False), size)

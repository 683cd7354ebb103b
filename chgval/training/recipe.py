"""How to train where the user did not say: chosen from the data, the model's kind and the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chgval.config import TrainConfig

# On a CPU, images are shrunk to what a small network can learn from in reasonable time.
LARGEST_SIZE_ON_CPU = 64
LARGEST_SIZE = 224
# Batches of a CPU, and those that fill a GPU: of images up to LARGEST_SIZE_ON_CPU, and of larger ones.
BATCH_SIZE, GPU_BATCH_SIZE, GPU_BATCH_SIZE_OF_LARGE = 128, 512, 256
# An epoch of a small dataset must still have steps to learn in: this many, if batches stay as
# large as SMALL_BATCH_SIZE. Fewer do on a GPU, where a small batch takes as long as a large one.
STEPS_PER_EPOCH, GPU_STEPS_PER_EPOCH = 150, 96
SMALL_BATCH_SIZE = 32
# Share of the learning rate for weights that know something already, which the full one would destroy.
FINE_TUNING = 0.1
# And a tiny one at least so many.
FEWEST_STEPS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The resolved settings of a training run; see TrainConfig for what each means."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    schedule: Literal["one-cycle", "cosine"]
    augment: Literal["none", "crop", "crop-flip"]


def largest_image_size(arch: str | None, device_type: str, *, frozen: bool = False) -> int:
    """Return the largest image size to choose; an architecture that the user names gets its usual 224."""
    small_model = arch in (None, "resnet8", "resnet20") and not frozen
    return LARGEST_SIZE_ON_CPU if device_type == "cpu" and small_model else LARGEST_SIZE


def choose_arch(image_size: int | None, device_type: str) -> str:
    """Return the default model: logistic regression for embeddings (no image size), else a ResNet."""
    if image_size is None:
        return "linear"
    return "resnet8" if device_type == "cpu" else "resnet18"


def choose_epochs(config: TrainConfig, num_samples: int, *, is_embedding: bool) -> int:
    """Return the passes over the data."""
    return config.epochs or (20 if is_embedding else 30 if num_samples <= 5_000 else 15)


def choose_batch_size(num_samples: int, image_size: int, *, fills_gpu: bool) -> int:
    """Return the samples per step."""
    largest, fewest_steps = BATCH_SIZE, STEPS_PER_EPOCH
    if fills_gpu:
        is_large = image_size > LARGEST_SIZE_ON_CPU
        largest, fewest_steps = GPU_BATCH_SIZE_OF_LARGE if is_large else GPU_BATCH_SIZE, GPU_STEPS_PER_EPOCH
    batch_size = min(largest, max(SMALL_BATCH_SIZE, num_samples // fewest_steps))
    return max(8, min(batch_size, num_samples // FEWEST_STEPS))


def choose_recipe(
    config: TrainConfig,
    num_samples: int,
    *,
    has_batch_norm: bool,
    num_features: int | None,
    flips: bool,
    image_size: int = 0,
    device_type: str = "cpu",
) -> Recipe:
    """Fill in what the user left open.

    Args:
        config: what the user said.
        num_samples: usable samples.
        has_batch_norm: networks without it diverge at the learning rates of those with it.
        num_features: length of the embeddings; None for images.
        flips: whether a mirrored sample still belongs to its class.
        image_size: side of the images in pixels.
        device_type: cpu, cuda or mps.
    """
    # The others would need more epochs with larger batches: their steps cannot be longer.
    fills_gpu = device_type == "cuda" and has_batch_norm
    batch_size = config.batch_size or choose_batch_size(num_samples, image_size, fills_gpu=fills_gpu)
    batch_size = min(batch_size, num_samples)
    if num_features is not None:
        # The curvature of the loss grows with the squared length of the (normalised) inputs.
        lr = min(0.1, 6.4 / num_features)
    else:
        # Larger batches make fewer steps, each so much longer (Goyal et al. 2017, arXiv:1706.02677).
        scaled = min(batch_size, GPU_BATCH_SIZE) / BATCH_SIZE  # beyond, it was not tried
        lr = 0.3 * max(1.0, scaled) if has_batch_norm else 0.01
        if config.weights is not None:
            lr *= FINE_TUNING
    return Recipe(
        epochs=choose_epochs(config, num_samples, is_embedding=num_features is not None),
        batch_size=batch_size,
        lr=config.lr or lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        augment="none" if num_features is not None else config.augment or ("crop-flip" if flips else "crop"),
    )

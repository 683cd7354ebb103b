"""Views of images: what a model is shown of them beside, or instead of, the images themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

# Far enough that a network which learned an image by heart does not quite recognise it, near enough that it
# still sees what is on it. 12 degrees were tried, and 90, which cost a tenth of the accuracy.
DEGREES = 12.0


def mirrored(images_BCHW: Tensor) -> Tensor:
    """Return images flipped left to right."""
    return images_BCHW.flip(3)


def rotated(images_BCHW: Tensor) -> Tensor:
    """Return images turned by DEGREES about their middle; corners are filled by reflection."""
    angle = math.radians(DEGREES)
    turn_23 = torch.tensor(
        [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]],
        dtype=images_BCHW.dtype,
        device=images_BCHW.device,
    )
    grid = functional.affine_grid(
        turn_23.expand(len(images_BCHW), 2, 3), list(images_BCHW.shape), align_corners=False
    )
    turned_BCHW = functional.grid_sample(
        images_BCHW, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return turned_BCHW.contiguous(memory_format=torch.channels_last)

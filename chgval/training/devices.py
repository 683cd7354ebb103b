"""Which device a model is trained on."""

from __future__ import annotations

import torch

from chgval.errors import SettingsError


def pick_device(name: str) -> torch.device:
    """Return the device of that name; auto takes the fastest there is.

    Raises:
        SettingsError: this machine, or this build of PyTorch, does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise SettingsError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsError("--device mps: not available on this machine.")
    return device

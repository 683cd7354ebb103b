"""Which device a model is trained on, and in which numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Literal

import torch
from torch import Tensor, nn

from chgval.data.loader import free_memory
from chgval.errors import SettingsError
from chgval.system import has_amx, total_memory
from chgval.training.models import IMAGE_ARCHS_OF_CHGVAL, SplitModel

# What a backbone computes in. In tf32, convolutions round their inputs to 11 bits.
Precision = Literal["float32", "tf32", "bfloat16", "float16"]
AUTOCAST: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Compute capability from which a CUDA device multiplies matrices of each type by itself.
WITH_FLOAT16, WITH_BFLOAT16 = (7, 0), (8, 0)
# So much is done on a CPU of two cores in the time in which a GPU gets ready (5 s): pixels of images that a
# ResNet-8 learns from, and multiply-adds of a linear model on embeddings.
SMALL_PIXELS, SMALL_PRODUCTS = 5e6, 2e10
# Side of images in pixels up to which neither more threads nor AMX make a step faster.
SMALL_IMAGE = 16
# Pixels of a batch that our own networks train on everywhere: 1.5 GiB. To ask takes as long as to load torch.
FITTING_PIXELS = 2**20
# Of what CUDA and its libraries say where there is no memory, besides torch.OutOfMemoryError.
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "unable to find an engine to execute this computation")


def pick_device(name: str, *, is_small: bool = False) -> torch.device:
    """Return the device of that name; auto takes the fastest there is.

    Args:
        name: auto, cpu, cuda, cuda:N or mps.
        is_small: whether all there is to do is done before a GPU would be ready.
    Raises:
        SettingsError: this machine, or this build of PyTorch, does not have it.
    """
    if name == "auto" and not is_small:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "auto"
    device = torch.device("cpu" if name == "auto" else name)
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise SettingsError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsError("--device mps: not available on this machine.")
    return device


def choose_precision(
    name: str,
    device_type: str,
    capability: tuple[int, int] | None,
    *,
    has_batch_norm: bool,
    gains_on_cpu: bool,
) -> Precision:
    """Return what a backbone computes in.

    On GPUs that can, networks with batch normalisation take float16: it has three bits more than bfloat16,
    and cuDNN normalises it several times as fast. The others take bfloat16, whose range no activation leaves.
    CPUs take bfloat16 where that is known to be faster, else float32.

    Args:
        name: as the user says; auto chooses.
        device_type: cpu, cuda or mps.
        capability: compute capability of a CUDA device.
        has_batch_norm: whether the network normalises over batches.
        gains_on_cpu: whether this processor computes the network faster in bfloat16 (`gains_from_amx`).
    Raises:
        SettingsError: the device cannot.
    """
    can: list[Precision] = ["float32"]
    if device_type == "cpu":
        can.append("bfloat16")
    if capability is not None and capability >= WITH_BFLOAT16:
        can += ["tf32", "bfloat16"]
    if capability is not None and capability >= WITH_FLOAT16:
        can.append("float16")
    if name == "auto" and device_type == "cuda":
        preferred: list[Precision] = ["float16", "bfloat16"] if has_batch_norm else ["bfloat16", "float16"]
        return next((precision for precision in preferred if precision in can), "float32")
    if name == "auto":
        return "bfloat16" if device_type == "cpu" and gains_on_cpu else "float32"
    found = next((precision for precision in can if precision == name), None)
    if found is None:
        raise SettingsError(f"--precision {name}: this {device_type} device has only {', '.join(can)}.")
    return found


def gains_from_amx(network: nn.Module, image_size: int) -> bool:
    """Say whether this processor computes a network with batch normalisation on images faster in bfloat16.

    It does if it has AMX and the network is one of plain convolutions, as ResNets are. Without AMX,
    conversions take more than AVX512_BF16 saves; so they do in depthwise convolutions.
    """
    is_depthwise = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in network.modules())
    return not is_depthwise and image_size > SMALL_IMAGE and has_amx()


def check_memory(model: SplitModel, arch: str, batch_size: int, image_size: int) -> None:
    """Raise SettingsError where this machine has no memory for a training step on the CPU.

    A GPU that has none says so, and takes its batches in parts; a process on a CPU would be killed.
    """
    if arch in IMAGE_ARCHS_OF_CHGVAL and batch_size * image_size**2 <= FITTING_PIXELS:
        return
    needed, has = batch_size * kept_bytes(model, image_size), total_memory()
    if has is not None and needed > has:
        raise SettingsError(
            f"{arch}: a batch of {batch_size:,} images of {image_size:,} px needs about "
            f"{needed / 2**30:,.0f} GiB of memory, and there are {has / 2**30:,.0f}; pass a smaller "
            "--batch-size or --image-size."
        )


def kept_bytes(model: SplitModel, image_size: int) -> int:
    """Return what a training step keeps of each image for its gradients, in bytes.

    Found on shapes alone, which takes no memory. Without the weights, and what they are converted to.
    """
    shapes = copy.deepcopy(model).to("meta").train()
    shapes.backbone_dtype = None
    own = {tensor.untyped_storage()._cdata for tensor in shapes.state_dict().values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    # A network that looks into its data cannot run without them: nothing is known of it.
    with suppress(RuntimeError), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shapes(torch.empty(2, 3, image_size, image_size, device="meta"))  # one is too few to normalise
    sizes = [tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own]
    in_float32 = sum(sizes) // 2
    return in_float32 if model.backbone_dtype is None else in_float32 // 2


def has_room(device: torch.device, num_bytes: int, share: float) -> bool:
    """Say whether a GPU has room for something in a share of its free memory; a CPU always has."""
    if device.type == "mps":  # has no float64, which values are computed in
        return False
    return device.type == "cpu" or num_bytes <= share * free_memory(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that a device has no memory for what was asked."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


@contextmanager
def cudnn_settings(**settings: bool) -> Iterator[None]:
    """Give attributes of torch.backends.cudnn these values in the block, and put them back after it."""
    cudnn = torch.backends.cudnn
    before = {name: getattr(cudnn, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(cudnn, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(cudnn, name, value)


def device_settings(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Let cuDNN take the fastest kernels for the shapes that it sees, and TF32 only where it is wanted."""
    if device.type != "cuda":
        return nullcontext()
    return cudnn_settings(benchmark=True, allow_tf32=precision != "float32")

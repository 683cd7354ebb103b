"""The state of a run in a safetensors file: tensors as such, all else as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chgval.errors import DataError, first_line
from chgval.files import replacing_by_name

HEADER_KEY = "chgval"
# What another library, or a file that is not what it should be, raises when a state is read.
UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)


def write_state(path: Path, header: Mapping[str, Any], state: Any) -> None:
    """Replace a file by one of this state, as a whole.

    Args:
        path: of the file.
        header: what JSON can hold.
        state: dictionaries of dictionaries, tensors, and what JSON can hold.
    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps({**header, "state": _without_tensors(state, "", tensors, set())})
    with replacing_by_name(path) as part:
        save_file(tensors, part, {HEADER_KEY: text})


def read_header(path: Path) -> dict[str, Any]:
    """Return what a state says besides the state itself.

    Raises:
        DataError: it cannot be read.
    """
    with reading(path), safe_open(path, framework="pt") as file:
        return _header(file)


def read_state(path: Path) -> Any:
    """Return the state that a file holds; raises whatever reading it raises, see `reading`."""
    with safe_open(path, framework="pt") as file:
        return _with_tensors(_header(file)["state"], file)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what an unreadable state raises into DataError."""
    try:
        yield
    except UNREADABLE as error:
        raise DataError(
            f"{path}: cannot be resumed ({first_line(error)}); pass --overwrite instead of --resume to "
            "start anew."
        ) from error


def _header(file: Any) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(file.metadata()[HEADER_KEY])
    return header


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor], storages: set[int]) -> Any:
    """Return a state in which tensors are references, {"tensor": name}; put them among the tensors.

    Args:
        value: the state, or a part of it.
        path: names that lead there.
        tensors: gets them, contiguous and on the host.
        storages: addresses of their memory.
    """
    if isinstance(value, dict):
        return {
            name: _without_tensors(item, f"{path}/{name}", tensors, storages) for name, item in value.items()
        }
    if not isinstance(value, torch.Tensor):
        return value
    tensor = value.detach().cpu().contiguous()
    if tensor.untyped_storage().data_ptr() in storages:
        tensor = tensor.clone()  # safetensors refuses tensors that share their memory
    storages.add(tensor.untyped_storage().data_ptr())
    tensors[path] = tensor
    return {"tensor": path}


def _with_tensors(value: Any, file: Any) -> Any:
    """Undo `_without_tensors`."""
    if not isinstance(value, dict):
        return value
    if set(value) == {"tensor"}:
        return file.get_tensor(value["tensor"])
    return {name: _with_tensors(item, file) for name, item in value.items()}

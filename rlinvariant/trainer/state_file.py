"""A file of training state without pickle: safetensors holds the tensors, and its header, as JSON, everything else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlinvariant.errors import UserError
from rlinvariant.types import Json

SCALARS = (bool, int, float, str, type(None))


def write(path: Path, state: object) -> None:
    """Write a state of dicts, lists, tuples, numbers, strings, None, tensors and numpy arrays.

    Args:
        path: the file, in a directory that is made if it is not there.
        state: what `read` gives back, with the same bits; tensors lie on the CPU then. Keys of dicts are scalars.

    Raises:
        UserError: part of the state is of another type, so that a run could not go on from the file.
        OSError, SafetensorError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encoded(state, "", tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_apart(tensors), path, {"state": text})


def read(path: Path) -> Json:
    """Return what `write` was given.

    Raises:
        OSError, SafetensorError: the file cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        return _decoded(json.loads(file.metadata()["state"]), file)


def _encoded(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """Return a value in JSON's types, and put the tensors in it, by their place, into `tensors`.

    A scalar stands for itself; whatever else there is becomes an object with one key, its type.
    """
    if isinstance(value, SCALARS):
        return value
    assert name not in tensors, f"two keys of one spelling: {name}"
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(value)
        return {"array": name}
    if isinstance(value, dict) and all(isinstance(key, SCALARS) for key in value):
        return {"dict": [[key, _encoded(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encoded(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}  # type: ignore[arg-type]
    raise UserError(f"checkpoint: {name.lstrip('/')}: {type(value).__name__} cannot be saved; a run could not go on from it")


def _decoded(value: Any, file: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "array":
        return file.get_tensor(content).numpy()
    if kind == "dict":
        return {key: _decoded(item, file) for key, item in content}
    items = [_decoded(item, file) for item in content]
    return tuple(items) if kind == "tuple" else items


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, each with memory of its own and no more, as safetensors wants them."""
    taken: set[int] = set()
    apart = {}
    for name, x in tensors.items():
        x = x.cpu().contiguous()
        storage = x.untyped_storage()
        if storage.nbytes() != x.numel() * x.element_size() or storage.data_ptr() in taken:
            x = x.clone()
        taken.add(x.untyped_storage().data_ptr())
        apart[name] = x
    return apart

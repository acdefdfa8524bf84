"""Models in shards (PyTorch's FSDP2): each process keeps some rows of every weight; a layer is whole while it computes.

A decoder layer is a unit: its weights are gathered, as they are, when it is called, forward and backward, and freed after it;
its gradients are averaged when its backward is done. What lies outside of the layers (embedding, last norm, lm_head) is one
more unit. Every number is computed as without shards: what a layer sees is its whole weights, and they have the same bits.
Frozen weights may have another dtype than those that are trained: a unit gathers the bytes of each.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rlinvariant.checksums import Checksum, of, partials, together
from rlinvariant.errors import UserError
from rlinvariant.models import experts
from rlinvariant.types import JsonObject, Untyped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
VECTOR = 16  # float32 numbers, at most, of a CPU's vector


def shard(model: "PreTrainedModel", layers: Iterable[nn.Module]) -> int:
    """Cut the weights of a model, in place, into a shard for each process of the default group; return how many units it has.

    Args:
        model: on the host or on this process's device, where the shards will be; all processes have the same weights.
        layers: its decoder layers, each of which becomes a unit, moved to the device one after the other.

    Raises:
        RuntimeError: part of the model is in no unit.
    """
    layers = list(layers)
    for unit in (*layers, model):  # after its forward the last is freed, too: whoever reads weights finds shards
        fully_shard(unit, reshard_after_forward=True)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if len(units) != len(layers) + 1 or whole or not layers:
        raise RuntimeError(f"{len(units)} units of {len(layers)} layers; whole weights: {', '.join(whole[:3]) or 'none'}")
    return len(units)


def unwrapped(model: Untyped) -> Untyped:
    """Return the model that PyTorch's wrappers are around, if there are any: that of data parallel, and of `torch.compile`.

    In place of accelerate's `unwrap_model`, which looks for compiled parts in all modules, some times in each micro-batch.
    """
    while isinstance(model, (DistributedDataParallel, OptimizedModule)):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


def cut_within_a_vector(named: Iterable[tuple[str, Tensor]], processes: int) -> str | None:
    """Name the first trained weight that is cut, for so many processes, where no vector of a CPU ends; None if none is.

    torch's fused optimizers take numbers by vectors there, and the last ones of a process's rows by code that rounds otherwise.
    """
    trained = ((name, p.shape[0], p.shape[1:].numel()) for name, p in named if p.requires_grad)
    share = [(name, rows, -(-rows // processes), width) for name, rows, width in trained]
    return next((name for name, rows, own, width in share if own < rows and own * width % VECTOR), None)


def is_shard(x: Tensor) -> bool:
    """Return whether a tensor is this process's part of one."""
    return isinstance(x, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` has cut the model."""
    return isinstance(model, FSDPModule)


def reduced(unit: Untyped) -> int:
    """Return how many numbers FSDP gives to a unit's reduce-scatter, if each weight that is trained has a gradient.

    Every weight has as many rows for each process as the first has: what is missing is filled up.
    """
    inner: list[Untyped] = [module for module in unit.modules() if isinstance(module, FSDPModule) and module is not unit]
    others = {id(p) for module in inner for p in module.parameters()}
    own = (p for p in unit.parameters() if isinstance(p, DTensor) and p.requires_grad and id(p) not in others)
    processes = torch.distributed.get_world_size()
    return sum(-(-p.shape[0] // processes) * processes * p.shape[1:].numel() for p in own)


def average_gradients(model: nn.Module, now: bool) -> None:
    """Say whether the next backward averages a model's gradients over the processes, or adds to this process's alone."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(now)


def local(x: Tensor) -> Tensor:
    """Return this process's rows of a tensor, which share its memory; a tensor that is no shard is returned as it is."""
    own: Any = x.detach()
    return own.to_local() if isinstance(x, DTensor) else x


def first_row(x: Tensor) -> int:
    """Return the number, in the whole tensor, of the first row that this process has. Rows are cut as `Tensor.chunk` does."""
    if not isinstance(x, DTensor):
        return 0
    rows = -(-x.shape[0] // x.device_mesh.size())
    return min(x.shape[0], x.device_mesh.get_local_rank() * rows)


def put(values: Tensor, x: Tensor) -> None:
    """Copy into a tensor, of which this process may have some rows alone, what the whole one is to hold."""
    own, first = local(x.detach()), first_row(x)
    own.copy_(values[first : first + len(own)])


def row(x: Tensor, number: int) -> Tensor:
    """Return row `number` of a tensor as [1, ...], which shares its memory; [0, ...] where another process has it."""
    own, at = local(x.detach()), number - first_row(x)
    return own[at : at + 1] if at >= 0 else own[:0]


def whole(x: Tensor) -> Tensor:
    """Gather a tensor; every process must call this. One that is no shard is returned as it is."""
    own: Any = x.detach()
    return own.full_tensor() if isinstance(x, DTensor) else x


def like(own: Tensor, x: Tensor) -> Tensor:
    """Return a process's own rows as a shard, with the layout of `x`; where that is no shard, as they are."""
    if not isinstance(x, DTensor):
        return own
    return DTensor.from_local(own, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def checksums(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> dict[str, Checksum]:
    """Return the checksum of each whole weight, of which this process has rows. All must call this.

    With `dtype`, weights are rounded to it first.
    """
    pairs = [(name, x) for name, x in named]
    held = ((local(x.detach()).to(dtype or x.dtype), first_row(x)) for _, x in pairs)
    sums = torch.cat([partials(group) for group in together(held)])
    if any(isinstance(x, DTensor) for _, x in pairs):
        torch.distributed.all_reduce(sums)
    return {name: of(dtype or x.dtype, x.shape, total) for (name, x), total in zip(pairs, sums.cpu(), strict=True)}


def state(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Gather whole weights on the host, one after the other.

    Every process must call this; with `keep` it gets the weights, and else nothing.
    """
    found = {}
    for name, p in named:
        gathered = whole(p)
        if keep:
            found[name] = gathered.cpu()
    return found


def load(model: "PreTrainedModel", directory: Path) -> None:
    """Read this process's rows of every weight from a checkpoint in Hugging Face's form, in place.

    Raises:
        UserError: a weight is missing, unknown, or of another shape.
    """
    own = dict(model.named_parameters())
    stored = {name: experts.stored(name, p, model.config.model_type) for name, p in own.items()}
    tied = {name for name, p in model.named_parameters(remove_duplicate=False)} - own.keys()
    _load(own, stored, _files(directory, WEIGHTS), directory, tied)


def load_adapter(named: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """Read this process's rows of an adapter from PEFT's file, in place; `named` are its weights by PEFT's names.

    Raises:
        UserError: as for `load`.
    """
    own = dict(named)
    stored = {name: {None: name.replace(".default.", ".")} for name in own}  # the adapter's name is in no file
    _load(own, stored, _files(directory, ADAPTER), directory)


def _load(
    own: Mapping[str, Tensor],
    stored: Mapping[str, Mapping[Any, str]],
    files: dict[str, Path],
    directory: Path,
    tied: Collection[str] = (),
) -> None:
    """Read rows of weights; `stored` says by which names files have them, and `tied` which names may be there besides."""
    needed = {name for names in stored.values() for name in names.values()}
    missing, unknown = needed - files.keys(), files.keys() - needed - {*tied}
    if missing or unknown:
        why = f"{len(missing)} weights are missing and {len(unknown)} unknown, {min(missing or unknown)} first"
        raise UserError(f"{directory}: of another model: {why}")
    with torch.no_grad():
        for name, p in own.items():
            rows, first = local(p.detach()), first_row(p)
            for at, saved in stored[name].items():
                if at is None:
                    _read(files[saved], saved, rows, p.shape, slice(first, first + len(rows)))
                elif first <= at[0] < first + len(rows):
                    matrix = experts.rows_of(rows, at[0] - first, at[1], name)
                    _read(files[saved], saved, matrix, matrix.shape, slice(None))


def _read(path: Path, name: str, into: Tensor, shape: torch.Size, rows: slice) -> None:
    """Copy rows of a weight of a file into a tensor. Raises UserError if the whole weight has another shape."""
    with safe_open(path, framework="pt") as file:
        saved = file.get_slice(name)
        if saved.get_shape() != list(shape):
            raise UserError(f"{path.parent}: {name} has shape {saved.get_shape()}, expected {list(shape)}")
        if len(into):
            into.copy_(saved[rows])


def _files(directory: Path, single: str) -> dict[str, Path]:
    """Return in which file each weight of a checkpoint is; `single` is its file's name where there is one."""
    if (directory / INDEX).is_file():
        names = json.loads((directory / INDEX).read_text())["weight_map"]
        return {name: directory / file for name, file in names.items()}
    with safe_open(directory / single, framework="pt") as file:
        return dict.fromkeys(file.keys(), directory / single)


def optimizer_state(optimizer: torch.optim.Optimizer) -> JsonObject:
    """Return an optimizer's state with this process's own rows in it."""
    state, found = optimizer.state_dict(), {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for at, of_one in state["state"].items():
        if other := [key for key, x in of_one.items() if isinstance(x, DTensor) and x.shape != parameters[int(at)].shape]:
            why = "a state of another shape than its weight, which cannot be saved in shards; use adamw_torch"
            raise UserError(f"trainer.optim: has {other[0]}, {why}")
        found[at] = {key: local(x) if isinstance(x, Tensor) else x for key, x in of_one.items()}
    return state | {"state": found}


def as_shards(state: JsonObject, optimizer: torch.optim.Optimizer) -> JsonObject:
    """Return what `optimizer_state` has returned with shards in the place of rows, laid out as the optimizer's parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = {}
    for at, of_one in state["state"].items():
        p = parameters[int(at)]
        own = local(p.detach()).shape
        found[at] = {
            key: like(value.to(p.device), p) if isinstance(value, Tensor) and value.shape == own and value.dim() else value
            for key, value in of_one.items()
        }
    return state | {"state": found}


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of whole gradients, [] fp32, with the bits that `torch.nn.utils.get_total_norm` has for them unsharded.

    That sums the squares of each whole gradient in an order of its own, which no sum over shards has: each is gathered, alone.
    """
    norms = [torch._foreach_norm([whole(gradient)], 2.0)[0] for gradient in gradients]  # pyright: ignore
    return torch.linalg.vector_norm(torch.stack(norms), 2.0)


def scale_gradients(gradients: Iterable[Tensor], norm: Tensor, most: float) -> None:
    """Scale gradients, in place, to a norm of `most`, as torch's `clip_grads_with_norm_` does; `norm` is theirs."""
    own = [local(gradient) for gradient in gradients]
    every: Any = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
    every(own, torch.clamp(most / (norm + 1e-6), max=1.0))

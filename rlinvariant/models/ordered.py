"""Averages of gradients over processes whose bits no library's algorithm decides: a tree over the ranks, in a fixed order.

    average = ((g0 + g1) + (g2 + g3)) / 4       of four ranks; of an odd number the last waits for the next level

Each rank gets the others' parts of what it reduces (`all_to_all`) and adds them itself; as many bytes move as in a
reduce-scatter. NCCL and gloo choose an order by size, place and topology: for other buckets, shards or versions their sums are
other ones. With this tree a gradient's bits depend on the ranks' gradients alone, in DDP and in shards alike.

W: processes, C: numbers that each of them reduces.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.nn.parallel import DistributedDataParallel


def tree_sum(parts: list[Tensor]) -> Tensor:
    """Add tensors of one shape, two neighbours at a time, until one is left."""
    while len(parts) > 1:
        last = [parts[-1]] if len(parts) % 2 else []
        parts = [a + b for a, b in zip(parts[0::2], parts[1::2], strict=False)] + last
    return parts[0]


def reduce_scatter(whole: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return this rank's part [C] of the sum over ranks of `whole` [W C]."""
    ranks = dist.get_world_size(group)
    found = torch.empty_like(whole)
    dist.all_to_all_single(found, whole, group=group)
    return tree_sum(list(found.view(ranks, -1).unbind(0)))


def total(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum over ranks of a tensor of one shape on all, on all of them."""
    flat = x.detach().reshape(-1)
    whole = nn.functional.pad(flat, (0, -len(flat) % dist.get_world_size(group)))
    own = reduce_scatter(whole, group)
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.12
    gather(whole, own, group=group)
    return whole[: len(flat)].view(x.shape)


def average(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the mean over ranks of a tensor of one shape on all, on all of them."""
    return total(x, group).div_(dist.get_world_size(group))


class OrderedReduceScatter(ReduceScatter):
    """Takes the place of the reduce-scatter by which FSDP averages the gradients of a unit."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.reduce(output_tensor, input_tensor, group, op)

    def reduce(self, output: Tensor, whole: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType) -> None:
        """Write this rank's part of the sum or mean over ranks of a unit's whole gradient to `output`."""
        output.copy_(reduce_scatter(whole, group))
        if op == dist.ReduceOp.AVG:
            output.div_(dist.get_world_size(group))
        elif op != dist.ReduceOp.SUM:
            raise RuntimeError(f"gradients=ordered: FSDP asks for {op}, expected a mean or a sum")


def _reduced(group, bucket):  # DDP takes its own annotations or none
    buffer = bucket.buffer()
    done: Any = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)  # whose streams a waiter waits for
    buffer.copy_(average(buffer, group))
    done.set_result(buffer)
    return done


def use(model: nn.Module) -> None:
    """Let the gradients of a model in shards, or in DDP, be averaged so; of one that is neither, each process has its own."""
    if isinstance(model, DistributedDataParallel) and not vars(model).get("in_order"):
        model.register_comm_hook(None, _reduced)
        vars(model)["in_order"] = True
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(OrderedReduceScatter())

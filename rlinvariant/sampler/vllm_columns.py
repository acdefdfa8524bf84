"""An engine that spans several processes, each with some columns of every product; written for vLLM 0.26 (CUDA) and 0.32 (CPU).

vLLM cuts o_proj and down_proj by the dimension that is summed over, and adds what the processes have: another order of
summation, and other bits, than one process has. Here every weight is cut by its own rows, which are the columns of the product.
What a product reads is gathered first, whole; so each element is one sum, in one process, in the order of a process alone.
Nothing is added across processes, whatever NCCL or gloo would choose.

    q, k, v, gate, up    columns: whole heads, or columns of the MLP            as vLLM has them
    o, down              input gathered, columns, output gathered               `GatheredLinear`
    embedding            rows of the vocabulary; looked up by all, the owner's taken   `GatheredEmbedding`
    lm_head              rows of the vocabulary, logits gathered                as vLLM has it

T: tokens, D: width of a hidden state, P: processes.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed.communication_op import tensor_model_parallel_all_gather
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from rlinvariant import bits, ops
from rlinvariant.errors import UserError
from rlinvariant.types import Json, Untyped

_vllms_plan: ContextVar[bool] = ContextVar("whether vLLM cuts o_proj and down_proj as it does by itself", default=False)


@contextmanager
def vllms_plan() -> Iterator[None]:
    """Leave o_proj and down_proj of an engine that is made inside to vLLM, which adds over processes: a control."""
    token = _vllms_plan.set(True)
    try:
        yield
    finally:
        _vllms_plan.reset(token)


def processes() -> int:
    """Return over how many processes the engine of this process is spread."""
    return get_tp_group().world_size


def rank() -> int:
    """Return this process's number among those of its engine."""
    return get_tp_group().rank_in_group


def drop_queue() -> None:
    """Give back the shared memory through which vLLM's own executor talks to its workers: here nobody starts any."""
    get_tp_group().mq_broadcaster = None


def of_all(item: Json) -> list[Json]:
    """Return what each process of the engine gives. Every one of them must call this."""
    group, found = get_tp_group(), [item] * processes()
    if len(found) > 1:
        torch.distributed.all_gather_object(found, item, group=group.cpu_group)
    return found


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    class Worker(CPUWorker):
        """Runs vLLM's worker on a CPU, with a name of its own for the memory that the processes share.

        vLLM calls that memory alike in every run of a machine whose processes it has not started itself: two runs at once would
        not start, nor any after one that was killed. Here it has no name any more as soon as all have found it.
        """

        def init_device(self) -> None:
            name = [f"rlinvariant-{uuid.uuid4().hex}"]
            torch.distributed.broadcast_object_list(name)
            self.distributed_init_method = f"env://:{name[0]}"
            super().init_device()
            if get_tp_group().is_first_rank:
                for path in Path("/dev/shm").glob(f"*{name[0]}*{get_tp_group().unique_name}*"):
                    path.unlink(missing_ok=True)


class Cut(NamedTuple):
    """Says which rows of a Hugging Face weight with `whole` rows a process has: `rows`, from `first` on."""

    whole: int
    first: int
    rows: int


def cuts(layer: Untyped, parts: list[int]) -> list[Cut]:
    """Return the cut of each of the weights that a layer of vLLM's has merged, of which this process has `parts` rows."""
    if isinstance(layer, VocabParallelEmbedding):
        first, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        return [Cut(layer.org_vocab_size, first, end - first)]
    apart = [(layer.tp_size, layer.tp_rank) if isinstance(layer, ColumnParallelLinear) else (1, 0)] * len(parts)
    if isinstance(layer, QKVParallelLinear):  # fewer heads of keys than processes: several processes have the same
        same = layer.num_kv_head_replicas
        apart[1:] = [(layer.tp_size // same, layer.tp_rank // same)] * 2
    return [Cut(rows * count, rows * at, rows) for rows, (count, at) in zip(parts, apart, strict=True)]


class GatheredLinear(ColumnParallelLinear):
    """Takes an input of which each process has some columns; gathers it, multiplies it, and gathers the product."""

    def forward(self, x: Tensor) -> Untyped:
        return super().forward(tensor_model_parallel_all_gather(x))


class GatheredEmbedding(VocabParallelEmbedding):
    """Finds a token's row in the process that has it: all look, and gather what each has found.

    vLLM adds the processes' rows, zeros all but one: -0 + 0 is 0, another word.
    """

    weight: Tensor
    first: int  # of this process's rows
    scale: float | None

    def forward(self, ids: Tensor) -> Tensor:
        own = self.num_embeddings_per_partition
        owner = ids // own  # every process has as many rows: the vocabulary is padded
        rows_TD = F.embedding((ids - self.first).clamp(0, own - 1), self.weight)
        every = tensor_model_parallel_all_gather(rows_TD.flatten(0, -2), 0).view(self.tp_size, -1, rows_TD.shape[-1])
        at = torch.arange(every.shape[1], device=ids.device)
        x = every[owner.flatten(), at].view(rows_TD.shape)
        return x if self.scale is None else x * self.scale


def require_heads_apart(model: Untyped, count: int, dtype: torch.dtype, device: Untyped) -> None:
    """Compare the attention of the heads that each of some processes has with that of all heads in one call.

    Args:
        model: the patched model.
        count: how many processes.
        dtype: of activations.
        device: where its attention is computed, as torch takes it.

    Raises:
        UserError: a bit differs.
    """
    heads, keys = model.config.num_attention_heads, model.config.num_key_value_heads
    forms = {(m.head_dim, m.scaling, m.window, m.softcap) for m in model.modules() if hasattr(m, "softcap")}
    lengths = (300, 1, 17, 129)
    cu = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    random = torch.Generator(device).manual_seed(0)
    for size, scale, window, softcap in forms:
        more = scale, max(lengths), window, softcap
        shape = lambda n, size=size: torch.randn(sum(lengths), n, size, generator=random, device=device).to(dtype)  # noqa: E731
        q, k, v = shape(heads), shape(keys), shape(keys)
        whole, own, shared = ops.attention(q, k, v, cu, *more), heads // count, max(1, keys // count)
        for at in range(count):
            mine, theirs = slice(own * at, own * (at + 1)), slice(keys * at // count, keys * at // count + shared)
            part = ops.attention(q[:, mine].contiguous(), k[:, theirs].contiguous(), v[:, theirs].contiguous(), cu, *more)
            if not bits.same(part, whole[:, mine].contiguous()):
                raise UserError(
                    f"sampler.tensor_parallel_size={count}: attention of {own} heads of {size} ({shared} for keys) has other "
                    f"bits here than in a call for {heads} ({keys}); expected 1: remove it"
                )


def spread(model: nn.Module, quant_config: Untyped) -> None:
    """Put `GatheredLinear` in the place of o_proj and down_proj, before vLLM replaces the other layers of a patched model."""
    if processes() == 1 or _vllms_plan.get():
        return
    for name, module in list(model.named_modules()):
        for child in ("o_proj", "down_proj"):
            stock: Any = getattr(module, child, None)
            if isinstance(stock, nn.Linear):
                gathered = GatheredLinear(
                    stock.in_features,
                    stock.out_features,
                    bias=stock.bias is not None,
                    gather_output=True,
                    quant_config=quant_config,
                    prefix=f"model.{name}.{child}",
                    return_bias=False,
                )
                setattr(module, child, gathered)


def gather_embeddings(model: nn.Module) -> None:
    """Make the embedding of vLLM's model a `GatheredEmbedding`."""
    if processes() == 1:
        return
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            embedding: Any = module
            cls, own = type(module), module.num_embeddings_per_partition
            scale = getattr(module, "scale", getattr(module, "embed_scale", None))  # ours, in vLLM 0.32; vLLM's, in 0.26
            embedding.__class__ = type(cls.__name__, (GatheredEmbedding, cls), {"__module__": cls.__module__})
            embedding.first, embedding.scale = rank() * own, scale

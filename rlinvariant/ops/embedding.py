"""Rows of a table by number, whose gradient has one order of summation.

T: tokens, V: vocabulary, D: width of a row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rlinvariant.ops.register import define


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Look up rows of a table.

        y[t] = weight[ids[t]];  dweight[v] = sum of dy[t] over the t with ids[t] = v, 0 for v = padding_idx

    PyTorch's own gradient on CUDA adds parts of a long sum by atomics where more than 3,072 tokens share few rows: two runs of
    one seed then end with other weights.

    Args:
        ids: int64, any shape.
        weight: [V, D] bf16 or fp32.
        padding_idx: a row that gets no gradient; None: all get theirs.

    Returns:
        [*ids.shape, D] in weight.dtype.

    Order: no sums forward. The gradient of a row is a sum in weight.dtype, over the tokens sorted stably by id, in pieces that
        depend on nothing but those ids.
    Bits: y[t] depends on row ids[t] alone; dweight on ids and dy alone, the same at every call.
    Ref: Mikolov et al., arXiv:1301.3781; the gradient is PyTorch's index_put with accumulate on CUDA, which sorts, and its
        embedding_dense_backward on a CPU.
    """
    return _embedding(ids, weight, padding_idx)


def embedding_ref(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Compute `embedding` in plain PyTorch, of any float dtype: a product with a one-hot matrix."""
    hot = F.one_hot(ids, len(weight)).to(weight.dtype)
    if padding_idx is None:
        return hot @ weight
    kept = torch.arange(len(weight), device=weight.device)[:, None] != padding_idx
    return hot @ torch.where(kept, weight, weight.detach())


def _lookup(ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    return F.embedding(ids, weight)


def _cpu_backward(dy: Tensor, ids: Tensor, rows: int, padding_idx: int | None) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(dy, ids, rows, -1 if padding_idx is None else padding_idx, False)


def _cuda_backward(dy: Tensor, ids: Tensor, rows: int, padding_idx: int | None) -> Tensor:
    dweight_VD = dy.new_zeros(rows, dy.shape[-1])
    dweight_VD.index_put_((ids.flatten(),), dy.reshape(-1, dy.shape[-1]), accumulate=True)
    if padding_idx is not None:
        dweight_VD[padding_idx] = 0
    return dweight_VD


def _save(ctx, inputs, output) -> None:
    ids, weight, ctx.padding_idx = inputs
    ctx.rows = len(weight)
    ctx.save_for_backward(ids)


def _backward(ctx, dy: Tensor):
    return None, embedding_backward(dy, *ctx.saved_tensors, ctx.rows, ctx.padding_idx), None


embedding_backward = define(
    "embedding_backward(Tensor dy, Tensor ids, int rows, int? padding_idx) -> Tensor",
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=lambda dy, ids, rows, padding_idx: dy.new_empty(rows, dy.shape[-1]),
)
_embedding = define(
    "embedding(Tensor ids, Tensor weight, int? padding_idx) -> Tensor",
    cpu=_lookup,
    cuda=_lookup,
    fake=lambda ids, weight, padding_idx: weight.new_empty(*ids.shape, weight.shape[1]),
    save=_save,
    backward=_backward,
)

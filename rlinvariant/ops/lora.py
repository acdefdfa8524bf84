"""Matrix product with a low-rank adapter inside it: one sum, one rounding.

Adding `s (x A^T) B^T` to a product that is rounded to bf16 already, as PEFT does under bf16, or merging `s B A` into a bf16
weight, loses whatever lies below half an ulp: of an adapter whose product is a thousandth of the weight, half. Here the adapter
is R more columns of the sum, and nothing is lost. It is also why no kernel is new: `linear` sums over K + R columns.

R: rows of A, as many as the adapter's rank, K: columns of the weight, N: its rows, T: rows of x.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlinvariant.ops.linear import linear, linear_ref, product

RANK_STEP = {"cpu": 16, "cuda": 64}  # R is padded with zeros to a multiple: sixteen products are one step of a matrix unit


def lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a frozen weight and by an adapter.

        h = linear(x, a);  y = linear([x | h], [weight | b], bias)

    Args:
        x: [*rows, K], bf16 or fp32.
        weight: [N, K], any float dtype; cast to x.dtype at use. It gets no gradient.
        a: [R, K], any float dtype; cast to x.dtype at use.
        b: [N, R], likewise; what PEFT multiplies the result by (alpha / r) is to be in it.
        bias: [N] or None; cast to x.dtype. It gets no gradient.

    Returns:
        [*rows, N] in x.dtype.

    Raises:
        ValueError: shapes or dtypes are not as above.

    Order: as in `linear`: the columns of the weight, ascending, then those of b, which are padded with zeros to a multiple of
        RANK_STEP; then the bias, and one rounding. h is rounded to x.dtype, as any activation.
    Bits: y[m] depends on x[m] and the weights alone. Gradients come from stock GEMMs: deterministic, not invariant.
    Ref: Hu et al. 2021, arXiv:2106.09685.
    """
    if a.dim() != 2 or a.shape[1] != x.shape[-1] or b.shape != (len(weight), len(a)):
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)}"
        raise ValueError(f"lora_linear: expected x [*, K], weight [N, K], a [R, K] and b [N, R], got {shapes}")
    return _LoraLinear.apply(x, weight, a, b, bias)


def lora_linear_ref(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `lora_linear` in plain PyTorch, for x of any float dtype; differentiable by autograd."""
    return linear_ref(torch.cat([x, linear_ref(x, a)], -1), torch.cat([weight, b.to(weight.dtype)], -1), bias)


def padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return a [R, K] and b [N, R] with zeros up to the next multiple of RANK_STEP, contiguous."""
    missing = -len(a) % RANK_STEP[a.device.type]
    return F.pad(a, (0, 0, 0, missing)).contiguous(), F.pad(b, (0, missing)).contiguous()


@contextmanager
def unpadded() -> Iterator[None]:
    """Leave out the padding for a while, for a control."""
    steps = dict(RANK_STEP)
    RANK_STEP.update(dict.fromkeys(steps, 1))
    try:
        yield
    finally:
        RANK_STEP.update(steps)


def widened_by(x: Tensor, a: Tensor) -> Tensor:
    """Return [x | x A^T], [*rows, K + R], for a as `padded` gave it."""
    return torch.cat([x, linear(x, a)], -1)


def wide_linear(x: Tensor, weight: Tensor, a: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """Compute `lora_linear` by a weight that has b beside it in memory, as a sampler keeps it; it has no gradients.

    Args:
        x: [*rows, K], bf16 or fp32.
        weight: [N, K + R] in x.dtype: the weight, and b as `padded` gave it.
        a: [R, K] in x.dtype, as `padded` gave it.
        bias: [N] or None.
        packed: what `linear.pack_weight` made of `weight`, or None.

    Order, Bits, Ref: those of `lora_linear`.
    """
    return linear(widened_by(x, a), weight, bias, packed)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        a_RK, b_NR = padded(a.to(x.dtype), b.to(x.dtype))
        wide = widened_by(x, a_RK)
        ctx.rank, ctx.dtypes = len(a), (a.dtype, b.dtype)
        ctx.save_for_backward(x, wide[..., x.shape[-1] :].contiguous(), weight, a_RK, b_NR)
        return linear(wide, torch.cat([weight.to(x.dtype), b_NR], -1), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, h, weight, a_RK, b_NR = ctx.saved_tensors
        in_x, _, in_a, in_b, _ = ctx.needs_input_grad
        dy_TN, x_TK, h_TR = (t.reshape(-1, t.shape[-1]) for t in (dy, x, h))
        dh_TR = dy_TN @ b_NR
        dx = torch.addmm(dy_TN @ weight.to(dy.dtype), dh_TR, a_RK).view(x.shape) if in_x else None
        da = product(dh_TR.t(), x_TK, ctx.dtypes[0])[: ctx.rank] if in_a else None
        db = product(dy_TN.t(), h_TR, ctx.dtypes[1])[:, : ctx.rank] if in_b else None
        return dx, None, da, db, None

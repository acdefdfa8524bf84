"""Root-mean-square normalisation, alone and after a residual addition."""

from typing import Any

import torch
from torch import Tensor

from rlinvariant.kernels import cpu
from rlinvariant.ops.register import define, require_dtype, widened


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float | None = None) -> Tensor:
    """Scale each row to unit root mean square, then by `weight`.

        y = round(round(x * rsqrt(mean(x^2) + eps)) * weight)       without offset
        y = round(x * rsqrt(mean(x^2) + eps) * (offset + weight))   with one

    Args:
        x: [*rows, D], bf16 or fp32.
        weight: [D], any float dtype; cast to x.dtype at use.
        eps: added to the mean square, before the root.
        offset: added to the weight, in fp32: 1 for Gemma, 0 for OLMo-2. None is Llama's norm, which rounds twice.

    Order: fp32 squares; CPU: column i to accumulator i % 16, ascending, then a fixed tree (`lanes` in kernels/cpu.h); CUDA:
        one tree, whose shape depends on D alone.
    Bits: a row of y and of dx depends on that row and `weight` alone. dweight sums rows in an order that their number fixes:
        deterministic, not batch invariant. CPU and CUDA follow one rounding but do not promise the same bits.
    Ref: Zhang and Sennrich 2019, arXiv:1910.07467; rounding as in transformers' LlamaRMSNorm, and, with
        an offset, in its Gemma2RMSNorm and Olmo2RMSNorm.
    """
    return _rms_norm(x, weight, eps, offset)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float | None = None) -> tuple[Tensor, Tensor]:
    """Add a residual and normalise the sum.

        s = round(x + residual);  y = rms_norm(s, weight, eps, offset)

    Args:
        x, residual: [*rows, D], same shape and dtype, bf16 or fp32.
        weight, eps, offset: as in `rms_norm`.

    Returns:
        (y, s), both like x.

    Order: as in `rms_norm`.
    Bits: the same as the addition followed by `rms_norm`.
    Ref: pre-norm residual stream as in transformers' LlamaDecoderLayer.
    """
    return _add_rms_norm(x, residual, weight, eps, offset)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, offset: float | None = None) -> Tensor:
    """Compute `rms_norm` in plain PyTorch, with its roundings: x of any float dtype, differentiable by autograd."""
    wide = widened(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    w = weight.to(x.dtype)
    return y.to(x.dtype) * w if offset is None else (y * (offset + w.to(y.dtype))).to(x.dtype)


def add_rms_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` in plain PyTorch, with its roundings."""
    total = x + residual
    return rms_norm_ref(total, weight, eps, offset), total


def _check(x: Tensor, weight: Tensor, eps: float, offset: float | None) -> None:
    require_dtype("rms_norm", x)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} needs a weight of [{x.shape[-1]}], got {tuple(weight.shape)}")


def _add_check(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float | None) -> None:
    if x.shape != residual.shape or x.dtype != residual.dtype:
        got = f"x {x.dtype} {tuple(x.shape)} and residual {residual.dtype} {tuple(residual.shape)}"
        raise ValueError(f"add_rms_norm: {got} differ")
    _check(x, weight, eps, offset)


def _cpu(x: Tensor, weight: Tensor, eps: float, offset: float | None) -> Tensor:
    x, w = x.contiguous(), weight.to(x.dtype).contiguous()
    y, d = torch.empty_like(x), x.shape[-1]
    cpu.call("rms_norm", x, w, y, x.numel() // d, d, eps, offset is not None, offset or 0.0, cpu.is_bf16(x))
    return y


def _cpu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, dtotal: Tensor | None, eps: float, offset: float | None
) -> tuple[Tensor, Tensor]:
    dy, x, w = dy.contiguous(), x.contiguous(), weight.to(x.dtype).contiguous()
    dx, dw, d = torch.empty_like(x), torch.empty(x.shape[-1], dtype=torch.float32), x.shape[-1]
    rows = x.numel() // d
    cpu.call("rms_norm_backward", dy, x, w, dx, dw, rows, d, eps, offset is not None, offset or 0.0, cpu.is_bf16(x))
    return dx if dtotal is None else dx + dtotal, dw.to(weight.dtype)


def _save(ctx: Any, inputs, output) -> None:
    x, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor):
    x, weight = ctx.saved_tensors
    return *rms_norm_backward(dy, x, weight, None, ctx.eps, ctx.offset), None, None


def _add_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float | None) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _cpu(total, weight, eps, offset), total


def _add_save(ctx: Any, inputs, output) -> None:
    ctx.eps, ctx.offset = inputs[3:]
    ctx.save_for_backward(output[1], inputs[2])


def _add_backward(ctx: Any, dy: Tensor, dtotal: Tensor):
    total, weight = ctx.saved_tensors
    dx, dw = rms_norm_backward(dy, total, weight, dtotal, ctx.eps, ctx.offset)
    return dx, dx, dw, None, None


rms_norm_backward = define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? dtotal, float eps, float? offset) -> (Tensor, Tensor)",
    cpu=_cpu_backward,
    cuda="rms_norm.rms_norm_backward",
    fake=lambda dy, x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
_rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps, float? offset) -> Tensor",
    cpu=_cpu,
    cuda="rms_norm.rms_norm",
    fake=lambda x, *_: x.new_empty(x.shape),
    check=_check,
    save=_save,
    backward=_backward,
)
_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float? offset) -> (Tensor, Tensor)",
    cpu=_add_cpu,
    cuda="rms_norm.add_rms_norm",
    fake=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
    check=_add_check,
    save=_add_save,
    backward=_add_backward,
)

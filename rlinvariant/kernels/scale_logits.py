"""Scaling and bounding of logits on a GPU, element by element."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _tanh(x):
    """Return tanh x by the formulas of tanh_ in kernels/cpu.h."""
    z = x * x
    p = -5.7049855e-3 * z + 2.0639086e-2
    p = (p * z - 5.3739715e-2) * z + 1.3331442e-1
    p = p * z - 3.3333281e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x * z * p + x, tl.where(x < 0.0, -large, large))


@triton.jit
def _capped(x, scale, cap, dtype):
    """Compute tanh(x * scale / cap), every step before the tanh rounded to dtype."""
    x = (x * scale).to(dtype).to(tl.float32)
    return _tanh(tl.div_rn(x, tl.zeros_like(x) + cap).to(dtype).to(tl.float32))


@triton.jit
def _forward(x_ptr, y_ptr, n, scale, cap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    y = x * scale
    if CAP:
        y = _capped(x, scale, cap, dtype).to(dtype).to(tl.float32) * cap
    tl.store(y_ptr + at, y.to(dtype), mask=at < n)


@triton.jit
def _backward(dy_ptr, x_ptr, dx_ptr, n, scale, cap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dx = tl.load(dy_ptr + at, mask=at < n, other=0.0).to(tl.float32) * scale
    dtype = dx_ptr.dtype.element_ty
    if CAP:
        t = _capped(tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32), scale, cap, dtype)
        dx = dx * (1.0 - t * t)
    tl.store(dx_ptr + at, dx.to(dtype), mask=at < n)


def scale_logits(logits: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """Compute `ops.scale_logits`: logits of any shape."""
    logits = logits.contiguous()
    y = torch.empty_like(logits)
    if n := y.numel():
        factor, cap = 1.0 if scale is None else scale, softcap or 0.0
        _forward[(triton.cdiv(n, BLOCK),)](logits, y, n, factor, cap, CAP=softcap is not None, BLOCK=BLOCK, num_warps=4)
    return y


def scale_logits_backward(dy: Tensor, logits: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """Return the gradient of the logits, of any shape, for dy of the same."""
    dy, logits = dy.contiguous(), logits.contiguous()
    dx = torch.empty_like(logits)
    if n := dx.numel():
        factor, cap = 1.0 if scale is None else scale, softcap or 0.0
        _backward[(triton.cdiv(n, BLOCK),)](dy, logits, dx, n, factor, cap, CAP=softcap is not None, BLOCK=BLOCK, num_warps=4)
    return dx

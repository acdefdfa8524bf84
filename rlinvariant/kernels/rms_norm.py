"""Root-mean-square normalisation on a GPU: a row is reduced by one program, in one tree whose shape depends on D alone.

D: columns, N: programs of the backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinvariant.kernels.rows import flat, rows

ELEMENTS = 1024  # of a program: short rows (the heads of a query) share one
PARTIALS = 264  # programs of the backward, each with its own sum for dweight: two for each of 132 multiprocessors


def tile(d: int) -> tuple[int, int, int]:
    """Return (rows, columns, warps) of a program."""
    width = triton.next_power_of_2(d)
    return max(1, ELEMENTS // width), width, 4 if width <= 2048 else 8


@triton.jit
def _forward(
    x_ptr,
    r_ptr,
    w_ptr,
    y_ptr,
    s_ptr,
    count,
    inner,
    d,
    eps,
    offset,
    x_outer,
    x_inner,
    r_outer,
    r_inner,
    ADD: tl.constexpr,
    ONCE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    col = tl.arange(0, D)
    live = (row < count)[:, None] & (col < d)[None, :]
    outer, within = row // inner, row % inner
    x = tl.load(x_ptr + (outer * x_outer + within * x_inner)[:, None] + col[None, :], mask=live, other=0.0).to(tl.float32)
    out = row[:, None] * d + col[None, :]
    if ADD:
        r = tl.load(r_ptr + (outer * r_outer + within * r_inner)[:, None] + col[None, :], mask=live, other=0.0)
        total = (x + r.to(tl.float32)).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + out, total, mask=live)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / d + eps)
    y = x * scale[:, None]
    w = tl.load(w_ptr + col, mask=col < d, other=0.0).to(y_ptr.dtype.element_ty).to(tl.float32)
    if ONCE:
        w = offset + w
    else:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + out, (y * w[None, :]).to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _backward(
    dy_ptr,
    x_ptr,
    w_ptr,
    ds_ptr,
    dx_ptr,
    dw_ptr,
    count,
    inner,
    d,
    eps,
    offset,
    x_outer,
    x_inner,
    ADD: tl.constexpr,
    ONCE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
):
    col = tl.arange(0, D)
    w = tl.load(w_ptr + col, mask=col < d, other=0.0).to(dx_ptr.dtype.element_ty).to(tl.float32)
    if ONCE:
        w = offset + w
    dw = tl.zeros([D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(count, R), tl.num_programs(0)):
        row = (block * R + tl.arange(0, R)).to(tl.int64)
        live = (row < count)[:, None] & (col < d)[None, :]
        at = ((row // inner) * x_outer + (row % inner) * x_inner)[:, None] + col[None, :]
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        out = row[:, None] * d + col[None, :]
        dy = tl.load(dy_ptr + out, mask=live, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / d + eps)[:, None]
        xhat = x * scale
        g = dy * w[None, :]
        dx = scale * (g - xhat * (tl.sum(g * xhat, 1) / d)[:, None])
        if ADD:
            dx += tl.load(ds_ptr + out, mask=live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=live)
        if not ONCE:  # what the weight multiplied was rounded
            xhat = xhat.to(dx_ptr.dtype.element_ty).to(tl.float32)
        dw += tl.sum(dy * xhat, 0)
    tl.store(dw_ptr + tl.program_id(0) * d + col, dw, mask=col < d)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float | None) -> Tensor:
    """Compute `ops.rms_norm`: x [*rows, D], weight [D]."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, outer, inner, so, si = rows(x)
    weight = weight.contiguous()
    r, d, warps = tile(x.shape[-1])
    grid = (triton.cdiv(outer * inner, r),)
    _forward[grid](
        x,
        x,
        weight,
        y,
        y,
        outer * inner,
        inner,
        x.shape[-1],
        eps,
        offset or 0.0,
        so,
        si,
        0,
        0,
        ADD=False,
        ONCE=offset is not None,
        R=r,
        D=d,
        num_warps=warps,
    )
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float | None) -> tuple[Tensor, Tensor]:
    """Compute `ops.add_rms_norm`: x and residual [*rows, D], weight [D]."""
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    x, outer, inner, so, si = rows(flat(x))
    residual, _, other, ro, ri = rows(flat(residual))
    if inner != other:
        (x, outer, inner, so, si), (residual, _, _, ro, ri) = rows(x.contiguous()), rows(residual.contiguous())
    weight = weight.contiguous()
    r, d, warps = tile(x.shape[-1])
    grid = (triton.cdiv(outer * inner, r),)
    _forward[grid](
        x,
        residual,
        weight,
        y,
        total,
        outer * inner,
        inner,
        x.shape[-1],
        eps,
        offset or 0.0,
        so,
        si,
        ro,
        ri,
        ADD=True,
        ONCE=offset is not None,
        R=r,
        D=d,
        num_warps=warps,
    )
    return y, total


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, dtotal: Tensor | None, eps: float, offset: float | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight for dy like x [*rows, D]; `dtotal`, like x, is added to the former."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, outer, inner, so, si = rows(x)
    weight = weight.contiguous()
    r, d, warps = tile(x.shape[-1])
    blocks = triton.cdiv(outer * inner, r)
    partial_ND = torch.empty(max(1, min(PARTIALS, blocks)), x.shape[-1], dtype=torch.float32, device=x.device)
    dtotal = None if dtotal is None else dtotal.contiguous()
    _backward[(len(partial_ND),)](
        dy.contiguous(),
        x,
        weight,
        dx if dtotal is None else dtotal,
        dx,
        partial_ND,
        outer * inner,
        inner,
        x.shape[-1],
        eps,
        offset or 0.0,
        so,
        si,
        ADD=dtotal is not None,
        ONCE=offset is not None,
        R=r,
        D=d,
        num_warps=warps,
    )
    return dx, partial_ND.sum(0).to(weight.dtype)

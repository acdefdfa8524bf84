"""The norms of queries and keys and their rotation in one launch: a program takes a few heads of one token.

The mean square is reduced over tiles of the shape that `rms_norm` uses, with as many warps, so the bits are those of the two
kernels one after the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinvariant.kernels.rms_norm import tile
from rlinvariant.kernels.rows import rows


@triton.jit
def _normed(x, w, offset, ONCE: tl.constexpr, dtype: tl.constexpr):
    if ONCE:
        return (x * (offset + w)).to(dtype)
    return (x.to(dtype).to(tl.float32) * w).to(dtype)


@triton.jit
def _heads(
    x_ptr,
    w_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    token,
    first,
    heads,
    d,
    half,
    eps,
    offset,
    x_token,
    x_head,
    NORM: tl.constexpr,
    ONCE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    head = (first + tl.arange(0, R))[:, None]
    start = x_ptr + token * x_token + head * x_head
    y = y_ptr + (token * heads + head) * d
    if NORM:
        col = tl.arange(0, D)[None, :]
        x = tl.load(start + col, mask=(head < heads) & (col < d), other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / d + eps)[:, None]
    col = tl.arange(0, HALF)[None, :]
    live = (head < heads) & (col < half)
    a = tl.load(start + col, mask=live, other=0.0).to(tl.float32)
    b = tl.load(start + half + col, mask=live, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    if NORM:
        w_a = tl.load(w_ptr + col, mask=col < half, other=0.0).to(dtype).to(tl.float32)
        w_b = tl.load(w_ptr + half + col, mask=col < half, other=0.0).to(dtype).to(tl.float32)
        a = _normed(a * scale, w_a, offset, ONCE, dtype).to(tl.float32)
        b = _normed(b * scale, w_b, offset, ONCE, dtype).to(tl.float32)
    c = tl.broadcast_to(tl.load(cos_ptr + token * half + col, mask=col < half, other=0.0), a.shape)
    s = tl.broadcast_to(tl.load(sin_ptr + token * half + col, mask=col < half, other=0.0), a.shape)
    tl.store(y + col, tl.fma(a, c, -(b * s)).to(dtype), mask=live)
    tl.store(y + half + col, tl.fma(b, c, a * s).to(dtype), mask=live)
    if REST:  # columns beyond the rotated ones
        col = 2 * half + tl.arange(0, REST)[None, :]
        live = (head < heads) & (col < d)
        x = tl.load(start + col, mask=live, other=0.0)
        if NORM:
            w = tl.load(w_ptr + col, mask=col < d, other=0.0).to(dtype).to(tl.float32)
            x = _normed(x.to(tl.float32) * scale, w, offset, ONCE, dtype)
        tl.store(y + col, x, mask=live)


@triton.jit
def _kernel(
    q_ptr,
    k_ptr,
    qw_ptr,
    kw_ptr,
    cos_ptr,
    sin_ptr,
    qy_ptr,
    ky_ptr,
    q_heads,
    k_heads,
    q_programs,
    d,
    half,
    eps,
    offset,
    q_token,
    q_head,
    k_token,
    k_head,
    NORM: tl.constexpr,
    ONCE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part < q_programs:
        _heads(
            q_ptr,
            qw_ptr,
            cos_ptr,
            sin_ptr,
            qy_ptr,
            token,
            part * R,
            q_heads,
            d,
            half,
            eps,
            offset,
            q_token,
            q_head,
            NORM,
            ONCE,
            R,
            D,
            HALF,
            REST,
        )
    else:
        _heads(
            k_ptr,
            kw_ptr,
            cos_ptr,
            sin_ptr,
            ky_ptr,
            token,
            (part - q_programs) * R,
            k_heads,
            d,
            half,
            eps,
            offset,
            k_token,
            k_head,
            NORM,
            ONCE,
            R,
            D,
            HALF,
            REST,
        )


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute `ops.qk_norm_rope`: q [T, H, D], k [T, H_kv, D], weights [D] or None, cos and sin [T, R/2] fp32."""
    (t, q_heads, d), k_heads, half = q.shape, k.shape[1], cos.shape[-1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if not t:
        return q_out, k_out
    (q, q_token, q_head), (k, k_token, k_head) = _strides(q), _strides(k)
    norm = q_weight is not None and k_weight is not None
    weights = (q_weight.contiguous(), k_weight.contiguous()) if norm else (q, k)
    r, width, warps = tile(d)
    q_programs = triton.cdiv(q_heads, r)
    _kernel[(t, q_programs + triton.cdiv(k_heads, r))](
        q,
        k,
        *weights,
        cos.contiguous(),
        sin.contiguous(),
        q_out,
        k_out,
        q_heads,
        k_heads,
        q_programs,
        d,
        half,
        eps,
        offset or 0.0,
        q_token,
        q_head,
        k_token,
        k_head,
        NORM=norm,
        ONCE=offset is not None,
        R=r,
        D=width,
        HALF=triton.next_power_of_2(max(1, half)),
        REST=triton.next_power_of_2(d - 2 * half) if d > 2 * half else 0,
        num_warps=warps,
    )
    return q_out, k_out


def _strides(x: Tensor) -> tuple[Tensor, int, int]:
    """Return x [T, H, D] as `rows` finds it: (tensor, stride of tokens, stride of heads)."""
    heads, d = x.shape[1:]
    x, _, inner, outer_stride, inner_stride = rows(x)
    return (x, heads * d, d) if inner == 1 and heads > 1 else (x, outer_stride, inner_stride or d)

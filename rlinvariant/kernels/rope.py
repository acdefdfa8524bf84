"""Rotary position embedding on a GPU: a program turns every head of one token."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    heads,
    d,
    half,
    x_token,
    x_head,
    cos_token,
    sign,
    H: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, col = tl.arange(0, H)[:, None], tl.arange(0, HALF)[None, :]
    live = (head < heads) & (col < half)
    at = x_ptr + token * x_token + head * x_head + col
    a = tl.load(at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(at + half, mask=live, other=0.0).to(tl.float32)
    c = tl.load(cos_ptr + token * cos_token + col, mask=col < half, other=0.0)
    s = tl.load(sin_ptr + token * cos_token + col, mask=col < half, other=0.0) * sign
    out = y_ptr + (token * heads + head) * d + col
    tl.store(out, tl.fma(a, tl.broadcast_to(c, a.shape), -(b * s)).to(y_ptr.dtype.element_ty), mask=live)
    tl.store(out + half, tl.fma(b, tl.broadcast_to(c, a.shape), a * s).to(y_ptr.dtype.element_ty), mask=live)
    if REST:  # columns beyond the rotated ones
        rest = 2 * half + tl.arange(0, REST)[None, :]
        live = (head < heads) & (rest < d)
        kept = tl.load(x_ptr + token * x_token + head * x_head + rest, mask=live)
        tl.store(y_ptr + (token * heads + head) * d + rest, kept, mask=live)


def rope(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Compute `ops.rope`: x [T, H, D], cos and sin [T, R/2] fp32; sign -1 turns back."""
    if not cos.shape[-1]:
        return x.clone(memory_format=torch.contiguous_format)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    (t, heads, d), half = x.shape, cos.shape[-1]
    if t:
        _turn[(t,)](
            x,
            cos,
            sin,
            y,
            heads,
            d,
            half,
            x.stride(0),
            x.stride(1),
            cos.stride(0),
            sign,
            H=triton.next_power_of_2(heads),
            HALF=triton.next_power_of_2(half),
            REST=triton.next_power_of_2(d - 2 * half) if d > 2 * half else 0,
            num_warps=4,
        )
    return y

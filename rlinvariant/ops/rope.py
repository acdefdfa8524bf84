"""Rotary position embedding.

T: tokens, H: heads, D: width of a head, P: pairs of columns that turn.
"""

import torch
from torch import Tensor

from rlinvariant.kernels import cpu
from rlinvariant.ops.register import define, require_dtype, widened


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + R/2) of the first R columns of each head by the angle of their token.

        y[i]       = round(x[i] cos[i] - x[i + R/2] sin[i])
        y[i + R/2] = round(x[i + R/2] cos[i] + x[i] sin[i])

    Args:
        x: [T, H, D], bf16 or fp32.
        cos, sin: [T, R/2] fp32, R <= D; columns from R on are copied.

    Order: one product, one fused multiply-add, one rounding to x.dtype (transformers rounds three times).
    Bits: a token of y and of dx depends on that token's x, cos and sin alone. No gradient for cos and sin.
    Ref: Su et al. 2021, arXiv:2104.09864; halves paired as in transformers' rotate_half.
    """
    return _rope(x, cos, sin, 1.0)


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `rope` in plain PyTorch: x of any float dtype, rounded to it once; the product is not fused with the sum."""
    half, x_THD = cos.shape[-1], widened(x)
    cos_T1P, sin_T1P = (angle[:, None].to(x_THD.dtype) for angle in (cos, sin))
    a_THP, b_THP, rest = x_THD[..., :half], x_THD[..., half : 2 * half], x_THD[..., 2 * half :]
    turned = (a_THP * cos_T1P - b_THP * sin_T1P, b_THP * cos_T1P + a_THP * sin_T1P)
    return torch.cat([*turned, rest], -1).to(x.dtype)


def _check(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    require_dtype("rope", x)
    (t, _, d), half = x.shape, cos.shape[-1]
    if not cos.shape == sin.shape == (t, half) or 2 * half > d or not cos.dtype == sin.dtype == torch.float32:
        raise ValueError(f"rope: x {tuple(x.shape)} needs fp32 cos and sin of [{t}, at most {d // 2}], got {tuple(cos.shape)}")


def _cpu(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    cpu.call("rope", x, cos, sin, y, *x.shape, cos.shape[-1], sign, cpu.is_bf16(x))
    return y


def rope_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate a gradient [T, H, D] back, by the same angles, cos and sin [T, R/2] fp32."""
    return _rope(dy, cos, sin, -1.0)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _backward(ctx, dy: Tensor):
    return rope_backward(dy, *ctx.saved_tensors), None, None, None


_rope = define(
    "rope(Tensor x, Tensor cos, Tensor sin, float sign) -> Tensor",
    cpu=_cpu,
    cuda="rope.rope",
    fake=lambda x, cos, sin, sign: x.new_empty(x.shape),
    check=_check,
    save=_save,
    backward=_backward,
)

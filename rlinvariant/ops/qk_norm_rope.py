"""The steps between an attention's projections and its scores: the norms of queries and keys, if any, and the rotation."""

import torch
from torch import Tensor

from rlinvariant.ops.register import define
from rlinvariant.ops.rms_norm import _check as check_rms_norm
from rlinvariant.ops.rms_norm import rms_norm, rms_norm_backward, rms_norm_ref
from rlinvariant.ops.rope import _check as check_rope
from rlinvariant.ops.rope import rope, rope_backward, rope_ref


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise each head of queries and keys, and rotate it; without weights, only rotate.

        q' = rope(rms_norm(q, q_weight, eps, offset), cos, sin), and k' likewise

    Args:
        q: [T, H, D], bf16 or fp32; may be a slice of a merged projection.
        k: [T, H_kv, D], same dtype.
        q_weight, k_weight: [D], any float dtype; or both None.
        cos, sin: [T, R/2] fp32, as for `rope`.
        eps, offset: as for `rms_norm`.

    Order, Bits: those of `rms_norm` followed by `rope`: on a GPU one launch in place of four.
    Ref: attention of Qwen3, and with an offset of 1 of Gemma 3, in transformers.
    """
    return _qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, offset)


def qk_norm_rope_ref(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    offset: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `qk_norm_rope` in plain PyTorch, with its roundings."""
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm_ref(q, q_weight, eps, offset), rms_norm_ref(k, k_weight, eps, offset)
    return rope_ref(q, cos, sin), rope_ref(k, cos, sin)


def _check(q: Tensor, k: Tensor, q_weight, k_weight, cos: Tensor, sin: Tensor, eps: float, offset: float | None) -> None:
    check_rope(q, cos, sin, 1.0)
    for weight in (q_weight, k_weight):
        if weight is not None:
            check_rms_norm(q, weight, eps, offset)
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.dtype != k.dtype or (q_weight is None) != (k_weight is None):
        raise ValueError(
            f"qk_norm_rope: q {q.dtype} {tuple(q.shape)} and k {k.dtype} {tuple(k.shape)} do not fit, or one weight is missing"
        )


def _cpu(q, k, q_weight, k_weight, cos, sin, eps, offset) -> tuple[Tensor, Tensor]:
    pairs = ((q, q_weight), (k, k_weight))
    normed = (x if weight is None else rms_norm(x, weight, eps, offset) for x, weight in pairs)
    first, second = (rope(x, cos, sin) for x in normed)
    return first, second


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dq: Tensor, dk: Tensor):
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    dq, dk, dq_weight, dk_weight = rope_backward(dq, cos, sin), rope_backward(dk, cos, sin), None, None
    if q_weight is not None:
        dq, dq_weight = rms_norm_backward(dq, q, q_weight, None, ctx.eps, ctx.offset)
        dk, dk_weight = rms_norm_backward(dk, k, k_weight, None, ctx.eps, ctx.offset)
    return dq, dk, dq_weight, dk_weight, None, None, None, None


_qk_norm_rope = define(
    "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps, "
    "float? offset) -> (Tensor, Tensor)",
    cpu=_cpu,
    cuda="qk_norm_rope.qk_norm_rope",
    fake=lambda q, k, *_: (torch.empty(q.shape, dtype=q.dtype, device=q.device), k.new_empty(k.shape)),
    check=_check,
    save=_save,
    backward=_backward,
)

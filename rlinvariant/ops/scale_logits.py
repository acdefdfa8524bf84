"""Scaling and bounding of a model's logits, between lm_head and temperature."""

import torch
from torch import Tensor

from rlinvariant.kernels import cpu
from rlinvariant.ops.register import define, require_dtype


def scale_logits(logits: Tensor, scale: float | None = None, softcap: float | None = None) -> Tensor:
    """Multiply logits by a number, and bound them.

        x = round(logits * scale)
        y = round(round(tanh(round(x / softcap))) * softcap)

    Without either, `logits` itself. One function for sampler and trainer: `sample` and `log_softmax` take its result, and
    `token_logprobs` calls it.

    Args:
        logits: any shape, bf16 or fp32.
        scale: Cohere's `logit_scale`; 1 / `logits_scaling` for Granite, which is what a division by a number is on CUDA, and
            the same bits everywhere where it is a power of two.
        softcap: Gemma's `final_logit_softcapping`, positive.

    Order: no sums; fp32 arithmetic, a true division, each result rounded to logits.dtype. tanh is a polynomial below 0.625 and
        1 - 2 / (exp(2 |x|) + 1) above. The gradient takes 1 - tanh^2 of the tanh before it is rounded.
    Bits: an element of y and of its gradient depends on that element (and dy) alone.
    Ref: Gemma 2, arXiv:2408.00118; rounding as in transformers' Gemma2ForCausalLM, CohereForCausalLM, GraniteForCausalLM.
    """
    if scale in (None, 1.0) and softcap is None:
        return logits
    return _scale_logits(logits, scale, softcap)


def scale_logits_ref(logits: Tensor, scale: float | None = None, softcap: float | None = None) -> Tensor:
    """Compute `scale_logits` in plain PyTorch, of any float dtype, with its roundings."""
    x = logits if scale is None else logits * scale
    return x if softcap is None else torch.tanh(x / softcap) * softcap


def _check_scaling(scale: float | None, softcap: float | None) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"scale_logits: softcap={softcap}: expected a positive number, or None")


def _check(logits: Tensor, scale: float | None, softcap: float | None) -> None:
    require_dtype("scale_logits", logits)
    _check_scaling(scale, softcap)


def _cpu(logits: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    logits = logits.contiguous()
    y = torch.empty_like(logits)
    cpu.call("scale_logits", logits, y, y.numel(), 1.0 if scale is None else scale, softcap or 0.0, cpu.is_bf16(y))
    return y


def _cpu_backward(dy: Tensor, logits: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    dy, logits = dy.contiguous(), logits.contiguous()
    dx, by = torch.empty_like(logits), 1.0 if scale is None else scale
    cpu.call("scale_logits_backward", dy, logits, dx, dx.numel(), by, softcap or 0.0, cpu.is_bf16(dx))
    return dx


def _save(ctx, inputs, output) -> None:
    logits, *ctx.scaling = inputs
    ctx.save_for_backward(logits)


def _backward(ctx, dy: Tensor):
    return scale_logits_backward(dy, *ctx.saved_tensors, *ctx.scaling), None, None


scale_logits_backward = define(
    "scale_logits_backward(Tensor dy, Tensor logits, float? scale, float? softcap) -> Tensor",
    cpu=_cpu_backward,
    cuda="scale_logits.scale_logits_backward",
    fake=lambda dy, logits, scale, softcap: logits.new_empty(logits.shape),
)
_scale_logits = define(
    "scale_logits(Tensor logits, float? scale, float? softcap) -> Tensor",
    cpu=_cpu,
    cuda="scale_logits.scale_logits",
    fake=lambda logits, scale, softcap: logits.new_empty(logits.shape),
    check=_check,
    save=_save,
    backward=_backward,
)

"""Gated activations: of the Llama family (SwiGLU), and of Gemma (the same with GELU for a gate)."""

import math

import torch
from torch import Tensor

from rlinvariant.kernels import cpu
from rlinvariant.ops.register import define, require_dtype, widened

ACTIVATIONS = ("silu", "gelu_tanh")


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Multiply by a gate through SiLU, or through GELU in its tanh form, element by element.

        y = round(round(gate / (1 + exp(-u))) * up)
        u = gate, or 2 sqrt(2 / pi) (gate + 0.044715 gate^3): gate / (1 + exp(-u)) = gate (1 + tanh(u / 2)) / 2

    Args:
        gate, up: same shape and dtype, bf16 or fp32.
        activation: "silu" or "gelu_tanh".

    Order: no sums. exp is the polynomial of kernels/cpu.h, or the GPU's ex2: the same for every element (a vectorised library
        exp and its scalar tail are not).
    Bits: an element of y and of both gradients depends on that element of gate and up (and dy) alone.
    Ref: Shazeer 2020, arXiv:2002.05202; Hendrycks and Gimpel 2016, arXiv:1606.08415; rounding as in transformers'
        LlamaMLP and Gemma2MLP.
    """
    return _swiglu(gate, up, activation)


def swiglu_merged(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """Compute `swiglu` of the two halves of a product's last dimension, with its gradient in one tensor too: nothing is copied.

    Args:
        gate_up: [*, 2 I], bf16 or fp32: gate, then up.
        activation: as in `swiglu`.
    """
    return _swiglu_merged(gate_up, activation)


def swiglu_ref(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Compute `swiglu` in plain PyTorch, of any float dtype, with its roundings.

    `F.gelu` would form 1 + tanh, which has no digits left for a gate below -6, even in fp64.
    """
    wide = widened(gate)
    u = wide if activation == "silu" else 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (wide * torch.sigmoid(u)).to(gate.dtype) * up


def swiglu_merged_ref(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """Compute `swiglu_merged` in plain PyTorch."""
    gate, up = gate_up.chunk(2, -1)
    return swiglu_ref(gate, up, activation)


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    require_dtype("swiglu", gate)
    if activation not in ACTIVATIONS:
        raise ValueError(f"swiglu: activation={activation!r}: expected {' or '.join(ACTIVATIONS)}")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)} differ")


def _cpu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    cpu.call("swiglu", gate, up, y, y.numel(), activation == "gelu_tanh", cpu.is_bf16(y))
    return y


def _cpu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    gelu = activation == "gelu_tanh"
    cpu.call("swiglu_backward", dy, gate, up, dgate, dup, gate.numel(), gelu, cpu.is_bf16(gate))
    return dgate, dup


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


_swiglu_backward = define(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    cpu=_cpu_backward,
    cuda="swiglu.swiglu_backward",
    fake=lambda dy, gate, up, activation: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)
_swiglu = define(
    "swiglu(Tensor gate, Tensor up, str activation) -> Tensor",
    cpu=_cpu,
    cuda="swiglu.swiglu",
    fake=lambda gate, up, activation: gate.new_empty(gate.shape),
    check=_check,
    save=_save,
    backward=lambda ctx, dy: (*_swiglu_backward(dy, *ctx.saved_tensors, ctx.activation), None),
)
swiglu_merged_backward = define(
    "swiglu_merged_backward(Tensor dy, Tensor gate_up, str activation) -> Tensor",
    cpu=lambda dy, gate_up, activation: torch.cat(_cpu_backward(dy, *gate_up.chunk(2, -1), activation=activation), -1),
    cuda="swiglu.swiglu_merged_backward",
    fake=lambda dy, gate_up, activation: gate_up.new_empty(gate_up.shape),
)
_swiglu_merged = define(
    "swiglu_merged(Tensor gate_up, str activation) -> Tensor",
    cpu=lambda gate_up, activation: _cpu(*gate_up.chunk(2, -1), activation=activation),
    cuda="swiglu.swiglu_merged",
    fake=lambda gate_up, activation: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
    check=lambda gate_up, activation: _check(*gate_up.chunk(2, -1), activation=activation),
    save=_save,
    backward=lambda ctx, dy: (swiglu_merged_backward(dy, *ctx.saved_tensors, ctx.activation), None),
)

"""Gated activation of the Llama family."""

import torch
from torch import Tensor

from rlinvariant.kernels import cpu
from rlinvariant.ops.register import define, require_dtype


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply by a gate through SiLU, element by element.

        y = round(round(gate / (1 + exp(-gate))) * up)

    Args:
        gate, up: same shape and dtype, bf16 or fp32.

    Order: no sums. exp is the polynomial of kernels/cpu.c, or the GPU's ex2: the same for every element (a vectorised library
        exp and its scalar tail are not).
    Bits: an element of y and of both gradients depends on that element of gate and up (and dy) alone.
    Ref: Shazeer 2020, arXiv:2002.05202; rounding as in transformers' LlamaMLP.
    """
    return _swiglu(gate, up)


def swiglu_merged(gate_up: Tensor) -> Tensor:
    """`swiglu` of the two halves of the last dimension of one product, with its gradient in one tensor too: no copies.

    Args:
        gate_up: [*, 2 I], bf16 or fp32: gate, then up.
    """
    return _swiglu_merged(gate_up)


def _check(gate: Tensor, up: Tensor) -> None:
    require_dtype("swiglu", gate)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)} differ")


def _cpu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    cpu.call("swiglu", gate, up, y, y.numel(), cpu.is_bf16(y))
    return y


def _cpu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    cpu.call("swiglu_backward", dy, gate, up, dgate, dup, gate.numel(), cpu.is_bf16(gate))
    return dgate, dup


_swiglu_backward = define(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    cpu=_cpu_backward,
    cuda="swiglu.swiglu_backward",
    fake=lambda dy, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)
_swiglu = define(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    cpu=_cpu,
    cuda="swiglu.swiglu",
    fake=lambda gate, up: gate.new_empty(gate.shape),
    check=_check,
    save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=lambda ctx, dy: _swiglu_backward(dy, *ctx.saved_tensors),
)
_swiglu_merged_backward = define(
    "swiglu_merged_backward(Tensor dy, Tensor gate_up) -> Tensor",
    cpu=lambda dy, gate_up: torch.cat(_cpu_backward(dy, *gate_up.chunk(2, -1)), -1),
    cuda="swiglu.swiglu_merged_backward",
    fake=lambda dy, gate_up: gate_up.new_empty(gate_up.shape),
)
_swiglu_merged = define(
    "swiglu_merged(Tensor gate_up) -> Tensor",
    cpu=lambda gate_up: _cpu(*gate_up.chunk(2, -1)),
    cuda="swiglu.swiglu_merged",
    fake=lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
    check=lambda gate_up: _check(*gate_up.chunk(2, -1)),
    save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=lambda ctx, dy: _swiglu_merged_backward(dy, *ctx.saved_tensors),
)

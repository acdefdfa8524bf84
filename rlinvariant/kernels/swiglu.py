"""SwiGLU on a GPU, and the same with GELU.

exp is the hardware's ex2 after one multiplication: the same instruction for every element."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinvariant.kernels.rows import flat

BLOCK = 1024


@triton.jit
def _gelu_u(gate):
    """Return u = 2 sqrt(2 / pi) (gate + 0.044715 gate^3), so that GELU is gate / (1 + exp(-u)), and its slope."""
    near = tl.where(gate < -16.0, -16.0, tl.where(gate > 16.0, 16.0, gate))
    square = near * near
    return near * (1.5957691216 + 0.0713548163 * square), 1.5957691216 + 0.2140644488 * square


@triton.jit
def _forward(gate_ptr, up_ptr, y_ptr, d, per_row, gate_row, up_row, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row, col = (tl.program_id(0) // per_row).to(tl.int64), tl.program_id(0) % per_row * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * gate_row + col, mask=col < d, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + col, mask=col < d, other=0.0).to(tl.float32)
    u = gate
    if GELU:
        u, _ = _gelu_u(gate)
    act = (gate / (1.0 + tl.exp(-u))).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * d + col, (act * up).to(y_ptr.dtype.element_ty), mask=col < d)


@triton.jit
def _backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, d, per_row, gate_row, up_row, out_row, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row, col = (tl.program_id(0) // per_row).to(tl.int64), tl.program_id(0) % per_row * BLOCK + tl.arange(0, BLOCK)
    live = col < d
    gate = tl.load(gate_ptr + row * gate_row + col, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + col, mask=live, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * d + col, mask=live, other=0.0).to(tl.float32)
    u, slope = gate, 1.0
    if GELU:
        u, slope = _gelu_u(gate)
    sigmoid = 1.0 / (1.0 + tl.exp(-u))
    act = gate * sigmoid
    if GELU:
        dgate = dy * up * (sigmoid + act * (1.0 - sigmoid) * slope)
    else:
        dgate = dy * up * (sigmoid + act * (1.0 - sigmoid))
    tl.store(dgate_ptr + row * out_row + col, dgate.to(dgate_ptr.dtype.element_ty), mask=live)
    tl.store(dup_ptr + row * out_row + col, (dy * act).to(dup_ptr.dtype.element_ty), mask=live)


def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute `ops.swiglu`: gate and up [*rows, D]."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = flat(gate), flat(up)
    d = gate.shape[-1]
    per_row = triton.cdiv(d, BLOCK)
    if y.numel():
        _forward[(len(gate) * per_row,)](
            gate, up, y, d, per_row, gate.stride(0), up.stride(0), GELU=activation == "gelu_tanh", BLOCK=BLOCK, num_warps=4
        )
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, [*rows, D] each, for dy of that shape."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _differentiate(dy, gate, up, flat(dgate), flat(dup), activation)
    return dgate, dup


def swiglu_merged(gate_up: Tensor, activation: str) -> Tensor:
    """Compute `ops.swiglu_merged`: gate_up [*rows, 2 D]."""
    return swiglu(*gate_up.chunk(2, -1), activation)


def swiglu_merged_backward(dy: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """Return both gradients in one tensor [*rows, 2 D], as the product before wants them."""
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    _differentiate(dy, *gate_up.chunk(2, -1), *flat(out).chunk(2, -1), activation)
    return out


def _differentiate(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: str) -> None:
    gate, up = flat(gate), flat(up)
    d = gate.shape[-1]
    per_row = triton.cdiv(d, BLOCK)
    if dy.numel():
        _backward[(len(gate) * per_row,)](
            dy.contiguous(),
            gate,
            up,
            dgate,
            dup,
            d,
            per_row,
            gate.stride(0),
            up.stride(0),
            dgate.stride(0),
            GELU=activation == "gelu_tanh",
            BLOCK=BLOCK,
            num_warps=4,
        )

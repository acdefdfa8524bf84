"""The experts of a mixture: many small gated MLPs, of which each row takes a few.

R: rows (tokens), S: slots of a row, X: slots of all rows, one row's after the other's; E: experts, D: width of a row,
I: width inside an expert, N: twice that, gate and up; G: rows of one expert.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlinvariant.kernels import cpu
from rlinvariant.ops.linear import linear, linear_ref, product
from rlinvariant.ops.register import define, require_dtype, widened
from rlinvariant.ops.swiglu import ACTIVATIONS, swiglu_merged, swiglu_merged_backward, swiglu_merged_ref


def moe_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str = "silu") -> Tensor:
    """Send each row through its experts, and add up what they give, by weight.

        y[r, j] = linear(swiglu_merged(linear(x[r], gate_up[e])), down[e]),  e = ids[r, j]
        out[r] = round(sum_j y[r, j] * weights[r, j])

    Args:
        x: [R, D], bf16 or fp32.
        ids: [R, S] int64, each from 0 to E - 1, those of a row different. It is not checked on a GPU.
        weights: [R, S], any float dtype; widened to fp32.
        gate_up: [E, 2 I, D], any float dtype; cast to x.dtype at use.
        down: [E, D, I], likewise.
        activation: as in `swiglu`.

    Returns:
        [R, D] in x.dtype.

    Raises:
        TypeError, ValueError: a dtype or a shape is not as above.

    Order: the products as in `linear`, each rounded to x.dtype, as is the activation; then slots, ascending: each product by
        a weight is rounded to fp32, and so is each sum, and the last to x.dtype.
    Bits: out[r] depends on x[r], ids[r], weights[r] and the experts named there alone: not on how many rows an expert has,
        nor on where they stand. Gradients come from stock GEMMs, on a GPU from kernels of our own, over an
        expert's rows, ascending: deterministic, not invariant.
    Ref: Shazeer et al. 2017, arXiv:1701.06538; transformers' Qwen3MoeExperts, whose sum over experts is rounded at each.
    """
    return _moe_experts(x, ids, weights, gate_up, down, activation)


def moe_experts_ref(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str = "silu") -> Tensor:
    """Compute `moe_experts` in plain PyTorch, with its roundings: x of any float dtype, differentiable by autograd."""
    out = torch.zeros_like(widened(x))
    for expert in range(len(gate_up)):
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        y = linear_ref(swiglu_merged_ref(linear_ref(x[rows], gate_up[expert]), activation), down[expert])
        out = out.index_add(0, rows, y.to(out.dtype) * weights[rows, slots, None].to(out.dtype))
    return out.to(x.dtype)


def _check(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> None:
    require_dtype("moe_experts", x, (torch.bfloat16,) if x.is_cuda else cpu.DTYPES)
    if activation not in ACTIVATIONS:
        raise ValueError(f"moe_experts: activation={activation!r}: expected {' or '.join(ACTIVATIONS)}")
    experts, wide, d = gate_up.shape if gate_up.dim() == 3 else (0, 0, 0)
    fits = x.dim() == 2 and ids.dim() == 2 and x.shape == (len(ids), d) and down.shape == (experts, d, wide // 2)
    if not fits or wide % 2 or ids.shape != weights.shape or ids.dtype != torch.int64:
        given = {"x": x, "ids": ids, "weights": weights, "gate_up": gate_up, "down": down}
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
        expected = "expected x [R, D], ids [R, S] int64, weights [R, S], gate_up [E, 2 I, D], down [E, D, I]"
        raise ValueError(f"moe_experts: {shapes}, ids {str(ids.dtype)[6:]}: {expected}")
    if not x.is_cuda and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < experts:
        raise ValueError(f"moe_experts: ids from {int(ids.min())} to {int(ids.max())}: expected 0 to {experts - 1}")


def _groups(ids_RS: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each expert that has rows, with the places [G] of its slots in ids.flatten(), ascending."""
    flat = ids_RS.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    for expert, places in enumerate(order.split(counts)):
        if len(places):
            yield expert, places


def _cpu(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    rows, slots = ids.shape
    y_XD = x.new_empty(rows * slots, x.shape[1])
    for expert, places in _groups(ids, len(gate_up)):
        inside = swiglu_merged(linear(x[places // slots], gate_up[expert]), activation)
        y_XD[places] = linear(inside, down[expert])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    cpu.call("moe_combine", y_XD, weights.float().contiguous(), out, rows, slots, x.shape[1], cpu.is_bf16(x))
    return out


def _save(ctx: Any, inputs, output) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor):
    x, ids, weights, gate_up, down = ctx.saved_tensors
    dx, dw, dup, ddown = gradients(dout, x, ids, weights, gate_up, down, ctx.activation, gate_up.dtype, ctx.needs_input_grad)
    return dx, None, dw, dup, ddown, None


def gradients(
    dout: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    dtype: torch.dtype,
    needed: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (dx, dweights, dgate_up, ddown) of `moe_experts`, the last two in `dtype`, each None unless it is needed.

    Args:
        dout: [R, D], of what `moe_experts` gave; the next six are its arguments.
        dtype: of the gradients of gate_up and down.
        needed: six, whether each argument of `moe_experts` needs a gradient; those of x and weights are always made.

    An expert's activations are computed again. A GPU takes all experts in one product; see kernels/moe_experts.py.
    """
    if x.is_cuda and ids.numel():
        from rlinvariant.kernels import moe_experts  # Triton's, which a CPU need not have

        return moe_experts.gradients(dout, x, ids, weights, gate_up, down, activation, dtype, needed)
    rows, slots = ids.shape
    w_X, dw_X = weights.float().flatten(), x.new_zeros(rows * slots, dtype=torch.float32)
    dx_XD = x.new_zeros(rows * slots, x.shape[1])
    dup = torch.zeros_like(gate_up, dtype=dtype) if needed[3] else None
    ddown = torch.zeros_like(down, dtype=dtype) if needed[4] else None
    for expert, places in _groups(ids, len(gate_up)):
        up_ND, down_DI = gate_up[expert].to(x.dtype), down[expert].to(x.dtype)
        x_GD, dout_GD, w_G1 = x[places // slots], dout[places // slots], w_X[places, None]
        both_GN = linear(x_GD, up_ND)
        inside_GI = swiglu_merged(both_GN, activation)
        dinside_GI = dout_GD @ down_DI  # before the weight, whose own gradient is its product with what is inside
        dw_X[places] = (dinside_GI.float() * inside_GI.float()).sum(-1)
        dboth_GN = swiglu_merged_backward((dinside_GI * w_G1).to(x.dtype), both_GN, activation)
        dx_XD[places] = dboth_GN @ up_ND
        if dup is not None:
            dup[expert] = product(dboth_GN.t(), x_GD, dtype)
        if ddown is not None:
            ddown[expert] = product((dout_GD * w_G1).to(x.dtype).t(), inside_GI, dtype)
    dx = dx_XD.view(rows, slots, -1).sum(1, dtype=torch.float32).to(x.dtype)
    return dx, dw_X.view(rows, slots).to(weights.dtype), dup, ddown


_moe_experts = define(
    "moe_experts(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, str activation) -> Tensor",
    cpu=_cpu,
    cuda="moe_experts.moe_experts",
    fake=lambda x, *_: x.new_empty(x.shape),
    check=_check,
    save=_save,
    backward=_backward,
)

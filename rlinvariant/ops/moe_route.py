"""The router of a mixture of experts: which experts a token goes to, and with which weights.

R: rows (tokens), E: experts, S: slots of a row, one for each expert that it goes to.
"""

from typing import Any

import torch
from torch import Tensor

from rlinvariant.kernels import cpu
from rlinvariant.ops.register import define, require_dtype, widened


def moe_route(logits: Tensor, slots: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Choose the experts with the largest logits, and weigh them by a softmax over all experts.

        ids = the first `slots` experts by (logit falling, index rising)
        p[e] = exp(x[e] - max x) / sum_e' exp(x[e'] - max x);  w[j] = p[ids[j]], or p[ids[j]] / sum_j' p[ids[j']]

    Args:
        logits: [R, E], bf16 or fp32.
        slots: experts of a row, 1 to E.
        renormalise: whether the weights of a row's slots sum to 1.

    Returns:
        (w, ids): [R, S] fp32 and [R, S] int64. The experts of a row differ, and stand in the order above.

    Raises:
        TypeError, ValueError: a dtype or a shape is not as above.

    Order: CPU: the softmax's sum over experts, ascending, in fp32; then the sum over slots, ascending. CUDA: the first is one
        tree, whose shape depends on E alone; the second is ascending. exp is that of kernels/cpu.h, or the GPU's ex2.
    Bits: a row of both results, and of dlogits, depends on that row of logits alone. The order of experts is total, so equal
        logits, which bf16 has often, choose no kernel's favourite: -0 equals 0, and NaN comes after all numbers.
    Ref: Fedus et al. 2021, arXiv:2101.03961; transformers' Qwen3MoeTopKRouter, which takes the largest probabilities by
        torch.topk: of equal ones any.
    """
    return _moe_route(logits, slots, renormalise)


def moe_route_ref(logits: Tensor, slots: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Compute `moe_route` in plain PyTorch, of any float dtype; differentiable by autograd."""
    p = torch.softmax(widened(logits), -1)
    ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :slots]
    w = p.gather(-1, ids)
    return (w / w.sum(-1, keepdim=True) if renormalise else w), ids


def _check(logits: Tensor, slots: int, renormalise: bool) -> None:
    require_dtype("moe_route", logits)
    if logits.dim() != 2 or not 1 <= slots <= logits.shape[1]:
        raise ValueError(f"moe_route: logits {tuple(logits.shape)}, slots={slots}: expected [R, E] and 1 to E slots")


def _cpu(logits: Tensor, slots: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    rows, experts = logits.shape
    weights = torch.empty(rows, slots, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, slots, dtype=torch.int64, device=logits.device)
    cpu.call("moe_route", logits, weights, ids, rows, experts, slots, renormalise, cpu.is_bf16(logits))
    return weights, ids


def _fake(logits: Tensor, slots: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    shape = logits.shape[0], slots  # len() would make a number of a size that a compiler leaves open
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def _save(ctx: Any, inputs, output) -> None:
    logits, _, ctx.renormalise = inputs
    ctx.save_for_backward(logits, *output)


def _backward(ctx: Any, dw_RS: Tensor, _):
    """Return the gradient through the softmax; where weights are renormalised it is one over a row's own slots."""
    logits_RE, w_RS, ids_RS = ctx.saved_tensors
    if ctx.renormalise:
        d_RS = w_RS * (dw_RS - (w_RS * dw_RS).sum(-1, keepdim=True))
        d_RE = torch.zeros_like(logits_RE, dtype=torch.float32).scatter_(-1, ids_RS, d_RS)
    else:
        p_RE = torch.softmax(logits_RE.float(), -1)
        d_RE = -p_RE * (w_RS * dw_RS).sum(-1, keepdim=True)
        d_RE = d_RE.scatter_add_(-1, ids_RS, w_RS * dw_RS)
    return d_RE.to(logits_RE.dtype), None, None


_moe_route = define(
    "moe_route(Tensor logits, int slots, bool renormalise) -> (Tensor, Tensor)",
    cpu=_cpu,
    cuda="moe_route.moe_route",
    fake=_fake,
    check=_check,
    save=_save,
    backward=_backward,
)

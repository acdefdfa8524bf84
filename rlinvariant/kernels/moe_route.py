"""The router of a mixture of experts on a GPU: one program for each row, which chooses by integers, in a total order.

E: experts, S: slots of a row; both are powers of two in a kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinvariant.kernels.rows import aligned


@triton.jit
def _route(logits_ptr, weights_ptr, ids_ptr, experts, slots, RENORMALISE: tl.constexpr, E: tl.constexpr, S: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    e, s = tl.arange(0, E), tl.arange(0, S)
    x = tl.load(logits_ptr + row * experts + e, mask=e < experts, other=-float("inf")).to(tl.float32)
    u = (x + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    order = tl.where(x == x, u ^ ((u >> 31) & 0x7FFFFFFF), -2147483647).to(tl.int64)  # rises with the logit; NaN comes last
    least = tl.full((E,), -2147483648, tl.int64) * 4294967296
    key = tl.where(e < experts, order * 4294967296 - e, least)
    ids = tl.zeros((S,), tl.int64)
    for j in range(slots):
        best = (-tl.max(key, 0)) & 0xFFFFFFFF
        ids = tl.where(s == j, best, ids)
        key = tl.where(e == best, least, key)
    first = tl.sum(tl.where(s == 0, ids, 0), 0)
    p = tl.exp(x - tl.sum(tl.where(e == first, x, 0.0), 0))
    p = p / tl.sum(p, 0)
    weights, kept = tl.zeros((S,), tl.float32), 0.0
    for j in range(slots):
        w = tl.sum(tl.where(e == tl.sum(tl.where(s == j, ids, 0), 0), p, 0.0), 0)
        weights = tl.where(s == j, w, weights)
        kept += w
    if RENORMALISE:
        weights = weights / kept
    tl.store(weights_ptr + row * slots + s, weights, mask=s < slots)
    tl.store(ids_ptr + row * slots + s, ids, mask=s < slots)


def moe_route(logits: Tensor, slots: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Compute `ops.moe_route`: logits [R, E]; weights fp32 and ids int64, [R, S] each."""
    logits = aligned(logits)
    rows, experts = logits.shape
    weights = torch.empty(rows, slots, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, slots, dtype=torch.int64, device=logits.device)
    sizes = {"E": triton.next_power_of_2(experts), "S": triton.next_power_of_2(slots)}
    warps = 1 if experts <= 1024 else 4  # the tree of a sum follows their number
    if rows:
        _route[(rows,)](
            logits, weights, ids, experts, slots, RENORMALISE=renormalise, **sizes, num_warps=warps, enable_fp_fusion=False
        )
    return weights, ids

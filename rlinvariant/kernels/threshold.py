"""The threshold of truncated sampling on a GPU: one program a row, which reads it three times and then a short list.

1. The largest logit, and the largest of every LANES-th: the k-th of those is a logit that top-k surely reaches, since k tokens
   are at least as large.
2. The integer masses, as in kernels/threshold.c, and their sum over what min-p keeps.
3. A list of the logits that can be the threshold: not those that are, all V of them together, within what top-p drops.

On the list, the largest key with enough at or above it is found bit by bit. All sums are of integers, in any order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinvariant.kernels.rows import aligned

LANES = 4096  # columns that a program takes at a time
ROWS = 256  # rows whose lists are held at once, 4 bytes a logit


@triton.jit
def _masses(x, top, scale):
    """Return floor(2^40 exp((x - top) / temperature)) as int64; each product and sum is rounded, none fused."""
    g = (x - top) * scale
    g = tl.where(g > -44.0, g, -44.0)
    z = g + 12582912.0
    f = g - (z - 12582912.0)
    p = f * 1.5353362e-4 + 1.3398875e-3
    p = p * f + 9.618437e-3
    p = p * f + 5.5503324e-2
    p = p * f + 2.4022648e-1
    p = p * f + 6.931472e-1
    p = p * f + 1.0
    power = (z.to(tl.int32, bitcast=True) - 1262485337) << 23  # 2^(n + 40)
    return (p * power.to(tl.float32, bitcast=True)).to(tl.int64)


@triton.jit
def _keys(x, SHIFT: tl.constexpr):
    """Return int32 keys that rise with the logit, of its upper 32 - SHIFT bits; the two zeros are one."""
    u = (x + 0.0).to(tl.int32, bitcast=True)
    return (u ^ ((u >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _logit(key, SHIFT: tl.constexpr):
    """Return the logit of a key, of which the lower bits are 0, fp32."""
    u = key << SHIFT
    u = u ^ ((u >> 31) & 0x7FFFFFFF & ~((1 << SHIFT) - 1))
    return u.to(tl.float32, bitcast=True)


@triton.jit
def _load(x_ptr, start, count, LANES: tl.constexpr):
    at = start + tl.arange(0, LANES)
    return tl.load(x_ptr + at, mask=at < count, other=-float("inf")).to(tl.float32), at < count


@triton.jit
def _largest(x_ptr, count, need, low, top, scale, BY_MASS: tl.constexpr, SHIFT: tl.constexpr, LANES: tl.constexpr):
    """Return the largest key from which up the list's tokens, or their masses, are `need` or more; `low` if there is none."""
    low = low.to(tl.int64)
    high = _keys(top, SHIFT).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        total = tl.zeros((LANES,), tl.int64)
        for start in range(0, count, LANES):
            x, inside = _load(x_ptr, start, count, LANES)
            weight = _masses(x, top, scale) if BY_MASS else inside.to(tl.int64)
            total += tl.where(inside & (_keys(x, SHIFT) >= middle), weight, 0)
        enough = tl.sum(total, 0) >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32)


@triton.jit
def _kth(keys, k, low, high):
    """Return the k-th largest of the keys, which are in registers; not below `low`."""
    low = low.to(tl.int64)
    high = high.to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        enough = tl.sum((keys >= middle).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32)


@triton.jit
def _threshold(
    logits_ptr, t_ptr, k_ptr, p_ptr, m_ptr, list_ptr, theta_ptr, vocab, first, SHIFT: tl.constexpr, LANES: tl.constexpr
):
    place, row = tl.program_id(0).to(tl.int64), first + tl.program_id(0).to(tl.int64)
    x_ptr, list_ptr = logits_ptr + row * vocab, list_ptr + place * vocab
    t, k, p, m = tl.load(t_ptr + row), tl.load(k_ptr + row), tl.load(p_ptr + row), tl.load(m_ptr + row)
    by_k, by_p, by_min = (k > 0) & (k < vocab), p < 1.0, m > 0.0
    tops = tl.full((LANES,), -float("inf"), tl.float32)
    nan = tl.zeros((LANES,), tl.int32)
    for start in range(0, vocab, LANES):
        x, _ = _load(x_ptr, start, vocab, LANES)
        nan = nan | (x != x).to(tl.int32)
        tops = tl.where(x > tops, x, tops)
    top = tl.max(tops, 0)
    right = (tl.max(nan, 0) == 0) & (t == t) & (t != 0.0) & (top - top == 0.0)
    theta = top * 0.0 - float("inf")
    if right & (by_k | by_p | by_min):
        scale = tl.div_rn(t * 0.0 + 1.44269504, t)
        least = tl.ceil(m.to(tl.float64) * 1099511627776.0).to(tl.int64)
        sums = tl.zeros((LANES,), tl.int64)
        lowest = tl.full((LANES,), 2147483647 >> SHIFT, tl.int32)
        for start in range(0, vocab, LANES):
            x, inside = _load(x_ptr, start, vocab, LANES)
            mass = _masses(x, top, scale)
            sums += tl.where(inside, mass, 0)
            lowest = tl.minimum(lowest, tl.where(inside & (mass >= least), _keys(x, SHIFT), 2147483647 >> SHIFT))
        low = tl.where(by_min, tl.min(lowest, 0), tl.min(_keys(lowest * 0.0 - float("inf"), SHIFT), 0))
        if by_min:
            for start in range(0, vocab, LANES):  # what is left by min-p; a mass is its key's, up to the last bit
                x, inside = _load(x_ptr, start, vocab, LANES)
                sums -= tl.where(inside & (_keys(x, SHIFT) < low), _masses(x, top, scale), 0)
        total = tl.sum(sums, 0)
        cut = low
        if by_k & (k <= LANES):
            cut = tl.maximum(cut, _kth(_keys(tops, SHIFT), k, low, _keys(top, SHIFT)))
        if by_p & (by_k == 0):
            spare = (total.to(tl.float64) * (1.0 - p.to(tl.float64)) / vocab).to(tl.float32)
            gap = tl.where(spare > 1.0, tl.log2(tl.maximum(spare, 1.0)) - 40.25, -float("inf"))
            cut = tl.maximum(cut, _keys(top + gap / scale, SHIFT))
        count = tl.zeros((), tl.int32)
        for start in range(0, vocab, LANES):
            x, inside = _load(x_ptr, start, vocab, LANES)
            listed = (inside & (_keys(x, SHIFT) >= cut)).to(tl.int32)
            tl.store(list_ptr + count + tl.cumsum(listed, 0) - 1, x, mask=listed > 0)
            count += tl.sum(listed, 0)
        tl.debug_barrier()
        if by_k:
            low = tl.maximum(low, _largest(list_ptr, count, k, tl.maximum(low, cut), top, scale, False, SHIFT, LANES))
        if by_p:
            if by_k:
                sums = tl.zeros((LANES,), tl.int64)
                for start in range(0, count, LANES):
                    x, inside = _load(list_ptr, start, count, LANES)
                    sums += tl.where(inside & (_keys(x, SHIFT) >= low), _masses(x, top, scale), 0)
                total = tl.sum(sums, 0)
            need = tl.maximum(tl.ceil(p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)
            low = tl.maximum(low, _largest(list_ptr, count, need, tl.maximum(low, cut), top, scale, True, SHIFT, LANES))
        theta = _logit(low, SHIFT)
    tl.store(theta_ptr + row, theta)


def threshold(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Compute `ops.threshold`: logits [R, V], the others [R]."""
    logits = aligned(logits)
    settings = [x.contiguous() for x in (temperature, top_k, top_p, min_p)]
    rows, vocab = logits.shape
    theta = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lists = torch.empty(min(rows, ROWS), vocab, dtype=torch.float32, device=logits.device)
    shift = 16 if logits.dtype is torch.bfloat16 else 0
    for first in range(0, rows, ROWS):
        grid = (min(ROWS, rows - first),)
        at = logits, *settings, lists, theta, vocab, first
        _threshold[grid](*at, SHIFT=shift, LANES=LANES, num_warps=16, enable_fp_fusion=False)
    return theta

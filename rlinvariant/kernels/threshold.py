"""The threshold of truncated sampling on a GPU: a row is read once, and then the little of it that can matter.

1. `_tops`: the largest of every 32 logits, a group.
2. `_totals`: where top-p stands alone, the sum of a row's integer masses, as in kernels/threshold.c: it needs all of them.
3. `_chosen`: a list of the logits from a cut up, read from the groups whose largest is one; then the largest key from which up
   there are enough of them, or enough mass, bit by bit. The cut lies below any threshold: it is the k-th of largest logits of k
   sets or more, since k tokens are at least as large; a logit that min-p drops; or one so small that V of them would be within
   what top-p drops.

All sums are of integers, in any order, and nothing is added atomically: each part of a row has a place of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinvariant.kernels.rows import aligned

BLOCK = tl.constexpr(4096)  # columns of a program of `_tops`
GROUP = tl.constexpr(32)  # columns of a group: 64 bytes of bf16
FEW = tl.constexpr(32)  # groups that are read together
LANES = tl.constexpr(1024)  # logits that are read together
PARTS = tl.constexpr(8)  # programs that add up a row's masses
ROWS = 512  # rows that are looked at together, each with a place for a list


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
def _least(min_p):
    """Return the least mass that min-p keeps."""
    return tl.ceil(min_p.to(tl.float64) * 1099511627776.0).to(tl.int64)


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
def _lowest(SHIFT: tl.constexpr):
    """Return the key of -inf."""
    return _keys(tl.full((), -float("inf"), tl.float32), SHIFT)


@triton.jit
def _load(x_ptr, start, count, N: tl.constexpr):
    at = start + tl.arange(0, N)
    return tl.load(x_ptr + at, mask=at < count, other=-float("inf")).to(tl.float32), at < count


@triton.jit
def _kth(keys, k, low, high):
    """Return the k-th largest of the keys, which are in registers; not below `low`."""
    low = low.to(tl.int64)
    high = high.to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        enough = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32)


@triton.jit
def _settings(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab):
    """Return whether a row asks for top-k, for top-p, for min-p, for top-p alone, and 1 / temperature in octaves."""
    k, by_p, by_m = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row) < 1.0, tl.load(min_p_ptr + row) > 0.0
    by_k = (k > 0) & (k < vocab)
    scale = tl.div_rn(tl.full((), 1.44269504, tl.float32), tl.load(temperature_ptr + row))
    return by_k, by_p, by_m, by_p & (by_k == 0) & (by_m == 0), scale


@triton.jit
def _tops(logits_ptr, tops_ptr, vocab):
    """Store the largest of each group of a block, in the logits' dtype; +inf if one is NaN."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x, _ = _load(logits_ptr + row * vocab, block * BLOCK, vocab, BLOCK)
    tops = tl.max(tl.reshape(tl.where(x == x, x, float("inf")), (BLOCK // GROUP, GROUP)), 1)
    at = (row * tl.num_programs(1) + block) * (BLOCK // GROUP)
    tl.store(tops_ptr + at + tl.arange(0, BLOCK // GROUP), tops)


@triton.jit
def _row_tops(tops_ptr, count):
    """Return the largest logits of LANES sets of groups, of which some may be empty: -inf."""
    tops = tl.full((LANES,), -float("inf"), tl.float32)
    for start in range(0, count, LANES):
        more, inside = _load(tops_ptr, start, count, LANES)
        tops = tl.maximum(tops, more)
    return tops


@triton.jit
def _totals(logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, tops_ptr, total_ptr, vocab, count):
    """Store the mass of every so many columns of a row that asks for top-p alone."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    by_k, by_p, by_m, alone, scale = _settings(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab)
    if alone:
        top = tl.max(_row_tops(tops_ptr + row * count, count), 0)
        total = tl.zeros((LANES,), tl.int64)
        for start in range(part * LANES, vocab, PARTS * LANES):
            x, inside = _load(logits_ptr + row * vocab, start, vocab, LANES)
            total += tl.where(inside, _masses(x, top, scale), 0)
        tl.store(total_ptr + row * PARTS + part, tl.sum(total, 0))


@triton.jit
def _list(x_ptr, tops_ptr, groups_ptr, list_ptr, vocab, count, key, SHIFT: tl.constexpr):
    """Write a row's logits whose keys are `key` or more, and return how many; groups_ptr: room for numbers of groups."""
    groups, listed = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    tl.debug_barrier()  # the former list has been read
    for start in range(0, count, LANES):
        tops, inside = _load(tops_ptr, start, count, LANES)
        these = (inside & (_keys(tops, SHIFT) >= key)).to(tl.int32)
        tl.store(groups_ptr + groups + tl.cumsum(these, 0) - 1, start + tl.arange(0, LANES), mask=these > 0)
        groups += tl.sum(these, 0)
    tl.debug_barrier()
    for first in range(0, groups, FEW):
        at = first + tl.arange(0, FEW)
        group = tl.load(groups_ptr + at, mask=at < groups, other=vocab)
        col = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.reshape(tl.load(x_ptr + col, mask=col < vocab, other=0.0), (FEW * GROUP,)).to(tl.float32)
        these = (tl.reshape(col < vocab, (FEW * GROUP,)) & (_keys(x, SHIFT) >= key)).to(tl.int32)
        tl.store(list_ptr + listed + tl.cumsum(these, 0) - 1, x, mask=these > 0)
        listed += tl.sum(these, 0)
    tl.debug_barrier()
    return listed


@triton.jit
def _from(list_ptr, size, key, top, scale, BY_MASS: tl.constexpr, SHIFT: tl.constexpr):
    """Return the number of the listed logits whose keys are `key` or more, or the sum of their masses, int64."""
    total = tl.zeros((LANES,), tl.int64)
    for start in range(0, size, LANES):
        x, inside = _load(list_ptr, start, size, LANES)
        weight = _masses(x, top, scale) if BY_MASS else inside.to(tl.int64)
        total += tl.where(inside & (_keys(x, SHIFT) >= key), weight, 0)
    return tl.sum(total, 0)


@triton.jit
def _largest(list_ptr, size, need, low, top, scale, BY_MASS: tl.constexpr, SHIFT: tl.constexpr):
    """Return the largest key from which up the list's tokens, or their masses, are `need` or more; `low` if there is none."""
    low = low.to(tl.int64)
    high = _keys(top, SHIFT).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        enough = _from(list_ptr, size, middle.to(tl.int32), top, scale, BY_MASS, SHIFT) >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32)


@triton.jit
def _kept(list_ptr, size, least, top, scale, SHIFT: tl.constexpr):
    """Return the least key of a listed token whose mass is `least` or more."""
    low = tl.full((LANES,), 2147483647, tl.int32)
    for start in range(0, size, LANES):
        x, inside = _load(list_ptr, start, size, LANES)
        low = tl.minimum(low, tl.where(inside & (_masses(x, top, scale) >= least), _keys(x, SHIFT), 2147483647))
    return tl.min(low, 0)


@triton.jit
def _chosen(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    tops_ptr,
    total_ptr,
    groups_ptr,
    list_ptr,
    theta_ptr,
    rows,
    vocab,
    count,
    SHIFT: tl.constexpr,
):
    """Store the thresholds of every so many rows."""
    place = tl.program_id(0).to(tl.int64)
    groups_ptr, list_ptr = groups_ptr + place * count, list_ptr + place * vocab
    for row in range(place, rows, tl.num_programs(0)):
        by_k, by_p, by_m, alone, scale = _settings(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab)
        x_ptr, row_tops = logits_ptr + row * vocab, tops_ptr + row * count
        tops = _row_tops(row_tops, count)
        top = tl.max(tops, 0)
        theta = tl.full((), -float("inf"), tl.float32)
        if (scale - scale == 0.0) & (top - top == 0.0) & (by_k | by_p | by_m):
            low, size = _lowest(SHIFT), tl.full((), 0, tl.int32)
            if by_k:
                k = tl.load(top_k_ptr + row)
                low = _kth(_keys(tops, SHIFT), k, low, _keys(top, SHIFT))
                size = _list(x_ptr, row_tops, groups_ptr, list_ptr, vocab, count, low, SHIFT)
                low = _largest(list_ptr, size, k, low, top, scale, False, SHIFT)
            if by_m:
                m = tl.load(min_p_ptr + row)
                if (by_k == 0) | (_masses(_logit(low, SHIFT), top, scale) < _least(m)):
                    cut = _keys(top + (tl.log2(m) - 0.25) / scale, SHIFT)
                    size = _list(x_ptr, row_tops, groups_ptr, list_ptr, vocab, count, cut, SHIFT)
                    low = tl.maximum(low, _kept(list_ptr, size, _least(m), top, scale, SHIFT))
            if by_p:
                if alone:
                    total = tl.sum(tl.load(total_ptr + row * PARTS + tl.arange(0, PARTS)), 0)
                else:
                    total = _from(list_ptr, size, low, top, scale, True, SHIFT)
                need = tl.ceil(tl.load(top_p_ptr + row).to(tl.float64) * total.to(tl.float64)).to(tl.int64)
                need = tl.maximum(need, 1)
                if alone:
                    spare = ((total - need).to(tl.float64) / vocab).to(tl.float32)
                    gap = tl.where(spare > 1.0, tl.log2(tl.maximum(spare, 1.0)) - 40.25, -float("inf"))
                    low = _keys(top + gap / scale, SHIFT)
                    size = _list(x_ptr, row_tops, groups_ptr, list_ptr, vocab, count, low, SHIFT)
                low = _largest(list_ptr, size, need, low, top, scale, True, SHIFT)
            theta = _logit(low, SHIFT)
        tl.store(theta_ptr + row, theta)


def threshold(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Compute `ops.threshold`: logits [R, V], the others [R]."""
    logits = aligned(logits)
    settings = [x.contiguous() for x in (temperature, top_k, top_p, min_p)]
    (rows, vocab), device = logits.shape, logits.device
    blocks, held = triton.cdiv(vocab, BLOCK.value), min(rows, ROWS)
    count = blocks * (BLOCK.value // GROUP.value)

    def room(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    theta, totals = room(rows, dtype=torch.float32), room(rows, PARTS.value, dtype=torch.int64)
    tops, groups = room(rows, count, dtype=logits.dtype), room(held, count, dtype=torch.int32)
    lists = room(held, vocab, dtype=logits.dtype)
    if rows:
        shift, exact = 16 if logits.dtype is torch.bfloat16 else 0, {"num_warps": 4, "enable_fp_fusion": False}
        _tops[(rows, blocks)](logits, tops, vocab, num_warps=8)
        _totals[(rows, PARTS.value)](logits, *settings, tops, totals, vocab, count, **exact)
        _chosen[(held,)](logits, *settings, tops, totals, groups, lists, theta, rows, vocab, count, SHIFT=shift, **exact)
    return theta

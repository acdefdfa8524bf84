"""The threshold of truncated sampling on a GPU, in four kernels, of which two read a row, by many programs.

1. `_tops`: the largest of every 64 logits.
2. `_cuts`: the largest of all, and a cut below which no threshold can lie: the k-th of those of `_tops`, since k tokens are at
   least as large; or, for top-p, a logit so small that V of them would be within what top-p drops.
3. `_lists`: the logits from the cut up; and, where top-p or min-p asks for them, the integer masses, as in kernels/threshold.c.
4. `_chosen`: on a row's list, the largest key with enough at or above it, bit by bit.

All sums are of integers, in any order, and nothing is added atomically: each block of a row has a place of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinvariant.kernels.rows import aligned

BLOCK = 4096  # columns of a block of a row
TOP_OF = 64  # columns of which the largest is kept
LANES = 1024  # logits of a list that are looked at together
ROWS = 256  # rows whose lists are held at once: two copies of their logits


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
def _load(x_ptr, start, count, LANES: tl.constexpr):
    at = start + tl.arange(0, LANES)
    return tl.load(x_ptr + at, mask=at < count, other=-float("inf")).to(tl.float32), at < count


@triton.jit
def _from(x_ptr, count, key, top, scale, BY_MASS: tl.constexpr, SHIFT: tl.constexpr, LANES: tl.constexpr):
    """Return the number of the logits whose keys are `key` or more, or the sum of their masses, int64."""
    total = tl.zeros((LANES,), tl.int64)
    for start in range(0, count, LANES):
        x, inside = _load(x_ptr, start, count, LANES)
        weight = _masses(x, top, scale) if BY_MASS else inside.to(tl.int64)
        total += tl.where(inside & (_keys(x, SHIFT) >= key), weight, 0)
    return tl.sum(total, 0)


@triton.jit
def _largest(x_ptr, count, need, low, top, scale, BY_MASS: tl.constexpr, SHIFT: tl.constexpr, LANES: tl.constexpr):
    """Return the largest key from which up the list's tokens, or their masses, are `need` or more; `low` if there is none."""
    low = low.to(tl.int64)
    high = _keys(top, SHIFT).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        enough = _from(x_ptr, count, middle, top, scale, BY_MASS, SHIFT, LANES) >= need
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
def _settings(t_ptr, k_ptr, p_ptr, top, row, vocab):
    """Return which of top-k and top-p a row asks for, whether it is one that can be cut, and 1 / temperature in octaves."""
    k, p, scale = (
        tl.load(k_ptr + row),
        tl.load(p_ptr + row),
        tl.div_rn(tl.full((), 1.44269504, tl.float32), tl.load(t_ptr + row)),
    )
    right = (scale - scale == 0.0) & (top - top == 0.0)
    return right & (k > 0) & (k < vocab), right & (p < 1.0), right, scale


@triton.jit
def _lowest(SHIFT: tl.constexpr):
    """Return the key of -inf."""
    return _keys(tl.full((), -float("inf"), tl.float32), SHIFT)


@triton.jit
def _tops(logits_ptr, tops_ptr, vocab, first, BLOCK: tl.constexpr, TOP_OF: tl.constexpr):
    """Store the largest of every TOP_OF columns of a block; +inf if one is NaN."""
    place, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x, _ = _load(logits_ptr + (first + place) * vocab, block * BLOCK, vocab, BLOCK)
    tops = tl.max(tl.reshape(tl.where(x == x, x, float("inf")), (BLOCK // TOP_OF, TOP_OF)), 1)
    at = (place * tl.num_programs(1) + block) * (BLOCK // TOP_OF)
    tl.store(tops_ptr + at + tl.arange(0, BLOCK // TOP_OF), tops)


@triton.jit
def _cuts(
    tops_ptr, t_ptr, k_ptr, p_ptr, m_ptr, top_ptr, cut_ptr, vocab, first, count, SHIFT: tl.constexpr, COUNT: tl.constexpr
):
    """Store a row's largest logit, and the key from which up `_lists` lists."""
    place = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, COUNT)
    tops = tl.load(tops_ptr + place * count + at, mask=at < count, other=-float("inf"))
    top = tl.max(tops, 0)
    by_k, by_p, _, scale = _settings(t_ptr, k_ptr, p_ptr, top, first + place, vocab)
    highest, lowest = _keys(top, SHIFT), _lowest(SHIFT)
    k, p = tl.load(k_ptr + first + place), tl.load(p_ptr + first + place)
    cut = highest
    if by_k:
        cut = lowest
        if k <= count:
            cut = _kth(_keys(tops, SHIFT), k, lowest, highest)
    elif by_p:  # the total is not known yet: of the largest of every TOP_OF that min-p keeps, it is no more
        mass = _masses(tops, top, scale)
        total = tl.sum(tl.where((at < count) & (mass >= _least(tl.load(m_ptr + first + place))), mass, 0), 0)
        spare = (total.to(tl.float64) * (1.0 - p.to(tl.float64)) / vocab).to(tl.float32)
        gap = tl.where(spare > 1.0, tl.log2(tl.maximum(spare, 1.0)) - 40.25, -float("inf"))
        cut = _keys(top + gap / scale, SHIFT)
    tl.store(top_ptr + place, top)
    tl.store(cut_ptr + place, cut)


@triton.jit
def _lists(
    logits_ptr,
    t_ptr,
    k_ptr,
    p_ptr,
    m_ptr,
    top_ptr,
    cut_ptr,
    list_ptr,
    count_ptr,
    sum_ptr,
    lowest_ptr,
    vocab,
    first,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a block's logits from the cut up and their number; where it is asked for, its mass and the least key of min-p."""
    place, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, at = first + place, place * tl.num_programs(1) + block
    top, cut, m = tl.load(top_ptr + place), tl.load(cut_ptr + place), tl.load(m_ptr + row)
    by_k, by_p, right, scale = _settings(t_ptr, k_ptr, p_ptr, top, row, vocab)
    if right & (by_k | by_p | (m > 0.0)):
        x, inside = _load(logits_ptr + row * vocab, block * BLOCK, vocab, BLOCK)
        keys = _keys(x, SHIFT)
        if (m > 0.0) | (by_p & (by_k == 0)):
            mass = tl.where(inside, _masses(x, top, scale), 0)
            tl.store(sum_ptr + at, tl.sum(mass, 0))
            tl.store(lowest_ptr + at, tl.min(tl.where(inside & (mass >= _least(m)), keys, 2147483647 >> SHIFT), 0))
        listed = (inside & (keys >= cut)).to(tl.int32)
        count = tl.sum(listed, 0)
        if count > 0:
            tl.store(list_ptr + place * vocab + block * BLOCK + tl.cumsum(listed, 0) - 1, x, mask=listed > 0)
        tl.store(count_ptr + at, count)


@triton.jit
def _joined(list_ptr, all_ptr, counts, LOG_NB: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Write the blocks' logits one after the other, and return how many there are; counts [NB] of the blocks."""
    ends, count = tl.cumsum(counts, 0), tl.sum(counts, 0)
    begins = ends - counts
    for start in range(0, count, LANES):
        j = start + tl.arange(0, LANES)
        block = j * 0  # how many blocks end at or before j
        for i in tl.static_range(LOG_NB):
            more = block + (1 << (LOG_NB - 1 - i))
            block = tl.where(tl.gather(ends, more - 1, 0) <= j, more, block)
        x = tl.load(list_ptr + block.to(tl.int64) * BLOCK + (j - tl.gather(begins, block, 0)), mask=j < count, other=0.0)
        tl.store(all_ptr + j, x, mask=j < count)
    tl.debug_barrier()
    return count


@triton.jit
def _chosen(
    logits_ptr,
    t_ptr,
    k_ptr,
    p_ptr,
    m_ptr,
    top_ptr,
    cut_ptr,
    list_ptr,
    all_ptr,
    count_ptr,
    sum_ptr,
    lowest_ptr,
    theta_ptr,
    vocab,
    first,
    blocks,
    SHIFT: tl.constexpr,
    LOG_NB: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = first + place
    top, cut, m = tl.load(top_ptr + place), tl.load(cut_ptr + place), tl.load(m_ptr + row)
    by_k, by_p, right, scale = _settings(t_ptr, k_ptr, p_ptr, top, row, vocab)
    k, p = tl.load(k_ptr + row), tl.load(p_ptr + row)
    theta = tl.full((), -float("inf"), tl.float32)
    if right & (by_k | by_p | (m > 0.0)):
        b = tl.arange(0, 1 << LOG_NB)
        low = _lowest(SHIFT)
        if m > 0.0:
            low = tl.min(tl.load(lowest_ptr + place * blocks + b, mask=b < blocks, other=2147483647 >> SHIFT), 0)
        list_ptr, all_ptr = list_ptr + place * vocab, all_ptr + place * vocab
        counts = tl.load(count_ptr + place * blocks + b, mask=b < blocks, other=0)
        count = _joined(list_ptr, all_ptr, counts, LOG_NB, BLOCK, LANES)
        if by_k:
            low = tl.maximum(low, _largest(all_ptr, count, k, tl.maximum(low, cut), top, scale, False, SHIFT, LANES))
        if by_p:
            if by_k:
                total = _from(all_ptr, count, low, top, scale, True, SHIFT, LANES)
            elif m > 0.0:  # of what min-p keeps, of which the list has a part alone
                total = _from(logits_ptr + row * vocab, vocab, low, top, scale, True, SHIFT, LANES)
            else:
                total = tl.sum(tl.load(sum_ptr + place * blocks + b, mask=b < blocks, other=0), 0)
            need = tl.maximum(tl.ceil(p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)
            low = tl.maximum(low, _largest(all_ptr, count, need, tl.maximum(low, cut), top, scale, True, SHIFT, LANES))
        theta = _logit(low, SHIFT)
    tl.store(theta_ptr + row, theta)


def threshold(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Compute `ops.threshold`: logits [R, V], the others [R]."""
    logits = aligned(logits)
    t, k, p, m = (x.contiguous() for x in (temperature, top_k, top_p, min_p))
    (rows, vocab), device = logits.shape, logits.device
    blocks, held = triton.cdiv(vocab, BLOCK), min(rows, ROWS)
    tops = blocks * (BLOCK // TOP_OF)

    def of_rows(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(held, columns, dtype=dtype, device=device)

    theta = torch.empty(rows, dtype=torch.float32, device=device)
    largest, top, cut = of_rows(tops, torch.float32), of_rows(1, torch.float32), of_rows(1, torch.int32)
    lists, whole = of_rows(vocab, logits.dtype), of_rows(vocab, logits.dtype)
    counts, sums, lowest = (of_rows(blocks, dtype) for dtype in (torch.int32, torch.int64, torch.int32))
    shift = 16 if logits.dtype is torch.bfloat16 else 0
    shared = {"SHIFT": shift, "enable_fp_fusion": False}
    for first in range(0, rows, ROWS):
        some = min(ROWS, rows - first)
        _tops[(some, blocks)](logits, largest, vocab, first, BLOCK=BLOCK, TOP_OF=TOP_OF, num_warps=8)
        padded = triton.next_power_of_2(tops)
        _cuts[(some,)](largest, t, k, p, m, top, cut, vocab, first, tops, COUNT=padded, num_warps=8, **shared)
        listed = logits, t, k, p, m, top, cut, lists, counts, sums, lowest, vocab, first
        _lists[(some, blocks)](*listed, BLOCK=BLOCK, num_warps=8, **shared)
        joined = logits, t, k, p, m, top, cut, lists, whole, counts, sums, lowest, theta, vocab, first, blocks
        sizes = {"LOG_NB": (blocks - 1).bit_length(), "BLOCK": BLOCK, "LANES": LANES}
        _chosen[(some,)](*joined, **sizes, num_warps=4, **shared)
    return theta

"""The threshold of truncated sampling on a GPU: a row is read once, and then the little of it that can matter.

1. `_tops`: the largest of every 32 logits, a group; where top-p stands alone also the sum of the group's probabilities, in
   units of the largest and in fp32, as floats are fast.
2. `_chosen`: a list of the logits from a cut up, read from the groups whose largest is one; then the largest key from which up
   there are enough of them, or enough mass, bit by bit. For top-k and min-p the cut lies below any threshold: it is the k-th of
   largest logits of k sets or more, since k tokens are at least as large; or a logit that min-p drops.

Top-p alone needs a share of the integer mass of all tokens, as kernels/threshold.c adds it up. The groups that are read
again have it; of the others the sums of floats say within which bounds it lies. If the key that has enough for the most is also
the largest that has enough for the least, it is the key of every total between, and so of the exact one. Otherwise the exact
total is added up, and the search made again: the same bits in either case, whatever the floats were.

All sums that decide are of integers, in any order, and nothing is added atomically: each part of a row has a place of its own.
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
# A sum of floats is within this share of the integer masses, and less than 1 for the floor of each, as is derived here.
# Let h = (x - top) * scale without rounding. `_masses` rounds twice, so its g is within |h| 2^-23 of h; the exponents that are
# added here, of x below its group's largest and of that below `top`, are rounded twice each: also within |h| 2^-23. As exp2
# turns d into a share of d ln 2, that is 44 * 2^-22 * 0.6932 < 2^-17 for h above -44; below, the mass is 0, and the float less
# than 1. Shares of 2^-22 each: the two ex2.approx, and the polynomial with its roundings. 31 * 2^-24: sums of 32 floats in any
# order; 2^-24: the product. Products are added in fp64. Together less than 2^-16.4.
WITHIN = tl.constexpr(2.0**-16)
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
def _tops(logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, tops_ptr, sums_ptr, vocab):
    """Store the largest of each group of a block, in the logits' dtype; +inf if one is NaN; and sums for top-p alone, fp32."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    by_k, by_p, by_m, alone, scale = _settings(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab)
    x, _ = _load(logits_ptr + row * vocab, block * BLOCK, vocab, BLOCK)
    x = tl.reshape(tl.where(x == x, x, float("inf")), (BLOCK // GROUP, GROUP))
    tops = tl.max(x, 1)
    at = (row * tl.num_programs(1) + block) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(tops_ptr + at, tops)
    if alone:
        sums = tl.sum(tl.exp2((x - tops[:, None]) * scale), 1)
        tl.store(sums_ptr + at, tl.where(tops > -float("inf"), sums, 0.0))


@triton.jit
def _row_tops(tops_ptr, count):
    """Return the largest logits of LANES sets of groups, of which some may be empty: -inf."""
    tops = tl.full((LANES,), -float("inf"), tl.float32)
    for start in range(0, count, LANES):
        more, inside = _load(tops_ptr, start, count, LANES)
        tops = tl.maximum(tops, more)
    return tops


@triton.jit
def _share(tops, top, scale):
    """Return exp2((tops - top) * scale), approximately."""
    return tl.exp2((tops - top) * scale)


@triton.jit
def _floats(tops_ptr, sums_ptr, count, key, top, scale, SHIFT: tl.constexpr):
    """Return the sums of floats of LANES sets of groups, of those whose largest has a key below `key`, fp64."""
    floats = tl.zeros((LANES,), tl.float64)
    for start in range(0, count, LANES):
        tops, inside = _load(tops_ptr, start, count, LANES)
        sums, _ = _load(sums_ptr, start, count, LANES)
        floats += tl.where(inside & (_keys(tops, SHIFT) < key), sums * _share(tops, top, scale), 0.0).to(tl.float64)
    return floats


@triton.jit
def _list(x_ptr, tops_ptr, groups_ptr, list_ptr, vocab, count, key, top, scale, BY_MASS: tl.constexpr, SHIFT: tl.constexpr):
    """Write a row's logits whose keys are `key` or more; groups_ptr: room for numbers of groups.

    Return how many, and if BY_MASS the mass of the groups that were read, int64.
    """
    groups, listed = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    mass = tl.zeros((FEW * GROUP,), tl.int64)
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
        inside = tl.reshape(col < vocab, (FEW * GROUP,))
        these = (inside & (_keys(x, SHIFT) >= key)).to(tl.int32)
        tl.store(list_ptr + listed + tl.cumsum(these, 0) - 1, x, mask=these > 0)
        listed += tl.sum(these, 0)
        if BY_MASS:
            mass += tl.where(inside, _masses(x, top, scale), 0)
    tl.debug_barrier()
    return listed, tl.sum(mass, 0)


@triton.jit
def _cut(row_tops, row_sums, tops, top, scale, p, vocab, count, SHIFT: tl.constexpr):
    """Return a key from which up there is p of a row's mass, by floats: `_chosen` checks it by integers.

    It is one so small that V tokens below would be within what top-p drops, or a larger one from which up the largest logits of
    sets have p, with what all others of their sets have at least, if these were no larger than the key.
    """
    high = _keys(top, SHIFT) + 1
    sums = _floats(row_tops, row_sums, count, high, top, scale, SHIFT).to(tl.float32)
    total, others = tl.sum(sums, 0), (tl.cdiv(count, LANES) * GROUP - 1).to(tl.float32)
    gap = tl.log2((1.0 - p) * total / vocab) - 0.25
    low = _keys(top + gap / scale, SHIFT).to(tl.int64)
    high = high.to(tl.int64)
    keys, tops = _keys(tops, SHIFT), _share(tops, top, scale)
    while high - low > 1:
        middle = ((low + high) >> 1).to(tl.int32)
        below = others * _share(_logit(middle, SHIFT), top, scale)
        enough = tl.sum(tl.where(keys >= middle, tl.maximum(tops, sums - below), 0.0), 0) >= p * total * (1.0 + WITHIN)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32)


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
def _need(p, total):
    """Return the least mass that top-p keeps of a total."""
    return tl.maximum(tl.ceil(p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _chosen(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    tops_ptr,
    sums_ptr,
    groups_ptr,
    list_ptr,
    theta_ptr,
    summed_ptr,
    rows,
    vocab,
    count,
    SHIFT: tl.constexpr,
):
    """Store the thresholds of every so many rows, and whether the masses of all their tokens were added up."""
    place = tl.program_id(0).to(tl.int64)
    groups_ptr, list_ptr = groups_ptr + place * count, list_ptr + place * vocab
    for row in range(place, rows, tl.num_programs(0)):
        by_k, by_p, by_m, alone, scale = _settings(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab)
        x_ptr, row_tops, row_sums = logits_ptr + row * vocab, tops_ptr + row * count, sums_ptr + row * count
        tops = _row_tops(row_tops, count)
        top = tl.max(tops, 0)
        theta, summed = tl.full((), -float("inf"), tl.float32), tl.full((), 0, tl.int32)
        if (scale - scale == 0.0) & (top - top == 0.0) & (by_k | by_p | by_m):
            low, size = _lowest(SHIFT), tl.full((), 0, tl.int32)
            if by_k:
                k = tl.load(top_k_ptr + row)
                low = _kth(_keys(tops, SHIFT), k, low, _keys(top, SHIFT))
                size, _ = _list(x_ptr, row_tops, groups_ptr, list_ptr, vocab, count, low, top, scale, False, SHIFT)
                low = _largest(list_ptr, size, k, low, top, scale, False, SHIFT)
            if by_m:
                m = tl.load(min_p_ptr + row)
                if (by_k == 0) | (_masses(_logit(low, SHIFT), top, scale) < _least(m)):
                    cut = _keys(top + (tl.log2(m) - 0.25) / scale, SHIFT)
                    size, _ = _list(x_ptr, row_tops, groups_ptr, list_ptr, vocab, count, cut, top, scale, False, SHIFT)
                    low = tl.maximum(low, _kept(list_ptr, size, _least(m), top, scale, SHIFT))
            if by_p:
                p, proven = tl.load(top_p_ptr + row), alone
                if alone:
                    low = _cut(row_tops, row_sums, tops, top, scale, p, vocab, count, SHIFT)
                    size, mass = _list(x_ptr, row_tops, groups_ptr, list_ptr, vocab, count, low, top, scale, True, SHIFT)
                    rest = tl.sum(_floats(row_tops, row_sums, count, low, top, scale, SHIFT), 0) * 1099511627776.0
                    least = _need(p, mass + tl.maximum((rest * (1.0 - WITHIN)).to(tl.int64) - vocab, 0))
                    most = _need(p, mass + (rest * (1.0 + WITHIN)).to(tl.int64))
                    low = _largest(list_ptr, size, most, low, top, scale, True, SHIFT)
                    enough = _from(list_ptr, size, low, top, scale, True, SHIFT) >= most
                    proven = enough & (_from(list_ptr, size, low + 1, top, scale, True, SHIFT) < least) & (rest - rest == 0.0)
                if proven == 0:
                    source, length, first = list_ptr, size, low
                    if alone:
                        source, length, first = x_ptr, tl.full((), vocab, tl.int32), _lowest(SHIFT)
                        summed = tl.full((), 1, tl.int32)
                    need = _need(p, _from(source, length, first, top, scale, True, SHIFT))
                    if _from(list_ptr, size, low, top, scale, True, SHIFT) >= need:
                        source, length, first = list_ptr, size, low
                    low = _largest(source, length, need, first, top, scale, True, SHIFT)
            theta = _logit(low, SHIFT)
        tl.store(theta_ptr + row, theta)
        tl.store(summed_ptr + row, summed)


def threshold(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Compute `ops.threshold`: logits [R, V], the others [R]."""
    return threshold_and_summed(logits, temperature, top_k, top_p, min_p)[0]


def threshold_and_summed(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Return theta, [R] fp32, and [R] int32: 1 for a row of top-p alone whose bounds left more than one key, so that the masses
    of all its tokens were added up; 0 for others. Logits [R, V], the others [R].
    """
    logits = aligned(logits)
    settings = [x.contiguous() for x in (temperature, top_k, top_p, min_p)]
    (rows, vocab), device = logits.shape, logits.device
    blocks, held = triton.cdiv(vocab, BLOCK.value), min(rows, ROWS)
    count = blocks * (BLOCK.value // GROUP.value)

    def room(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    theta, summed = room(rows, dtype=torch.float32), room(rows, dtype=torch.int32)
    tops, sums = room(rows, count, dtype=logits.dtype), room(rows, count, dtype=torch.float32)
    groups, lists = room(held, count, dtype=torch.int32), room(held, vocab, dtype=logits.dtype)
    if rows:
        shift, exact = 16 if logits.dtype is torch.bfloat16 else 0, {"enable_fp_fusion": False}
        _tops[(rows, blocks)](logits, *settings, tops, sums, vocab, num_warps=8, **exact)
        places = tops, sums, groups, lists, theta, summed
        _chosen[(held,)](logits, *settings, *places, rows, vocab, count, SHIFT=shift, num_warps=4, **exact)
    return theta, summed

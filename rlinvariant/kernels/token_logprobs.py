"""Softmax statistics, log-probabilities and sampling on a GPU.

Each program reduces one fixed block of one row's vocabulary, so that a row of logits is read once, by as many programs as it
has blocks; a second kernel puts a row's blocks together in fp64. Trainer and sampler share both.

R: rows of logits, V: vocabulary, N: blocks of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinvariant.kernels.rows import aligned

BLOCK = 4096  # columns of a block of the vocabulary


@triton.jit
def _load_x(logits_ptr, theta_ptr, row, col, vocab, temperature, TRUNCATED: tl.constexpr):
    """Return logits / temperature in fp32, a true division; -inf beyond the vocabulary and below the row's theta.

    They become -inf after the division: with infinite operands, which a true division may take a slow way for, `_blocks` took
    twice as long on an H200 where nearly all tokens were dropped. Temperatures are positive; a row of NaN drops none.
    """
    logits = tl.load(logits_ptr + row * vocab + col, mask=col < vocab, other=-float("inf")).to(tl.float32)
    x = tl.div_rn(logits, tl.broadcast_to(temperature, logits.shape))
    if TRUNCATED:
        x = tl.where(logits < tl.load(theta_ptr + row), -float("inf"), x)
    return x


@triton.jit
def _blocks(logits_ptr, t_ptr, theta_ptr, max_ptr, sum_ptr, weighted_ptr, vocab, TRUNCATED: tl.constexpr, BLOCK: tl.constexpr):
    """Store a block's maximum m, and its sums of e^(x - m) and e^(x - m) (x - m) over all but the first maximum.

    The maximum's own 1 is added in fp64: in fp32 it would swallow what a token that is all but certain leaves to others.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.load(t_ptr + row)
    col = tl.arange(0, BLOCK)
    x = _load_x(logits_ptr, theta_ptr, row, block * BLOCK + col, vocab, tl.where(t == 0.0, 1.0, t), TRUNCATED)
    m = tl.max(x, 0)
    first = tl.min(tl.where(x == m, col, BLOCK), 0)
    gap = tl.where(x == -float("inf"), -float("inf"), x - m)
    e = tl.where(col == first, 0.0, tl.exp(gap))
    at = row * tl.num_programs(1) + block
    tl.store(max_ptr + at, m)
    tl.store(sum_ptr + at, tl.sum(e, 0))
    tl.store(weighted_ptr + at, tl.sum(tl.where(e == 0.0, 0.0, e * gap), 0))


@triton.jit
def _parts(max_ptr, sum_ptr, row, blocks, NB: tl.constexpr):
    """Return a row's block maxima, the row's maximum, their differences in fp64, and block sums relative to the latter."""
    b = tl.arange(0, NB)
    m = tl.load(max_ptr + row * blocks + b, mask=b < blocks, other=-float("inf"))
    s = 1.0 + tl.load(sum_ptr + row * blocks + b, mask=b < blocks, other=0.0).to(tl.float64)
    top = tl.max(m, 0)
    shift = tl.where(m == -float("inf"), 0.0, (m - top).to(tl.float64))
    return m, top, shift, s * tl.where(m == -float("inf"), 0.0, tl.exp(shift))


@triton.jit
def _logprobs(
    logits_ptr,
    ids_ptr,
    t_ptr,
    theta_ptr,
    max_ptr,
    sum_ptr,
    weighted_ptr,
    logprob_ptr,
    entropy_ptr,
    stats_ptr,
    vocab,
    blocks,
    TRUNCATED: tl.constexpr,
    PICK: tl.constexpr,
    NB: tl.constexpr,
):
    """Add up the blocks of a row. No other kernel does: the order of a sum depends on the warps of its kernel.

    stats: maximum, log of the sum, the sum.
    """
    row = tl.program_id(0).to(tl.int64)
    m, top, shift, parts = _parts(max_ptr, sum_ptr, row, blocks, NB)
    total = tl.sum(parts, 0)
    log_sum = tl.log(total)
    tl.store(stats_ptr + 3 * row, top.to(tl.float64))
    tl.store(stats_ptr + 3 * row + 1, log_sum)
    tl.store(stats_ptr + 3 * row + 2, total)
    if PICK:
        b = tl.arange(0, NB)
        w = tl.load(weighted_ptr + row * blocks + b, mask=b < blocks, other=0.0).to(tl.float64)
        scale = tl.where(m == -float("inf"), 0.0, tl.exp(shift))
        entropy = log_sum - tl.sum(scale * w + shift * parts, 0) / total
        x = tl.load(logits_ptr + row * vocab + tl.load(ids_ptr + row)).to(tl.float32)
        if TRUNCATED:
            x = tl.where(x < tl.load(theta_ptr + row), -float("inf"), x)
        x = tl.div_rn(x, tl.load(t_ptr + row))
        tl.store(logprob_ptr + row, (x.to(tl.float64) - top.to(tl.float64) - log_sum).to(tl.float32))
        tl.store(entropy_ptr + row, entropy.to(tl.float32))


@triton.jit
def _gradient(
    logits_ptr,
    ids_ptr,
    t_ptr,
    theta_ptr,
    glp_ptr,
    gent_ptr,
    logprob_ptr,
    entropy_ptr,
    stats_ptr,
    vocab,
    TRUNCATED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write (glp (1[j = id] - p_j) - gent p_j (log p_j + entropy)) / temperature over the logits, each in its own place."""
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t, glp, chosen = tl.load(t_ptr + row), tl.load(glp_ptr + row), tl.load(ids_ptr + row)
    top, log_sum = tl.load(stats_ptr + 2 * row), tl.load(stats_ptr + 2 * row + 1)
    x = _load_x(logits_ptr, theta_ptr, row, col, vocab, t, TRUNCATED)
    lp = x - top.to(tl.float32) - log_sum.to(tl.float32)
    p = tl.exp(lp)
    own = tl.exp(tl.load(logprob_ptr + row).to(tl.float64))  # the logit may have been written over
    g = tl.where(col == chosen, glp * (1.0 - own).to(tl.float32), -glp * p)  # 1 - p in fp64: p may be all but 1
    if ENTROPY:
        g -= tl.where(p == 0.0, 0.0, tl.load(gent_ptr + row) * p * (lp + tl.load(entropy_ptr + row)))
    tl.store(logits_ptr + row * vocab + col, (g / t).to(logits_ptr.dtype.element_ty), mask=col < vocab)


@triton.jit
def _mixed(z):
    """Do one round of splitmix64's finaliser. Shifts are made logical by masking: Triton's on int64 are arithmetic."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def _uniform(seed, position):
    """Return 53 bits of splitmix64(seed, position) as a number in [0, 1): the one that kernels/token_logprobs.c makes."""
    z = _mixed(_mixed(seed + (position + 1) * -7046029254386353131))
    return ((z >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _draw(
    logits_ptr,
    t_ptr,
    theta_ptr,
    seeds_ptr,
    positions_ptr,
    max_ptr,
    sum_ptr,
    stats_ptr,
    token_ptr,
    logprob_ptr,
    x_ptr,
    vocab,
    blocks,
    TRUNCATED: tl.constexpr,
    NB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    maxima, top, _, parts = _parts(max_ptr, sum_ptr, row, blocks, NB)
    log_sum, total = tl.load(stats_ptr + 3 * row + 1), tl.load(stats_ptr + 3 * row + 2)
    t = tl.load(t_ptr + row)
    b = tl.arange(0, NB)
    target = _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row)) * total
    running = tl.cumsum(parts, 0)
    hit = tl.min(tl.where((running > target) & (parts > 0.0), b, NB), 0)
    last = tl.max(tl.where(parts > 0.0, b, 0), 0)  # rounding may leave the running sum a hair short of the target
    block = tl.where(t == 0.0, tl.min(tl.where(maxima == top, b, NB), 0), tl.minimum(hit, last))
    block = tl.minimum(block, blocks - 1)  # of a row of NaN
    before = tl.sum(tl.where(b < block, parts, 0.0), 0)
    top_of_block = tl.max(tl.where(b == block, maxima, -float("inf")), 0)
    col = block * BLOCK + tl.arange(0, BLOCK)
    x = _load_x(logits_ptr, theta_ptr, row, col, vocab, tl.where(t == 0.0, 1.0, t), TRUNCATED)
    e = tl.where(x == -float("inf"), 0.0, tl.exp(x - top_of_block)).to(tl.float64) * tl.exp((top_of_block - top).to(tl.float64))
    inside = before + tl.cumsum(e, 0)
    first = tl.min(tl.where((inside > target) & (e > 0.0), col, vocab), 0)
    final = tl.max(tl.where(e > 0.0, col, 0), 0)
    token = tl.where(t == 0.0, tl.min(tl.where(x == top, col, vocab), 0), tl.minimum(first, final))
    token = tl.minimum(token, vocab - 1)
    own = tl.load(logits_ptr + row * vocab + token).to(tl.float32)
    own = tl.div_rn(own, tl.where(t == 0.0, 1.0, t))
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(x_ptr + row, own)
    tl.store(logprob_ptr + row, (own.to(tl.float64) - top.to(tl.float64) - log_sum).to(tl.float32))


@triton.jit
def _likelier(logits_ptr, t_ptr, x_ptr, count_ptr, vocab, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.load(t_ptr + row)
    x = _load_x(logits_ptr, t_ptr, row, block * BLOCK + tl.arange(0, BLOCK), vocab, tl.where(t == 0.0, 1.0, t), False)
    larger = (x > tl.load(x_ptr + row)).to(tl.int32)
    tl.store(count_ptr + row * tl.num_programs(1) + block, tl.sum(larger, 0))


def _reduced(logits: Tensor, temperature: Tensor, theta: Tensor | None) -> tuple[tuple[Tensor, Tensor, Tensor], int, int]:
    """Return the block statistics of every row, the number of blocks, and that number rounded up to a power of two."""
    rows, vocab = logits.shape
    blocks = triton.cdiv(vocab, BLOCK)
    parts = torch.empty(3, rows, blocks, dtype=torch.float32, device=logits.device)
    if rows:
        _blocks[(rows, blocks)](
            logits,
            temperature,
            temperature if theta is None else theta,
            parts[0],
            parts[1],
            parts[2],
            vocab,
            TRUNCATED=theta is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return (parts[0], parts[1], parts[2]), blocks, triton.next_power_of_2(blocks)


def row_logprobs(
    logits: Tensor, ids: Tensor | None, temperature: Tensor, theta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs and entropies [R] fp32 of logits [R, V], and [R, 2] fp64: the maximum and the log of the sum.

    Logits below theta, [R] fp32, count as -inf; None: all count.
    """
    logprobs, entropy, stats_R3 = _row_logprobs(logits, ids, temperature, theta)
    return logprobs, entropy, stats_R3[:, :2].contiguous()


def _row_logprobs(
    logits: Tensor, ids: Tensor | None, temperature: Tensor, theta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    logits = aligned(logits)
    rows, vocab = logits.shape
    logprobs, entropy = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    stats_R3 = torch.empty(rows, 3, dtype=torch.float64, device=logits.device)
    parts, blocks, padded = _reduced(logits, temperature, theta)
    if rows:
        _logprobs[(rows,)](
            logits,
            logits if ids is None else ids,
            temperature,
            temperature if theta is None else theta,
            *parts,
            logprobs,
            entropy,
            stats_R3,
            vocab,
            blocks,
            TRUNCATED=theta is not None,
            PICK=ids is not None,
            NB=padded,
            num_warps=1,
        )
    return logprobs, entropy, stats_R3


def row_logprobs_backward(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    theta: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor,
    stats: Tensor,
) -> None:
    """Write the gradient of the logits [R, V] over them; the last three are what `row_logprobs` has returned for them."""
    rows, vocab = logits.shape
    if rows:
        _gradient[(rows, triton.cdiv(vocab, BLOCK))](
            logits,
            ids,
            temperature,
            temperature if theta is None else theta,
            dlogprobs,
            dlogprobs if dentropy is None else dentropy,
            logprobs,
            entropy,
            stats,
            vocab,
            TRUNCATED=theta is not None,
            ENTROPY=dentropy is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )


def sample(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, theta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `ops.sample`: logits [R, V], temperature, seeds, positions and theta [R]."""
    logits, temperature = aligned(logits), temperature.float().contiguous()
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs, x = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    stats_R3 = torch.empty(rows, 3, dtype=torch.float64, device=logits.device)
    parts, blocks, padded = _reduced(logits, temperature, theta)
    larger_RN = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    if rows:
        unused, truncated = logprobs, theta is not None
        at = logits, logits, temperature, temperature if theta is None else theta, *parts, unused, unused, stats_R3
        _logprobs[(rows,)](*at, vocab, blocks, TRUNCATED=truncated, PICK=False, NB=padded, num_warps=1)
        _draw[(rows,)](
            logits,
            temperature,
            temperature if theta is None else theta,
            seeds.contiguous(),
            positions.contiguous(),
            *parts[:2],
            stats_R3,
            tokens,
            logprobs,
            x,
            vocab,
            blocks,
            TRUNCATED=truncated,
            NB=padded,
            BLOCK=BLOCK,
            num_warps=8,
        )
        _likelier[(rows, blocks)](logits, temperature, x, larger_RN, vocab, BLOCK=BLOCK, num_warps=8)
    return tokens, logprobs, larger_RN.sum(1)

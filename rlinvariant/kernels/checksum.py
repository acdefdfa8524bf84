"""The sums of `checksums` on a GPU, in one pass over a tensor: integers, so that programs may add in any order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, BLOCKS = 1024, 16  # words of a step, and steps of a program


@triton.jit
def _folded(x):
    return x ^ ((x >> 32) & 0xFFFFFFFF)


@triton.jit(do_not_specialize=["first"])
def _sums(
    words_ptr,
    sums_ptr,
    n,
    first,
    M1: tl.constexpr,
    M2: tl.constexpr,
    M3: tl.constexpr,
    M4: tl.constexpr,
    M5: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    one, other = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for step in range(BLOCKS):
        at = (program * BLOCKS + step) * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(words_ptr + at, mask=at < n, other=0).to(tl.int64)
        mixed = _folded(_folded(_folded((at + first) * M1) ^ (word * M2 + M1)) * M3)
        one += tl.where(at < n, _folded(mixed * M5), 0)
        other += tl.where(at < n, _folded((mixed ^ word) * M4), 0)
    tl.store(sums_ptr + 2 * program, tl.sum(one, 0))
    tl.store(sums_ptr + 2 * program + 1, tl.sum(other, 0))


def checksum(words: Tensor, first: int, multipliers: tuple[int, int, int, int, int]) -> Tensor:
    """Return the two sums, int64 [2], of words [n], of int64, int32, int16 or uint8; `first` is the first one's number."""
    programs = triton.cdiv(len(words), BLOCK * BLOCKS)
    sums = torch.empty(programs, 2, dtype=torch.int64, device=words.device)
    if programs:
        named = dict(zip(("M1", "M2", "M3", "M4", "M5"), multipliers, strict=True))
        _sums[(programs,)](words, sums, len(words), first, **named, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=4)
    return sums.sum(0)

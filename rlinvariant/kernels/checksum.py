"""The sums of `checksums` on a GPU, of many tensors at once: integers, so that programs may add in any order.

One launch for all, since a host needs longer to start a kernel than a GPU needs to read most of a model's weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # words of a step
STEPS, PROGRAMS = 16, 4096  # of a program, at least; and programs of a launch, at most, but for one of each piece
MOST = 2**30  # words of a piece, which are counted in 32 bits
TYPES = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.uint8}


class Words(NamedTuple):
    """Says where the words of some rows are.

    Args:
        address: of the first word, a multiple of a word's size.
        count: how many words there are.
        columns, stride: words of a row, and from the start of one row to that of the next.
        first: the number of the first word in the whole tensor.
        size: bytes of a word.
    """

    address: int
    count: int
    columns: int
    stride: int
    first: int
    size: int


@triton.jit
def _folded(x):
    return x ^ ((x >> 32) & 0xFFFFFFFF)


@triton.jit
def _sums(
    pieces_ptr,
    pairs_ptr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    M3: tl.constexpr,
    M4: tl.constexpr,
    M5: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece, program, programs = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    piece_ptr = pieces_ptr + piece * 5
    words_ptr = tl.load(piece_ptr).to(tl.pointer_type(WORD))
    count, columns = tl.load(piece_ptr + 1).to(tl.int32), tl.load(piece_ptr + 2).to(tl.int32)
    stride, first = tl.load(piece_ptr + 3), tl.load(piece_ptr + 4)
    one, other = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for start in range(program * BLOCK, count, programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        place = (at // columns).to(tl.int64) * stride + at % columns
        word = tl.load(words_ptr + place, mask=at < count, other=0).to(tl.int64)
        mixed = _folded(_folded(_folded((at + first) * M1) ^ (word * M2 + M1)) * M3)
        one += tl.where(at < count, _folded(mixed * M5), 0)
        other += tl.where(at < count, _folded((mixed ^ word) * M4), 0)
    pairs_ptr += 2 * (piece * programs + program)
    tl.store(pairs_ptr, tl.sum(one, 0))
    tl.store(pairs_ptr + 1, tl.sum(other, 0))


def checksums(parts: Sequence[Words], multipliers: tuple[int, int, int, int, int], device: torch.device) -> Tensor:
    """Return the two sums of each of some parts, int64 [parts, 2], on the device where they are."""
    total = torch.zeros(len(parts), 2, dtype=torch.int64, device=device)
    named = dict(zip(("M1", "M2", "M3", "M4", "M5"), multipliers, strict=True))
    for size, word in TYPES.items():
        pieces = [(at, piece) for at, part in enumerate(parts) if part.size == size for piece in _pieces(part)]
        if not pieces:
            continue
        longest = max(piece.count for _, piece in pieces)
        programs = min(triton.cdiv(longest, BLOCK * STEPS), max(1, PROGRAMS // len(pieces)))
        sums = torch.empty(len(pieces), programs, 2, dtype=torch.int64, device=device)
        rows = torch.tensor([[*piece[:5], at] for at, piece in pieces]).to(device)
        _sums[(len(pieces), programs)](rows[:, :5].contiguous(), sums, **named, WORD=word, BLOCK=BLOCK, num_warps=4)
        total.index_add_(0, rows[:, 5], sums.sum(1))
    return total


def _pieces(part: Words) -> list[Words]:
    """Cut a part into pieces of whole rows, with MOST words at most; one of longer rows has no gaps, and is cut anywhere."""
    step = part.columns * max(1, MOST // part.columns) if part.columns <= MOST else MOST
    pieces = []
    for done in range(0, part.count, step):
        count = min(step, part.count - done)
        skipped = done // part.columns * part.stride + done % part.columns
        columns = min(part.columns, count)
        pieces.append(Words(part.address + skipped * part.size, count, columns, part.stride, part.first + done, part.size))
    return pieces

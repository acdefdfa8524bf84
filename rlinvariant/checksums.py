"""Sums over the words of a tensor that do not depend on how it is cut into rows, nor in which order they are added.

    sum over i of mix(word_i, i) mod 2**64,  by two mixes;  i counts the words of the whole tensor, in row-major order

Processes that hold different rows of a weight each sum their own, and the sums of all add up to the whole's, as integers do in
any order. So two sides can compare weights that neither has gathered: shards of a trainer, parts of a merged weight of vLLM's.
Equal tensors have equal sums. Different ones have equal sums by chance alone, of about 2**-128.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlinvariant.kernels import cpu

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
M1, M2, M3 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # odd, mod 2**64
M4, M5 = -4417276706812531889, -3335678366873096957
MULTIPLIERS = (M1, M2, M3, M4, M5)
TOGETHER = 2**28  # bytes of tensors that are summed at once: some are made for this, and gone after it


class Checksum(NamedTuple):
    """Holds the sums of a whole tensor: of its dtype and shape, and two numbers mod 2**64 as signed integers."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sums: tuple[int, int]


def partial(rows: Tensor, first: int = 0) -> Tensor:
    """Return the two sums, int64 [2], over some consecutive rows of a tensor.

    Args:
        rows: [R, ...], of any dtype, on any device.
        first: the number of the first of them in the whole tensor.

    Bits: sums of disjoint parts add up, mod 2**64, to those of the whole. A word is as many bytes as divide a row, at most 8:
    the whole tensor's shape and dtype decide it, and not the cut.
    """
    return partials([(rows, first)])[0]


def partials(parts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Return the two sums of each of some pairs of rows and their first number, int64 [parts, 2]; all are on one device."""
    if parts and parts[0][0].is_cuda:
        return _on_gpu(parts)
    found, multipliers = torch.empty(len(parts), 2, dtype=torch.int64), torch.tensor(MULTIPLIERS)
    for sums, (rows, first) in zip(found, parts, strict=True):
        words, first = _words(rows, first)
        cpu.call("checksum", words, sums, multipliers, len(words), first, words.element_size())
    return found


def _on_gpu(parts: Sequence[tuple[Tensor, int]]) -> Tensor:
    from rlinvariant.kernels import checksum

    held, where = list[Tensor](), list[checksum.Words]()
    for rows, first in parts:
        row = rows.shape[1:].numel() * rows.element_size()
        size = _word(row)
        apart = rows.stride(0) * rows.element_size() if rows.dim() == 2 and rows.stride(1) == 1 else 0  # from row to row
        if apart > row > 0 and apart % size == 0 and rows.data_ptr() % size == 0 and row // size < checksum.MOST:
            at = rows.data_ptr(), len(rows) * row // size, row // size, apart // size
        else:
            rows, _ = _words(rows, first)
            at = rows.data_ptr(), len(rows), max(1, len(rows)), 0
        held.append(rows)  # until the kernel has been started
        where.append(checksum.Words(*at, first * (row // size), size))
    return checksum.checksums(where, MULTIPLIERS, parts[0][0].device)


def partial_ref(rows: Tensor, first: int = 0) -> Tensor:
    """Compute `partial` in plain PyTorch."""
    words, first = _words(rows, first)
    index = torch.arange(len(words), device=words.device) + first
    return torch.stack([x.sum() for x in _mixed(index, words.to(torch.int64))])


def _words(rows: Tensor, first: int) -> tuple[Tensor, int]:
    """Return the words [n] of some rows, and the number of the first one."""
    row = rows.shape[1:].numel() * rows.element_size()
    size = _word(row)
    flat = rows.detach().contiguous().view(-1).view(torch.uint8)
    misplaced = flat.data_ptr() % size or flat.storage_offset() % size  # for the kernel, or for PyTorch's view
    flat = flat.clone() if misplaced else flat
    return flat.view(WORDS[size]), first * (row // size)


def _word(row: int) -> int:
    """Return the bytes of a word of a tensor whose rows have so many."""
    return next(size for size in WORDS if row % size == 0)


def _mixed(index: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return two numbers for each word and its place, int64. One product fewer, and signs that change cancel too often."""
    mixed = _folded(_folded(_folded(index * M1) ^ (words * M2 + M1)) * M3)
    return _folded(mixed * M5), _folded((mixed ^ words) * M4)


def whole(x: Tensor) -> Checksum:
    """Return the checksum of a tensor that is all here."""
    return of(x.dtype, x.shape, partial(x if x.dim() else x[None]))


def wholes(named: Iterable[tuple[str, Tensor]]) -> dict[str, Checksum]:
    """Return the checksum of each tensor, all of which are on one device, by name; the host waits for the device once."""
    forms: dict[str, tuple[torch.dtype, torch.Size]] = {}

    def noted() -> Iterator[tuple[Tensor, int]]:
        for name, x in named:
            forms[name] = x.dtype, x.shape
            yield (x if x.dim() else x[None]), 0

    sums = [partials(group) for group in together(noted())]
    read = torch.cat(sums).cpu() if sums else ()
    return {name: of(*form, both) for (name, form), both in zip(forms.items(), read, strict=True)}


def together(parts: Iterable[tuple[Tensor, int]]) -> Iterator[list[tuple[Tensor, int]]]:
    """Yield what `partials` takes, in groups of some TOGETHER bytes: who makes tensors for this holds no more at once."""
    group, held = list[tuple[Tensor, int]](), 0
    for rows, first in parts:
        group.append((rows, first))
        held += rows.nbytes
        if held >= TOGETHER:
            yield group
            group, held = [], 0
    if group:
        yield group


def of(dtype: torch.dtype, shape: Iterable[int], sums: Tensor) -> Checksum:
    """Return the checksum of a tensor whose parts' sums were added up to `sums`, int64 [2]."""
    one, other = sums.tolist()
    return Checksum(dtype, tuple(shape), (one, other))


def digest(checksums: Iterable[tuple[str, Checksum]]) -> str:
    """Return the sha256, as hex, of named checksums: of names, dtypes, shapes and sums, in order of names."""
    lines = (f"{name} {x.dtype} {list(x.shape)} {list(x.sums)}\n" for name, x in sorted(checksums))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _folded(x: Tensor) -> Tensor:
    """Let high bits decide low ones, and keep it a bijection: x xor (x shifted right by 32, without the sign)."""
    return x ^ ((x >> 32) & 0xFFFFFFFF)

"""Packed sequences of queries, keys and values, and the pages of a cache that holds them: operands of the attention tests."""

from itertools import accumulate

import torch
from torch import Tensor

from rlinvariant import ops
from tests.ladders import randn, randperm

BF16 = torch.bfloat16
SHAPES = ((2, 1, 32), (4, 2, 64), (3, 3, 80), (4, 1, 96), (2, 2, 128))  # heads, kv_heads, head_dim
# Of a GPU: Llama 3.2 1B (64), Qwen3 0.6B and 1.7B (128), groups of one, of seven (Qwen2.5 0.5B), and head_dim 256.
GPU_SHAPES = ((32, 8, 64), (14, 2, 64), (16, 8, 128), (3, 3, 128), (4, 1, 256))
LENGTHS = (3, 127, 1, 128, 33, 129)  # 127-129: FlashAttention's tile; 33: one query more than attention.c's block
NAN, INF = float("nan"), float("inf")
# FlashAttention multiplies the values of masked keys by a weight of 0, so NaN and Inf in a value (not in a key) reach the rows
# of its tile: on a GPU the promise is about finite values.
UNUSED = {"cpu": NAN, "cuda": 3e38}  # what fills the slots of a cache that no token fills


def offsets(lengths: tuple[int, ...] | list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def operands(tokens: int, shape: tuple[int, int, int], dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, dim = shape
    return (
        randn(tokens, heads, dim, dtype=dtype),
        randn(tokens, kv_heads, dim, dtype=dtype, seed=1),
        randn(tokens, kv_heads, dim, dtype=dtype, seed=2),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | list[int] | None = None) -> Tensor:
    return ops.attention(q, k, v, offsets([len(q)] if lengths is None else lengths), q.shape[-1] ** -0.5)


class Cache:
    """Keys and values of sequences in pages of a pool, in a random order; the slots that no token fills are poisoned."""

    def __init__(self, k: Tensor, v: Tensor, lengths: tuple[int, ...] | list[int], page: int, seed: int = 0) -> None:
        widths = [-(-n // page) for n in lengths]
        order = randperm(sum(widths) + 3, seed).int()
        self.pages = k.new_full((len(order), k.shape[1], page, 2 * k.shape[2]), UNUSED[k.device.type])
        self.table = torch.full((len(lengths), max(widths, default=0) + 1), int(order[-1]), dtype=torch.int32)
        self.starts, used = offsets(lengths).tolist(), 0
        for b, (start, width, n) in enumerate(zip(self.starts, widths, lengths, strict=False)):
            self.table[b, :width] = order[used : used + width]
            used += width
            at = torch.arange(n)
            self.pages[self.table[b, at // page], :, at % page] = torch.cat([k, v], -1)[start : start + n]

    def attend(self, q: Tensor, asked: list[tuple[int, int, int]], **options: object) -> Tensor:
        """Queries first..last of each (sequence, first, last), in one call; keys from last on have not been written yet."""
        rows = self.expected(q, asked)
        table = self.table[[b for b, _, _ in asked]]
        lens = torch.tensor([last for _, _, last in asked], dtype=torch.int32)
        cu = offsets([last - first for _, first, last in asked])
        return ops.paged_attention(rows, self.pages, table, cu, lens, q.shape[-1] ** -0.5, **options)

    def expected(self, out: Tensor, asked: list[tuple[int, int, int]]) -> Tensor:
        return torch.cat([out[self.starts[b] + first : self.starts[b] + last] for b, first, last in asked])

"""`ops.linear` against cuBLAS as PyTorch calls it, at the weight shapes of Qwen3 1.7B and 8B, from one row to thousands."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from rlinvariant import bits, ops
from rlinvariant.bench import gpu
from rlinvariant.bench.measure import Row
from rlinvariant.models.shapes import SHAPES

MODELS = ("qwen3-1.7b", "qwen3-8b")
ROW_COUNTS = (1, 8, 16, 64, 256, 1024, 4096)
FEW_ROWS_TARGET, MANY_ROWS_TARGET, MEAN_TARGET = 1.15, 1.0, 1.05  # up to 63 rows, from 64 on, geometric mean


def rows(tiny: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    shapes = {(m, w): SHAPES[m].linears[w] for m in MODELS for w in ("qkv", "o", "gate_up", "down")}
    if tiny:
        shapes = {key: shapes[key] for key in (("qwen3-1.7b", "o"), ("qwen3-1.7b", "down"))}
    found: dict[int, list[Row]] = {m: [] for m in ((1, 64) if tiny else ROW_COUNTS)}
    for (model, weight), (n, k) in shapes.items():
        equal = _bits(n, k, list(found))
        weights = torch.randn(gpu.copies(2 * n * k), n, k, device="cuda", dtype=torch.bfloat16) / k**0.5
        for m in found:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            ours = [partial(ops.linear, x, w) for w in weights]
            stock = [partial(torch.mm, x, w.t()) for w in weights]
            numbers = gpu.pair(ours, stock, 0.05 if tiny else 0.3)
            case = f"{model} {weight}, {m} x {k} -> {n}"
            target = FEW_ROWS_TARGET if m < 64 else MANY_ROWS_TARGET
            found[m].append(Row(bench="linear", case=case, target=target, bits_equal=equal[m], **numbers))
            yield found[m][-1]
        del weights
    for m, some in found.items():
        ours, stock = (math.exp(sum(math.log(getattr(r, side)) for r in some) / len(some)) for side in ("ours", "stock"))
        equal_: dict[str, bool | None] = {side: all(bool(r.bits_equal[side]) for r in some) for side in ("ours", "stock")}
        case, numbers = f"geometric mean of {len(some)} shapes, {m} rows", gpu.numbers(ours, stock, "us", some[0].samples)
        yield Row(bench="linear", case=case, target=MEAN_TARGET, bits_equal=equal_, **numbers)


def _bits(n: int, k: int, counts: list[int]) -> dict[int, dict[str, bool | None]]:
    """Return {rows: {"ours": ..., "stock": ...}}: whether the first, middle and last row are the same as alone."""
    x, w = bits.cancelling(max(counts), n, k, torch.bfloat16, "cuda")
    functions: dict[str, Callable[[Tensor], Tensor]] = {"ours": lambda x: ops.linear(x, w), "stock": lambda x: x @ w.t()}
    return {m: {side: _alone(f, x[:m]) for side, f in functions.items()} for m in counts}


def _alone(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    together = function(x)
    picked = sorted({0, len(x) // 2, len(x) - 1})
    return all(bits.same(function(x[i : i + 1].clone()), together[i : i + 1]) for i in picked)

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
ROWS = (1, 8, 16, 64, 256, 1024, 4096)
FEW, MANY, MEAN = 1.15, 1.0, 1.05  # targets: up to 63 rows, from 64 on, geometric mean


def rows(tiny: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    shapes = {(m, w): SHAPES[m].linears[w] for m in MODELS for w in ("qkv", "o", "gate_up", "down")}
    if tiny:
        shapes = {key: shapes[key] for key in (("qwen3-1.7b", "o"), ("qwen3-1.7b", "down"))}
    found: dict[int, list[Row]] = {m: [] for m in ((1, 64) if tiny else ROWS)}
    for (model, weight), (n, k) in shapes.items():
        equal = _bits(n, k, list(found))
        weights = torch.randn(gpu.copies(2 * n * k), n, k, device="cuda", dtype=torch.bfloat16) / k**0.5
        for m in found:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            ours = [partial(ops.linear, x, w) for w in weights]
            stock = [partial(torch.mm, x, w.t()) for w in weights]
            numbers = gpu.pair(ours, stock, 0.05 if tiny else 0.3)
            case = f"{model} {weight}, {m} x {k} -> {n}"
            found[m].append(Row("linear", case, target=FEW if m < 64 else MANY, bits_equal=equal[m], **numbers))
            yield found[m][-1]
        del weights
    for m, some in found.items():
        ours, stock = (math.exp(sum(math.log(getattr(r, side)) for r in some) / len(some)) for side in ("ours", "stock"))
        equal_: dict[str, bool | None] = {side: all(bool(r.bits_equal[side]) for r in some) for side in ("ours", "stock")}
        case, numbers = f"geometric mean of {len(some)} shapes, {m} rows", gpu.numbers(ours, stock, "us", some[0].samples)
        yield Row("linear", case, target=MEAN, bits_equal=equal_, **numbers)


def cancelling(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """x [m, k] and w [n, k] whose exact product is zero: what comes out is rounding error, which any other order changes."""
    x = torch.randn(m, k, device="cuda") * torch.exp2(torch.randint(-4, 4, (m, k), device="cuda"))
    w, order = torch.randn(n, k, device="cuda", dtype=torch.bfloat16), torch.randperm(k, device="cuda")
    one, other = order[: k // 2], order[k // 2 : k // 2 * 2]
    x[:, one], w[:, one] = -x[:, other], w[:, other]
    return x.bfloat16(), w


def _bits(n: int, k: int, counts: list[int]) -> dict[int, dict[str, bool | None]]:
    """For each number of rows: are the first, middle and last row the same as alone? {"ours", "stock"}"""
    x, w = cancelling(max(counts), n, k)
    functions: dict[str, Callable[[Tensor], Tensor]] = {"ours": lambda x: ops.linear(x, w), "stock": lambda x: x @ w.t()}
    return {m: {side: _alone(f, x[:m]) for side, f in functions.items()} for m in counts}


def _alone(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    together = function(x)
    picked = sorted({0, len(x) // 2, len(x) - 1})
    return all(bits.compare(function(x[i : i + 1].clone()), together[i : i + 1].clone()) is None for i in picked)

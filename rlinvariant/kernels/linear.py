"""The matrix product on Hopper: one function, two routes, chosen by the number of rows.

A tensor core adds 16 products at a time to an fp32 accumulator. On sm_90 this is all that decides a bit: tile shapes, warps,
pipelining, mma.sync or wgmma, and which operand comes first change nothing, as long as one accumulator runs over the whole of
K in ascending order. So every kernel that does not split K gives the same bits, and the fastest may be taken for each shape:

* cuBLASLt, with split-K forbidden, for many rows: the speed of stock cuBLAS;
* a Triton kernel for few rows, where cuBLAS would split K to fill the chip and, without, picks kernels up to 9 times slower.

`check` compares both routes with operands whose exact product is zero before a weight shape is first used: the output is then
nothing but rounding error, and any other order of summation shows in nearly every element.
"""

import functools
import json
import math
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinvariant.errors import UserError
from rlinvariant.kernels.routes import ROUTES
from rlinvariant.kernels.rows import flat

TILES = Path(__file__).with_name("linear_tiles.json")  # written by `python -m rlinvariant.bench tune`
FEW = (16, 32, 64, 128, 256)  # row counts up to which a tile is tuned; more rows go to cuBLASLt
MANY = (128, 128, 64, 8, 3)  # tile for many rows, should cuBLASLt ever disagree
CHECKED_ROWS = (  # each edge of a tile, and plenty between: cuBLASLt picks its kernel by the row count
    17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 300, 384, 511, 512, 777, 1000, 1024, 1536,
    2048, 3001, 4096, 5000, 6144, 8192,
)  # fmt: skip
CHECKED_BYTES = 1 << 29  # outputs larger than this are not compared

Tile = tuple[int, int, int, int, int]
"""Weight rows, x rows, depth, warps, stages."""


@triton.jit
def _tile_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, m, n, k, x_row, w_row, BIAS: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """y^T = w x^T: the weight takes the side of the matrix unit that must be 64 wide, few rows of x the one that may be 8.

    Programs that share a weight tile are neighbours, so that it comes from memory once.
    """
    col = tl.program_id(1) * N + tl.arange(0, N)
    row = tl.program_id(0) * M + tl.arange(0, M)
    read = tl.minimum(row, m - 1)  # rows past the end repeat the last one: a mask would cost 20 % where m is no multiple of 16
    depth = tl.arange(0, K)
    w_at = w_ptr + col.to(tl.int64)[:, None] * w_row + depth[None, :]
    x_at = x_ptr + read.to(tl.int64)[None, :] * x_row + depth[:, None]
    acc = tl.zeros((N, M), tl.float32)
    for start in range(0, k, K):
        if WHOLE:
            w = tl.load(w_at, mask=col[:, None] < n, other=0.0)
            x = tl.load(x_at)
        else:
            w = tl.load(w_at, mask=(col[:, None] < n) & (start + depth[None, :] < k), other=0.0)
            x = tl.load(x_at, mask=start + depth[:, None] < k, other=0.0)
        acc = tl.dot(w, x, acc)
        w_at += K
        x_at += K
    if BIAS:
        acc += tl.load(b_ptr + col, mask=col < n, other=0.0).to(tl.float32)[:, None]
    out = y_ptr + row.to(tl.int64)[None, :] * n + col[:, None]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(row[None, :] < m) & (col[:, None] < n))


def tiled(x: Tensor, w: Tensor, b: Tensor | None, tile: Tile) -> Tensor:
    """x [M, K] times w [N, K] transposed, plus b [N], with one Triton tile shape."""
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    bn, bm, bk, warps, stages = tile
    grid = (triton.cdiv(m, bm), triton.cdiv(n, bn))
    if not m:
        return y
    _tile_kernel[grid](
        x, w, w if b is None else b, y, m, n, k, x.stride(0), w.stride(0), BIAS=b is not None, WHOLE=k % bk == 0, N=bn, M=bm,
        K=bk, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def cublaslt(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The same by cuBLASLt with one accumulator over K. The switches are process-wide: the backward gets them back."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k
    library = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    try:
        return torch.mm(x, w.t()) if b is None else torch.addmm(b, x, w.t())
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
        torch.backends.cuda.preferred_blas_library(library)


@functools.cache
def _table() -> dict[tuple[int, int], dict[int, Tile | None]]:
    """{(N, K): {rows up to: tile, or None for cuBLASLt}}."""
    if not TILES.exists():
        return {}
    return {
        (int(n), int(k)): {int(m): tile and tuple(tile) for m, tile in by_rows.items()}
        for shape, by_rows in json.loads(TILES.read_text())["tiles"].items()
        for n, k in [shape.split("x")]
    }


@functools.cache
def tile_for(m: int, n: int, k: int) -> Tile | None:
    """The tuned tile for m rows, that of the nearest tuned weight shape for others; None: cuBLASLt.

    Up to 16 rows it is always a tile: for one row cuBLASLt has a kernel with another order.
    """
    few = next((rows for rows in FEW if m <= rows), None)
    if few is None:
        return None
    if not (table := _table()):
        return (16 if n <= 4096 else 64, max(16, min(few, 64)), 128, 4, 4) if few < 64 else None
    nearest = min(table, key=lambda s: abs(math.log(s[0] / n)) + abs(math.log(s[1] / k)))
    return table[nearest][few]


@functools.cache
def check(n: int, k: int, bias: bool, device: int) -> bool:
    """Whether cuBLASLt gives the bits of the Triton tiles for a weight [n, k]. False: Triton takes every row count.

    Compared at up to 31 row counts, and every tuned tile with the others; milliseconds, cached for the process.

    Raises:
        UserError: the Triton tiles differ among themselves, so nothing on this GPU is known to be exact.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"linear: weight [{n}, {k}] was first met inside a CUDA graph; call it once before")
    with torch.random.fork_rng(devices=[device]), torch.cuda.device(device):
        torch.manual_seed(n * 1_000_003 + k)
        most = min(CHECKED_ROWS[-1], CHECKED_BYTES // (2 * n))
        x = torch.randn(most, k, device="cuda") * torch.exp2(torch.randint(-4, 4, (most, k), device="cuda"))
        w, order = torch.randn(n, k, device="cuda"), torch.randperm(k, device="cuda")
        one, other = order[: k // 2], order[k // 2 : k // 2 * 2]
        x[:, one], w[:, one] = -x[:, other], w[:, other]
        x, w = x.bfloat16(), w.bfloat16()
        b = torch.randn(n, device="cuda").bfloat16() / 64 if bias else None
    expected = tiled(x, w, b, MANY)
    for rows in FEW:
        if (tile := tile_for(rows, n, k)) is not None and not _same(tiled(x[:rows], w, b, tile), expected[:rows]):
            raise UserError(
                f"linear: on {torch.cuda.get_device_name(device)} the result for a weight [{n}, {k}] depends on the tile "
                f"({rows} rows, tile {tile}); exact mode is not possible here; use invariance=off"
            )
    vendor = [m for m in CHECKED_ROWS if m <= most and tile_for(m, n, k) is None]
    return all(_same(cublaslt(x[:m], w, b), expected[:m]) for m in vendor)


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x [*rows, K] bf16, w [N, K], b [N] or None -> [*rows, N]."""
    shape, x = x.shape, flat(x)
    w, b = flat(w.to(x.dtype)), None if b is None else b.to(x.dtype).contiguous()
    vendor = check(w.shape[0], w.shape[1], b is not None, x.device.index)
    ROUTES[f"{w.shape[0]}x{w.shape[1]} bfloat16"] = "Triton, and cuBLASLt without split-K" if vendor else "Triton"
    tile = tile_for(max(1, len(x)), *w.shape)
    y = cublaslt(x, w, b) if tile is None and vendor else tiled(x, w, b, tile or MANY)
    return y.view(*shape[:-1], w.shape[0])


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))

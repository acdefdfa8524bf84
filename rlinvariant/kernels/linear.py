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
import os
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinvariant import bits
from rlinvariant.errors import UserError
from rlinvariant.kernels.attention import PORTABLE, chip
from rlinvariant.kernels.routes import ROUTES
from rlinvariant.kernels.rows import GEMM_ROW_STEP, flat

TILE_TABLE = Path(__file__).with_name("linear_tiles.json")  # written by `python -m rlinvariant.bench tune`
TUNED_ROWS = (16, 32, 64, 128, 256)  # row counts up to which a tile is tuned; more rows go to cuBLASLt
FALLBACK_TILE = (128, 128, 64, 8, 3)  # tile for many rows, should cuBLASLt ever disagree
SAFE_TILES = {16: (64, 16, 64, 4, 3), 256: (64, 64, 64, 4, 3)}  # for up to so many rows, on chips for which none was tuned
TUNED_CHIP = "sm_90"
# Fewer than FREE_ROWS rows are one call, whatever their number; of more, a call has a multiple of GEMM_ROW_STEP rows, and the
# rest of the rows are another call.
FREE_ROWS = 512
CALL_ROWS = 8192  # at most so many rows are one call, fewer where its output would be larger than CALL_BYTES
CALL_BYTES = 1 << 29

Tile = tuple[int, int, int, int, int]
"""Weight rows, x rows, depth, warps, stages."""


@triton.jit
def accumulated(x_at, w_at, w_depth, live, k, WHOLE: tl.constexpr, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    """Return w x^T, fp32 [N, M], in the one order of every product: an accumulator runs over k, ascending, K at a time.

    x_at: where the first numbers of M rows of x stand, [K, M]; w_at: of N rows of the weight, [N, K], each number w_depth from
    the next. Rows that are not `live`, [N], are zero. WHOLE: k is a multiple of K.
    """
    depth = tl.arange(0, K)
    acc = tl.zeros((N, M), tl.float32)
    for start in range(0, k, K):
        if WHOLE:
            w = tl.load(w_at, mask=live[:, None], other=0.0)
            x = tl.load(x_at)
        else:
            w = tl.load(w_at, mask=live[:, None] & (start + depth[None, :] < k), other=0.0)
            x = tl.load(x_at, mask=start + depth[:, None] < k, other=0.0)
        acc = tl.dot(w, x, acc)
        w_at += K * w_depth
        x_at += K
    return acc


@triton.jit
def _tile_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    m,
    n,
    k,
    x_row,
    w_row,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """Compute y^T = w x^T: the weight takes the matrix unit's side that must be 64 wide, few rows of x the one that may be 8.

    Programs that share a weight tile are neighbours, so that it comes from memory once.
    """
    col = tl.program_id(1) * N + tl.arange(0, N)
    row = tl.program_id(0) * M + tl.arange(0, M)
    read = tl.minimum(row, m - 1)  # rows past the end repeat the last one: a mask would cost 20 % where m is no multiple of 16
    depth = tl.arange(0, K)
    w_at = w_ptr + col.to(tl.int64)[:, None] * w_row + depth[None, :]
    x_at = x_ptr + read.to(tl.int64)[None, :] * x_row + depth[:, None]
    acc = accumulated(x_at, w_at, 1, col < n, k, WHOLE, N, M, K)
    if BIAS:
        acc += tl.load(b_ptr + col, mask=col < n, other=0.0).to(tl.float32)[:, None]
    out = y_ptr + row.to(tl.int64)[None, :] * n + col[:, None]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=(row[None, :] < m) & (col[:, None] < n))


def tiled(x: Tensor, w: Tensor, b: Tensor | None, tile: Tile, out: Tensor | None = None) -> Tensor:
    """Multiply x [M, K] by w [N, K] transposed and add b [N], with one Triton tile shape, into `out` [M, N] if given."""
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device) if out is None else out
    bn, bm, bk, warps, stages = tile
    grid = (triton.cdiv(m, bm), triton.cdiv(n, bn))
    if not m:
        return y
    _tile_kernel[grid](
        x,
        w,
        w if b is None else b,
        y,
        m,
        n,
        k,
        x.stride(0),
        w.stride(0),
        BIAS=b is not None,
        WHOLE=k % bk == 0,
        N=bn,
        M=bm,
        K=bk,
        num_warps=warps,
        num_stages=stages,
    )
    return y


def cublaslt(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Multiply as `tiled` does, x [M, K] by w [N, K], by cuBLASLt with one accumulator over K.

    The switches are process-wide: the backward gets them back.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k
    library = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    try:
        return torch.mm(x, w.t(), out=out) if b is None else torch.addmm(b, x, w.t(), out=out)
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
        torch.backends.cuda.preferred_blas_library(library)


@functools.cache
def _table() -> dict[tuple[int, int], dict[int, Tile | None]]:
    """Return {(N, K): {rows up to: tile, or None for cuBLASLt}}."""
    if not TILE_TABLE.exists():
        return {}
    return {
        (int(n), int(k)): {int(m): tile and tuple(tile) for m, tile in by_rows.items()}
        for shape, by_rows in json.loads(TILE_TABLE.read_text())["tiles"].items()
        for n, k in [shape.split("x")]
    }


def tile_for(m: int, n: int, k: int) -> Tile | None:
    """Return the tuned tile for m rows, for other weight shapes that of the nearest tuned one; None means cuBLASLt.

    Up to 16 rows it is always a tile: for one row cuBLASLt has a kernel with another order.
    """
    few = next((rows for rows in TUNED_ROWS if m <= rows), None)
    if few is not None and chip() != TUNED_CHIP:
        return SAFE_TILES[16 if few <= 16 else 256]
    return None if few is None else _tile(few, n, k)


@functools.cache
def _tile(few: int, n: int, k: int) -> Tile | None:
    if not (table := _table()):
        return (16 if n <= 4096 else 64, max(16, min(few, 64)), 128, 4, 4) if few < 64 else None
    nearest = min(table, key=lambda s: abs(math.log(s[0] / n)) + abs(math.log(s[1] / k)))
    return table[nearest][few]


def call_rows(n: int) -> int:
    """Return the rows of the largest call for a weight of n rows."""
    return max(FREE_ROWS, min(CALL_ROWS, CALL_BYTES // (2 * n) // GEMM_ROW_STEP * GEMM_ROW_STEP))


@functools.cache
def check(n: int, k: int, bias: bool, device: int) -> bool:
    """Return whether cuBLASLt gives the bits of the Triton tiles for a weight [n, k]. False: Triton takes every row count.

    Makes every call that `linear` would make of cuBLASLt, and one of every tuned tile, once a process: in tens of
    milliseconds, or a fifth of a second for a lm_head.

    Raises:
        UserError: the Triton tiles differ among themselves, so nothing on this GPU is known to be exact.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"linear: weight [{n}, {k}] was first met inside a CUDA graph; call it once before")
    sizes = [*range(call_rows(n), FREE_ROWS - 1, -GEMM_ROW_STEP), *range(FREE_ROWS - 1, 0, -1)]
    x, w = bits.cancelling(sizes[0], n, k, torch.bfloat16, f"cuda:{device}")
    b = w[:, 0] / 64 if bias else None  # of the size of the rounding errors, which it must not hide
    expected = tiled(x, w, b, FALLBACK_TILE)
    for rows in TUNED_ROWS:
        if (tile := tile_for(rows, n, k)) is not None and not bits.same(tiled(x[:rows], w, b, tile), expected[:rows]):
            raise UserError(
                f"linear: on {torch.cuda.get_device_name(device)} the result for a weight [{n}, {k}] depends on the tile "
                f"({rows} rows, tile {tile}); exact mode is not possible here; use invariance=off"
            )
    if PORTABLE in os.environ:
        return False
    tried = [m for m in sizes if tile_for(m, n, k) is None]
    same = torch.stack([bits.same(cublaslt(x[:m], w, b), expected[:m]) for m in tried]) if tried else torch.ones(1)
    return bool(same.all())


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Multiply x [*rows, K] bf16 by w [N, K] transposed and add b [N] unless it is None; the result is [*rows, N]."""
    shape, (n, k) = x.shape, w.shape
    x, w = _aligned(flat(x)), _aligned(flat(w.to(x.dtype)))
    b = None if b is None else _aligned(b.to(x.dtype)[None])[0]
    vendor, m = check(n, k, b is not None, x.device.index), len(x)
    ROUTES[f"{n}x{k} bfloat16"] = "Triton, and cuBLASLt without split-K" if vendor else "Triton"
    y, at = x.new_empty(m, n), 0
    while at < m:
        rows = _call(m - at, call_rows(n)) if vendor else m
        part, out = x[at : at + rows], y[at : at + rows]
        tile = tile_for(rows, n, k)
        if vendor and tile is None:
            cublaslt(part, w, b, out)
        else:
            tiled(part, w, b, tile or FALLBACK_TILE, out)
        at += rows
    return y.view(*shape[:-1], n)


def _call(rows: int, most: int) -> int:
    """Return how many of the rows still to do go into the next call: a number that `check` has compared."""
    return rows if rows < FREE_ROWS else min(most, rows // GEMM_ROW_STEP * GEMM_ROW_STEP)


def _aligned(x: Tensor) -> Tensor:
    """Return x [rows, D], aligned as the operands of `check` are: cuBLASLt chooses its kernel by alignment too."""
    in_place = x.data_ptr() % 16 == 0 and (x.is_contiguous() or x.stride(0) % 8 == x.shape[1] % 8 == 0)
    return x if in_place else x.clone(memory_format=torch.contiguous_format)

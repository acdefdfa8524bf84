"""The experts of a mixture on Hopper: products grouped by expert, over a table of tiles that is made on the device.

Slots are sorted by expert, stably. A tile is up to M of the slots of one expert; how many tiles there are is known on the
device alone, so the grid has room for the most that there can be, and a program without a tile ends. Nothing waits for the GPU.

A tile's product is that of kernels/linear.py, by its `accumulated`: one fp32 accumulator over K, ascending. So a row has
the bits that `linear` gives it, whatever the tile and whoever shares it. `check` compares the two before a weight shape is
used. Gradients take the same kernel, and one that sums over an expert's slots: they have run in Triton's interpreter and have
been compiled, and not run on a GPU yet.

R: rows (tokens), S: slots of a row, X: R times S; E: experts, D: width of a row, I: width inside an expert, N: columns of a
product (of the first, 2 I), K: columns that it sums over.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinvariant import bits
from rlinvariant.errors import UserError
from rlinvariant.kernels.linear import FALLBACK_TILE, SAFE_TILES, Tile, accumulated, tiled
from rlinvariant.kernels.routes import ROUTES
from rlinvariant.kernels.swiglu import swiglu_merged, swiglu_merged_backward

FEW = 16  # up to so many slots of an expert, on average, tiles have 16 rows, beyond 64
TABLE_BLOCK = 32  # tiles that a program of `_tiles` describes
BLOCK = 1024  # columns that a program of `_combine` adds
SUMMED = 128, 64, 32, 8, 3  # of `_summed`: rows and columns of a tile, slots of a step, warps, stages; larger ones spill


@triton.jit
def _tiles(starts_ptr, tiles_ptr, experts, room, M: tl.constexpr, E: tl.constexpr, B: tl.constexpr):
    """Store for each tile its expert, -1 if there is no such tile, its first slot in sorted order, and its expert's end."""
    e, t = tl.arange(0, E), tl.program_id(0) * B + tl.arange(0, B)
    first = tl.load(starts_ptr + e, mask=e < experts, other=0)
    end = tl.load(starts_ptr + e + 1, mask=e < experts, other=0)
    need = (end - first + M - 1) // M
    ends = tl.cumsum(need, 0)
    expert = tl.sum((ends[None, :] <= t[:, None]).to(tl.int64), 1)  # those whose tiles all come before
    own = e[None, :] == expert[:, None]
    at = tl.sum(tl.where(own, (first - (ends - need) * M)[None, :], 0), 1) + t * M
    out = tiles_ptr + t * 3
    tl.store(out, tl.where(t < tl.sum(need, 0), expert, -1), mask=t < room)
    tl.store(out + 1, at, mask=t < room)
    tl.store(out + 2, tl.sum(tl.where(own, end[None, :], 0), 1), mask=t < room)


@triton.jit
def _grouped(
    x_ptr,
    w_ptr,
    y_ptr,
    order_ptr,
    tiles_ptr,
    n,
    k,
    slots,
    x_row,
    expert_stride,
    w_row,
    w_depth,
    FROM_ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """Compute a tile of y^T = w x^T for one expert: from rows of tokens to sorted slots, or from those to slots in place."""
    table = tiles_ptr + tl.program_id(0) * 3
    expert, end = tl.load(table), tl.load(table + 2)
    if expert >= 0:
        col = tl.program_id(1) * N + tl.arange(0, N)
        place = tl.load(table + 1) + tl.arange(0, M)
        read = tl.minimum(place, end - 1)  # places past the end repeat the last one
        slot = tl.load(order_ptr + read)
        row = slot // slots if FROM_ROWS else read
        depth = tl.arange(0, K)
        w_at = w_ptr + expert * expert_stride + col.to(tl.int64)[:, None] * w_row + depth[None, :] * w_depth
        x_at = x_ptr + row[None, :] * x_row + depth[:, None]
        acc = accumulated(x_at, w_at, w_depth, col < n, k, WHOLE, N, M, K)
        out = place if FROM_ROWS else slot
        live = (place < end)[None, :] & (col < n)[:, None]
        tl.store(y_ptr + out[None, :] * n + col[:, None], acc.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _summed(
    left_ptr,
    right_ptr,
    out_ptr,
    order_ptr,
    starts_ptr,
    n,
    k,
    slots,
    FROM_ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    X: tl.constexpr,
):
    """Compute a tile of left^T right over the slots of one expert; right is of rows of tokens, or of sorted slots."""
    expert = tl.program_id(0).to(tl.int64)
    row, col = tl.program_id(1) * N + tl.arange(0, N), tl.program_id(2) * K + tl.arange(0, K)
    end = tl.load(starts_ptr + expert + 1)
    acc = tl.zeros((N, K), tl.float32)
    for at in range(tl.load(starts_ptr + expert), end, X):
        place = at + tl.arange(0, X)
        live = place < end
        of = tl.load(order_ptr + place, mask=live, other=0) // slots if FROM_ROWS else place
        left = tl.load(left_ptr + place[None, :] * n + row[:, None], mask=live[None, :] & (row < n)[:, None], other=0.0)
        right = tl.load(right_ptr + of[:, None] * k + col[None, :], mask=live[:, None] & (col < k)[None, :], other=0.0)
        acc = tl.dot(left, right, acc)
    at = out_ptr + (expert * n + row[:, None]) * k + col[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(row < n)[:, None] & (col < k)[None, :])


@triton.jit
def _combine(y_ptr, weights_ptr, out_ptr, slots, d, per_row, BLOCK: tl.constexpr):
    """Add a row's slots, ascending; each product and each sum is rounded to fp32."""
    row, col = (tl.program_id(0) // per_row).to(tl.int64), tl.program_id(0) % per_row * BLOCK + tl.arange(0, BLOCK)
    at = y_ptr + row * slots * d + col
    total = tl.load(at, mask=col < d, other=0.0).to(tl.float32) * tl.load(weights_ptr + row * slots)
    for j in range(1, slots):
        part = tl.load(at + j * d, mask=col < d, other=0.0).to(tl.float32)
        total += part * tl.load(weights_ptr + row * slots + j)
    tl.store(out_ptr + row * d + col, total.to(out_ptr.dtype.element_ty), mask=col < d)


class _Plan:
    """Holds who goes where: slots sorted by expert, and the table of tiles, all on the device."""

    def __init__(self, ids: Tensor, experts: int, tile: Tile) -> None:
        self.count, self.slots, self.tile, m = ids.numel(), ids.shape[1], tile, tile[1]
        numbers, self.order = ids.flatten().sort(stable=True)
        self.starts = torch.searchsorted(numbers, torch.arange(experts + 1, device=ids.device))
        self.room = self.count // m + min(experts, self.count)  # each expert has one tile at most that is not full
        self.table = torch.empty(self.room, 3, dtype=torch.int64, device=ids.device)
        grid = (triton.cdiv(self.room, TABLE_BLOCK),)
        _tiles[grid](
            self.starts, self.table, experts, self.room, M=m, E=triton.next_power_of_2(experts), B=TABLE_BLOCK, num_warps=4
        )

    def product(self, x: Tensor, weight: Tensor, from_rows: bool) -> Tensor:
        """Multiply x [R, K] or [X, K] by each slot's expert of weight [E, N, K], of any strides: the result is [X, N]."""
        (_, n, k), (bn, bm, bk, warps, stages) = weight.shape, self.tile
        y = torch.empty(self.count, n, dtype=x.dtype, device=x.device)
        _grouped[(self.room, triton.cdiv(n, bn))](
            x,
            weight,
            y,
            self.order,
            self.table,
            n,
            k,
            self.slots,
            x.stride(0),
            *weight.stride(),
            FROM_ROWS=from_rows,
            WHOLE=k % bk == 0,
            N=bn,
            M=bm,
            K=bk,
            num_warps=warps,
            num_stages=stages,
        )
        return y

    def summed(self, left: Tensor, right: Tensor, from_rows: bool, dtype: torch.dtype) -> Tensor:
        """Sum left[x]^T right[x] over each expert's slots, left [X, N] and right [R, K] or [X, K]: [E, N, K]."""
        (n, k), experts = (left.shape[1], right.shape[1]), len(self.starts) - 1
        out = torch.empty(experts, n, k, dtype=dtype, device=left.device)
        (bn, bk, bx, warps, stages), ends = SUMMED, (self.order, self.starts)
        grid = (experts, triton.cdiv(n, bn), triton.cdiv(k, bk))
        how = {"FROM_ROWS": from_rows, "N": bn, "K": bk, "X": bx, "num_warps": warps, "num_stages": stages}
        _summed[grid](left, right, out, *ends, n, k, self.slots, **how)
        return out


def tile_for(count: int, experts: int) -> Tile:
    """Return the tile for so many slots over so many experts; it decides speed, and no bit."""
    return SAFE_TILES[16 if count <= FEW * experts else 256]


@functools.cache
def check(n: int, k: int, device: int) -> None:
    """Compare grouped products with a weight [E, n, k] with those of `linear`, once a process.

    Experts have 1, 0, 17, 64 and 100 rows, with operands whose exact product is zero; both tiles and both directions are tried.

    Raises:
        UserError: they differ, so a mixture is not exact on this GPU.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"moe_experts: weights [E, {n}, {k}] were first met inside a CUDA graph; call it once before")
    counts = (1, 0, 17, 64, 100)
    x, w = bits.cancelling(sum(counts), n * len(counts), k, torch.bfloat16, f"cuda:{device}")
    w = w.view(len(counts), n, k)
    of = torch.cat([torch.full((count,), e) for e, count in enumerate(counts)])
    ids = of[torch.randperm(len(of), generator=torch.Generator().manual_seed(0))][:, None].to(x.device)
    expected = torch.stack([tiled(x[i : i + 1], w[e], None, FALLBACK_TILE)[0] for i, e in enumerate(ids[:, 0].tolist())])
    for tile in SAFE_TILES.values():
        plan = _Plan(ids, len(counts), tile)
        for found in (plan.product(x, w, True), plan.product(x[plan.order], w, False)[plan.order]):
            if not bits.same(found, expected[plan.order]):
                raise UserError(
                    f"moe_experts: on {torch.cuda.get_device_name(device)} a grouped product with weights [E, {n}, {k}] has "
                    f"other bits than `linear` (tile {tile}); exact mode is not possible here; use invariance=off"
                )


def moe_experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Compute `ops.moe_experts`: x [R, D] bf16, ids and weights [R, S], gate_up [E, 2 I, D], down [E, D, I]."""
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.float().contiguous()
    up, down = (w.to(x.dtype).contiguous() for w in (gate_up, down))
    (rows, d), slots, experts = x.shape, ids.shape[1], len(up)
    out = torch.empty(rows, d, dtype=x.dtype, device=x.device)
    if not ids.numel():
        return out
    for weight in (up, down):
        if x.is_cuda:
            check(*weight.shape[1:], x.device.index)
        ROUTES[f"{experts} experts {weight.shape[1]}x{weight.shape[2]} bfloat16"] = "Triton, grouped, checked equal to linear"
    plan = _Plan(ids, experts, tile_for(ids.numel(), experts))
    y = plan.product(swiglu_merged(plan.product(x, up, True), activation), down, False)
    per_row = triton.cdiv(d, BLOCK)
    _combine[(rows * per_row,)](y, weights, out, slots, d, per_row, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)
    return out


def gradients(
    dout: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    dtype: torch.dtype,
    needed: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute `ops.moe_experts.gradients`, without waiting for the GPU: all experts in each of at most six products.

    dout, x: [R, D]; ids, weights: [R, S]; gate_up: [E, 2 I, D]; down: [E, D, I].
    """
    dout, x, ids = (t.contiguous() for t in (dout, x, ids))
    up, down = gate_up.to(x.dtype), down.to(x.dtype)
    (rows, slots), experts = ids.shape, len(up)
    plan = _Plan(ids, experts, tile_for(ids.numel(), experts))
    w_X1 = weights.float().flatten()[plan.order, None]
    both_XN = plan.product(x, up, True)
    inside_XI = swiglu_merged(both_XN, activation)
    dinside_XI = plan.product(dout, down.mT, True)  # before the weight, as in ops/moe_experts.py
    dw_X = torch.empty(ids.numel(), dtype=torch.float32, device=x.device)
    dw_X[plan.order] = (dinside_XI.float() * inside_XI.float()).sum(-1)
    dboth_XN = swiglu_merged_backward((dinside_XI * w_X1).to(x.dtype), both_XN, activation)
    dx_XD = plan.product(dboth_XN, up.mT, False)
    dx = dx_XD.view(rows, slots, -1).sum(1, dtype=torch.float32).to(x.dtype)
    dup = plan.summed(dboth_XN, x, True, dtype) if needed[3] else None
    weighted_XD = (dout[plan.order // slots] * w_X1).to(x.dtype) if needed[4] else None
    ddown = None if weighted_XD is None else plan.summed(weighted_XD, inside_XI, False, dtype)
    return dx, dw_X.view(rows, slots).to(weights.dtype), dup, ddown

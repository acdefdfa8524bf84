"""The gradients of chunked_attention.py, where no other deterministic backward has them: for capped scores.

The weights are made again from the scores and the log-sum-exp of each row. Two kernels, so that each sum has one program, which
adds in a fixed order: `_of_queries` walks over the keys of a tile of queries, `_of_keys` over the queries of a block of keys.
The same call twice gives the same bits, and that is all that a gradient promises here.

    x = cap tanh(scale q k / cap), p = e^(x - lse), dx = p (dout v - dout out), d(q k) = dx scale (1 - tanh^2)

A sink takes part in lse alone; its own gradient is -sum over rows of e^(sink - lse) (dout out).
Ref: Dao et al. 2022, arXiv:2205.14135, appendix B. Legend: as in chunked_attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlinvariant.kernels.chunked_attention import LOG2E, _tanh, load_rows
from rlinvariant.kernels.chunked_calls import Backward, Form, padded, row


@triton.jit
def _weights(s, base, seen, inner, factor, CAP: tl.constexpr):
    """Return the weights of raw scores s, and what a gradient of the scores is multiplied by, but for the scale."""
    slope = 1.0
    if CAP:
        s = _tanh(s * inner)
        slope = 1.0 - s * s
    return tl.where(seen, tl.exp2(tl.where(seen, s * factor - base, 0.0)), 0.0), slope


@triton.jit
def _load_keys(ptr, row, origin, key, queries, D: tl.constexpr, D_: tl.constexpr):
    """Return keys or values of one head [N, D_]."""
    d = tl.arange(0, D_)
    at = ptr + (origin + key).to(tl.int64)[:, None] * row + d[None, :]
    return tl.load(at, mask=(key < queries)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _load_tile(
    q_ptr,
    q_row,
    q_head,
    dout_ptr,
    dout_row,
    dout_head,
    lse_ptr,
    delta_ptr,
    heads,
    tile,
    kv_head,
    queries,
    origin,
    D: tl.constexpr,
    D_: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
):
    """Return what `load_rows` does, and of its rows dout [M, D_], the log-sum-exp in octaves and dout out, both [M]."""
    q, query, head, live = load_rows(q_ptr, q_row, q_head, tile, kv_head, queries, origin, D, D_, M, G)
    dout, _, _, _ = load_rows(dout_ptr, dout_row, dout_head, tile, kv_head, queries, origin, D, D_, M, G)
    at = (origin + query) * heads + head
    base = tl.load(lse_ptr + at, mask=live, other=0.0) * LOG2E
    return q, query, head, live, dout, base, tl.load(delta_ptr + at, mask=live, other=0.0)


@triton.jit(do_not_specialize=["window", "heads"])
def _of_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    cu_ptr,
    inner,
    factor,
    scale,
    window,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    dout_row,
    dout_head,
    dq_row,
    dq_head,
    heads,
    G: tl.constexpr,
    D: tl.constexpr,
    D_: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
):
    kv_head, b, d = tl.program_id(1), tl.program_id(2), tl.arange(0, D_)
    origin = tl.load(cu_ptr + b)
    queries = tl.load(cu_ptr + b + 1) - origin
    tile = tl.cdiv(queries * G, M) - 1 - tl.program_id(0)
    if tile < 0:
        return
    rows = q_ptr, q_row, q_head, dout_ptr, dout_row, dout_head, lse_ptr, delta_ptr, heads
    q, query, head, live, dout, base, delta = _load_tile(*rows, tile, kv_head, queries, origin, D, D_, M, G)
    first = tl.maximum(0, tile * M // G - window + 1) // N * N if WINDOW else 0
    last = tl.minimum(queries, (tile * M + M - 1) // G + 1)
    dq = tl.zeros((M, D_), tl.float32)
    for start in range(first, last, N):
        key = start + tl.arange(0, N)
        k = _load_keys(k_ptr + kv_head * k_head, k_row, origin, key, queries, D, D_)
        v = _load_keys(v_ptr + kv_head * v_head, v_row, origin, key, queries, D, D_)
        seen = (key[None, :] <= query[:, None]) & live[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > query[:, None] - window)
        p, slope = _weights(tl.dot(q, k.T), base[:, None], seen, inner, factor, CAP)
        ds = p * (tl.dot(dout, v.T) - delta[:, None]) * slope
        dq = tl.dot(ds.to(q.dtype), k, dq)
    at = dq_ptr + (origin + query).to(tl.int64)[:, None] * dq_row + head[:, None] * dq_head + d[None, :]
    tl.store(at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["window", "heads"])
def _of_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    cu_ptr,
    inner,
    factor,
    scale,
    window,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    dout_row,
    dout_head,
    dk_row,
    dk_head,
    heads,
    G: tl.constexpr,
    D: tl.constexpr,
    D_: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
):
    start, kv_head, b, d = tl.program_id(0) * N, tl.program_id(1), tl.program_id(2), tl.arange(0, D_)
    origin = tl.load(cu_ptr + b)
    queries = tl.load(cu_ptr + b + 1) - origin
    if start >= queries:
        return
    key = start + tl.arange(0, N)
    k = _load_keys(k_ptr + kv_head * k_head, k_row, origin, key, queries, D, D_)
    v = _load_keys(v_ptr + kv_head * v_head, v_row, origin, key, queries, D, D_)
    last = tl.minimum(queries, start + N - 1 + window) if WINDOW else queries
    dk, dv = tl.zeros((N, D_), tl.float32), tl.zeros((N, D_), tl.float32)
    for tile in range(start * G // M, tl.cdiv(last * G, M)):
        rows = q_ptr, q_row, q_head, dout_ptr, dout_row, dout_head, lse_ptr, delta_ptr, heads
        q, query, head, live, dout, base, delta = _load_tile(*rows, tile, kv_head, queries, origin, D, D_, M, G)
        seen = (key[:, None] <= query[None, :]) & live[None, :]
        if WINDOW:
            seen = seen & (key[:, None] > query[None, :] - window)
        p, slope = _weights(tl.dot(k, q.T), base[None, :], seen, inner, factor, CAP)
        dv = tl.dot(p.to(q.dtype), dout, dv)
        ds = p * (tl.dot(v, dout.T) - delta[None, :]) * slope
        dk = tl.dot(ds.to(q.dtype), q, dk)
    at = (origin + key).to(tl.int64)[:, None] * dk_row + kv_head * dk_head + d[None, :]
    mask = (key < queries)[:, None] & (d < D)[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    out: Tensor,
    lse: Tensor,
    longest: int,
    form: Form,
    tile: Backward | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq [T, H, D], dk and dv [T, H_kv, D] of `chunked_calls.packed`; dout and out are like q, lse is [T, H] fp32."""
    dout, q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (dout, q, k, v))
    (_, heads, d), kv_heads, d_ = q.shape, k.shape[1], padded(q.shape[2])
    group, sequences = heads // kv_heads, len(cu) - 1
    tile = tile or row(d)["backward"]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = (dout.float() * out.float()).sum(-1)
    (inner, factor, window), strides = form.numbers(), [n for x in (q, k, v, dout) for n in x.stride()[:2]]
    numbers = inner, factor, form.scale, window
    fixed = {"G": group, "D": d, "D_": d_, "M": tile.rows, "N": tile.block, **form.flags()}
    fixed |= {"num_warps": tile.warps, "num_stages": tile.stages}
    _of_queries[(triton.cdiv(longest * group, tile.rows), kv_heads, sequences)](
        *(q, k, v, dout, dq, lse, delta, cu, *numbers, *strides, dq.stride(0), dq.stride(1), heads), **fixed
    )
    _of_keys[(triton.cdiv(longest, tile.block), kv_heads, sequences)](
        *(q, k, v, dout, dk, dv, lse, delta, cu, *numbers, *strides, dk.stride(0), dk.stride(1), heads), **fixed
    )
    return dq, dk, dv


def sinks_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return the gradient of sinks [H]: dout and out [T, H, D], lse [T, H] fp32, sinks counted."""
    return -((sinks.float() - lse).exp() * (dout.float() * out.float()).sum(-1)).sum(0).to(sinks.dtype)

"""Attention in Triton whose bits depend on nothing but a query, its keys and its values. Its calls are in chunked_calls.py.

A softmax over many keys has to be taken in some order, and what is fast differs: a prefill has many queries and walks the keys
once for all of them; a decode has one query a sequence and must cut the keys into parts that run beside each other. Here both
take the same order:

* *Blocks.* Keys come in blocks of N, which begin at multiples of N, ascending. N belongs to the chip and the head size.
* *Chunks.* Blocks are collected in chunks of CHUNK keys, which begin at multiples of CHUNK. A chunk has a state of its own: the
  maximum m of its scores, the sum z of its weights 2^(score - m), the sum acc of its weighted values.
* *The fold.* A row's chunks are folded in ascending order, by whoever has them: `_tiles` does it in registers as it walks on,
  `_parts` and `_fold_parts` through memory. So a long context is as parallel as it is long, and has the bits of a prefill.

A tile holds M rows, each a (query, head) pair of the heads that share their keys. Why neither M nor the other rows reach a bit:

1. Every product is a chain of 16-deep matrix instructions into fp32, and these compute each row for itself. On one chip all
   widths of them, mma.sync or wgmma, share one arithmetic (linear.py).
2. The sum of the weights is a product too, with a matrix of ones: the order of `tl.sum` follows the layout, which may change
   with M, though on an H200 every tile that was tried gave the same bits. A maximum has no order.
3. Nothing is fused (enable_fp_fusion=False) but what says `fma`. 2^x is one instruction, and tanh is made of it.
4. A block that a row does not see is neutral: the maximum stays, 2^0 = 1 scales, and the sums gain zeros, exactly. So is the
   fold of a chunk without keys. A tile may therefore walk over blocks that only some of its rows see. (A sum of -0 may become
   +0 by it; `_quotient` makes both +0.)
5. A window begins inside a block, and that block is walked as a whole: blocks that began with the window would be others.
6. A sink, which is a score without a value, is a chunk of its own before the first.

Legend: D: width of a head, D_: the power of two that holds it; G: query heads that share one of keys; M, N: rows and keys of a
step; PAGE: tokens of a page of the cache, 0 for keys in one piece.
Ref: Milakov and Gimelshein 2018, arXiv:1805.02867 (the running maximum); Dao et al. 2022, arXiv:2205.14135 (blocks).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ONES = tl.constexpr(8)  # columns of the product that adds weights up: the fewest of a matrix instruction


@triton.jit
def _tanh(x):
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def fold(m, z, acc, m2, z2, acc2):
    """Add the state of a later chunk to that of those before it: m and z [M], acc [M, D_]."""
    top = tl.maximum(m, m2)
    base = tl.where(top == -float("inf"), 0.0, top)
    a, b = tl.exp2(m - base), tl.exp2(m2 - base)
    return top, z * a + z2 * b, acc * a[:, None] + acc2 * b[:, None]


@triton.jit
def _quotient(z, acc):
    return acc / z[:, None] + 0.0


@triton.jit
def _empty(M: tl.constexpr, D_: tl.constexpr):
    """Return the state of no keys: m [M], z [M, ONES], whose columns are equal, acc [M, D_]."""
    return tl.full((M,), -float("inf"), tl.float32), tl.zeros((M, ONES), tl.float32), tl.zeros((M, D_), tl.float32)


@triton.jit
def before_all(sink_ptr, head, M: tl.constexpr, D_: tl.constexpr, SINKS: tl.constexpr):
    """Return what the first chunk is folded into: the sinks of rows of these heads [M], or nothing."""
    if SINKS:
        m, z = tl.load(sink_ptr + head).to(tl.float32) * LOG2E, tl.full((M,), 1.0, tl.float32)
    else:
        m, z = tl.full((M,), -float("inf"), tl.float32), tl.zeros((M,), tl.float32)
    return m, z, tl.zeros((M, D_), tl.float32)


@triton.jit
def _load(
    start, oldest, keys, at, D: tl.constexpr, D_: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr
):
    """Return keys [D_, N] and values [N, D_] from `start` on, zeros in place of what may not be there: 0 x NaN would be NaN.

    There are keys from `oldest` on, with which the first row's window begins: pages before it may have been given away.
    """
    k_ptr, v_ptr, k_row, v_row, table_ptr, page_stride, k_rows, v_rows, origin, kv_head = at
    key, d = start + tl.arange(0, N), tl.arange(0, D_)
    have = (key >= oldest) & (key < keys)
    if k_rows is not None and not MASKED:  # tensor descriptors
        k = k_rows.load([origin + start, kv_head, 0]).reshape(N, D_).T
        v = v_rows.load([origin + start, kv_head, 0]).reshape(N, D_)
    else:
        if PAGE:
            page = tl.load(table_ptr + key // PAGE, mask=have, other=0) if MASKED else tl.load(table_ptr + key // PAGE)
            k_at = page.to(tl.int64) * page_stride + (key % PAGE) * k_row
            v_at = page.to(tl.int64) * page_stride + (key % PAGE) * v_row
        else:
            k_at, v_at = key.to(tl.int64) * k_row, key.to(tl.int64) * v_row
        k_at, v_at = k_ptr + k_at[None, :] + d[:, None], v_ptr + v_at[:, None] + d[None, :]
        if MASKED:
            k = tl.load(k_at, mask=have[None, :] & (d < D)[:, None], other=0.0)
            v = tl.load(v_at, mask=have[:, None] & (d < D)[None, :], other=0.0)
        elif D < D_:
            k, v = tl.load(k_at, mask=(d < D)[:, None], other=0.0), tl.load(v_at, mask=(d < D)[None, :], other=0.0)
        else:
            k, v = tl.load(k_at), tl.load(v_at)
    return k, v


@triton.jit
def _walk(
    state,
    first,
    last,
    ask,
    at,
    D: tl.constexpr,
    D_: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take the blocks from `first` up to `last`. Where a chunk begins, the one before is folded into all before that.

    state: of the chunk so far (m, z, acc), and of the chunks before it. Without MASKED every row sees every key.
    """
    m, z, acc, m_all, z_all, acc_all = state
    q, position, oldest, keys, inner, factor, window = ask
    ones = tl.full((N, ONES), 1.0, q.dtype)
    for start in range(first, last, N):
        if start % CHUNK == 0:
            m_all, z_all, acc_all = fold(m_all, z_all, acc_all, m, tl.max(z, 1), acc)
            m, z, acc = _empty(M, D_)
        k, v = _load(start, oldest, keys, at, D, D_, N, PAGE, MASKED)
        s = tl.dot(q, k)
        if CAP:
            s = _tanh(s * inner)
        if MASKED:
            key = start + tl.arange(0, N)
            seen = (key[None, :] <= position[:, None]) & (key < keys)[None, :]
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            s = tl.where(seen, s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1) * factor)
        base = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp2(tl.fma(s, factor, -base[:, None])).to(q.dtype)
        a = tl.exp2(m - base)[:, None]
        z = tl.dot(p, ones, z * a)
        acc = tl.dot(p, v, acc * a)
        m = top
    return m, z, acc, m_all, z_all, acc_all


@triton.jit
def attend(
    first,
    last,
    lowest,
    highest,
    ask,
    at,
    before,
    D: tl.constexpr,
    D_: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
):
    """Take the keys first <= j < last with rows at the positions from `lowest` to `highest`, masking where it is needed.

    Returns the state of the last chunk begun, z as [M], and that of all before it.
    """
    m, z, acc = _empty(M, D_)
    m_all, z_all, acc_all = before
    state = m, z, acc, m_all, z_all, acc_all
    window = ask[6]
    begin = first
    if WINDOW:  # from here on all rows see all keys ...
        begin = tl.minimum(last, tl.maximum(first, (highest - window + N) // N * N))
        state = _walk(state, first, begin, ask, at, D, D_, M, N, CHUNK, PAGE, WINDOW, CAP, True)
    end = tl.maximum(begin, tl.minimum(last, lowest + 1) // N * N)  # ... up to here
    state = _walk(state, begin, end, ask, at, D, D_, M, N, CHUNK, PAGE, WINDOW, CAP, False)
    m, z, acc, m_all, z_all, acc_all = _walk(state, end, last, ask, at, D, D_, M, N, CHUNK, PAGE, WINDOW, CAP, True)
    return m, tl.max(z, 1), acc, m_all, z_all, acc_all


@triton.jit
def load_rows(
    q_ptr, q_row, q_head, tile, group, queries, origin, D: tl.constexpr, D_: tl.constexpr, M: tl.constexpr, G: tl.constexpr
):
    """Return the queries [M, D_] of a tile, which query and which head each is, and which rows there are."""
    row, d = tile * M + tl.arange(0, M), tl.arange(0, D_)
    query, head = row // G, group * G + row % G
    live = query < queries
    at = q_ptr + (origin + query).to(tl.int64)[:, None] * q_row + head[:, None] * q_head + d[None, :]
    return tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0), query, head, live


@triton.jit
def store_rows(out_ptr, out_row, out_head, token, head, live, z, acc, D: tl.constexpr, D_: tl.constexpr):
    d = tl.arange(0, D_)
    at = out_ptr + token.to(tl.int64)[:, None] * out_row + head[:, None] * out_head + d[None, :]
    tl.store(at, _quotient(z, acc).to(out_ptr.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["window", "table_row", "heads"])
def _tiles(
    q_ptr,
    k_ptr,
    v_ptr,
    k_rows,
    v_rows,
    out_ptr,
    lse_ptr,
    sink_ptr,
    cu_ptr,
    keys_ptr,
    table_ptr,
    inner,
    factor,
    window,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    out_row,
    out_head,
    page_stride,
    table_row,
    heads,
    SKIP: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Attend from one tile of rows to all its keys. Sequences of up to SKIP rows are left to `_parts`."""
    kv_head, b = tl.program_id(1), tl.program_id(2)
    origin = tl.load(cu_ptr + b)
    queries = tl.load(cu_ptr + b + 1) - origin
    tile = tl.cdiv(queries * G, M) - 1 - tl.program_id(0)  # the longest first
    if (tile < 0) | (queries * G <= SKIP):
        return
    q, query, head, live = load_rows(q_ptr, q_row, q_head, tile, kv_head, queries, origin, D, D_, M, G)
    if PAGE:
        keys, begin = tl.load(keys_ptr + b), 0
        table_ptr += b.to(tl.int64) * table_row
    else:
        keys, begin = queries, origin.to(tl.int64)
    position = keys - queries + query
    lowest = keys - queries + tile * M // G
    highest = tl.minimum(keys - 1, keys - queries + (tile * M + M - 1) // G)
    oldest = tl.maximum(0, lowest - window + 1) if WINDOW else 0
    first = oldest // N * N
    k_ptr += begin * k_row + kv_head * k_head
    v_ptr += begin * v_row + kv_head * v_head
    at = k_ptr, v_ptr, k_row, v_row, table_ptr, page_stride, k_rows, v_rows, origin, kv_head
    ask = q, position, oldest, keys, inner, factor, window
    before = before_all(sink_ptr, head, M, D_, SINKS)
    m, z, acc, m_all, z_all, acc_all = attend(
        first, highest + 1, lowest, highest, ask, at, before, D, D_, M, N, CHUNK, PAGE, WINDOW, CAP
    )
    m_all, z_all, acc_all = fold(m_all, z_all, acc_all, m, z, acc)
    store_rows(out_ptr, out_row, out_head, origin + query, head, live, z_all, acc_all, D, D_)
    if lse_ptr is not None:
        tl.store(lse_ptr + (origin + query) * heads + head, (m_all + tl.log2(z_all)) * LN2, mask=live)

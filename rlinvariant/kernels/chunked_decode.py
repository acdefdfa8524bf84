"""Decode of chunked_attention.py: a program for each chunk of the keys, and a fold.

A plan says which programs have what to do. It is made on the GPU from the lengths of a step, once for all layers of a kind: a
CUDA graph needs to know bounds alone: the programs are as many as the chip can use, not as the longest context has chunks, and
each works off every so many-th item. What a chunk leaves behind lies in a slot, and slots are as many as memory is given: the
sequences for which none are left, as those of one chunk, are one item, which walks over all of its chunks and folds them in
registers. Which of the two it is changes no bit.
"""

import triton
import triton.language as tl

from rlinvariant.kernels.chunked_attention import attend, before_all, fold, load_rows, store_rows

ITEM = tl.constexpr(3)  # numbers of an item of a plan: its sequence, its first chunk, its slot (-1: all chunks at once)


@triton.jit(do_not_specialize=["window", "sequences"])
def _plan(
    plan_ptr,
    cu_ptr,
    keys_ptr,
    sequences,
    window,
    slots,
    ROWS: tl.constexpr,
    G: tl.constexpr,
    B: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Write one sequence's part of a plan: [items, slots] of the sequences, then the items, whose number comes first of all.

    A sequence of up to ROWS rows is one item for each of its chunks while there are slots for them, else one item.
    """
    b, i = tl.program_id(0), tl.arange(0, B)
    here = i < sequences
    queries = tl.load(cu_ptr + i + 1, mask=here, other=0) - tl.load(cu_ptr + i, mask=here, other=0)
    keys = tl.load(keys_ptr + i, mask=here, other=0)
    few = (queries > 0) & (queries * G <= ROWS)
    first = tl.maximum(0, keys - queries - window + 1) // N * N // CHUNK if WINDOW else keys * 0
    chunks = tl.where(few, (keys - 1) // CHUNK - first + 1, 0)
    wanted = tl.where(chunks > 1, chunks, 0)
    until = tl.cumsum(wanted, 0)
    cut = (wanted > 0) & (until <= slots)
    items = tl.where(cut, chunks, few.to(tl.int32))
    own = i == b
    at = tl.sum(tl.where(i < b, items, 0), 0)
    count, begin = tl.sum(tl.where(own, items, 0), 0), tl.sum(tl.where(own, first, 0), 0)
    slot = tl.sum(tl.where(own & cut, until - wanted + 1, 0), 0) - 1
    tl.store(plan_ptr, tl.sum(items, 0))
    tl.store(plan_ptr + 1 + 2 * b, slot)
    tl.store(plan_ptr + 2 + 2 * b, count)
    item_ptr = plan_ptr + 1 + 2 * sequences + at * ITEM
    for j in range(0, count):
        tl.store(item_ptr + j * ITEM, b)
        tl.store(item_ptr + j * ITEM + 1, begin + j)
        tl.store(item_ptr + j * ITEM + 2, tl.where(slot < 0, -1, slot + j))


@triton.jit(do_not_specialize=["window", "sequences", "table_row"])
def _parts(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    sink_ptr,
    sums_ptr,
    state_ptr,
    plan_ptr,
    cu_ptr,
    keys_ptr,
    table_ptr,
    sequences,
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
    """Work off a plan: each item is a chunk of a sequence, whose state is written to its slot, or all of a sequence's keys.

    sums: [slots, H_kv, M, D_]; state: [slots, H_kv, 2, M], both fp32.
    """
    kv_head, row, d = tl.program_id(1), tl.arange(0, M), tl.arange(0, D_)
    k_ptr, v_ptr = k_ptr + kv_head * k_head, v_ptr + kv_head * v_head
    for item in range(tl.program_id(0), tl.load(plan_ptr), tl.num_programs(0)):
        item_ptr = plan_ptr + 1 + 2 * sequences + item * ITEM
        b, chunk, slot = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
        origin, keys = tl.load(cu_ptr + b), tl.load(keys_ptr + b)
        queries = tl.load(cu_ptr + b + 1) - origin
        q, query, head, live = load_rows(q_ptr, q_row, q_head, 0, kv_head, queries, origin, D, D_, M, G)
        lowest = keys - queries
        oldest = tl.maximum(0, lowest - window + 1) if WINDOW else 0
        first, last = tl.maximum(chunk * CHUNK, oldest // N * N), keys
        if slot >= 0:
            last = tl.minimum(keys, (chunk + 1) * CHUNK)
        at = k_ptr, v_ptr, k_row, v_row, table_ptr + b.to(tl.int64) * table_row, page_stride, None, None, 0, kv_head
        ask = q, lowest + query, oldest, keys, inner, factor, window
        before = before_all(sink_ptr, tl.where(live, head, 0), M, D_, SINKS)
        m, z, acc, m_all, z_all, acc_all = attend(
            first, last, lowest, keys - 1, ask, at, before, D, D_, M, N, CHUNK, PAGE, WINDOW, CAP
        )
        if slot >= 0:
            place = slot.to(tl.int64) * tl.num_programs(1) + kv_head
            tl.store(sums_ptr + place * M * D_ + row[:, None] * D_ + d[None, :], acc, mask=live[:, None])
            tl.store(state_ptr + place * 2 * M + row, m, mask=live)
            tl.store(state_ptr + place * 2 * M + M + row, z, mask=live)
        else:
            m_all, z_all, acc_all = fold(m_all, z_all, acc_all, m, z, acc)
            store_rows(out_ptr, out_row, out_head, origin + query, head, live, z_all, acc_all, D, D_)


@triton.jit(do_not_specialize=["sequences"])
def _fold_parts(
    sums_ptr,
    state_ptr,
    out_ptr,
    sink_ptr,
    plan_ptr,
    cu_ptr,
    out_row,
    out_head,
    G: tl.constexpr,
    D: tl.constexpr,
    D_: tl.constexpr,
    M: tl.constexpr,
    SINKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Add up one row's chunks in ascending order, reading AT_ONCE of them ahead."""
    row, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, chunks = tl.load(plan_ptr + 1 + 2 * b), tl.load(plan_ptr + 2 + 2 * b)
    origin = tl.load(cu_ptr + b)
    if (slot < 0) | (row >= (tl.load(cu_ptr + b + 1) - origin) * G):
        return
    one, d = tl.arange(0, 1), tl.arange(0, D_)
    head = kv_head * G + row % G + one
    m, z, acc = before_all(sink_ptr, head, 1, D_, SINKS)
    for start in range(0, chunks, AT_ONCE):
        for j in tl.static_range(AT_ONCE):
            have = start + j + one < chunks  # what is not there is a chunk without keys
            place = (slot + start + j).to(tl.int64) * tl.num_programs(1) + kv_head
            m2 = tl.load(state_ptr + place * 2 * M + row + one, mask=have, other=-float("inf"))
            z2 = tl.load(state_ptr + place * 2 * M + M + row + one, mask=have, other=0.0)
            acc2 = tl.load(sums_ptr + (place * M + row) * D_ + one[:, None] + d[None, :], mask=have[:, None], other=0.0)
            m, z, acc = fold(m, z, acc, m2, z2, acc2)
    store_rows(out_ptr, out_row, out_head, origin + row // G + one, head, one < 1, z, acc, D, D_)

"""Causal attention over packed sequences, and its twin over a paged key-value cache.

T: tokens of all sequences, or in the reference of one; H: heads of queries, D: width of a head; P: tokens in the cache.
"""

from itertools import pairwise

import torch
from torch import Tensor

from rlinvariant.kernels import cpu
from rlinvariant.ops.register import define, require_dtype, widened


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    max_seqlen: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend causally inside each of several sequences laid end to end.

        out[i] = sum_{i - window < j <= i} softmax_j(s_j) v[j]
        s_j = scale * q[i] . k[j], or softcap * tanh(scale * q[i] . k[j] / softcap)

    Args:
        q: [T, H, D], bf16 or fp32.
        k, v: [T, H_kv, D], H a multiple of H_kv (grouped queries), same dtype.
        cu_seqlens: [sequences + 1] int32; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        scale: multiplies the scores.
        max_seqlen: length of the longest sequence, read off cu_seqlens if not given (which waits for a GPU).
        window: how many keys a query attends to, its own included; all if None.
        softcap: bound of the scores; none if None. On a GPU either takes an attention of our own (kernels/attention.py).

    Returns:
        [T, H, D] in q.dtype.

    Order: everything in fp32. CPU: scores over D ascending, fused, one accumulator; exp of (score - row maximum); its sum over
        key positions by `lanes`, values by `chain4` (kernels/cpu.h); one division; one rounding. With a window, lanes and
        chains are those of absolute key positions. CUDA: FlashAttention-3 with one split, its tile fixed by D, or blocks and
        chunks of keys at absolute positions, chunks folded in ascending order (kernels/attention.py chooses, by form).
    Bits: row i depends on its query and on keys and values 0..i (the last `window` of them) of its own sequence. Packing,
        padding, chunking, paging and the other sequences change nothing: `paged_attention` gives the same bits, and a window
        that covers the whole sequence those of none. Gradients are deterministic.
    Ref: Vaswani et al. 2017, arXiv:1706.03762; gradient as in Dao et al. 2022, arXiv:2205.14135, appendix B;
        window as transformers' `sliding_window`; softcap as in Gemma 2 (arXiv:2408.00118), here in fp32.
    """
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    return _attention(q, k, v, cu_seqlens, scale, max_seqlen, window, softcap)[0]


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    scale: float,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    schedule: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend from the last queries of each sequence to keys and values that are kept in pages.

    Args:
        q: [T, H, D]; the queries of sequence b are rows cu_seqlens_q[b] to cu_seqlens_q[b + 1], its last positions.
        kv_cache: [pages, H_kv, page_size, 2 D]: keys in the first D columns, values in the others. Columns are next to each
            other in memory; pages, heads and rows may be anywhere.
        block_table: [sequences, width] int32, the pages of each sequence in order.
        cu_seqlens_q: [sequences + 1] int32.
        kv_lens: [sequences] int32, keys per sequence, those of q included.
        scale: multiplies the scores.
        window, softcap: as in `attention`. Pages wholly before the window of a sequence's first query here are not read,
            whatever the table says of them.
        max_seqlen_q, max_seqlen_k: bounds of the lengths; read off the tensors if not given, which a CUDA graph cannot.
        schedule: the plan of work for this batch, if the caller has made one for several layers of this form (CUDA).
        out: like q; where to write.

    Returns:
        [T, H, D] in q.dtype. No gradient.

    Order, Bits, Ref: those of `attention`.
    """
    if max_seqlen_q is None:
        max_seqlen_q = int(cu_seqlens_q.diff().max()) if len(kv_lens) else 0
    if max_seqlen_k is None:
        max_seqlen_k = int(kv_lens.max()) if len(kv_lens) else 0
    out = q.new_empty(q.shape) if out is None else out
    bounds = max_seqlen_q, max_seqlen_k
    _paged_attention(q, kv_cache, block_table, cu_seqlens_q, kv_lens, scale, *bounds, window, softcap, schedule, out)
    return out


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    max_seqlen: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute `attention` in plain PyTorch, one matrix of scores per sequence: any float dtype, differentiable by autograd."""
    group, out = q.shape[1] // k.shape[1], []
    for first, last in pairwise(cu_seqlens.tolist()):
        q_HTD, k_HTD, v_HTD = (widened(x[first:last]).transpose(0, 1) for x in (q, k, v))
        k_HTD, v_HTD = k_HTD.repeat_interleave(group, 0), v_HTD.repeat_interleave(group, 0)
        scores_HTT = q_HTD @ k_HTD.mT * scale
        scores_HTT = scores_HTT if softcap is None else torch.tanh(scores_HTT / softcap) * softcap
        i, j = torch.arange(last - first, device=q.device)[:, None], torch.arange(last - first, device=q.device)
        seen_TT = (j <= i) & (j > i - window) if window else j <= i
        out.append((scores_HTT.masked_fill(~seen_TT, -torch.inf).softmax(-1) @ v_HTD).transpose(0, 1).to(q.dtype))
    return torch.cat(out) if out else torch.zeros_like(q)


def paged_attention_ref(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute `paged_attention` in plain PyTorch: gather a sequence's pages, attend from all positions, keep the last."""
    out, page = [], kv_cache.shape[2]
    for b, (first, last) in enumerate(pairwise(cu_seqlens_q.tolist())):
        length, count = int(kv_lens[b]), last - first
        at_P = torch.arange(length, device=q.device)
        k_PHD, v_PHD = kv_cache[block_table[b, at_P // page].long(), :, at_P % page].chunk(2, -1)
        q_PHD = torch.cat([q.new_zeros(length - count, *q.shape[1:]), q[first:last]])
        whole = torch.tensor([0, length])
        out.append(attention_ref(q_PHD, k_PHD, v_PHD, whole, scale, None, window, softcap)[length - count :])
    return torch.cat(out) if out else torch.zeros_like(q)


def _check_scores(window: int | None, softcap: float | None) -> None:
    if window is not None and window < 1 or softcap is not None and not softcap > 0:
        raise ValueError(f"attention: window={window}, softcap={softcap}: expected positive numbers, or None")


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale, max_seqlen, window, softcap) -> None:
    _check_scores(window, softcap)
    require_dtype("attention", q, (torch.bfloat16,) if q.is_cuda else cpu.DTYPES)
    (t, heads, dim), kv_heads = q.shape, k.shape[1]
    if k.shape != v.shape or k.shape != (t, kv_heads, dim) or heads % kv_heads or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")


def _cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale, max_seqlen, window, softcap) -> tuple[Tensor, Tensor]:
    q, k, v, cu = q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens.to(torch.int32).contiguous()
    (t, heads, dim), kv_heads = q.shape, k.shape[1]
    lengths = _lengths(cu, t)
    out, lse = torch.empty_like(q), torch.empty(t, heads, dtype=torch.float32)
    no_pages = None, 0, 0, 0  # block table, its width, tokens of a page, elements of a page
    strides, sizes = (kv_heads * dim, dim), (heads, kv_heads, dim)
    scores = window or 0, scale, softcap or 0.0, cpu.is_bf16(q)
    cpu.call("attention", q, k, v, out, lse, cu, lengths, *no_pages, *strides, cu.numel() - 1, *sizes, *scores)
    return out, lse


def _lengths(cu: Tensor, rows: int) -> Tensor:
    """Return the sequence lengths, [B] int32. Raises ValueError unless `cu` rises from 0 to `rows`."""
    lengths = cu.diff()
    if int(cu[0]) != 0 or int(cu[-1]) != rows or (lengths < 0).any():
        raise ValueError(f"attention: cu_seqlens must rise from 0 to the {rows} rows of q, got {cu.tolist()[:8]}")
    return lengths


def _paged_check(q, kv_cache, block_table, cu_seqlens_q, kv_lens, scale, max_q, max_k, window, softcap, schedule, out) -> None:
    _check_scores(window, softcap)
    require_dtype("paged_attention", q, (torch.bfloat16,) if q.is_cuda else cpu.DTYPES)
    (_, heads, dim), kv_heads = q.shape, kv_cache.shape[1]
    if kv_cache.shape[-1] != 2 * dim or kv_cache.stride(-1) != 1 or kv_cache.dtype != q.dtype or heads % kv_heads:
        raise ValueError(f"paged_attention: q {tuple(q.shape)} does not fit a {kv_cache.dtype} cache {tuple(kv_cache.shape)}")


def _paged_cpu(q, kv_cache, block_table, cu_seqlens_q, kv_lens, scale, max_q, max_k, window, softcap, schedule, out) -> None:
    q, cu, lens = q.contiguous(), cu_seqlens_q.to(torch.int32).contiguous(), kv_lens.to(torch.int32).contiguous()
    table = block_table.to(torch.int32).contiguous()
    (_, heads, dim), (_, kv_heads, page, _) = q.shape, kv_cache.shape
    if (lens < _lengths(cu, len(q))).any() or (lens > table.shape[1] * page).any():
        raise ValueError("paged_attention: fewer keys than queries, or more than the block table holds")
    result = out if out.is_contiguous() else torch.empty_like(q)
    values = kv_cache.data_ptr() + dim * kv_cache.element_size()
    pages = table, table.shape[1], page, kv_cache.stride(0)
    strides, sizes = (kv_cache.stride(2), kv_cache.stride(1)), (heads, kv_heads, dim)
    scores = window or 0, scale, softcap or 0.0, cpu.is_bf16(q)
    cpu.call("attention", q, kv_cache, values, result, None, cu, lens, *pages, *strides, lens.numel(), *sizes, *scores)
    if result is not out:
        out.copy_(result)


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, *ctx.settings = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, cu_seqlens, out, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, dout: Tensor, _):
    return *_attention_backward(dout, *ctx.saved_tensors, *ctx.settings), *[None] * 5


def _cpu_backward(dout, q, k, v, cu, out, lse, scale, max_seqlen, window, softcap) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, cu = q.contiguous(), k.contiguous(), v.contiguous(), cu.to(torch.int32).contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    inputs, outputs = (dout.contiguous(), q, k, v, out, lse), (dq, dk, dv)
    sizes = q.shape[1], k.shape[1], q.shape[2]
    scores = window or 0, scale, softcap or 0.0, cpu.is_bf16(q)
    cpu.call("attention_backward", *inputs, *outputs, cu, cu.numel() - 1, *sizes, *scores)
    return dq, dk, dv


_attention_backward = define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor out, Tensor lse, float scale, "
    "int max_seqlen, int? window, float? softcap) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_backward,
    cuda="attention.attention_backward",
    fake=lambda dout, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)
_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, int max_seqlen, int? window, float? softcap) -> "
    "(Tensor, Tensor)",
    cpu=_cpu,
    cuda="attention.attention",
    fake=lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)),
    check=_check,
    save=_save,
    backward=_backward,
)
_paged_attention = define(
    "paged_attention(Tensor q, Tensor kv_cache, Tensor block_table, Tensor cu_seqlens_q, Tensor kv_lens, float scale, "
    "int max_seqlen_q, int max_seqlen_k, int? window, float? softcap, Tensor? schedule, Tensor(a!) out) -> ()",
    cpu=_paged_cpu,
    cuda="attention.paged_attention",
    fake=lambda *inputs: None,
    check=_paged_check,
)

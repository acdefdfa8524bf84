"""Attention on Hopper: FlashAttention-3 as vLLM ships it, with one split, on both sides; FlashAttention-2's backward.

FlashAttention-3 walks the keys of a query in blocks whose width depends on the head size, so packed and paged calls give the
same bits as long as nothing makes it take another block: its splits are pinned to 1, and at head size 64, where a short
longest query selects another tile, the longest query is declared to be at least 128 (it only selects; no row is added).

A sliding window is refused: with one, FlashAttention-3 gives a row other bits depending on where its tile of queries begins, so
decode is not prefill. Measured on an H100 with vLLM 0.26, heads of 64, 128 and 256: of the last 1, 3, 16 or 128 queries of a
sequence of 1,500, every one differs from the whole forward with a window of 400, and some with 127 and 17; without a window
none does. How many differ changes with the window, so that no check at the start could vouch for the others.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from rlinvariant import bits
from rlinvariant.errors import UserError

HEAD_SIZES = (64, 128, 256)  # at 96, paged and packed calls take different tiles
FLOOR = {64: 128}  # head size -> least max_seqlen_q
SOFTCAP = False  # whether scores can be bounded here: PyTorch's FlashAttention-2 backward cannot
WINDOW = False  # whether a query can attend to its last keys alone: decode would not have the bits of prefill


@functools.cache
def _fa3():
    """Return vLLM's build of FlashAttention-3 (kernels alone: importing this starts no engine)."""
    try:
        import vllm.vllm_flash_attn.flash_attn_interface as interface
    except ImportError as error:
        raise UserError(f"FlashAttention-3 not found ({error}): install vllm, whose wheel holds it") from error
    if not interface.is_fa_version_supported(3):
        raise UserError(f"FlashAttention-3 does not run here: {interface.fa_version_unsupported_reason(3)}")
    return interface


def longest_query(max_seqlen_q: int, head_size: int) -> int:
    """Return what to tell FlashAttention-3 about the longest query, so that its tile does not depend on it."""
    return max(max_seqlen_q, FLOOR.get(head_size, 1))


def _refuse(window: int | None, softcap: float | None) -> None:
    if window is not None and not WINDOW:
        raise UserError(f"window={window}: decode with a window does not have the bits of prefill on a GPU; use invariance=off")
    if softcap is not None and not SOFTCAP:
        raise UserError(f"softcap={softcap}: attention scores cannot be bounded on a GPU (no backward); use invariance=off")


def schedule(
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    page_size: int,
) -> Tensor:
    """Return FlashAttention-3's plan of work for a batch, [*] int32: it is made once per step instead of once per layer."""
    return _fa3().get_scheduler_metadata(
        batch_size=len(kv_lens),
        max_seqlen_q=longest_query(max_seqlen_q, head_size),
        max_seqlen_k=max_seqlen_k,
        num_heads_q=heads,
        num_heads_kv=kv_heads,
        headdim=head_size,
        cache_seqlens=kv_lens,
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=cu_seqlens_q,
        page_size=page_size,
        causal=True,
        num_splits=1,
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    max_seqlen: int,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend as `ops.attention` does, for q [T, H, D], k and v [T, H_kv, D]; return out like q, and log-sum-exp [T, H] fp32."""
    _refuse(window, softcap)
    if not len(q):
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    check(q.shape[1], k.shape[1], q.shape[2], q.device.index)
    cu = cu_seqlens.to(torch.int32).contiguous()
    out, lse = _packed(q, k, v, cu, max_seqlen, scale)
    return out, lse.t().contiguous()


def _packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    return _fa3().flash_attn_varlen_func(
        q,
        k,
        v,
        longest_query(longest, q.shape[2]),
        cu,
        longest,
        cu_seqlens_k=cu,
        softmax_scale=scale,
        causal=True,
        num_splits=1,
        fa_version=3,
        return_softmax_lse=True,
    )


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    scale: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window: int | None,
    softcap: float | None,
    plan: Tensor | None,
    out: Tensor,
) -> None:
    """Attend as `ops.paged_attention` does, from q [T, H, D] to kv_cache [pages, H_kv, page, 2 D], into `out` like q."""
    _refuse(window, softcap)
    if not len(q):
        return
    check(q.shape[1], kv_cache.shape[1], q.shape[2], q.device.index, kv_cache.shape[2])
    _paged(q, kv_cache, block_table, cu_seqlens_q, kv_lens, scale, max_seqlen_q, max_seqlen_k, plan, out)


def _paged(q, kv_cache, block_table, cu_seqlens_q, kv_lens, scale, max_seqlen_q, max_seqlen_k, plan, out) -> None:
    keys, values = kv_cache.transpose(1, 2).split(q.shape[2], -1)
    _fa3().flash_attn_varlen_func(
        q,
        keys,
        values,
        longest_query(max_seqlen_q, q.shape[2]),
        cu_seqlens_q,
        max_seqlen_k,
        seqused_k=kv_lens,
        softmax_scale=scale,
        causal=True,
        block_table=block_table,
        scheduler_metadata=plan,
        num_splits=1,
        fa_version=3,
        out=out,
    )


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    max_seqlen: int,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run FlashAttention-2's backward in its deterministic form, on FlashAttention-3's output and log-sum-exp.

    dout, q, out: [T, H, D]; k, v: [T, H_kv, D]; lse: [T, H] fp32. Returns dq, dk, dv, each like what it belongs to.
    """
    _refuse(window, softcap)
    if not len(q):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    cu = cu_seqlens.to(torch.int32).contiguous()
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        return torch.ops.aten._flash_attention_backward(
            dout.contiguous(),
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            out,
            lse.t().contiguous(),
            cu,
            cu,
            max_seqlen,
            max_seqlen,
            0.0,
            True,
            state,
            state,
            scale=scale,
        )
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        deterministic.fill_uninitialized_memory = fill


@functools.cache
def check(heads: int, kv_heads: int, head_size: int, device: int, page: int = 16) -> None:
    """Compare packed, decode, chunked and shared calls for these heads before they are first used; milliseconds.

    Raises:
        UserError: the head size is not supported, or the calls differ.
    """
    if head_size not in HEAD_SIZES:
        raise UserError(f"head_dim={head_size}: expected one of {', '.join(map(str, HEAD_SIZES))} on a GPU; use invariance=off")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"attention: heads of {head_size} were first met inside a CUDA graph; call it once before")
    lengths = (300, 1, 17, 1500, 129)
    total, most = sum(lengths), max(lengths)
    with torch.random.fork_rng(devices=[device]), torch.device(f"cuda:{device}"):
        torch.manual_seed(heads * 100_003 + head_size)
        q, k, v = (torch.randn(total, h, head_size).bfloat16() for h in (heads, kv_heads, kv_heads))
        cu = torch.tensor([0, *torch.tensor(lengths, device="cpu").cumsum(0).tolist()], dtype=torch.int32)
        pages = [-(-n // page) for n in lengths]
        table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
        cache = torch.zeros(sum(pages) + 1, page, kv_heads, 2 * head_size, dtype=torch.bfloat16)
        free = torch.randperm(sum(pages)) + 1
    scale, at = head_size**-0.5, 0
    for b, (n, count) in enumerate(zip(lengths, pages, strict=True)):
        table[b, :count] = free[at : at + count]
        rows = torch.cat([k[cu[b] : cu[b + 1]], v[cu[b] : cu[b + 1]]], -1)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, count * page - n))
        cache[free[at : at + count]] = padded.view(count, page, kv_heads, 2 * head_size)
        at += count
    cache = cache.transpose(1, 2)
    expected, _ = _packed(q, k, v, cu, most, scale)
    alone, _ = _packed(q[:300], k[:300], v[:300], cu[:2], 300, scale)
    _require_equal(alone, expected[:300], "the rows of a sequence alone", heads, kv_heads, head_size)
    for last in (1, 3, 16, 128, most):  # so many of the last queries of every sequence
        counts = [min(last, n) for n in lengths]
        index = torch.cat([torch.arange(int(e) - c, int(e)) for e, c in zip(cu[1:].tolist(), counts, strict=True)]).to(q.device)
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=q.device)
        lens = cu.diff()
        plan = schedule(starts, lens, max(counts), most, heads, kv_heads, head_size, page)
        for p in (None, plan):
            out = torch.full_like(q[index], float("nan"))
            _paged(q[index], cache, table, starts, lens, scale, max(counts), most, p, out)
            _require_equal(out, expected[index], f"the last {last} queries of a sequence", heads, kv_heads, head_size)


def _require_equal(found: Tensor, expected: Tensor, what: str, heads: int, kv_heads: int, head_size: int) -> None:
    if not bits.same(found, expected):
        raise UserError(
            f"attention: with {heads} heads of {head_size} ({kv_heads} for keys) on "
            f"{torch.cuda.get_device_name(found.device)}, {what} do not have the bits that they have in a whole forward; exact "
            "mode is not possible here; use invariance=off"
        )

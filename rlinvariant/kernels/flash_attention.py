"""FlashAttention-3 as vLLM ships it, with one split, for packed and paged calls; FlashAttention-2's backward, as in PyTorch.

FlashAttention-3 walks the keys of a query in blocks whose width depends on the head size, so packed and paged calls give the
same bits as long as nothing makes it take another block: its splits are pinned to 1, and at head size 64, where a short
longest query selects another tile, the longest query is declared to be at least 128 (it only selects; no row is added).

With a sliding window it gives a row other bits depending on where its tile of queries begins, so decode is not prefill. On an
H100 with vLLM 0.26, heads of 64, 128 and 256: of the last 1, 3, 16 or 128 queries of a sequence of 1,500, every one differs
from the whole forward with a window of 400, and some with 127 and 17; without a window none does. How many differ changes with
the window, so that no check at the start could vouch for the others.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from rlinvariant.errors import UserError

HEAD_SIZES = (64, 128, 256)  # at 96, paged and packed calls take different tiles
FLOOR = {64: 128}  # head size -> least max_seqlen_q


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


def schedule_size(sequences: int) -> int:
    """Return how many numbers a plan has at most: 4 a sequence, rounded up, and a counter."""
    return 1 + (sequences + 3) // 4 * 16


def packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attend inside sequences laid end to end: q [T, H, D], k and v [T, H_kv, D]; return out, log-sum-exp [T, H] fp32."""
    out, lse = _fa3().flash_attn_varlen_func(
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
    return out, lse.t().contiguous()


def paged(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    scale: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    plan: Tensor | None,
    out: Tensor,
) -> None:
    """Attend from q [T, H, D] to kv_cache [pages, H_kv, page, 2 D], into `out` like q; `plan` is `schedule`'s or None."""
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


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    longest: int,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run FlashAttention-2's backward in its deterministic form, on the output and log-sum-exp of any forward.

    dout, q, out: [T, H, D]; k, v: [T, H_kv, D]; lse: [T, H] fp32. Returns dq, dk, dv, each like what it belongs to.
    """
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
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
            longest,
            longest,
            0.0,
            True,
            state,
            state,
            scale=scale,
            **sides,
        )
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        deterministic.fill_uninitialized_memory = fill

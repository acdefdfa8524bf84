"""The attentions of a GPU, which of them a layer takes, and the comparison that each has to pass before it is used.

* *FlashAttention-3* with one split (flash_attention.py), on the chips and for the heads that `attention_tiles.json` names; not
  with windows and caps, which it cannot do exactly.
* *The attention of our own* (chunked_attention.py) for everything else: any head up to 256, windows, caps, other GPUs.

A layer's form decides, its head size, window and cap, the chip, and the process's choice (choice.py), which may rule one of
the two out: both sides know these, and no call changes them. The backward follows the cap alone, whichever forward ran.
RLINVARIANT_PORTABLE=sm_80, for developers, does here what another chip would do, and so proves its kernels on this one.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlinvariant import bits
from rlinvariant.errors import UserError
from rlinvariant.kernels import choice
from rlinvariant.kernels import flash_attention as flash
from rlinvariant.kernels.routes import ATTENTION_ROUTES
from rlinvariant.kernels.rows import vectors

TABLE = Path(__file__).with_name("attention_tiles.json")
UNPROVEN = "RLINVARIANT_UNPROVEN_GPU"  # "1": what is unproven on this GPU may be tried
PORTABLE = "RLINVARIANT_PORTABLE"  # a chip, whose kernels are run here
LARGEST_HEAD = 256
FLASH, OWN = "FlashAttention-3, one split", "our own"


@functools.cache
def table() -> dict:
    """Return what attention_tiles.json says: "flash_attention_3", heads by chip, and "chips"."""
    return json.loads(TABLE.read_text())


@functools.cache
def _capability() -> str | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def chip() -> str:
    """Return the name of this GPU in the table; where there is none, that of the GPU for which models are judged."""
    return os.environ.get(PORTABLE) or _capability() or "sm_90"


def unproven_allowed() -> bool:
    """Return whether what is unproven on this GPU may be tried."""
    return os.environ.get(UNPROVEN) == "1" or PORTABLE in os.environ


def flash_heads() -> tuple[int, ...]:
    """Return the head sizes for which FlashAttention-3 is exact on this chip."""
    return () if PORTABLE in os.environ else tuple(table()["flash_attention_3"].get(chip(), ()))


def not_flash(head_size: int, window: int | None, softcap: float | None) -> list[str]:
    """Return what keeps FlashAttention-3 from layers of this form, as a configuration's keys say it; nothing if it is exact."""
    if not flash_heads():
        return [f"device={chip()}"]
    found = [f"head_dim={head_size}"] if head_size not in flash_heads() else []
    found += [f"sliding_window={window}"] if window is not None else []
    return found + ([f"attn_logit_softcapping={softcap}"] if softcap is not None else [])


def own(head_size: int, window: int | None, softcap: float | None) -> bool:
    """Return whether layers of this form take the attention of our own.

    Raises:
        UserError: attention=flash, and FlashAttention-3 cannot take them.
    """
    reasons, chosen = not_flash(head_size, window, softcap), choice.chosen()
    if chosen == "flash" and reasons:
        raise UserError(without_flash(reasons[0]))
    return chosen == "chunked" or bool(reasons)


def without_flash(reason: str) -> str:
    """Say why a model cannot have attention=flash, and what works."""
    return f"{reason}: attention=flash cannot take it, FlashAttention-3 is not exact there; write attention=auto or chunked"


def refusals(head_size: int) -> Iterator[str]:
    """Yield why layers with such heads do not run on a GPU, as the configuration's key says it."""
    if head_size > LARGEST_HEAD or head_size % 8:
        yield f"head_dim={head_size}: expected a multiple of 8, at most {LARGEST_HEAD}, on a GPU"


@dataclass(frozen=True)
class _Calls:
    """Holds the calls of one attention for one form: packed, paged, and the plan of a step; others with the bits of packed."""

    packed: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    paged: Callable[..., None]
    schedule: Callable[..., Tensor]
    others: dict[str, Callable[..., tuple[Tensor, Tensor]]]
    name: str


@functools.cache
def _calls(head_size: int, scale: float, window: int | None, softcap: float | None) -> _Calls:
    if not own(head_size, window, softcap):

        def fa3_paged(q, cache, table, cu, lens, most_q, most_k, plan, out) -> None:
            flash.paged(q, cache, table, cu, lens, scale, most_q, most_k, plan, out)

        def fa3_packed(q, k, v, cu, longest) -> tuple[Tensor, Tensor]:
            return flash.packed(q, k, v, cu, longest, scale)

        return _Calls(fa3_packed, fa3_paged, flash.schedule, {}, FLASH)
    from rlinvariant.kernels import chunked_calls as ours

    form, row = ours.Form(scale, window, softcap), ours.row(head_size)

    def paged(q, cache, table, cu, lens, most_q, most_k, plan, out) -> None:
        ours.paged(q, cache, table, cu, lens, most_q, most_k, form, out, made=plan)

    def packed(q, k, v, cu, longest, tile=None) -> tuple[Tensor, Tensor]:
        return ours.packed(q, k, v, cu, longest, form, tile=tile)

    def schedule(cu, lens, most_q, most_k, heads, kv_heads, head_size, page) -> Tensor:
        return ours.plan(cu, lens, heads // kv_heads, row["order"], window)

    others = {f"with {tile}, the rows": functools.partial(packed, tile=tile) for tile in ours.tiles(row)}
    name = f"{OWN}, {row['order'].block} keys a block, {row['order'].chunk} a chunk"
    return _Calls(packed, paged, schedule, others, name)


def schedule(
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    page_size: int,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the plan of work for a batch, [*] int32: it is made once per step instead of once per layer of one form."""
    lengths = cu_seqlens_q, kv_lens, max_seqlen_q, max_seqlen_k
    return _calls(head_size, 1.0, window, softcap).schedule(*lengths, heads, kv_heads, head_size, page_size)


def schedule_size(sequences: int, head_size: int, window: int | None = None, softcap: float | None = None) -> int:
    """Return how many numbers the plan of so many sequences has at most."""
    if not own(head_size, window, softcap):
        return flash.schedule_size(sequences)
    from rlinvariant.kernels.chunked_calls import plan_size

    return plan_size(sequences)


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
    _refuse(q.shape[2])
    if not len(q):
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    check(q.shape[1], k.shape[1], q.shape[2], q.device.index, window=window, softcap=softcap)
    cu = cu_seqlens.to(torch.int32).contiguous()
    return _calls(q.shape[2], scale, window, softcap).packed(vectors(q), vectors(k), vectors(v), cu, max_seqlen)


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
    """Attend as `ops.paged_attention` does, from q [T, H, D] to kv_cache [pages, H_kv, page, 2 D], into `out` like q.

    Raises:
        ValueError: the cache, which nobody would copy, has vectors that do not begin at multiples of 16 bytes.
    """
    _refuse(q.shape[2])
    if not len(q):
        return
    if (kv_cache.data_ptr() | kv_cache.element_size() * math.gcd(*kv_cache.stride()[:-1], q.shape[2])) % 16:
        raise ValueError("paged_attention: the cache's vectors of keys and values begin off multiples of 16 bytes")
    check(q.shape[1], kv_cache.shape[1], q.shape[2], q.device.index, kv_cache.shape[2], window, softcap)
    calls = _calls(q.shape[2], scale, window, softcap)
    result = vectors(out)  # a copy's numbers are written over
    numbers = block_table.contiguous(), cu_seqlens_q.contiguous(), kv_lens.contiguous()
    calls.paged(vectors(q), kv_cache, *numbers, max_seqlen_q, max_seqlen_k, plan, result)
    if result is not out:
        out.copy_(result)


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
    """Return dq, dk, dv, each like what it belongs to: by FlashAttention-2, and by our own where scores are capped.

    Both take the output and log-sum-exp of any forward, so that the choice of the forward changes nothing here.

    dout, q, out: [T, H, D]; k, v: [T, H_kv, D]; lse: [T, H] fp32.
    """
    _refuse(q.shape[2])
    if not len(q):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    cu = cu_seqlens.to(torch.int32).contiguous()
    dout, q, k, v = vectors(dout), vectors(q), vectors(k), vectors(v)
    if softcap is None:
        return flash.backward(dout, q, k, v, cu, out, lse, scale, max_seqlen, window)
    from rlinvariant.kernels.chunked_backward import backward
    from rlinvariant.kernels.chunked_calls import Form

    return backward(dout, q, k, v, cu, out, lse, max_seqlen, Form(scale, window, softcap))


@functools.cache
def _refuse(head_size: int) -> None:
    for reason in refusals(head_size):
        raise UserError(f"{reason}; use invariance=off")


@functools.cache
def check(
    heads: int,
    kv_heads: int,
    head_size: int,
    device: int,
    page: int = 16,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Compare packed, decode, chunked and shared calls for these heads before they are first used.

    It takes milliseconds, and with our own the seconds in which Triton compiles each tile, once a machine.

    Raises:
        UserError: the head size is not supported, or the calls differ.
    """
    _refuse(head_size)
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
    at, calls = 0, _calls(head_size, head_size**-0.5, window, softcap)
    for b, (n, count) in enumerate(zip(lengths, pages, strict=True)):
        table[b, :count] = free[at : at + count]
        rows = torch.cat([k[cu[b] : cu[b + 1]], v[cu[b] : cu[b + 1]]], -1)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, count * page - n))
        cache[free[at : at + count]] = padded.view(count, page, kv_heads, 2 * head_size)
        at += count
    cache, shape = cache.transpose(1, 2), (heads, kv_heads, head_size)
    expected, _ = calls.packed(q, k, v, cu, most)
    alone, _ = calls.packed(q[:300], k[:300], v[:300], cu[:2], 300)
    _require_equal(alone, expected[:300], "the rows of a sequence alone", *shape)
    for what, other in calls.others.items():
        _require_equal(other(q, k, v, cu, most)[0], expected, what, *shape)
    for last in (1, 3, 16, 128, most):  # so many of the last queries of every sequence
        counts = [min(last, n) for n in lengths]
        index = torch.cat([torch.arange(int(e) - c, int(e)) for e, c in zip(cu[1:].tolist(), counts, strict=True)]).to(q.device)
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=q.device)
        lens = cu.diff()
        plan = calls.schedule(starts, lens, max(counts), most, *shape, page)
        for p in (None, plan):
            out = torch.full_like(q[index], float("nan"))
            calls.paged(q[index], cache, table, starts, lens, max(counts), most, p, out)
            _require_equal(out, expected[index], f"the last {last} queries of a sequence", *shape)
    more = [f"window {window}"] * bool(window) + [f"cap {softcap}"] * bool(softcap)
    ATTENTION_ROUTES[", ".join([f"{heads}/{kv_heads} heads of {head_size}", *more])] = calls.name


def _require_equal(found: Tensor, expected: Tensor, what: str, heads: int, kv_heads: int, head_size: int) -> None:
    if not bits.same(found, expected):
        raise UserError(
            f"attention: with {heads} heads of {head_size} ({kv_heads} for keys) on "
            f"{torch.cuda.get_device_name(found.device)}, {what} do not have the bits that they have in a whole forward; exact "
            "mode is not possible here; use invariance=off"
        )

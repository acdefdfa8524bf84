"""Attention against FlashAttention-3 as vLLM runs it: over the paged cache, planned once a step, free to split the keys.

Both attentions of exact mode are measured: FlashAttention-3 with one split, as attention=auto gives it to these heads, and our
own, as attention=chunked does. The packed call of the trainer, forward and backward, stands beside PyTorch's, which Hugging
Face models take.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant import bits, ops
from rlinvariant.bench import gpu
from rlinvariant.bench.cases import Case, gpu_row
from rlinvariant.bench.measure import Row
from rlinvariant.kernels import choice

PAGE_TOKENS = 16  # vLLM's default
HEAD_SHAPES = ((16, 8, 128), (32, 8, 64))  # Qwen3-1.7B, Llama-3.2-1B
GRAPH_SPLITS = 32  # what vLLM allows inside its CUDA graphs
REFERENCE_SCORES = 2**24  # queries x keys of a sequence: what the reference can hold


@dataclass(frozen=True)
class Work:
    """Describes a step of an engine: how many new queries and keys each sequence has, and to how many keys a query attends."""

    name: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    target: float
    window: int | None = None

    @property
    def own_target(self) -> float:
        """Return the target of our own attention: with a window, where some prefill, one decodes alone, several decode."""
        if self.window is not None:
            return self.target
        return 1.4 if max(self.queries) > 1 else 1.25 if len(self.queries) == 1 else 1.05


WORKLOADS = (
    Work("prefill 8 x 2048", (2048,) * 8, (2048,) * 8, 1.02),
    Work("64 decode at 2048 and 4 prefill 512 after 512", (1,) * 64 + (512,) * 4, (2048,) * 64 + (1024,) * 4, 1.02),
    *(Work(f"decode {b} at 2048", (1,) * b, (2048,) * b, 1.02) for b in (16, 64, 256)),
    *(Work(f"decode {b} at {n}", (1,) * b, (n,) * b, 1.5) for n in (8192, 32768) for b in (1, 8)),
    Work("decode 16 at 8192", (1,) * 16, (8192,) * 16, 1.02),
    Work("decode 16 at 8192 in a window of 1024", (1,) * 16, (8192,) * 16, 1.1, window=1024),
    Work("prefill 4 x 8192", (8192,) * 4, (8192,) * 4, 1.02),
    Work("prefill 1 x 32768", (32768,), (32768,), 1.02),
)
TINY_WORKLOADS = (
    Work("decode 4 at 96", (1,) * 4, (96,) * 4, 1.02),
    Work("decode 4 at 96 in a window of 20", (1,) * 4, (96,) * 4, 1.1, window=20),
    Work("prefill 2 x 40", (40,) * 2, (40,) * 2, 1.02),
)


def rows(tiny: bool) -> Iterator[Row]:
    if choice.chosen() != choice.AUTO:
        raise SystemExit(f"{choice.VARIABLE}={choice.chosen()}: expected unset: both attentions are measured")
    torch.manual_seed(0)
    seconds = 0.02 if tiny else 0.3
    for heads in HEAD_SHAPES:
        for work in TINY_WORKLOADS if tiny else WORKLOADS:
            yield from _paged(work, *heads, seconds)
        for case in _packed(*heads, sequences=2 if tiny else 8, length=40 if tiny else 2048):
            yield gpu_row("attention", case, seconds)


class _Step:
    """Holds what attention reads in one step of an engine: some of the sequences of a piece of work."""

    def __init__(self, work: Work, which: Sequence[int], q: Tensor, cache: Tensor, table: Tensor) -> None:
        queries, keys = ([side[i] for i in which] for side in (work.queries, work.keys))
        starts = [0, *torch.tensor(work.queries).cumsum(0).tolist()]
        self.q = torch.cat([q[starts[i] : starts[i + 1]] for i in which])
        self.cache, self.table = cache, table[list(which)]
        self.cu = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        self.lens = torch.tensor(keys, dtype=torch.int32, device="cuda")
        self.most_q, self.most_k, self.out = max(queries), max(keys), torch.empty_like(self.q)
        self.scale, self.window = q.shape[-1] ** -0.5, work.window

    def reference(self) -> Tensor:
        return ops.paged_attention_ref(self.q, self.cache, self.table, self.cu, self.lens, self.scale, self.window)

    def ours(self) -> Callable[[], Tensor]:
        from rlinvariant.kernels.attention import schedule

        (_, heads, d), kv_heads = self.q.shape, self.cache.shape[1]
        plan = schedule(self.cu, self.lens, self.most_q, self.most_k, heads, kv_heads, d, PAGE_TOKENS)
        return partial(
            ops.paged_attention,
            self.q,
            self.cache,
            self.table,
            self.cu,
            self.lens,
            self.scale,
            max_seqlen_q=self.most_q,
            max_seqlen_k=self.most_k,
            schedule=plan,
            out=self.out,
        )

    def own(self) -> Callable[[], Tensor]:
        from rlinvariant.kernels import chunked_calls as calls

        (_, heads, d), kv_heads = self.q.shape, self.cache.shape[1]
        form, order = calls.Form(self.scale, self.window), calls.row(d)["order"]
        plan = calls.plan(self.cu, self.lens, heads // kv_heads, order, self.window)
        lengths = self.cu, self.lens, self.most_q, self.most_k

        def run() -> Tensor:
            calls.paged(self.q, self.cache, self.table, *lengths, form, self.out, made=plan)
            return self.out

        return run

    def stock(self, splits: int) -> Callable[[], Tensor]:
        fa3: Any = _fa3()
        (_, heads, d), kv_heads = self.q.shape, self.cache.shape[1]
        window = (-1, -1) if self.window is None else (self.window - 1, 0)
        plan = fa3.get_scheduler_metadata(
            batch_size=len(self.lens),
            max_seqlen_q=self.most_q,
            max_seqlen_k=self.most_k,
            num_heads_q=heads,
            num_heads_kv=kv_heads,
            headdim=d,
            cache_seqlens=self.lens,
            qkv_dtype=self.q.dtype,
            cu_seqlens_q=self.cu,
            page_size=PAGE_TOKENS,
            causal=True,
            window_size=window,
            num_splits=splits,
        )
        keys, values = self.cache.transpose(1, 2).split(d, -1)
        return partial(
            fa3.flash_attn_varlen_func,
            self.q,
            keys,
            values,
            self.most_q,
            self.cu,
            self.most_k,
            seqused_k=self.lens,
            softmax_scale=self.scale,
            causal=True,
            window_size=[*window],
            block_table=self.table,
            scheduler_metadata=plan,
            num_splits=splits,
            fa_version=3,
            out=self.out,
        )


def _fa3() -> Any:
    import vllm.vllm_flash_attn.flash_attn_interface as interface

    return interface


def _paged(work: Work, heads: int, kv_heads: int, d: int, seconds: float) -> Iterator[Row]:
    pages = [-(-n // PAGE_TOKENS) for n in work.keys]
    size = sum(pages) * PAGE_TOKENS * kv_heads * 2 * d * 2
    everyone = range(len(work.keys))
    steps = []
    for _ in range(min(gpu.GRAPH_LAUNCHES, gpu.copies(size))):
        q = torch.randn(sum(work.queries), heads, d, device="cuda", dtype=torch.bfloat16)
        cache = torch.randn(sum(pages), PAGE_TOKENS, kv_heads, 2 * d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        table = torch.zeros(len(pages), max(pages), device="cuda", dtype=torch.int32)
        order, at = torch.randperm(sum(pages), device="cuda").int(), 0
        for i, count in enumerate(pages):
            table[i, :count] = order[at : at + count]
            at += count
        steps.append((_Step(work, everyone, q, cache, table), q, cache, table))
    step, *inputs = steps[0]
    parts = [_Step(work, [i], *inputs) for i in sorted({0, len(pages) // 2, len(pages) - 1})]
    cu = step.cu.tolist()
    spans = [slice(cu[i], cu[i + 1]) for i in sorted({0, len(pages) // 2, len(pages) - 1})]
    kinds = {"FlashAttention-3": 0}
    if max(work.queries) == 1:
        kinds[f"the same with up to {GRAPH_SPLITS} splits, as in vLLM's CUDA graphs"] = GRAPH_SPLITS
    targets = {_Step.ours: work.target} if work.window is None else {}  # FlashAttention-3 is exact without alone
    targets |= {_Step.own: work.own_target}
    for ours, (stock, splits) in product(targets, kinds.items()):
        got, theirs = ours(step)().clone(), step.stock(splits)().clone()
        torch.testing.assert_close(got.float(), theirs.float(), rtol=0.05, atol=0.05)
        if max(work.queries) * max(work.keys) <= REFERENCE_SCORES:
            torch.testing.assert_close(got[spans[0]].float(), parts[0].reference().float(), rtol=0.05, atol=0.05)
        equal: dict[str, bool | None] = {
            "ours": _alone(got, [ours(p) for p in parts], spans),
            "stock": _alone(theirs, [p.stock(splits) for p in parts], spans),
        }
        numbers = gpu.pair([ours(s) for s, *_ in steps], [s.stock(splits) for s, *_ in steps], seconds)
        case = f"{'our own: ' * (ours is _Step.own)}{work.name}, {heads}/{kv_heads} heads of {d}; stock: {stock}"
        target = targets[ours] if splits == 0 else None
        yield Row(bench="attention", case=case, target=target, bits_equal=equal, **numbers)


def _alone(together: Tensor, calls: list[Callable[[], Tensor]], spans: list[slice]) -> bool:
    """Return whether sequences come out the same one at a time."""
    return all(bits.same(call(), together[span]) for call, span in zip(calls, spans, strict=True))


def _packed(heads: int, kv_heads: int, d: int, sequences: int, length: int) -> Iterator[Case]:
    """Return the trainer's calls, on sequences of one length, where PyTorch's own attention has nothing to mask."""
    q, k, v = (torch.randn(sequences * length, n, d, device="cuda", dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads))
    every = torch.arange(0, sequences * length + 1, length, dtype=torch.int32, device="cuda")

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, every[: len(q) // length + 1], d**-0.5, length)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention_ref(q, k, v, every[: len(q) // length + 1], d**-0.5)

    def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=d**-0.5, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    for both in (False, True):
        what = "forward + backward" if both else "forward"
        name = f"packed {sequences} x {length}, {heads}/{kv_heads} heads of {d}, {what}; stock: PyTorch's"
        yield Case(name, ours, reference, stock, (q, k, v), 3, length, gradients=(0, 1, 2) if both else ())

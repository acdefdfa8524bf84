"""Negative controls: what must be seen if the comparison can see at all, and what stock kernels do on this model and machine.

A control in which no token differs is *blind*. A planted fault that is blind takes the certificate's ground away; a blind stock
control says that drift does not show at these sizes here, and nothing else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant import ops
from rlinvariant.sampler.drive import drive
from rlinvariant.trainer.score import stock_score
from rlinvariant.verification.relations import Pair, Relation


def one_ulp(pair: Pair, dtype: torch.dtype) -> Relation:
    """One unit in the last place, of `dtype`, added to every weight of one row of the trainer's lm_head: of a drawn token.

    Compared with what the same model gave without it, so that nothing else can be seen.
    """
    relation = Relation("planted: one ulp in one row of the lm_head")
    head, row = pair.model.get_output_embeddings().weight, pair.batch.completions[0].token_ids[0]
    before = head.detach()[row].clone()
    try:
        with torch.no_grad():
            head[row] = _next(before.to(dtype)).to(head.dtype)
        _scored_again(pair, relation)
    finally:
        with torch.no_grad():
            head[row] = before
    return relation


def _next(x: Tensor) -> Tensor:
    """The neighbour of each number that is one larger in magnitude."""
    words = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
    return x.view(words).add(1).view(x.dtype)


def _scored_again(pair: Pair, relation: Relation) -> None:
    relation.add(pair.batch.scored, pair.score(pair.batch.requests, pair.batch.completions, pair.packed()))


def stale_weights(pair: Pair) -> Relation:
    """The trainer of after `weight_sync`, which moves some of the bf16 weights by an ulp, on what was drawn before it."""
    relation = Relation("planted: the sampler's weights one sync old")
    _scored_again(pair, relation)
    return relation


def stock_attention(pair: Pair) -> Relation:
    """torch's scaled_dot_product_attention in the trainer, in place of ours."""
    relation = Relation("stock: torch's attention in the trainer")
    with _in_place_of("attention", _sdpa):
        _scored_again(pair, relation)
    return relation


def stock_trainer(pair: Pair, model: Any) -> Relation:
    """transformers as it is, on what our sampler drew. `model` has the weights that `pair.batch` was drawn with."""
    return _scored_by_stock(pair, model, Relation("stock: transformers' model, our sampler"), lambda: pair.batch.completions)


def stock_both(pair: Pair, model: Any, engine: Any) -> Relation:
    """invariance=off: vLLM and transformers as they are."""
    relation = Relation("stock: vLLM, transformers (invariance=off)")
    known = model if hasattr(engine, "llm") else engine  # a reason
    return _scored_by_stock(pair, known, relation, lambda: drive(engine, pair.batch.requests).completions)


def _scored_by_stock(pair: Pair, model: Any, relation: Relation, draw: Callable[[], Any]) -> Relation:
    """A `model` that is a str says why there is none."""
    if isinstance(model, str):
        relation.how, relation.shown = model, False
        return relation
    for request, completion in zip(pair.batch.requests, draw(), strict=True):
        scored = stock_score(model, [request.prompt], [completion], request.temperature)
        relation.add([completion.sampler_logprobs], [x.numpy() for x in scored])
    return relation


@contextmanager
def _in_place_of(op: str, other: Callable) -> Iterator[None]:
    ours = getattr(ops, op)
    setattr(ops, op, other)
    try:
        yield
    finally:
        setattr(ops, op, ours)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, max_seqlen: Any = None, window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """`ops.attention` as torch has it, one sequence at a time; a soft cap, which torch has not, is written out."""
    parts = []
    for q1, k1, v1 in zip(*(x.split(cu_seqlens.diff().tolist()) for x in (q, k, v)), strict=True):
        at = torch.arange(len(q1), device=q.device)
        seen = (at[:, None] >= at) & (at[:, None] - at < (window or len(q1) + 1))
        q1, k1, v1 = (x.transpose(0, 1)[None] for x in (q1, k1, v1))
        if softcap is None:
            out = F.scaled_dot_product_attention(q1, k1, v1, attn_mask=seen, scale=scale, enable_gqa=True)
        else:
            k1, v1 = (x.repeat_interleave(q1.shape[1] // x.shape[1], 1) for x in (k1, v1))
            capped = softcap * torch.tanh((q1 @ k1.transpose(-1, -2)).float() * scale / softcap)
            out = capped.masked_fill(~seen, float("-inf")).softmax(-1).to(q.dtype) @ v1
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)

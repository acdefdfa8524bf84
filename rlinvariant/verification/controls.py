"""Negative controls: planted faults that the comparison must see, and what stock kernels do on this model and machine.

A control in which no token differs is *blind*. A blind planted fault voids the certificate. A blind stock control says only
that drift does not show at these sizes on this machine.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import words
from rlinvariant.models import lora, shards
from rlinvariant.sampler.drive import drive
from rlinvariant.trainer.score import stock_score
from rlinvariant.verification.pair import Pair
from rlinvariant.verification.relation import Relation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlinvariant.sampler.engine import Sampler


def one_ulp(pair: Pair, dtype: torch.dtype) -> Relation:
    """Add one unit in the last place of `dtype` to the trainer's lm_head, in every weight of the row of one drawn token.

    The log-probs are compared with the same model's from before, so that nothing but the fault can be seen.
    """
    relation = Relation("planted: one ulp in one row of the lm_head")
    number = pair.batch.completions[0].token_ids[0]
    row = shards.row(pair.model.get_output_embeddings().weight, number)  # of no length where another process has it
    before = row.clone()
    try:
        row.copy_(_one_ulp_larger(before.to(dtype)))
        _scored_again(pair, relation)
    finally:
        row.copy_(before)
    return relation


def _one_ulp_larger(x: Tensor) -> Tensor:
    """Return, for each number, the representable number next to it that is larger in magnitude."""
    return words(x).add(1).view(x.dtype)


def _scored_again(pair: Pair, relation: Relation) -> None:
    """Score the batch again with the trainer's model as it is now, and compare with the log-probs from before."""
    relation.add(pair.batch.scored, pair.score(pair.batch.requests, pair.batch.completions, pair.packed()))


def stale_weights(pair: Pair) -> Relation:
    """Score what was drawn before `relations.weight_sync` with the weights from after it: some differ by one bf16 ulp."""
    moved = "adapters" if lora.ranks(pair.model) else "weights"
    relation = Relation(f"planted: the sampler's {moved} one sync old")
    _scored_again(pair, relation)
    return relation


def stock_attention(pair: Pair) -> Relation:
    """Put torch's scaled_dot_product_attention in the place of `ops.attention` in the trainer."""
    relation = Relation("stock: torch's attention in the trainer")
    with _in_place_of("attention", _torch_attention):
        _scored_again(pair, relation)
    return relation


def stock_trainer(pair: Pair, model: "PreTrainedModel") -> Relation:
    """Score what our sampler drew with transformers' own `model`, or say why there is none (a str).

    The model has the weights that `pair.batch` was drawn with.
    """
    return _scored_by_stock(pair, model, Relation("stock: transformers' model, our sampler"), lambda: pair.batch.completions)


def stock_both(pair: Pair, model: "PreTrainedModel", engine: "Sampler") -> Relation:
    """Draw with vLLM's own `engine` and score with transformers' own `model`; each may be a str that says why there is none."""
    relation = Relation("stock: vLLM, transformers (invariance=off)")

    def draw() -> Any:
        return drive(engine, pair.batch.requests).completions

    return _scored_by_stock(pair, engine if isinstance(engine, str) else model, relation, draw)


def cut_by_rows(pair: Pair, engine: "Sampler") -> Relation:
    """Draw with our ops in an engine whose o_proj and down_proj are cut as vLLM cuts them, and score what it drew.

    The engine has no adapters, and the trainer's are off for a while.
    """
    relation, requests = Relation("planted: sums added over processes"), pair.batch.requests
    drawn = [c for c in drive(engine, requests).completions if c is not None]
    with pair.model.disable_adapter() if lora.ranks(pair.model) else nullcontext():
        relation.add([c.sampler_logprobs for c in drawn], pair.score(requests, drawn, pair.packed()))
    return relation


def _scored_by_stock(pair: Pair, model: Any, relation: Relation, draw: Callable[[], Any]) -> Relation:
    """Compare what `draw` gives with the scores of a stock model; a `model` that is a str says why it was not run."""
    if isinstance(model, str):
        relation.how, relation.shown = model, False
        return relation
    for request, completion in zip(pair.batch.requests, draw(), strict=True):
        scored = stock_score(model, [request.prompt], [completion], request.temperature)
        relation.add([completion.sampler_logprobs], [x.numpy() for x in scored])
    return relation


@contextmanager
def _in_place_of(op: str, other: Callable[..., Tensor]) -> Iterator[None]:
    """Put another function in the place of an op of `rlinvariant.ops` for a while."""
    ours = getattr(ops, op)
    setattr(ops, op, other)
    try:
        yield
    finally:
        setattr(ops, op, ours)


def _torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    max_seqlen: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute what `ops.attention` does with torch's own kernel, one sequence at a time; arguments as there.

    torch has no soft cap: with one, attention is written out.
    """
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

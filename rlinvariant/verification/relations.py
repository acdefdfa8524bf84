"""The claims of exactness about log-probs, each tried on a real engine and a real trainer's model, and counted token by token.

Most claims compare with the trainer's packed forward, which has no cache, no chunks and no schedule: in whatever way the engine
came to a token, the trainer must give the token the same 32 bits.
"""

import random

import torch
from torch import Tensor

from rlinvariant.models import lora
from rlinvariant.rollout import request_seed
from rlinvariant.sampler.drive import Request
from rlinvariant.trainer.packing import pack
from rlinvariant.trainer.score import Layout, padded
from rlinvariant.verification.pair import DRAW_TEMPERATURES, Batch, Pair, basic_requests
from rlinvariant.verification.relation import Relation

DRAWN_AT_EDGES = 8  # tokens
RELATIVE_WEIGHT_CHANGE = 2**-7  # a weight moves by half of it at most, either way: some bf16 weights change, by one ulp


def sampler_and_trainer(pair: Pair) -> Relation:
    """Draw one batch, keep it as `pair.batch`, and compare it with the trainer's packed forward."""
    relation, requests = Relation("sampler = trainer, packed"), basic_requests(pair)
    trace = pair.draw(requests)
    scored = pair.against_trainer(relation, requests, trace)
    pair.batch = Batch(requests, [c for c in trace.completions if c is not None], scored)
    return relation


def on_all_processes(pair: Pair) -> Relation:
    """Compare what each process of the engine has drawn, with what this one has."""
    from rlinvariant.sampler.vllm_columns import of_all

    relation = Relation("every process of the sampler = every other")
    for drawn in of_all(pair.batch.completions):
        relation.of(drawn, pair.batch.completions)
    return relation


def alone(pair: Pair) -> Relation:
    """Draw some requests of the batch again, each with no other request in the engine."""
    relation, batch = Relation("alone = in a batch"), pair.batch
    some = range(min(8, len(batch.requests)))
    apart = [pair.draw([batch.requests[i]]).completions[0] for i in some]
    return relation.of(apart, [batch.completions[i] for i in some])


def prefill_and_decode(pair: Pair) -> Relation:
    """Give the engine as prompts what it has decoded token by token."""
    relation, batch = Relation("prefill = decode"), pair.batch
    # vLLM reports log-probs of prompts at temperature 1 only
    ones = [i for i, r in enumerate(batch.requests) if r.temperature == 1.0]
    whole = [
        Request((*batch.requests[i].prompt, *batch.completions[i].token_ids), 0, 1.0, 1, ignore_eos=True, scored=True)
        for i in ones
    ]
    given = pair.draw(whole).prompt_logprobs
    parts = [x[len(batch.requests[i].prompt) - 1 :] for i, x in zip(ones, given, strict=True)]
    relation.add(parts, [batch.completions[i].sampler_logprobs for i in ones])
    return relation


def warm_prefix(pair: Pair) -> Relation:
    """Draw the batch twice, the second time in reversed order on the prefixes that the first left in the cache."""
    relation, batch = Relation("warm prefix = cold"), pair.batch
    pair.draw(batch.requests)
    warm = pair.draw(batch.requests[::-1], cold=False)
    relation.how, relation.shown = f"{warm.cached_tokens:,} prompt tokens from the cache", warm.cached_tokens > 0
    return relation.of(warm.completions[::-1], batch.completions)


def preempted(pair: Pair) -> Relation:
    """Draw the batch again and preempt every request twice: its pages are lost, and what it had drawn is prefilled."""
    relation, batch, n = Relation("preempted = not"), pair.batch, pair.sizes.tokens
    trace = pair.draw(batch.requests, preempt=lambda step: step in (n // 3, 2 * n // 3 + 1))
    relation.how, relation.shown = f"{trace.preemptions} preemptions", trace.preemptions > 0
    return relation.of(trace.completions, batch.completions)


def chunked(pair: Pair) -> Relation:
    """Draw from prompts that do not fit one step of the engine."""
    relation = Relation("chunked prefill = trainer")
    rng, size = random.Random(request_seed(pair.seed, 2, 0, 0)), pair.sizes
    more = 2 * size.in_step // size.longest + 2
    lengths = [size.longest, *(rng.randint(size.longest // 2, size.longest) for _ in range(more))]
    requests = [
        Request(pair.prompt(rng, n), i, DRAW_TEMPERATURES[i % 2], min(8, size.tokens), ignore_eos=True)
        for i, n in enumerate(lengths)
    ]
    trace = pair.draw(requests)
    pair.against_trainer(relation, requests, trace)
    relation.how = f"prompts of up to {max(lengths):,} tokens in steps of {size.in_step:,}: cut {trace.chunks} times"
    relation.shown &= trace.chunks > 0
    return relation


def contexts(pair: Pair) -> Relation:
    """Draw at contexts around powers of two, where pages, blocks and chunks of keys end, and around the model's window.

    Of each, one prompt ends a little before, so that decoding crosses it, one there, and one a token later. The longest is
    drawn again alone, and among 63 others.
    """
    relation, size = Relation("contexts around edges = trainer"), pair.sizes
    rng, most = random.Random(request_seed(pair.seed, 4, 0, 0)), size.context - DRAWN_AT_EDGES - 1
    window = getattr(pair.model.config.get_text_config(), "sliding_window", None)
    edges = sorted({edge for edge in (*(2**i for i in range(4, 16)), window or 0) if 4 <= edge <= most})
    lengths = [edge + beyond for edge in edges for beyond in (-3, 0, 1)]
    requests = [
        Request(pair.prompt(rng, n), i, DRAW_TEMPERATURES[i % 2], DRAWN_AT_EDGES, ignore_eos=True)
        for i, n in enumerate(lengths)
    ]
    trace = pair.draw(requests)
    pair.against_trainer(relation, requests, trace)
    if requests:
        others = [request for salt in range(2, 2 + 63) for request in basic_requests(pair, salt)][:63]
        again = [pair.draw([requests[-1], *crowd]) for crowd in ([], others)]
        relation.of([x for one in again for x in one.completions[:1] if x], [x for x in trace.completions[-1:] if x] * 2)
    relation.how = f"around {', '.join(f'{edge:,}' for edge in edges)}; the longest alone, and among 63"
    relation.shown &= bool(edges)
    return relation


def one_by_one(pair: Pair) -> Relation:
    """Score the batch again, each sequence in a forward of its own."""
    return _layout(pair, "trainer: micro-batch of 1 = packed", Layout(1))


def shuffled(pair: Pair) -> Relation:
    """Score the batch again in micro-batches of five, shuffled, padded on the right, with gradients on."""
    layout = Layout(5, "shuffled", "right", padding=7, grad=True)
    return _layout(pair, "trainer: padded, shuffled, with grad = packed", layout)


def checkpointed(pair: Pair) -> Relation:
    """Compute log-probs and the first layer's gradients, which need every layer's activations, with and without checkpoints."""
    relation = Relation("trainer: gradient checkpointing = none", unit="words")
    model, training = pair.model, pair.model.training
    model.train()
    try:
        plain = _gradients(pair)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            again = _gradients(pair)
        finally:
            model.gradient_checkpointing_disable()
    finally:
        model.train(training)
    for name, x in plain.items():
        relation.count(x, again[name], f"{name}: ")
    relation.shown = len(plain) > 1
    return relation


def _gradients(pair: Pair) -> dict[str, Tensor]:
    """Return the log-probs of a few completions, and the gradients of their sum in the first layer's parameters, by name."""
    chosen = [i for i, r in enumerate(pair.batch.requests) if r.temperature == 1.0][:4]
    prompts, drawn = [pair.batch.requests[i].prompt for i in chosen], [pair.batch.completions[i].token_ids for i in chosen]
    ids, mask, length = padded(prompts, drawn, Layout(4))
    device = next(pair.model.parameters()).device
    packed = pack(ids.to(device), mask.to(device), length)
    layer = lora.without_peft(pair.model).base_model.layers[0]
    first = {name: p for name, p in layer.named_parameters() if p.requires_grad}  # of a model in PEFT, its adapters
    needed = {p: p.requires_grad for p in pair.model.parameters()}
    try:
        for p in needed:  # all gradients of a large model would not fit beside an engine
            p.requires_grad_(False)
        for p in first.values():
            p.requires_grad_(True)
        with torch.enable_grad():
            asked = {"token_ids": packed.token_ids, "predicted_from": packed.predicted_from}
            logprobs, _ = pair.model(**packed.inputs, attention_mask=None, **asked, temperature=1.0)
            found = torch.autograd.grad(logprobs.sum(), list(first.values()))
    finally:
        for p, before in needed.items():
            p.requires_grad_(before)
    return {"log-probs": logprobs.detach(), **dict(zip(first, found, strict=True))}


def _layout(pair: Pair, name: str, layout: Layout) -> Relation:
    """Score the batch again in another layout."""
    relation = Relation(name)
    relation.add(pair.score(pair.batch.requests, pair.batch.completions, layout), pair.batch.scored)
    return relation


def weight_sync(pair: Pair) -> Relation:
    """Move every weight, as an optimizer step does, sync the engine, and draw while old prefixes could still be in the cache.

    Of a model in PEFT, adapters alone move, and are synced. Both sides keep the new weights: later checks run with other
    weights than `pair.batch` was drawn with.
    """
    relation, requests = Relation("weight sync: sampler = trainer"), basic_requests(pair, salt=1)
    pair.draw(requests)
    generator = torch.Generator("cpu").manual_seed(pair.seed)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, pair.model.parameters()):
            noise = torch.rand(p.shape[-1:], generator=generator).to(p.device, p.dtype)
            p.mul_(1 + RELATIVE_WEIGHT_CHANGE * (noise - 0.5))
    pair.sampler.sync(lora.moving(pair.model))
    differing = pair.sampler.differing_weights(lora.pairs(pair.model))
    pair.against_trainer(relation, requests, pair.draw(requests, cold=False))
    relation.how = f"{len(differing)} parameters differ after the sync"
    relation.shown &= not differing
    return relation


BATCH_RELATIONS = (
    sampler_and_trainer,
    alone,
    prefill_and_decode,
    warm_prefix,
    preempted,
    chunked,
    one_by_one,
    shuffled,
    checkpointed,
)
"""The comparisons of one batch. `sampler_and_trainer` must run first: it fills `pair.batch`."""

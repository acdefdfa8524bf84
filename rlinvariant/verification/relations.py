"""What exactness says of log-probs, each said of a real engine and a real trainer's model, and counted token by token.

The reference of most is the trainer's packed forward, which has no cache, no chunk and no schedule: whatever way the engine has
come to a token, the trainer must give it the same 32 bits.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinvariant.bits import compare
from rlinvariant.errors import UserError
from rlinvariant.metrics import first_mismatch, mismatches
from rlinvariant.rollout import Completion, request_seed
from rlinvariant.sampler.drive import Request, Trace, drive
from rlinvariant.sampler.engine import Sampler
from rlinvariant.trainer.packing import pack
from rlinvariant.trainer.score import Layout, padded, score

TEMPERATURES = (1.0, 0.7)  # a division by 0.7 rounds; one by 1.0 does not
CROWD = (44, 64)  # co-resident sequences: where peers' kernels were found to change (vllm #51187)
MOST = 128  # requests in the engine at once
MOVE = 2**-7  # relative, of a weight in a sync, either way at most half of it: some bf16 weights change, by one ulp


@dataclass(frozen=True)
class Sizes:
    """How much is drawn.

    Args:
        requests, prompt, tokens: of the relations that compare one batch with another: how many, their longest prompt, and
            tokens drawn for each.
        longest: prompt of a random composition.
        in_step: most tokens in one step of the engine.
        in_forward: most tokens in one forward of the trainer's model.
    """

    requests: int
    prompt: int
    tokens: int
    longest: int
    in_step: int
    in_forward: int

    @property
    def positions(self) -> int:
        """That the longest request needs."""
        return max(self.longest, self.prompt + self.tokens) + self.tokens + 1

    def within(self, positions: int) -> "Sizes":
        """Of a model with so many positions. UserError where there is no room for a prompt."""
        if positions < 64:
            raise UserError(f"max_position_embeddings={positions}: expected at least 64, for prompts that are cut and cached")
        tokens = min(self.tokens, positions // 8)
        longest = min(self.longest, positions - tokens - 1)
        return Sizes(self.requests, min(self.prompt, longest - tokens - 1), tokens, longest, self.in_step, self.in_forward)


SHORT = Sizes(requests=12, prompt=70, tokens=12, longest=160, in_step=256, in_forward=4096)
FULL = Sizes(requests=32, prompt=200, tokens=32, longest=4096, in_step=512, in_forward=8192)


@dataclass
class Relation:
    """One line of the table: numbers compared, those that are not the same bits, and the first of these.

    `shown` is False where the engine did not do what the name says, which proves nothing.
    """

    name: str
    compared: int = 0
    mismatched: int = 0
    how: str = ""
    shown: bool = True
    first: str | None = None
    lost: str = ""
    unit: str = "tokens"

    @property
    def holds(self) -> bool:
        return self.shown and self.compared > 0 and self.mismatched == 0

    def add(self, a: Sequence[Any], b: Sequence[Any], what: str = "") -> None:
        """Compare lists of fp32 log-probs, sequence by sequence. Those of unequal length differ in all that is missing."""
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            x, y = (np.asarray(v, np.float32) for v in (x, y))
            n = min(len(x), len(y))
            self.compared += max(len(x), len(y))
            wrong = int(mismatches(x[:n], y[:n]).sum()) + max(len(x), len(y)) - n
            if wrong and self.first is None:
                where = f"{len(x)} log-probs against {len(y)}"
                if (at := first_mismatch(x[None, :n], y[None, :n], np.ones((1, n)))) is not None:
                    a_word, b_word = f"{at.sampler_logprob:.9g} {at.sampler_hex}", f"{at.trainer_logprob:.9g} {at.trainer_hex}"
                    where = f"position {at.position}: {a_word} != {b_word}"
                self.first = f"{what}sequence {i}, {where}"
            self.mismatched += wrong

    def count(self, a: Tensor, b: Tensor, what: str) -> None:
        """Compare the words of two outputs of an op. A NaN equals itself here: a neighbour of NaN must not become one."""
        self.compared += a.numel()
        if (difference := compare(a, b)) is not None:
            self.mismatched += difference.count
            self.first = self.first or f"{what}{difference}"

    def of(self, again: Sequence[Completion | None], first: Sequence[Completion]) -> "Relation":
        """Compare what was drawn again with what was drawn first: from where their tokens part, nothing is equal."""
        kept = []
        for a, b in zip(again, first, strict=True):
            ids = a.token_ids if a is not None else []
            parted = next((i for i, (x, y) in enumerate(zip(ids, b.token_ids, strict=False)) if x != y), len(ids))
            kept.append(a.sampler_logprobs[:parted] if a is not None else [])
        self.add(kept, [b.sampler_logprobs for b in first])
        return self


@dataclass
class Pair:
    """A trainer's model and an engine that hold the same weights, and what has been drawn from them."""

    model: Any
    sampler: Sampler
    sizes: Sizes
    seed: int
    vocabulary: int
    advance: Callable[[int], None] = lambda tokens: None
    tokens: int = 0  # compared, sampler against trainer
    mismatched: int = 0  # of them
    scored: int = 0  # by the trainer's model, prompts with them
    seconds: float = 0.0  # which took so long
    batch: "Batch" = field(init=False)  # of `sampler_and_trainer`

    def prompt(self, rng: random.Random, length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(self.vocabulary) for _ in range(length))

    def draw(self, requests: Sequence[Request], **how: Any) -> Trace:
        return drive(self.sampler, requests, **how)

    def score(self, requests: Sequence[Request], completions: Sequence[Completion], layout: Layout) -> list[np.ndarray]:
        """The trainer's log-probs, temperature by temperature, in the order of the requests."""
        found: dict[int, np.ndarray] = {}
        for t in dict.fromkeys(r.temperature for r in requests):
            rows = [i for i, r in enumerate(requests) if r.temperature == t]
            prompts, began = [requests[i].prompt for i in rows], time.perf_counter()
            scored = score(self.model, prompts, [completions[i] for i in rows], t, layout)
            self.seconds += time.perf_counter() - began
            self.scored += sum(len(p) + len(completions[i].token_ids) for i, p in zip(rows, prompts, strict=True))
            found |= {i: x.numpy() for i, x in zip(rows, scored, strict=True)}
        return [found[i] for i in range(len(requests))]

    def packed(self, micro_batch: int = 64, **layout: Any) -> Layout:
        return Layout(micro_batch, tokens=self.sizes.in_forward, **layout)

    def against_trainer(self, relation: Relation, requests: Sequence[Request], trace: Trace) -> list[np.ndarray]:
        """Add every completion that came to its end to the relation; returns the trainer's log-probs.

        A request that was not to be cancelled must have come to its last token, or nothing is shown.
        """
        ended = [(r, c) for r, c in zip(requests, trace.completions, strict=True) if c is not None]
        asked, completions = [r for r, _ in ended], [c for _, c in ended]
        drawn = [0 if c is None else len(c.token_ids) for c in trace.completions]
        if lost := [i for i, r in enumerate(requests) if r.aborts is None and drawn[i] != r.max_tokens]:
            relation.shown = False
            relation.lost = f"{len(lost)} of {len(requests)} requests did not come to their last token, first {lost[0]}"
        scored, before = self.score(asked, completions, self.packed()), relation.mismatched
        relation.add([c.sampler_logprobs for c in completions], scored)
        self.tokens += sum(len(c.token_ids) for c in completions)
        self.mismatched += relation.mismatched - before
        self.advance(self.tokens)
        return scored


def basic(pair: Pair, salt: int = 0) -> list[Request]:
    """Ragged prompts, one token among them, temperatures in turn, each with a seed of its own."""
    rng, size = random.Random(request_seed(pair.seed, 0, 0, salt)), pair.sizes
    lengths = [1, size.prompt, *(rng.randint(2, size.prompt) for _ in range(size.requests - 2))]
    return [
        Request(pair.prompt(rng, n), request_seed(pair.seed, 1, i, salt), TEMPERATURES[i % 2], size.tokens, ignore_eos=True)
        for i, n in enumerate(lengths)
    ]


@dataclass(frozen=True)
class Batch:
    """Requests, what the engine drew for them all together from a cold cache, and the trainer's log-probs."""

    requests: list[Request]
    completions: list[Completion]
    scored: list[np.ndarray]


def sampler_and_trainer(pair: Pair) -> Relation:
    """One batch; most of what follows compares something with it."""
    relation, requests = Relation("sampler = trainer, packed"), basic(pair)
    trace = pair.draw(requests)
    scored = pair.against_trainer(relation, requests, trace)
    pair.batch = Batch(requests, [c for c in trace.completions if c is not None], scored)
    return relation


def alone(pair: Pair) -> Relation:
    relation, batch = Relation("alone = in a batch"), pair.batch
    some = range(min(8, len(batch.requests)))
    apart = [pair.draw([batch.requests[i]]).completions[0] for i in some]
    return relation.of(apart, [batch.completions[i] for i in some])


def prefill_and_decode(pair: Pair) -> Relation:
    """What was decoded token by token, given to the engine as a prompt."""
    relation, batch = Relation("prefill = decode"), pair.batch
    ones = [i for i, r in enumerate(batch.requests) if r.temperature == 1.0]  # of prompts vLLM has no other
    whole = [
        Request((*batch.requests[i].prompt, *batch.completions[i].token_ids), 0, 1.0, 1, ignore_eos=True, scored=True)
        for i in ones
    ]
    given = pair.draw(whole).prompt_logprobs
    parts = [x[len(batch.requests[i].prompt) - 1 :] for i, x in zip(ones, given, strict=True)]
    relation.add(parts, [batch.completions[i].sampler_logprobs for i in ones])
    return relation


def warm_prefix(pair: Pair) -> Relation:
    relation, batch = Relation("warm prefix = cold"), pair.batch
    pair.draw(batch.requests)
    warm = pair.draw(batch.requests[::-1], cold=False)
    relation.how, relation.shown = f"{warm.cached_tokens:,} prompt tokens from the cache", warm.cached_tokens > 0
    return relation.of(warm.completions[::-1], batch.completions)


def preempted(pair: Pair) -> Relation:
    """Twice on the way, every request loses its pages, and what it had drawn is prefilled."""
    relation, batch, n = Relation("preempted = not"), pair.batch, pair.sizes.tokens
    trace = pair.draw(batch.requests, preempt=lambda step: step in (n // 3, 2 * n // 3 + 1))
    relation.how, relation.shown = f"{trace.preemptions} preemptions", trace.preemptions > 0
    return relation.of(trace.completions, batch.completions)


def chunked(pair: Pair) -> Relation:
    """Prompts that do not fit one engine step."""
    relation = Relation("chunked prefill = trainer")
    rng, size = random.Random(request_seed(pair.seed, 2, 0, 0)), pair.sizes
    lengths = [
        size.longest,
        *(rng.randint(size.longest // 2, size.longest) for _ in range(2 * size.in_step // size.longest + 2)),
    ]
    requests = [
        Request(pair.prompt(rng, n), i, TEMPERATURES[i % 2], min(8, size.tokens), ignore_eos=True)
        for i, n in enumerate(lengths)
    ]
    trace = pair.draw(requests)
    pair.against_trainer(relation, requests, trace)
    relation.how = f"prompts of up to {max(lengths):,} in steps of {size.in_step:,}: {trace.chunks} times cut"
    relation.shown &= trace.chunks > 0
    return relation


def one_by_one(pair: Pair) -> Relation:
    return _layout(pair, "trainer: micro-batch of 1 = packed", Layout(1))


def shuffled(pair: Pair) -> Relation:
    layout = Layout(5, "shuffled", "right", padding=7, grad=True)
    return _layout(pair, "trainer: padded, shuffled, with grad = packed", layout)


def checkpointed(pair: Pair) -> Relation:
    """Log-probs and the first layer's gradients, which need every layer's activations, computed once or twice."""
    relation, model, training = (
        Relation("trainer: gradient checkpointing = none", unit="words"),
        pair.model,
        pair.model.training,
    )
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
    """Log-probs of a few completions, and the gradients of their sum."""
    chosen = [i for i, r in enumerate(pair.batch.requests) if r.temperature == 1.0][:4]
    prompts, completions = [pair.batch.requests[i].prompt for i in chosen], [pair.batch.completions[i] for i in chosen]
    ids, mask, length = padded(prompts, [c.token_ids for c in completions], Layout(4))
    device = next(pair.model.parameters()).device
    packed = pack(ids.to(device), mask.to(device), length)
    first = dict(pair.model.base_model.layers[0].named_parameters())
    needed = {p: p.requires_grad for p in pair.model.parameters()}
    try:
        for p in needed:  # all gradients of a large model would not fit beside an engine
            p.requires_grad_(False)
        for p in first.values():
            p.requires_grad_(True)
        with torch.enable_grad():
            logprobs, _ = pair.model(
                **packed.inputs, attention_mask=None, token_ids=packed.token_ids, predicted_from=packed.predicted_from,
                temperature=1.0,
            )  # fmt: skip
            found = torch.autograd.grad(logprobs.sum(), list(first.values()))
    finally:
        for p, before in needed.items():
            p.requires_grad_(before)
    return {"log-probs": logprobs.detach(), **dict(zip(first, found, strict=True))}


def _layout(pair: Pair, name: str, layout: Layout) -> Relation:
    relation = Relation(name)
    relation.add(pair.score(pair.batch.requests, pair.batch.completions, layout), pair.batch.scored)
    return relation


KINDS = ("crowd", "any", "full")


def composition(pair: Pair, number: int, budget: int) -> list[Request]:
    """One random batch of the kind KINDS[number % 3]: how many, how long, when they come, which are cancelled.

    "crowd": 44 to 64 short ones, co-resident. "full": as many as the engine takes, short, at once. "any": 3 to 128, ragged,
    some of which come while others decode, and some of which are cancelled.

    Args:
        budget: of prompt tokens, all together; one prompt of the longest is in it where there is room.
    """
    rng, size, kind = random.Random(request_seed(pair.seed, 3, number, 0)), pair.sizes, KINDS[number % len(KINDS)]
    any_kind = kind == "any"
    count = rng.randint(3, MOST) if any_kind else rng.randint(*CROWD) if kind == "crowd" else MOST
    longest = size.longest if any_kind else min(24, size.longest)
    lengths = [max(1, round(longest ** rng.random())) for _ in range(count)]
    lengths[0] = longest if longest <= budget else lengths[0]
    while sum(lengths) > budget and max(lengths[1:], default=0) > 1:
        lengths[1:] = [max(1, n // 2) for n in lengths[1:]]
    requests = []
    for i, n in enumerate(lengths):
        # the second comes while the first decodes, and the last is cancelled on its way, whatever is drawn
        arrives = 0 if i == 0 or not any_kind else 3 if i == 1 else rng.randint(0, 2 * size.tokens)
        tokens = rng.randint(size.tokens // 2, size.tokens) if any_kind and 1 < i < count - 1 else size.tokens
        cancelled = any_kind and (i == count - 1 or (i > 1 and rng.random() < 0.15))
        aborts = arrives + rng.randint(1, max(1, tokens - 2)) if cancelled else None
        seed, t = request_seed(pair.seed, 4, number, i), rng.choice((*TEMPERATURES, 1.3))
        requests.append(Request(pair.prompt(rng, n), seed, t, tokens, arrives, aborts, ignore_eos=True))
    return requests


def compositions(pair: Pair, go_on: Callable[[], bool]) -> Relation:
    """Random compositions while `go_on()`, one of each kind at the least.

    A batch has as many prompt tokens as the trainer's model scores in ten seconds, so that a slow machine is heard of.
    """
    relation = Relation("random batch compositions = trainer")
    number = aborted = decoding = 0
    loads, lengths = [], []
    budget = int(min(48_000, max(pair.sizes.longest, 10 * pair.scored / pair.seconds)))
    while number < len(KINDS) or go_on():
        requests = composition(pair, number, budget)
        trace = pair.draw(requests, cold=number % 4 != 3)
        pair.against_trainer(relation, requests, trace)
        loads.append(trace.together)
        lengths += [len(r.prompt) for r in requests]
        aborted, decoding = aborted + trace.aborted, decoding + sum(n > 0 for n in trace.decoding)
        kind = KINDS[number % len(KINDS)]
        relation.shown &= kind == "any" or trace.together >= {"crowd": CROWD[0], "full": MOST}[kind]
        number += 1
    relation.shown &= aborted > 0 and decoding > 0
    relation.how = (
        f"{number} batches of up to {max(loads)}, prompts of {min(lengths)} to {max(lengths):,}, {decoding:,} arrivals while "
        f"others decoded, {aborted} cancelled"
    )
    return relation


def weight_sync(pair: Pair) -> Relation:
    """Every weight moved, as an optimizer step would, and the engine given the new ones; the old ones' prefixes are cached.

    Both keep them: what comes after compares with other weights than `pair.batch` was drawn with.
    """
    relation, requests = Relation("weight sync: sampler = trainer"), basic(pair, salt=1)
    pair.draw(requests)
    generator = torch.Generator("cpu").manual_seed(pair.seed)
    with torch.no_grad():
        for p in pair.model.parameters():
            noise = torch.rand(p.shape[-1:], generator=generator).to(p.device, p.dtype)
            p.mul_(1 + MOVE * (noise - 0.5))
    pair.sampler.sync(pair.model.named_parameters())
    differing = pair.sampler.differing_weights(pair.model.named_parameters())
    pair.against_trainer(relation, requests, pair.draw(requests, cold=False))
    relation.how = f"{len(differing)} parameters differ after it"
    relation.shown &= not differing
    return relation


OF_A_BATCH = (
    sampler_and_trainer, alone, prefill_and_decode, warm_prefix, preempted, chunked, one_by_one, shuffled, checkpointed,
)  # fmt: skip
"""The first first; `compositions`, and `weight_sync`, which moves the weights, come after."""

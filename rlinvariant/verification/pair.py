"""The two sides that are compared: an engine and a trainer's model with the same weights, and how much is drawn from them."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rlinvariant.errors import UserError
from rlinvariant.rollout import Completion, request_seed
from rlinvariant.sampler.drive import Request, Trace, drive
from rlinvariant.sampler.engine import Sampler
from rlinvariant.sampler.served import ServedSampler
from rlinvariant.trainer.score import Layout, score
from rlinvariant.verification.relation import Relation

if TYPE_CHECKING:
    from rlinvariant.verification.turns import Sample

DRAW_TEMPERATURES = (1.0, 0.7)  # a division by 0.7 rounds; one by 1.0 does not
LEAST_POSITIONS = 64  # room for prompts that are cut and cached


@dataclass(frozen=True)
class Sizes:
    """Says how much is drawn and scored, in tokens where nothing else is said.

    Args:
        requests: number of requests in the relations that compare one batch with another.
        prompt: longest prompt of that batch.
        tokens: tokens drawn for each of its requests.
        longest: longest prompt of a random composition.
        in_step: most tokens in one step of the engine.
        in_forward: most tokens in one forward of the trainer's model.
        context: longest context that is tried, a few tokens of a completion included.
    """

    requests: int
    prompt: int
    tokens: int
    longest: int
    in_step: int
    in_forward: int
    context: int = 0

    @property
    def positions(self) -> int:
        """Return how many positions the longest request needs."""
        return max(max(self.longest, self.prompt + self.tokens) + self.tokens, self.context) + 1

    def within(self, positions: int) -> "Sizes":
        """Return sizes that fit a model with `positions` positions. Raises UserError where there is no room for a prompt."""
        if positions < LEAST_POSITIONS:
            raise UserError(
                f"max_position_embeddings={positions}: expected at least {LEAST_POSITIONS}, for prompts that are cut and "
                "cached; choose a model with more positions"
            )
        tokens = min(self.tokens, positions // 8)
        longest = min(self.longest, positions - tokens - 1)
        prompt, context = min(self.prompt, longest - tokens - 1), min(self.context, positions - 1)
        return Sizes(self.requests, prompt, tokens, longest, self.in_step, self.in_forward, context)


SHORT_SIZES = Sizes(requests=12, prompt=70, tokens=12, longest=160, in_step=256, in_forward=4096, context=160)
FULL_SIZES = Sizes(requests=32, prompt=200, tokens=32, longest=4096, in_step=512, in_forward=8192, context=33_000)
CONTEXT_ON_CPU = 4200  # in place of `FULL_SIZES.context`, whose prefill takes a CPU minutes


@dataclass(frozen=True)
class Batch:
    """Holds one batch of requests, what the engine drew for all together from a cold cache, and the trainer's log-probs."""

    requests: list[Request]
    completions: list[Completion]
    scored: list[np.ndarray]


@dataclass
class Pair:
    """Holds a trainer's model and an engine with the same weights, and counts what has been drawn and scored.

    Args:
        model: the trainer's model.
        sampler: the engine, or servers.
        sizes: how much to draw.
        seed: decides prompts, draws and batches.
        vocabulary: token ids of prompts are below it.
        advance: called after each comparison of sampler and trainer.
        agreed: given what a clock has decided, returns what all processes of the engine go by.
        tokens: log-probs compared so far, sampler against trainer; `mismatched` of them differ.
        scored: tokens that the trainer's model has scored, prompts included; `seconds` is the time that it took.
        batch: the batch that `relations.sampler_and_trainer` drew.
        samples: those that `turns.turns` drew.
    """

    model: Any
    sampler: Sampler | ServedSampler
    sizes: Sizes
    seed: int
    vocabulary: int
    advance: Callable[[], None] = lambda: None
    agreed: Callable[[Any], Any] = lambda value: value
    tokens: int = 0
    mismatched: int = 0
    scored: int = 0
    seconds: float = 0.0
    batch: Batch = field(init=False)
    samples: "list[Sample]" = field(init=False)

    def prompt(self, rng: random.Random, length: int) -> tuple[int, ...]:
        """Return `length` random token ids."""
        return tuple(rng.randrange(self.vocabulary) for _ in range(length))

    def draw(self, requests: Sequence[Request], **how: Any) -> Trace:
        """Run the requests through the engine; `how` as in `sampler.drive.drive`. Servers take no `how`, and all draw all."""
        if isinstance(self.sampler, ServedSampler):
            return Trace([*self.sampler.drawn_by_each(requests)])
        return drive(self.sampler, requests, **how)

    def score(self, requests: Sequence[Request], completions: Sequence[Completion], layout: Layout) -> list[np.ndarray]:
        """Return the trainer's log-probs [tokens] of each completion, in the order of the requests."""
        found: dict[int, np.ndarray] = {}
        for how in dict.fromkeys((r.temperature, r.truncation) for r in requests):
            rows = [i for i, r in enumerate(requests) if (r.temperature, r.truncation) == how]
            prompts, began = [requests[i].prompt for i in rows], time.perf_counter()
            scored = score(self.model, prompts, [completions[i] for i in rows], how[0], layout, how[1])
            self.seconds += time.perf_counter() - began
            self.scored += sum(len(p) + len(completions[i].token_ids) for i, p in zip(rows, prompts, strict=True))
            found |= {i: x.numpy() for i, x in zip(rows, scored, strict=True)}
        return [found[i] for i in range(len(requests))]

    def packed(self) -> Layout:
        """Return the layout of the trainer's packed forward, with which most relations compare."""
        return Layout(64, tokens=self.sizes.in_forward)

    def against_trainer(self, relation: Relation, requests: Sequence[Request], trace: Trace) -> list[np.ndarray]:
        """Add every completion that came to its end to the relation, and return the trainer's log-probs.

        A request that was not to be cancelled must have come to its last token; else the relation is not shown.
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
        self.advance()
        return scored


def basic_requests(pair: Pair, salt: int = 0) -> list[Request]:
    """Return requests with ragged prompts, one of a single token among them, temperatures in turn, and a seed for each."""
    rng, size = random.Random(request_seed(pair.seed, 0, 0, salt)), pair.sizes
    lengths = [1, size.prompt, *(rng.randint(2, size.prompt) for _ in range(size.requests - 2))]
    seeds = [request_seed(pair.seed, 1, i, salt) for i in range(len(lengths))]
    return [
        Request(pair.prompt(rng, n), seeds[i], DRAW_TEMPERATURES[i % 2], size.tokens, ignore_eos=True)
        for i, n in enumerate(lengths)
    ]

"""Rollouts of several turns, tried on a real engine: the next turn reads from the cache what the last one decoded.

A tool's tokens stand between turns. In each of several rounds some of the samples take another turn, so that first turns of
some are in one batch with later turns of others. In the end the trainer scores each sample whole, in a packed forward.
"""

import random
from dataclasses import dataclass, field

import numpy as np

from rlinvariant.rollout import Completion, request_seed
from rlinvariant.sampler.drive import Request
from rlinvariant.verification.pair import DRAW_TEMPERATURES, Pair
from rlinvariant.verification.relation import Relation

ROUNDS = 4
SAMPLES = 8


@dataclass
class Sample:
    """Holds what a sample has said so far, and what was said to it.

    Args:
        prompt: token ids.
        temperature: of all its turns.
        ids: all tokens behind the prompt.
        sampled: for each of them, whether it was sampled.
        logprobs: the sampler's, of the sampled ones.
        turns: how many turns were drawn.
    """

    prompt: tuple[int, ...]
    temperature: float
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: int = 0


def turns(pair: Pair) -> Relation:
    """Draw several turns of some samples, preempted in the midst, and compare all that was sampled with one packed forward."""
    relation, size = Relation("turns = one packed forward"), pair.sizes
    rng = random.Random(request_seed(pair.seed, 3, 0, 0))
    most_said = max(1, (size.positions - 1 - size.prompt // 2 - ROUNDS * size.tokens) // ROUNDS)
    lengths = [rng.randint(1, size.prompt // 2) for _ in range(SAMPLES)]
    samples = pair.samples = [Sample(pair.prompt(rng, n), DRAW_TEMPERATURES[i % 2]) for i, n in enumerate(lengths)]
    cached = known = preemptions = 0
    for turn in range(ROUNDS):
        going = [(i, s) for i, s in enumerate(samples) if (i + turn) % 3]
        for _, sample in going:
            said = pair.prompt(rng, rng.randint(1, most_said)) if sample.turns else ()
            known += len(sample.prompt) + len(sample.ids) if sample.turns else 0
            sample.ids += said
            sample.sampled += [False] * len(said)
        requests = [
            Request((*s.prompt, *s.ids), request_seed(pair.seed, 3, i, turn), s.temperature, size.tokens, ignore_eos=True)
            for i, s in going
        ]
        again = size.tokens // 2 if turn == ROUNDS - 1 else -1
        trace = pair.draw(requests, cold=turn == 0, preempt=lambda step, again=again: step == again)
        cached, preemptions = cached + (trace.cached_tokens if turn else 0), preemptions + trace.preemptions
        for (_, sample), drawn in zip(going, trace.completions, strict=True):
            tokens, logprobs = ([], []) if drawn is None else (drawn.token_ids, drawn.sampler_logprobs)
            sample.ids += tokens
            sample.sampled += [True] * len(tokens)
            sample.logprobs += logprobs
            sample.turns += 1
    relation.add([s.logprobs for s in samples], scored(pair))
    pair.tokens += relation.compared
    pair.mismatched += relation.mismatched
    pair.advance()
    most = max(s.turns for s in samples)
    relation.how = f"up to {most} turns, {cached:,} of {known:,} earlier tokens from the cache, {preemptions} preemptions"
    relation.shown = most > 2 and cached > 0 and preemptions > 0
    return relation


def scored(pair: Pair, change: int = 0) -> list[np.ndarray]:
    """Return the trainer's log-probs of the sampled tokens of each of `pair.samples`, [n] fp32.

    Args:
        change: add this to the first token behind each prompt: what the sampler read is not what is scored then.
    """
    requests = [Request(s.prompt, 0, s.temperature, len(s.ids)) for s in pair.samples]
    whole = [list(s.ids) for s in pair.samples]
    for ids in whole:
        ids[0] = (ids[0] + change) % pair.vocabulary
    completions = [Completion(ids, [0.0] * len(ids)) for ids in whole]
    found = pair.score(requests, completions, pair.packed())
    return [x[np.asarray(s.sampled)] for x, s in zip(found, pair.samples, strict=True)]


def another_token(pair: Pair) -> Relation:
    """Score the samples of `turns` with another first token, as a text that is tokenized anew may have."""
    relation = Relation("planted: a turn's token replaced by another")
    relation.add([s.logprobs for s in pair.samples], scored(pair, change=1))
    return relation

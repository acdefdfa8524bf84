"""Random batches, whatever their make-up: how many requests, how long, when they come, which are cancelled."""

import random
from collections.abc import Callable

from rlinvariant.rollout import request_seed
from rlinvariant.sampler.drive import Request
from rlinvariant.text import plural
from rlinvariant.verification.pair import DRAW_TEMPERATURES, Pair
from rlinvariant.verification.relation import Relation

CROWD_SIZES = (44, 64)  # co-resident sequences at which the kernels of peers were found to change (vllm #51187)
ENGINE_REQUESTS = 128  # most requests in the engine at once
COMPOSITION_KINDS = ("crowd", "any", "full")


def composition(pair: Pair, number: int, budget: int) -> list[Request]:
    """Return a random batch of the kind COMPOSITION_KINDS[number % 3].

    "crowd": 44 to 64 short requests at once. "full": as many short requests as the engine takes, at once. "any": 3 to 128
    ragged requests; some come while others decode, and some are cancelled.

    Args:
        number: decides, with the pair's seed, what is drawn.
        budget: prompt tokens of the whole batch; it has one prompt of the longest length where there is room.
    """
    rng, size, kind = random.Random(request_seed(pair.seed, 3, number, 0)), pair.sizes, _kind(number)
    any_kind = kind == "any"
    count = ENGINE_REQUESTS
    if kind != "full":
        count = rng.randint(*(CROWD_SIZES if kind == "crowd" else (3, ENGINE_REQUESTS)))
    longest = size.longest if any_kind else min(24, size.longest)
    lengths = [max(1, round(longest ** rng.random())) for _ in range(count)]
    lengths[0] = longest if longest <= budget else lengths[0]
    while sum(lengths) > budget and max(lengths[1:], default=0) > 1:
        lengths[1:] = [max(1, n // 2) for n in lengths[1:]]
    requests = []
    for i, n in enumerate(lengths):
        # Whatever is drawn, the second request comes while the first decodes, and the last is cancelled on its way
        arrives = 0 if i == 0 or not any_kind else 3 if i == 1 else rng.randint(0, 2 * size.tokens)
        tokens = rng.randint(size.tokens // 2, size.tokens) if any_kind and 1 < i < count - 1 else size.tokens
        cancelled = any_kind and (i == count - 1 or (i > 1 and rng.random() < 0.15))
        aborts = arrives + rng.randint(1, max(1, tokens - 2)) if cancelled else None
        seed, t = request_seed(pair.seed, 4, number, i), rng.choice((*DRAW_TEMPERATURES, 1.3))
        requests.append(Request(pair.prompt(rng, n), seed, t, tokens, arrives, aborts, ignore_eos=True))
    return requests


def compositions(pair: Pair, go_on: Callable[[], bool]) -> Relation:
    """Compare random batches with the trainer while `go_on()`, one of each kind at least.

    A batch has as many prompt tokens as the trainer's model scores in ten seconds, so that a slow machine shows progress too.
    """
    relation = Relation("random batch compositions = trainer")
    number = aborted = decoding = 0
    loads, lengths = [], []
    budget = pair.agreed(int(min(48_000, max(pair.sizes.longest, 10 * pair.scored / pair.seconds))))
    while number < len(COMPOSITION_KINDS) or pair.agreed(go_on()):
        requests = composition(pair, number, budget)
        trace = pair.draw(requests, cold=number % 4 != 3)
        pair.against_trainer(relation, requests, trace)
        loads.append(trace.together)
        lengths += [len(r.prompt) for r in requests]
        aborted, decoding = aborted + trace.aborted, decoding + sum(n > 0 for n in trace.decoding)
        relation.shown &= trace.together >= {"crowd": CROWD_SIZES[0], "any": 0, "full": ENGINE_REQUESTS}[_kind(number)]
        number += 1
    relation.shown &= aborted > 0 and decoding > 0
    relation.how = (
        f"{plural(number, 'batch', 'batches')} of up to {max(loads)}, prompts of {min(lengths)} to {max(lengths):,}, "
        f"{plural(decoding, 'arrival')} while others decoded, {aborted:,} cancelled"
    )
    return relation


def _kind(number: int) -> str:
    return COMPOSITION_KINDS[number % len(COMPOSITION_KINDS)]

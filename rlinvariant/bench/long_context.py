"""Prefill and decode of few long requests: stock vLLM, and the exact sampler with each attention, in turns.

Each engine has a process of its own. A prompt is prefilled, with one token drawn, and timed; then its pages come from the
prefix cache, and what is timed is the decode alone. Prompts are random, no two rounds have the same, and every engine gets the
same. Before that the first request is drawn alone and among all, to see whether its log-probs are the same.
"""

import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from rlinvariant.bench.measure import Answer, Link, Missing, Row, Worker, Workers, compared
from rlinvariant.bench.sampler import Engine, Ours, Stock, machine, prepare
from rlinvariant.kernels import choice

LABELS = {"flash": "attention=flash", "chunked": "attention=chunked", "exact": "ours"}
ROUNDS = 3
TARGET = 0.95  # least rate of a decode with our own attention, as a multiple of stock's
AGAIN = 256  # tokens of a prompt that may be computed again: those of a page that is not full, and one


@dataclass(frozen=True)
class Setup:
    """Describes what is measured on one kind of machine.

    Args:
        model: a name of `models.shapes`.
        contexts: lengths of prompts, in tokens.
        batches: how many requests there are at once.
        new_tokens: how many tokens are decoded for each.
        kv_gib: of each engine.
        engines: the sides; of ours, by the names of `LABELS`.
    """

    model: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int
    kv_gib: float
    engines: tuple[str, ...]


SETUPS = {
    # 8 requests of 33k hold 28.4 GiB, 112 KiB a token; three engines fit on an H200
    "gpu": Setup("qwen3-1.7b", (16384, 32768), (1, 8), 128, 29, ("flash", "chunked", "stock")),
    "gpu tiny": Setup("tiny", (512, 2048), (1, 2), 16, 0.5, ("flash", "chunked", "stock")),
    "cpu": Setup("smollm2-135m", (512, 2048), (1, 2), 16, 0.5, ("exact", "stock")),  # a CPU has one attention
    "cpu tiny": Setup("tiny", (512,), (1, 2), 4, 0.5, ("exact", "stock")),
}


def rows(tiny: bool) -> Iterator[Row | Missing]:
    from rlinvariant.models.shapes import build

    size = machine() + " tiny" * tiny
    setup = SETUPS[size]
    with tempfile.TemporaryDirectory() as directory:
        path = build(setup.model, directory)
        with Workers({side: Worker(__name__, side, path, size) for side in setup.engines}) as workers:
            workers.ask(setup.engines, together=True, what="start")
            found = workers.ask(setup.engines, what="alone")
            same = {side: answer["differing"] == 0 for side, answer in found.items()}
            for context in setup.contexts:
                for batch in setup.batches:
                    yield from _rows(workers, setup, context, batch, same)


def _rows(workers: Workers, setup: Setup, context: int, batch: int, same: dict[str, bool]) -> Iterator[Row | Missing]:
    """Yield prefill and decode of each of our sides against stock, and of one of ours against the other."""
    asked = {"what": "time", "context": context, "batch": batch}
    workers.ask(setup.engines, **asked, seed=0)  # warms kernels up, and what vLLM compiles for a shape
    answers: dict[str, list[Answer]] = {side: [] for side in setup.engines}
    for at in range(ROUNDS):
        for side in setup.engines if at % 2 else setup.engines[::-1]:
            for answer in workers.ask([side], **asked, seed=1 + at).values():
                answers[side].append(answer)
    ours = [side for side in setup.engines if side != "stock"]
    for side, other in [*((side, "stock") for side in ours), *([("chunked", "flash")] if "flash" in ours else [])]:
        for what in ("prefill", "decode"):
            against = "" if other == "stock" else f"; stock: {LABELS[other]}"
            case = f"{LABELS[side]}: {setup.model}, {what}, batch {batch}, {context} of context{against}"
            speed = {s: median(a[what] for a in answers[s]) for s in (side, other) if answers[s]}
            if len(speed) < 2:
                gone = [reason for name, reason in workers.missing.items() if name in (side, other)]
                yield Missing("long", case, "; ".join(gone), {s: round(x, 1) for s, x in speed.items()})
                continue
            equal = {"ours": same.get(side), "stock": same.get(other)}
            target = TARGET if (side, other, what) == ("chunked", "stock", "decode") else None
            yield compared("long", case, speed[side], speed[other], "tok/s", target, equal, len(answers[side]))


def serve(link: Link, engine: Engine, setup: Setup) -> None:
    """Answer the requests that `rows` makes: whether the bits of a request depend on others, and rates, in tokens/s."""
    from rlinvariant.bench.compare import differing

    for request in link.requests():
        if request["what"] == "start":
            link.send()
        elif request["what"] == "alone":
            prompts = _prompts(engine, 0, max(setup.batches), min(setup.contexts))
            together = engine.generate(prompts, setup.new_tokens, range(1, len(prompts) + 1))
            engine.forget()
            link.send(differing=differing(engine.generate(prompts[:1], setup.new_tokens, [1])[0], together[0]))
        else:
            context, batch = request["context"], request["batch"]
            link.send(**timed(engine, _prompts(engine, request["seed"], batch, context), setup.new_tokens))
        engine.forget()


def timed(engine: Engine, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """Return the rates of a prefill, in tokens of prompts, and of a decode of the same prompts, in new tokens a second.

    Raises:
        RuntimeError: the second call computed prompts again, so that it would not be the decode that is timed.
    """
    began = time.perf_counter()
    engine.generate(prompts, 1, None)
    prefilled = time.perf_counter()
    drawn = engine.generate(prompts, new_tokens, None)
    ended = time.perf_counter()
    tokens, cached = sum(map(len, prompts)), sum(c.cached_tokens for c in drawn)
    if tokens - cached > AGAIN * len(prompts):
        raise RuntimeError(f"{cached:,} of {tokens:,} tokens of prompts came from the prefix cache: the decode was not apart")
    return {"prefill": tokens / (prefilled - began), "decode": sum(len(c.token_ids) for c in drawn) / (ended - prefilled)}


def _prompts(engine: Engine, seed: int, count: int, length: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(engine.vocabulary) for _ in range(length)] for _ in range(count)]


def _worker(side: str, path: str, size: str) -> None:
    link, setup = Link(), SETUPS[size]
    prepare(stock=side == "stock")
    if side in choice.ATTENTIONS:
        os.environ[choice.VARIABLE] = side
    longest = max(setup.contexts) + setup.new_tokens
    serve(link, (Stock if side == "stock" else Ours)(path, longest, setup.kv_gib), setup)


if __name__ == "__main__":
    _worker(*sys.argv[1:])

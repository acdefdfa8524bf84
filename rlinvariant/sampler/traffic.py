"""Complete one request many times among others that join and leave, on an engine that is stepped by hand."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams

from rlinvariant.rollout import Completion
from rlinvariant.sampler.engine import Sampler, reported


@dataclass(frozen=True)
class Traffic:
    """Counts what the engine did.

    Args:
        completions: those of the request, in the order in which they were asked for.
        tokens: how many were drawn in requests that came to their end, other requests included.
        seconds: time spent stepping the engine.
        others: how many other requests shared the engine; `cancelled` of them left before their end.
        fewest, most: how many requests were in the engine at once.
    """

    completions: list[Completion]
    tokens: int
    seconds: float
    others: int
    cancelled: int
    fewest: int
    most: int


def alone(sampler: Sampler, prompt: Sequence[int], tokens: int) -> Completion:
    """Complete the request by itself, greedily, from a cold prefix cache."""
    sampler.llm.reset_prefix_cache()
    llm = sampler.llm.llm_engine
    llm.add_request("alone", {"prompt_token_ids": list(prompt)}, _params(tokens, 0.0, 0))
    while True:
        for output in llm.step():
            if output.finished:
                return reported([output])[0]


def among_traffic(
    sampler: Sampler,
    prompt: Sequence[int],
    *,
    completions: int,
    tokens: int,
    vocabulary: int,
    most: int,
    longest: int,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> Traffic:
    """Complete `prompt` greedily `completions` times, while the number of requests in the engine wanders between 1 and `most`.

    One request in three is another: 1 to `longest` random tokens as its prompt, 1 to `tokens` new ones, greedy or sampled; a
    quarter of them are cancelled on the way. All run to their last token, so what joins and leaves at which step depends on
    `seed` alone: engines of both kinds see the same traffic.

    Args:
        sampler: with nothing running in it.
        prompt: token ids.
        completions: how many times it is completed.
        tokens: length of each completion.
        vocabulary: number of token ids that prompts of others are drawn from.
        most: highest number of requests in the engine at once.
        longest: tokens of the longest prompt of another request.
        seed: of the traffic.
        advance: called with how many completions are done.
    """
    rng, llm = random.Random(seed), sampler.llm.llm_engine
    sampler.llm.reset_prefix_cache()
    done: dict[int, Completion] = {}
    live: set[str] = set()
    leaving: dict[int, list[str]] = {}
    loads: list[int] = []
    asked = others = cancelled = drawn = target = 0
    started = time.perf_counter()
    while len(done) < completions:
        step = len(loads)
        if step % 16 == 0:
            target = rng.randint(1, most)
        while len(live) < target and asked < completions:
            if rng.random() < 1 / 3:
                name, ids, length = f"other-{others}", _random(rng, vocabulary, longest), rng.randint(1, tokens)
                params = _params(length, rng.choice((0.0, 1.0)), others)
                if rng.random() < 0.25:
                    leaving.setdefault(step + rng.randint(1, length), []).append(name)
                others += 1
            else:
                name, ids, params = f"same-{asked}", list(prompt), _params(tokens, 0.0, 0)
                asked += 1
            llm.add_request(name, {"prompt_token_ids": ids}, params)
            live.add(name)
        gone = [name for name in leaving.pop(step, []) if name in live]
        llm.abort_request(gone)
        live.difference_update(gone)
        cancelled += len(gone)
        loads.append(len(live))
        outputs: list[Any] = llm.step()
        for output in outputs:
            if output.finished and output.request_id in live:
                live.remove(output.request_id)
                drawn += len(output.outputs[0].token_ids)
                kind, _, number = output.request_id.partition("-")
                if kind == "same":
                    done[int(number)] = reported([output])[0]
                    advance(len(done))
    seconds = time.perf_counter() - started
    llm.abort_request(list(live))
    while llm.has_unfinished_requests():
        llm.step()
    found = [done[i] for i in range(completions)]
    return Traffic(found, drawn, seconds, others, cancelled, min(filter(None, loads)), max(loads))


def _random(rng: random.Random, vocabulary: int, longest: int) -> list[int]:
    return [rng.randrange(vocabulary) for _ in range(rng.randint(1, longest))]


def _params(tokens: int, temperature: float, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=temperature,
        seed=None if temperature == 0 else seed,
        max_tokens=tokens,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )

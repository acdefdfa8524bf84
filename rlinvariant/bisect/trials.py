"""The requests that `bisect` draws, the plainest first, and how: cold, on a warm prefix, with preemption, in turns."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlinvariant.rollout import ALL_TOKENS, Completion, Truncation
from rlinvariant.sampler.drive import Request, Trace, drive
from rlinvariant.text import plural
from rlinvariant.verification.compositions import CROWD_SIZES

if TYPE_CHECKING:
    from rlinvariant.sampler.engine import Sampler


@dataclass(frozen=True)
class Trial:
    """Describes one batch to draw and score.

    Args:
        prompts: token ids.
        seeds: one for each prompt.
        temperature: of all draws.
        max_tokens: length of each completion.
        rows: sequences that the trainer packs together.
        seed: decided the prompts and their seeds.
        way: "cold"; "warm": drawn a second time, on the prefixes that the first left in the cache; "preempted": half-way every
            request loses its pages, and what they held is computed again; "turn": on what earlier turns have decoded.
        hint: where to look if this trial differs and those before it do not.
        opening: of a trial of later turns, its first turns, whose tokens its prompts go on from; else None.
        truncation: which tokens all are drawn from.
    """

    prompts: list[list[int]]
    seeds: list[int]
    temperature: float
    max_tokens: int
    rows: int
    seed: int
    way: str = "cold"
    hint: str = ""
    opening: "Trial | None" = None
    truncation: Truncation = ALL_TOKENS

    @property
    def policy(self) -> str:
        """Return in words what all draws are from."""
        return ", ".join([f"temperature {self.temperature}", *self.truncation.settings()])


@dataclass(frozen=True)
class Tried:
    """Describes a trial for the report: number of prompts, the longest in tokens, and what the engine did.

    A warm prefix or a preemption that did not come about is seen by its 0.
    """

    prompts: int
    longest: int
    engine: str

    @classmethod
    def of(cls, trial: Trial, trace: Trace) -> "Tried":
        """Describe a trial by what the engine did in it."""
        did = [f"{plural(trace.chunks, 'prefill')} cut"] if trace.chunks else []
        did += [f"drawn again, {plural(trace.cached_tokens, 'token')} from the cache"] if trial.way == "warm" else []
        did += [plural(trace.preemptions, "preemption")] if trial.way == "preempted" else []
        did += [f"a second turn, {plural(trace.cached_tokens, 'token')} from the cache"] if trial.way == "turn" else []
        return cls(len(trial.prompts), max(map(len, trial.prompts)), ", ".join(did))


def in_words(tried: Sequence[Tried]) -> str:
    """List trials in words: `16 prompts of up to 48 tokens (2 prefills cut); 1 of up to 48`; units are said once."""
    words = []
    for i, one in enumerate(tried):
        batch = f"{plural(one.prompts, 'prompt')} of up to {plural(one.longest, 'token')}"
        batch = f"{one.prompts:,} of up to {one.longest:,}" if i else batch
        words.append(f"{batch} ({one.engine})" if one.engine else batch)
    return "; ".join(words)


def draw_trial(
    vocabulary: int, sequences: int, longest: int, tokens: int, temperature: float, seed: int, rows: int, shortest: int = 1
) -> Trial:
    """Return a trial of ragged prompts of random tokens, the first of length `shortest` and the second of length `longest`."""
    rng = random.Random(seed)
    lengths = [shortest, longest, *(rng.randint(shortest, longest) for _ in range(sequences))][:sequences]
    prompts = [[rng.randrange(vocabulary) for _ in range(n)] for n in lengths]
    return Trial(prompts, [rng.getrandbits(62) for _ in prompts], temperature, tokens, rows, seed)


def all_trials(
    vocabulary: int,
    sequences: int,
    longest: int,
    tokens: int,
    temperature: float,
    seed: int,
    rows: int,
    step: int,
    far: int,
    truncation: Truncation = ALL_TOKENS,
) -> list[Trial]:
    """Return all that is tried: a fault that a few sequences do not show may need many, or another way to draw.

    Args:
        vocabulary: token ids of prompts are below it.
        sequences: number of prompts in the first trial; `longest` is the longest, in tokens.
        tokens, temperature, rows, truncation: as `max_tokens`, `temperature`, `rows` and `truncation` of each trial.
        seed: decides all prompts and seeds.
        step: most tokens in one step of the engine.
        far: length in tokens of a prompt that is to be cut; where it is shorter than a step, several prompts share one.
    """

    def trial(count: int, longest: int, number: int, hint: str, shortest: int = 1) -> Trial:
        drawn = draw_trial(vocabulary, count, longest, tokens, temperature, seed + number, rows, shortest)
        return replace(drawn, hint=hint, truncation=truncation)

    by_rows = "only with so many rows: look at what depends on their number"  # few rows may take another kernel than many
    counts, crowd = list(dict.fromkeys((sequences, 1, 3))), CROWD_SIZES[1]
    found = [trial(count, longest, i, by_rows if i else "") for i, count in enumerate(counts)]
    found.append(trial(crowd, min(8, longest, max(1, step // crowd)), 3, by_rows))  # so short that none is cut
    cut = "only with long prompts, which are cut: look at what the rest of one reads"
    long = trial(min(2 * step // far + 2, crowd), far, 4, cut, shortest=-(-far // 2))
    again = replace(long, way="warm", hint="only on a warm prefix: look at what is read from the cache")
    preempted = replace(found[0], way="preempted", hint="only when preempted: look at what is computed again")
    found += [long, again, preempted]
    if (room := far - tokens) > 1:  # for the first turn's prompt, and for what is said between the two
        left = "only in a later turn: look at what one turn has left in the cache for the next"
        found.append(replace(trial(sequences, min(longest, room // 2), 5, left), way="turn"))
    return found


def begun(engine: "Sampler", trial: Trial, far: int) -> Trial:
    """Return a trial whose prompts are whole: one of later turns draws the first ones, and random tokens are said to each.

    Args:
        far: most tokens of a prompt.
    """
    if trial.way != "turn":
        return trial
    rng, vocabulary = random.Random(trial.seed), max(max(p) for p in trial.prompts) + 1
    drawn = [c.token_ids for c in drive(engine, _requests(trial)).completions if c is not None]
    prompts = []
    for prompt, ids in zip(trial.prompts, drawn, strict=True):
        said = rng.randint(1, far - len(prompt) - len(ids))
        prompts.append([*prompt, *ids, *(rng.randrange(vocabulary) for _ in range(said))])
    return replace(trial, prompts=prompts, seeds=[rng.getrandbits(62) for _ in prompts], opening=trial)


def draw(engine: "Sampler", trial: Trial) -> tuple[Trace, list[Completion]]:
    """Draw as the trial says; where that is twice, the trace is the second draw's."""
    requests = _requests(trial)
    if trial.way == "warm" or trial.opening is not None:
        drive(engine, _requests(trial.opening or trial))
    step_tokens = engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    prefill_steps = -(-sum(map(len, trial.prompts)) // step_tokens)
    half = prefill_steps + (trial.max_tokens - 1) // 2

    def preempt(step: int) -> bool:
        return trial.way == "preempted" and step == half

    trace = drive(engine, requests, cold=trial.way not in ("warm", "turn"), preempt=preempt)
    return trace, [c for c in trace.completions if c is not None]


def _requests(trial: Trial) -> list[Request]:
    return [
        Request(tuple(p), s, trial.temperature, trial.max_tokens, ignore_eos=True, truncation=trial.truncation)
        for p, s in zip(trial.prompts, trial.seeds, strict=True)
    ]

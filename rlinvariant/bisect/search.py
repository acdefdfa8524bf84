"""Draw, score, and find the first recorded value in which sampler and trainer differ."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlinvariant import bits
from rlinvariant.bisect.record import Block, Place, Recorder
from rlinvariant.metrics import mismatches
from rlinvariant.rollout import Completion
from rlinvariant.sampler.drive import Request, Trace, drive
from rlinvariant.trainer.score import Layout, score, stock_score
from rlinvariant.verification.relations import CROWD

LOGPROB: Place = (None, "log-prob")
PADDED = ("lm_head", "scaled logits")  # roles whose value may have columns beyond the vocabulary


@dataclass(frozen=True)
class Trial:
    """What is drawn, prompts of token ids, a seed for each, one temperature; and how.

    Args:
        rows: sequences that the trainer packs together.
        seed: that all of this was drawn by.
        way: "cold"; "warm": drawn once more, on the prefixes that are in the cache since the first time; "preempted": half-way
            all requests lose their pages, and what these held is computed again.
        hint: where to look if this trial differs and those before it do not.
    """

    prompts: list[list[int]]
    seeds: list[int]
    temperature: float
    max_tokens: int
    rows: int
    seed: int
    way: str = "cold"
    hint: str = ""

    def name(self, trace: Trace) -> str:
        """With what the engine did: a warm prefix or a preemption that did not come about is seen by its 0."""
        count, longest = len(self.prompts), max(map(len, self.prompts))
        cut = f", prefills cut: {trace.chunks}" if trace.chunks else ""
        how = {
            "warm": f", again, {trace.cached_tokens:,} tokens from the cache",
            "preempted": f", {trace.preemptions} preemptions",
        }
        return f"{count} of {longest:,}{cut}{how.get(self.way, '')}"


@dataclass(frozen=True)
class Side:
    """One side's value of a place at a position, and how it was made."""

    block: Block
    index: int  # its row in the block
    recorder: Recorder

    @property
    def value(self) -> Tensor:
        return self.block.value[self.index]


@dataclass(frozen=True)
class First:
    """The first difference: in the log-probs, and among the recorded values.

    Args:
        sequence, token: of the batch, and of its completion, where the log-prob differs first.
        position: absolute, the first at which any recorded value differs.
        token_ids: the completion's.
        place: the first in order of execution at that position; None if nothing that was recorded differs.
    """

    sequence: int
    token: int
    sampler_logprob: float
    trainer_logprob: float
    prompt_tokens: int
    token_ids: list[int]
    position: int
    place: Place | None
    sampler: Side | None
    trainer: Side | None


@dataclass(frozen=True)
class Result:
    """Counts of the first pass; the first difference, or, if it did not come back on the second pass, how that went.

    `tried` has the names of the trials up to this, with what the engine did.
    """

    compared: int
    mismatched: int
    first: First | None = None
    vanished: list[str] | None = None
    tried: list[str] = field(default_factory=list)


def draw_trial(
    vocabulary: int, sequences: int, longest: int, tokens: int, temperature: float, seed: int, rows: int, shortest: int = 1
) -> Trial:
    """Ragged prompts of `shortest` to `longest` random tokens, among them one of each length, and a seed for each."""
    rng = random.Random(seed)
    lengths = [shortest, longest, *(rng.randint(shortest, longest) for _ in range(sequences))][:sequences]
    prompts = [[rng.randrange(vocabulary) for _ in range(n)] for n in lengths]
    return Trial(prompts, [rng.getrandbits(62) for _ in prompts], temperature, tokens, rows, seed)


def trials(
    vocabulary: int, sequences: int, longest: int, tokens: int, temperature: float, seed: int, rows: int, step: int, far: int
) -> list[Trial]:
    """All that is tried, the plainest first: faults that a few sequences do not show may need many, or another way to draw.

    Args:
        sequences, longest: of the first trial; `longest` prompt, in tokens.
        step: most tokens in one step of the engine.
        far: prompt that is to be cut, in tokens; where it is shorter than a step, several share one.
    """

    def trial(count: int, longest: int, number: int, hint: str, shortest: int = 1) -> Trial:
        drawn = draw_trial(vocabulary, count, longest, tokens, temperature, seed + number, rows, shortest)
        return replace(drawn, hint=hint)

    by_rows = "only with so many rows: look at what depends on their number"  # few may take another kernel than many
    counts = list(dict.fromkeys((sequences, 1, 3)))
    found = [trial(count, longest, i, by_rows if i else "") for i, count in enumerate(counts)]
    found.append(trial(CROWD[1], min(8, longest, max(1, step // CROWD[1])), 3, by_rows))  # so short that none is cut
    cut = "only with long prompts, which are cut: look at what the rest of one reads"
    long = trial(min(2 * step // far + 2, CROWD[1]), far, 4, cut, shortest=-(-far // 2))
    again = replace(long, way="warm", hint="only on a warm prefix: look at what is read from the cache")
    preempted = replace(found[0], way="preempted", hint="only when preempted: look at what is computed again")
    return [*found, long, again, preempted]


def find_any(engine: Any, model: Any, trials: Sequence[Trial], stock_trainer: bool = False) -> tuple[Result, Trial]:
    """`find` in each trial in turn, until something differs; if nothing does, the counts of all."""
    compared, tried = 0, []
    for trial in trials:
        result = find(engine, model, trial, stock_trainer)
        tried += result.tried
        if result.mismatched:
            return replace(result, tried=tried), trial
        compared += result.compared
    return Result(compared, 0, tried=tried), trials[-1]


def find(engine: Any, model: Any, trial: Trial, stock_trainer: bool = False) -> Result:
    """Compare every sampled token; of the first that differs, draw and score again with everything recorded.

    Args:
        engine: a `Sampler`, run eagerly.
        model: the trainer's, from `make_trainable`; with `stock_trainer` one of transformers as it is.
    """
    trace, drawn = draw(engine, trial)
    tried = [trial.name(trace)]
    scored = [row for at in range(0, len(drawn), trial.rows) for row in _score(model, trial, drawn, at, stock_trainer)]
    compared = sum(len(row) for row in scored)
    differing = [
        (s, t)
        for s, (completion, row) in enumerate(zip(drawn, scored, strict=True))
        for t in _differing(completion.sampler_logprobs, row)
    ]
    if not differing:
        return Result(compared, 0, tried=tried)
    s, t = differing[0]
    ours, theirs, again, row = record(engine, model, trial, s, stock_trainer)
    was = drawn[s].sampler_logprobs[t], scored[s][t]
    now = again.sampler_logprobs[t], row[t]
    if again.token_ids != drawn[s].token_ids or not _differing(now[:1], now[1:]):
        pairs = zip(("sampler", "trainer"), was, now, strict=True)
        vanished = [f"{side}    sequence {s}, token {t}: {shown(fp32(a))}, then {shown(fp32(b))}" for side, a, b in pairs]
        return Result(compared, len(differing), vanished=vanished, tried=tried)
    start = len(trial.prompts[s])
    found = first_difference(ours, theirs) or first_nan(ours, theirs)
    place, position, a, b = found or (None, start - 1 + t, None, None)
    first = First(s, t, *was, start, again.token_ids, position, place, a, b)
    return Result(compared, len(differing), first, tried=tried)


def record(
    engine: Any, model: Any, trial: Trial, s: int, stock_trainer: bool = False
) -> tuple[Recorder, Recorder, Completion, list[float]]:
    """Draw and score once more, with all that is computed for sequence `s` recorded; also its completion and its scores."""
    ours, theirs = Recorder(engine.model), Recorder(model)
    with ours.recording(_attentions(engine)), _following(engine, trial.seeds[s], ours):
        drawn = draw(engine, trial)[1]
    with theirs.recording(), _packed(model, trial, drawn, s, theirs, stock_trainer):
        at = s // trial.rows * trial.rows
        row = _score(model, trial, drawn, at, stock_trainer)[s - at]
    start = len(trial.prompts[s])
    positions = list(range(start - 1, start - 1 + len(row)))
    for recorder, values in ((ours, drawn[s].sampler_logprobs), (theirs, row)):
        words = fp32(values)[:, None]
        recorder.trace[LOGPROB] = [Block(positions, words, None, None, None, len(words))]
    return ours, theirs, drawn[s], row


def first_difference(ours: Recorder, theirs: Recorder) -> tuple[Place, int, Side, Side] | None:
    """At the smallest position that differs anywhere, since later ones read it through the cache; there, the first executed."""
    best: tuple[int, Place] | None = None
    for place in theirs.trace:
        a, b = side_at(ours, place), side_at(theirs, place)
        for position in sorted(a.keys() & b.keys()):
            if best is not None and position >= best[0]:
                break
            x, y = a[position].value, b[position].value
            if len(x) != len(y) and place[1] not in PADDED:
                break  # another layout, of a stock model: its rope table is twice as wide
            if not equal(x, y):
                best = position, place
    if best is None:
        return None
    position, place = best
    return place, position, side_at(ours, place)[position], side_at(theirs, place)[position]


def first_nan(ours: Recorder, theirs: Recorder) -> tuple[Place, int, Side, Side] | None:
    """Where both sides have the same bits and those are no number: what a log-prob of NaN comes from."""
    found = [
        (position, order, place)
        for order, place in enumerate(theirs.trace)
        for position, side in side_at(theirs, place).items()
        if position in side_at(ours, place) and side.value.isnan().any()
    ]
    if not found:
        return None
    position, _, place = min(found)
    return place, position, side_at(ours, place)[position], side_at(theirs, place)[position]


def side_at(recorder: Recorder, place: Place) -> dict[int, Side]:
    """By position; what was computed twice, as on a warm prefix or after a preemption, counts as it was computed last."""
    blocks = recorder.trace.get(place, [])
    return {p: Side(block, i, recorder) for block in blocks for i, p in enumerate(block.positions)}


def equal(a: Tensor, b: Tensor) -> bool:
    """In bits, of the columns that both have: a padded vocabulary is longer."""
    if a.dtype != b.dtype:
        return False
    columns = min(len(a), len(b))
    return bits.compare(a[:columns], b[:columns]) is None


def _differing(a: Sequence[float], b: Sequence[float]) -> list[int]:
    """Where two lists of fp32 numbers are not the same bits; NaN equals nothing."""
    return np.flatnonzero(mismatches(np.asarray(a, np.float32), np.asarray(b, np.float32))).tolist()


def fp32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def shown(value: Tensor) -> str:
    """A number and its bits."""
    return f"{value.item():.9g} ({bits.word(value)})"


def draw(engine: Any, trial: Trial) -> tuple[Trace, list[Completion]]:
    """As the trial says; the trace is of the last draw, where there are two."""
    requests = [
        Request(tuple(p), s, trial.temperature, trial.max_tokens, ignore_eos=True)
        for p, s in zip(trial.prompts, trial.seeds, strict=True)
    ]
    if trial.way == "warm":
        drive(engine, requests)
    step = engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    half = (
        -(-sum(map(len, trial.prompts)) // step) + (trial.max_tokens - 1) // 2
    )  # steps to prefill, and half of those to decode
    preempt = lambda step: trial.way == "preempted" and step == half  # noqa: E731
    trace = drive(engine, requests, cold=trial.way != "warm", preempt=preempt)
    return trace, [c for c in trace.completions if c is not None]


def _attentions(engine: Any) -> list[Any]:
    """vLLM's attention layers, by layer."""
    layers = engine._runner.compilation_config.static_forward_context
    return [layers[name] for name in sorted(layers, key=lambda n: next(int(x) for x in n.split(".") if x.isdigit()))]


@contextmanager
def _following(engine: Any, seed: int, recorder: Recorder) -> Iterator[None]:
    """Tell a recorder at every step of the engine which rows belong to the request that was given this seed."""
    runner = engine._runner

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        requests, starts = runner.input_batch, runner.query_start_loc.np
        tokens = next(x for x in (kwargs.get("input_ids"), kwargs.get("positions"), *args) if isinstance(x, Tensor))
        rows, first, own = range(0), 0, []
        for i, name in enumerate(requests.req_ids):
            if runner.requests[name].sampling_params.seed == seed:
                rows, first, own = range(starts[i], starts[i + 1]), int(requests.num_computed_tokens_cpu[i]), [i]
        positions = [first + i for i in range(len(rows))]  # by the scheduler, not by what the model is told
        recorder.expect(rows, positions, len(tokens))
        recorder.expect_logits(own, positions[-1:], len(requests.req_ids))

    hook = engine.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _score(model: Any, trial: Trial, drawn: Sequence[Completion], at: int, stock: bool) -> list[list[float]]:
    """The trainer's log-probs of one micro-batch, of the sequences from `at` on."""
    part = slice(at, at + trial.rows)
    given = model, trial.prompts[part], drawn[part], trial.temperature
    return [row.tolist() for row in (stock_score(*given) if stock else score(*given, Layout(trial.rows)))]


@contextmanager
def _packed(model: Any, trial: Trial, drawn: Sequence[Completion], s: int, recorder: Recorder, stock: bool) -> Iterator[None]:
    """Tell a recorder which rows of the trainer's forward are sequence `s`: part of a packed row, or all of its own."""
    at = s if stock else s // trial.rows * trial.rows
    until = at + (1 if stock else trial.rows)
    scored = [len(c.token_ids) for c in drawn[at:until]]
    lengths = [len(p) + n for p, n in zip(trial.prompts[at:until], scored, strict=True)]
    first, start, count = sum(lengths[: s - at]), len(trial.prompts[s]), lengths[s - at]
    own = [*trial.prompts[s], *drawn[s].token_ids]

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        mine = ids[0, first : first + count].tolist() == own  # with stock, each sequence has a forward
        predicted = range(start - 1, count - 1) if mine else ()
        rows = range(first, first + count) if mine else ()
        recorder.expect(rows, [r - first for r in rows], ids.numel())
        if stock:
            recorder.expect_logits(predicted, predicted, ids.numel())
        else:
            before = sum(scored[: s - at])
            recorder.expect_logits([before + i for i in range(len(predicted))], predicted, sum(scored))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()

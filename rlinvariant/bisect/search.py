"""Draw, score, and find the first recorded value in which sampler and trainer differ."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlinvariant import bits
from rlinvariant.bisect.record import Block, Place, Recorder
from rlinvariant.rollout import Completion
from rlinvariant.trainer.score import Layout, score

LOGPROB: Place = (None, "log-prob")
PADDED = ("lm_head", "scaled logits")  # roles whose value may have columns beyond the vocabulary


@dataclass(frozen=True)
class Batch:
    """What is drawn: prompts of token ids, a seed for each, one temperature."""

    prompts: list[list[int]]
    seeds: list[int]
    temperature: float
    max_tokens: int
    rows: int  # sequences that the trainer packs together
    seed: int  # that all of this was drawn by


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
    """Counts of the first pass; the first difference, or, if it did not come back on the second pass, how that went."""

    compared: int
    mismatched: int
    first: First | None = None
    vanished: list[str] | None = None


def draw_batch(vocabulary: int, sequences: int, longest: int, tokens: int, temperature: float, seed: int, rows: int) -> Batch:
    """Ragged prompts of 1 to `longest` random tokens, among them one of each length, and a seed for each."""
    rng = random.Random(seed)
    lengths = [1, longest, *(rng.randint(1, longest) for _ in range(sequences))][:sequences]
    prompts = [[rng.randrange(vocabulary) for _ in range(n)] for n in lengths]
    return Batch(prompts, [rng.getrandbits(62) for _ in prompts], temperature, tokens, rows, seed)


def find_any(engine: Any, model: Any, batches: Sequence[Batch], stock_trainer: bool = False) -> tuple[Result, Batch]:
    """`find` in each batch in turn, until something differs; the counts of those compared until then."""
    compared, batch = 0, batches[0]
    for batch in batches:
        result = find(engine, model, batch, stock_trainer)
        if result.mismatched:
            return result, batch
        compared += result.compared
    return Result(compared, 0), batch


def find(engine: Any, model: Any, batch: Batch, stock_trainer: bool = False) -> Result:
    """Compare every sampled token; of the first that differs, draw and score again with everything recorded.

    Args:
        engine: a `Sampler`, run eagerly.
        model: the trainer's, from `make_trainable`; with `stock_trainer` one of transformers as it is.
    """
    drawn = _draw(engine, batch)
    scored = [row for at in range(0, len(drawn), batch.rows) for row in _score(model, batch, drawn, at, stock_trainer)]
    compared = sum(len(row) for row in scored)
    differing = [
        (s, t)
        for s, (completion, row) in enumerate(zip(drawn, scored, strict=True))
        for t, (a, b) in enumerate(zip(completion.sampler_logprobs, row, strict=True))
        if not _same(a, b)
    ]
    if not differing:
        return Result(compared, 0)
    s, t = differing[0]
    ours, theirs, again, row = record(engine, model, batch, s, stock_trainer)
    was = drawn[s].sampler_logprobs[t], scored[s][t]
    now = again.sampler_logprobs[t : t + 1], row[t : t + 1]
    if again.token_ids != drawn[s].token_ids or _same(now[0][0], now[1][0]):
        pairs = zip(("sampler", "trainer"), was, now, strict=True)
        vanished = [f"{side}    sequence {s}, token {t}: {word(a)}, then {word(*b)}" for side, a, b in pairs]
        return Result(compared, len(differing), vanished=vanished)
    start = len(batch.prompts[s])
    found = first_difference(ours, theirs) or first_nan(ours, theirs)
    place, position, a, b = found or (None, start - 1 + t, None, None)
    return Result(compared, len(differing), First(s, t, *was, start, again.token_ids, position, place, a, b))


def record(
    engine: Any, model: Any, batch: Batch, s: int, stock_trainer: bool = False
) -> tuple[Recorder, Recorder, Completion, list[float]]:
    """Draw and score once more, with all that is computed for sequence `s` recorded; also its completion and its scores."""
    ours, theirs = Recorder(engine.model), Recorder(model)
    with ours.recording(_attentions(engine)), _following(engine, batch.seeds[s], ours):
        drawn = _draw(engine, batch)
    with theirs.recording(), _packed(model, batch, drawn, s, theirs, stock_trainer):
        at = s // batch.rows * batch.rows
        row = _score(model, batch, drawn, at, stock_trainer)[s - at]
    start = len(batch.prompts[s])
    positions = list(range(start - 1, start - 1 + len(row)))
    for recorder, values in ((ours, drawn[s].sampler_logprobs), (theirs, row)):
        words = torch.tensor(values, dtype=torch.float32)[:, None]
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
    """By position; what was computed twice, as before a preemption, counts as it was computed last."""
    blocks = recorder.trace.get(place, [])
    return {p: Side(block, i, recorder) for block in blocks for i, p in enumerate(block.positions)}


def equal(a: Tensor, b: Tensor) -> bool:
    """In bits, of the columns that both have: a padded vocabulary is longer."""
    if a.dtype != b.dtype:
        return False
    columns = min(len(a), len(b))
    return bits.compare(a[:columns], b[:columns]) is None


def _same(a: float, b: float) -> bool:
    """NaN equals nothing here."""
    return a == a and word(a) == word(b)


def word(value: float = math.nan) -> str:
    """An fp32 number and its bits."""
    bits_of = int(torch.tensor(value, dtype=torch.float32).view(torch.int32))
    return f"{value:.9g} (0x{bits_of & 0xFFFFFFFF:08X})"


def _draw(engine: Any, batch: Batch) -> list[Completion]:
    engine.llm.reset_prefix_cache()
    return engine.generate(
        batch.prompts, batch.seeds, temperature=batch.temperature, max_tokens=batch.max_tokens, ignore_eos=True
    )


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


def _score(model: Any, batch: Batch, drawn: Sequence[Completion], at: int, stock: bool) -> list[list[float]]:
    """The trainer's log-probs of one micro-batch, of the sequences from `at` on."""
    part = slice(at, at + batch.rows)
    if stock:
        return _score_stock(model, batch.prompts[part], drawn[part], batch.temperature)
    found = score(model, batch.prompts[part], drawn[part], batch.temperature, Layout(batch.rows))
    return [row.tolist() for row in found]


@torch.no_grad()
def _score_stock(
    model: Any, prompts: Sequence[Sequence[int]], drawn: Sequence[Completion], temperature: float
) -> list[list[float]]:
    """By transformers' own forward, one sequence at a time."""
    found = []
    for prompt, completion in zip(prompts, drawn, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]], device=next(model.parameters()).device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
        found.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist())
    return found


@contextmanager
def _packed(model: Any, batch: Batch, drawn: Sequence[Completion], s: int, recorder: Recorder, stock: bool) -> Iterator[None]:
    """Tell a recorder which rows of the trainer's forward are sequence `s`: part of a packed row, or all of its own."""
    at = s if stock else s // batch.rows * batch.rows
    until = at + (1 if stock else batch.rows)
    scored = [len(c.token_ids) for c in drawn[at:until]]
    lengths = [len(p) + n for p, n in zip(batch.prompts[at:until], scored, strict=True)]
    first, start, count = sum(lengths[: s - at]), len(batch.prompts[s]), lengths[s - at]
    own = [*batch.prompts[s], *drawn[s].token_ids]

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

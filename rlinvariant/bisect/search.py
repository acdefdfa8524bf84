"""Find the first recorded value in which sampler and trainer differ."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from rlinvariant import bits
from rlinvariant.bisect.both_sides import record, score_rows
from rlinvariant.bisect.record import Block, Place, Recorder, fp32
from rlinvariant.bisect.trials import Trial, Tried, begun, draw
from rlinvariant.metrics import mismatches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlinvariant.sampler.engine import Sampler

PADDED_ROLES = ("lm_head", "scaled logits")  # whose value may have columns beyond the vocabulary


@dataclass(frozen=True)
class Side:
    """Holds one side's value of a place at a position, and how it was made: row `index` of a recorder's block."""

    block: Block
    index: int
    recorder: Recorder

    @property
    def value(self) -> Tensor:
        """Return the value [D], on the CPU."""
        return self.block.value[self.index]


@dataclass(frozen=True)
class First:
    """Describes the first difference: in the log-probs, and among the recorded values.

    Args:
        sequence: index in the batch of the first sequence whose log-probs differ.
        token: index in its completion of the first log-prob that differs.
        sampler_logprob, trainer_logprob: that log-prob on both sides.
        prompt_tokens: length of the sequence's prompt.
        token_ids: the completion's.
        position: absolute, the first at which any recorded value differs.
        place: the first in order of execution at that position; None if nothing that was recorded differs.
        sampler, trainer: the value at that place; None where `place` is.
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
    """Holds what the trials gave.

    Args:
        compared: log-probs compared; `mismatched` of them differ.
        first: the first difference.
        vanished: lines that say how a difference did not come back when everything was recorded.
        tried: the trials up to this.
    """

    compared: int
    mismatched: int
    first: First | None = None
    vanished: list[str] | None = None
    tried: list[Tried] = field(default_factory=list)


def find_any(
    engine: "Sampler", model: "PreTrainedModel", trials: Sequence[Trial], stock_trainer: bool = False
) -> tuple[Result, Trial]:
    """Run `find` on each trial in turn until something differs; if nothing does, return the counts of all."""
    compared, tried = 0, []
    for asked in trials:
        trial = begun(engine, asked, engine.max_model_len - asked.max_tokens - 1)
        result = find(engine, model, trial, stock_trainer)
        tried += result.tried
        if result.mismatched:
            return replace(result, tried=tried), trial
        compared += result.compared
    return Result(compared, 0, tried=tried), trials[-1]


def find(engine: "Sampler", model: "PreTrainedModel", trial: Trial, stock_trainer: bool = False) -> Result:
    """Compare every sampled token; if one differs, draw and score again with the sequence of the first recorded.

    Args:
        engine: a `Sampler`, run eagerly.
        model: the trainer's, from `make_trainable`; with `stock_trainer` transformers' own.
        trial: what to draw.
        stock_trainer: score as with a stock trainer.
    """
    trace, drawn = draw(engine, trial)
    tried = [Tried.of(trial, trace)]
    scored = [row for at in range(0, len(drawn), trial.rows) for row in score_rows(model, trial, drawn, at, stock_trainer)]
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


def first_difference(ours: Recorder, theirs: Recorder) -> tuple[Place, int, Side, Side] | None:
    """Return the first place, position and sides that differ, None if nothing does.

    The smallest position comes first, since later ones read it through the cache; at one position, the place executed first.
    """
    best: tuple[int, Place] | None = None
    for place in theirs.trace:
        a, b = side_at(ours, place), side_at(theirs, place)
        for position in sorted(a.keys() & b.keys()):
            if best is not None and position >= best[0]:
                break
            x, y = a[position].value, b[position].value
            if len(x) != len(y) and place[1] not in PADDED_ROLES:
                break  # a stock model's layout is another: its rope table is twice as wide
            if not equal(x, y):
                best = position, place
    if best is None:
        return None
    position, place = best
    return place, position, side_at(ours, place)[position], side_at(theirs, place)[position]


def first_nan(ours: Recorder, theirs: Recorder) -> tuple[Place, int, Side, Side] | None:
    """Return where both sides first have the same NaN, from which a log-prob of NaN comes; None if neither has one."""
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
    """Return a place's values by position; of what was computed twice, as after a preemption, the last."""
    blocks = recorder.trace.get(place, [])
    return {p: Side(block, i, recorder) for block in blocks for i, p in enumerate(block.positions)}


def equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two values [D] have one dtype and the same bits in the columns that both have.

    A padded vocabulary has more columns.
    """
    columns = min(len(a), len(b))
    return a.dtype == b.dtype and bool(bits.same(a[:columns], b[:columns]))


def _differing(a: Sequence[float], b: Sequence[float]) -> list[int]:
    """Return the indices at which two lists of fp32 numbers are not the same bits; NaN equals nothing here."""
    return np.flatnonzero(mismatches(np.asarray(a, np.float32), np.asarray(b, np.float32))).tolist()


def shown(value: Tensor) -> str:
    """Return a number and its bits in words."""
    return f"{value.item():.9g} ({bits.word(value)})"

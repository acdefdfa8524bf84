"""Draw and score, with everything that either side computes for one sequence recorded.

B: sequences of a forward, T: its tokens, packed or padded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlinvariant.bisect.record import LOGPROB_PLACE, Block, Recorder, fp32
from rlinvariant.bisect.trials import Trial, draw
from rlinvariant.rollout import Completion
from rlinvariant.trainer.score import Layout, score, stock_score
from rlinvariant.types import Untyped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlinvariant.sampler.engine import Sampler


def record(
    engine: "Sampler", model: "PreTrainedModel", trial: Trial, s: int, stock_trainer: bool = False
) -> tuple[Recorder, Recorder, Completion, list[float]]:
    """Draw and score a trial with everything recorded that is computed for sequence `s`.

    Returns the sampler's recorder, the trainer's recorder, the sequence's completion and the trainer's log-probs of it.
    """
    ours, theirs = Recorder(engine.model), Recorder(model)
    with ours.recording(attention_layers(engine)), _following(engine, trial.seeds[s], ours):
        drawn = draw(engine, trial)[1]
    with theirs.recording(), expecting(model, trial, drawn, s, theirs, stock_trainer):
        at = s // trial.rows * trial.rows
        row = score_rows(model, trial, drawn, at, stock_trainer)[s - at]
    start = len(trial.prompts[s])
    positions = list(range(start - 1, start - 1 + len(row)))
    for recorder, values in ((ours, drawn[s].sampler_logprobs), (theirs, row)):
        words = fp32(values)[:, None]
        recorder.trace[LOGPROB_PLACE] = [Block(positions, words, None, None, None, len(words))]
    return ours, theirs, drawn[s], row


def score_rows(model: "PreTrainedModel", trial: Trial, drawn: Sequence[Completion], at: int, stock: bool) -> list[list[float]]:
    """Return the trainer's log-probs of one micro-batch: `trial.rows` sequences from `at` on."""
    part = slice(at, at + trial.rows)
    given = model, trial.prompts[part], drawn[part], trial.temperature
    return [row.tolist() for row in (stock_score(*given) if stock else score(*given, Layout(trial.rows), trial.truncation))]


def attention_layers(engine: "Sampler") -> list[Untyped]:
    """Return vLLM's attention layers, in the order of the layers."""
    layers = engine._runner.compilation_config.static_forward_context
    return [layers[name] for name in sorted(layers, key=lambda n: next(int(x) for x in n.split(".") if x.isdigit()))]


@contextmanager
def _following(engine: Any, seed: int, recorder: Recorder) -> Iterator[None]:
    """Tell a recorder, at every step of the engine, which rows belong to the request that was given this seed."""
    runner = engine._runner

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        requests, starts = runner.input_batch, runner.query_start_loc.np
        tokens = next(x for x in (kwargs.get("input_ids"), kwargs.get("positions"), *args) if isinstance(x, Tensor))
        rows, first, own = range(0), 0, []
        for i, name in enumerate(requests.req_ids):
            if runner.requests[name].sampling_params.seed == seed:
                rows, first, own = range(starts[i], starts[i + 1]), int(requests.num_computed_tokens_cpu[i]), [i]
        positions = [first + i for i in range(len(rows))]  # the scheduler's count, not what the model is told
        recorder.expect(rows, positions, len(tokens))
        recorder.expect_logits(own, positions[-1:], len(requests.req_ids))

    hook = engine.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def expecting(
    model: "PreTrainedModel", trial: Trial, drawn: Sequence[Completion], s: int, recorder: Recorder, stock: bool
) -> Iterator[None]:
    """Tell a recorder which rows of the trainer's forward are sequence `s`: a part of a packed row, or a row of its own."""
    at = s if stock else s // trial.rows * trial.rows
    until = at + (1 if stock else trial.rows)
    scored = [len(c.token_ids) for c in drawn[at:until]]
    lengths = [len(p) + n for p, n in zip(trial.prompts[at:until], scored, strict=True)]
    first, start, count = sum(lengths[: s - at]), len(trial.prompts[s]), lengths[s - at]
    own = [*trial.prompts[s], *drawn[s].token_ids]

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_BT = kwargs["input_ids"]
        mine = ids_BT[0, first : first + count].tolist() == own  # a stock model has a forward for each sequence
        predicted = range(start - 1, count - 1) if mine else ()
        rows = range(first, first + count) if mine else ()
        recorder.expect(rows, [r - first for r in rows], ids_BT.numel())
        if stock:
            recorder.expect_logits(predicted, predicted, ids_BT.numel())
        else:
            before = sum(scored[: s - at])
            recorder.expect_logits([before + i for i in range(len(predicted))], predicted, sum(scored))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()

"""Step an engine by hand: requests arrive and leave while others decode, and what the scheduler does is counted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from rlinvariant.rollout import ALL_TOKENS, Completion, Truncation
from rlinvariant.sampler.engine import Sampler
from rlinvariant.types import Untyped


@dataclass(frozen=True)
class Request:
    """Describes a completion to draw.

    Args:
        prompt: token ids, one or more.
        seed: in [0, 2**63), as for `Sampler.generate`.
        temperature: 0 for greedy.
        max_tokens: most tokens of the completion.
        arrives: engine step before which it is added.
        aborts: engine step before which it is aborted, or None.
        ignore_eos: whether it runs to the last of max_tokens, whatever is drawn.
        scored: whether the log-probs of the prompt's own tokens are asked for too, at temperature 1.
        truncation: which tokens it is drawn from.
    """

    prompt: tuple[int, ...]
    seed: int
    temperature: float
    max_tokens: int = 24
    arrives: int = 0
    aborts: int | None = None
    ignore_eos: bool = False
    scored: bool = False
    truncation: Truncation = ALL_TOKENS


@dataclass
class Trace:
    """Counts what an engine did with some requests."""

    completions: list[Completion | None]  # None where aborted
    prompt_logprobs: list[list[float]] = field(default_factory=list)  # from token 1 on, where a request asked for them
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache
    preemptions: int = 0
    together: int = 0  # most requests in one step
    chunks: int = 0  # times that a prompt was left unfinished
    aborted: int = 0
    steps: int = 0
    decoding: list[int] = field(default_factory=list)  # requests that had tokens when another arrived


@contextmanager
def counting(engine: Sampler) -> Iterator[Trace]:
    """Count, in the trace that is handed out, what the engine's scheduler does inside the `with` block."""
    trace, scheduler = Trace([]), engine.llm.llm_engine.engine_core.engine_core.scheduler  # pyright: ignore
    preempt, schedule = scheduler._preempt_request, scheduler.schedule

    def counted_preempt(*args: Any, **kwargs: Any) -> Any:
        trace.preemptions += 1
        return preempt(*args, **kwargs)

    def counted_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        trace.together = max(trace.together, len(output.num_scheduled_tokens))
        for name in output.num_scheduled_tokens:
            request = scheduler.requests[name]
            trace.chunks += request.num_computed_tokens < request.num_prompt_tokens
        return output

    scheduler._preempt_request, scheduler.schedule = counted_preempt, counted_schedule
    try:
        yield trace
    finally:
        del scheduler._preempt_request, scheduler.schedule  # the instance's: the class's own are back


def drive(
    engine: Sampler,
    requests: Sequence[Request],
    *,
    cold: bool = True,
    preempt: Callable[[int], bool] = lambda step: False,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Trace:
    """Run requests to their end, stepping the engine by hand, and count what the scheduler does.

    Args:
        engine: with nothing running in it.
        requests: in any order of arrival.
        cold: whether the prefixes of earlier requests are forgotten first.
        preempt: told the number of an engine step, says whether all running requests lose their pages before it; vLLM then
            computes them again.
        advance: called after each step that ended requests, with how many tokens all ended requests have.

    Raises:
        RuntimeError: `cold`, and a request is still running.
    """
    if cold and not engine.llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not reset its prefix cache: a request is still running")
    llm: Any = engine.llm.llm_engine
    waiting, step, drawn = dict(enumerate(requests)), 0, 0
    scheduler = llm.engine_core.engine_core.scheduler
    with counting(engine) as trace:
        trace.completions, trace.prompt_logprobs = [None] * len(requests), [[] for _ in requests]
        ids = {f"{id(trace)}-{i}": i for i in range(len(requests))}
        names, live = {i: name for name, i in ids.items()}, set[str]()
        try:
            while waiting or llm.has_unfinished_requests():
                for i in [i for i, r in waiting.items() if r.arrives <= step]:
                    request = waiting.pop(i)
                    trace.decoding.append(sum(r.num_output_tokens > 0 for r in scheduler.running))
                    live.add(names[i])
                    llm.add_request(names[i], {"prompt_token_ids": list(request.prompt)}, params(engine, request))
                leaving = [names[i] for i, r in enumerate(requests) if r.aborts == step and i not in waiting]
                llm.abort_request(leaving)
                trace.aborted += sum(name in live for name in leaving)
                live.difference_update(leaving)
                if preempt(step):
                    engine.llm.reset_prefix_cache(reset_running_requests=True)
                for output in llm.step():
                    if output.finished:
                        i, done = ids[output.request_id], output.outputs[0]
                        live.discard(output.request_id)
                        logprobs = [row[t].logprob for t, row in zip(done.token_ids, done.logprobs, strict=True)]
                        trace.completions[i] = Completion(list(done.token_ids), logprobs)
                        trace.cached_tokens += output.num_cached_tokens or 0
                        if requests[i].scored:
                            rows = zip(requests[i].prompt[1:], output.prompt_logprobs[1:], strict=True)
                            trace.prompt_logprobs[i] = [row[t].logprob for t, row in rows]
                        drawn += len(done.token_ids)
                        advance(drawn)
                step += 1
        except BaseException:  # an interrupted batch must not linger: the next one would wait for it forever
            llm.abort_request(list(ids))
            raise
    trace.steps = step
    return trace


def params(engine: Sampler, request: Request) -> Untyped:
    """Return vLLM's `SamplingParams` of a request."""
    how = {"ignore_eos": request.ignore_eos, "logprobs": 0, **asdict(request.truncation)}
    params = engine.params(request.seed, temperature=request.temperature, max_tokens=request.max_tokens, **how)
    if request.scored:
        params.prompt_logprobs = 0
    return params

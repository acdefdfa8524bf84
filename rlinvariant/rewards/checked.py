"""The guard at the user's border: a reward function is called under a time limit, and what it fails on has a name."""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.rewards.cage import Cage
from rlinvariant.rewards.grades import Failure, Graded, attempt, attempt_async, cut, merged, to_retry
from rlinvariant.rewards.limits import RewardLimits
from rlinvariant.rewards.watchdog import OverdueReward, watchdog
from rlinvariant.text import plural, printable, say
from rlinvariant.types import RewardArguments, RewardCall

DEFAULTS = RewardLimits()
ASYNC_GRACE_S = 0.5  # by which an event loop that is alive ends a coroutine before the watchdog's signal


def reward_problems(rewards: object) -> list[str]:
    """List the rewards that are none: neither a function, nor a reward model or its name."""
    return [
        f"reward function {index}: expected a function, a reward model or its name, got {type(reward).__name__}"
        for index, reward in enumerate(rewards if isinstance(rewards, list) else [rewards])
        if not (callable(reward) or isinstance(reward, str))
    ]


def checked_reward(
    reward: Any,
    limits: RewardLimits = DEFAULTS,
    on_failures: Callable[[str, int], object] | None = None,
    called: str | None = None,
) -> Any:
    """Wrap a TRL reward function so that it ends in time, and a failure names the function, the step and the sample.

    The wrapper keeps the function's name, which TRL logs, and is a coroutine function if `reward` is one. `None`
    passes: it is TRL's way to say that a reward does not apply to a sample. Reward models pass through unwrapped.

    Args:
        reward: a reward function, a reward model, or its name.
        limits: the time limit, whether the function runs in processes of its own, and what a failure leads to.
        on_failures: called with a kind ("error", "timeout", "crash") and how many failures of it were survived.
        called: its name; None: the function's own.

    Raises:
        ConfigErrors: it is none of these.
        UserError: a function that cannot be sent to another process; and from the wrapper: with reward_errors=stop, the
            function failed on a sample; always, it did not return one value for each sample, or passed its limit in the
            trainer's own process.
    """
    if problems := reward_problems(reward):
        raise ConfigErrors(problems)
    if not inspect.isroutine(reward) and (isinstance(reward, str) or hasattr(reward, "forward")):
        return reward
    function: Callable[..., Any] = reward
    name = printable(str(called or getattr(getattr(function, "func", function), "__name__", type(function).__name__)))
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(reward).__call__)
    cage = Cage(function, name, limits) if limits.reward_cage else None
    dog = watchdog()
    dog.listen()

    def where(arguments: Mapping[str, Any]) -> str:
        state = arguments.get("trainer_state")
        # global_step counts finished optimizer steps; the one in progress is the next.
        return f"reward function {name}" + (f", step {state.global_step + 1}" if state is not None else "")

    def synchronous(**arguments: Any) -> list[float | None]:
        place = where(arguments)
        try:
            with dog.watching(place, limits):
                graded = grade_here(function, arguments) if cage is None else cage.grade(arguments)
        except OverdueReward as overdue:
            dog.abandon()
            raise UserError(str(overdue)) from None
        return settled(graded, place, arguments, limits, on_failures)

    async def asynchronous(**arguments: Any) -> list[float | None]:
        place = where(arguments)
        with dog.watching(place, limits, ASYNC_GRACE_S):
            if cage is None:
                try:
                    graded = await asyncio.wait_for(grade_here_async(function, arguments), limits.limit_s)
                except TimeoutError:
                    raise UserError(limits.overdue(place)) from None
            else:
                graded = await asyncio.to_thread(cage.grade, arguments)
        return settled(graded, place, arguments, limits, on_failures)

    wrapper = asynchronous if is_async else synchronous
    wrapper.__name__ = wrapper.__qualname__ = name
    return wrapper


def grade_here(function: RewardCall, arguments: RewardArguments) -> Graded:
    """Grade a batch in this process, and if that fails, its samples one by one."""
    parts = [range(len(arguments["completions"]))]
    attempts = [attempt(function, arguments)]
    alone = [attempt(function, cut(arguments, [i]), i) for i in to_retry(parts, attempts)]
    return merged(parts, attempts, alone)


async def grade_here_async(function: RewardCall, arguments: RewardArguments) -> Graded:
    """Grade a batch on the running event loop, and if that fails, its samples by calls of their own, at once."""
    parts = [range(len(arguments["completions"]))]
    attempts = [await attempt_async(function, arguments)]
    retried = to_retry(parts, attempts)
    return merged(parts, attempts, await asyncio.gather(*[attempt_async(function, cut(arguments, [i])) for i in retried]))


def settled(
    graded: Graded,
    where: str,
    arguments: RewardArguments,
    limits: RewardLimits,
    on_failures: Callable[[str, int], object] | None,
) -> list[float | None]:
    """Turn grades into rewards: raise for a failure, or put in its place what `reward_errors` says, say so and count it."""
    failed = {i: grade for i, grade in enumerate(graded.grades) if isinstance(grade, Failure)}
    for failure in failed.values():
        if failure.kind == "wrong":
            raise UserError(f"{where}: {failure.text}") from failure.cause
    lines = [f"{where}, sample {i}: {failure.text}" for i, failure in failed.items()]
    lines += [f"{where}, no sample alone, only the whole batch: {failure.text}" for failure in graded.together]
    failures: Sequence[Failure] = [*failed.values(), *graded.together]
    if failures and limits.reward_errors == "stop":
        raise UserError(lines[0]) from failures[0].cause
    for kind in ("error", "timeout", "crash"):
        if on_failures is not None and (count := sum(failure.kind == kind for failure in failures)):
            on_failures(kind, count)
    if failures:
        others = f"; and {plural(len(lines) - 1, 'failure')} more in this batch" if len(lines) > 1 else ""
        say(f"{lines[0]}{others} (reward_errors={limits.reward_errors})", error=True)
    for name, value in graded.metrics:
        arguments["log_metric"](name, value)
    for column, values in graded.extras.items():
        arguments["log_extra"](column, values)
    substitute = 0.0 if limits.reward_errors == "zero" else None
    return [substitute if isinstance(grade, Failure) else grade for grade in graded.grades]

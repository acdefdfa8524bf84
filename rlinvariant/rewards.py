"""Guards at the user's border: reward functions and datasets, with errors that say where."""

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from rlinvariant.errors import UserError


def checked_reward(reward: Any) -> Any:
    """Wrap a TRL reward function so that a failure names the function, the step and the sample.

    The wrapper keeps the function's name, which TRL logs, and is a coroutine function if `reward` is one. `None`
    passes: it is TRL's way to say that a reward does not apply to a sample. Reward models pass through unwrapped.

    Raises (the wrapper):
        UserError: the function raised, or returned another number of rewards than there are completions, or one that
            is not a finite number.
    """
    if not inspect.isroutine(reward) and (not callable(reward) or hasattr(reward, "forward")):
        return reward
    function: Callable[..., Any] = reward
    name = str(getattr(getattr(function, "func", function), "__name__", type(function).__name__))

    def failure(arguments: dict[str, Any], raised: Sequence[bool], error: Exception) -> UserError:
        # The function was called again on each sample alone, to find the one that it fails on.
        sample = f"sample {list(raised).index(True)}" if any(raised) else "no sample alone, only the whole batch"
        return UserError(f"{where(arguments)}, {sample}: raised {type(error).__name__}: {' '.join(str(error).split())}")

    def where(arguments: dict[str, Any]) -> str:
        state = arguments.get("trainer_state")
        # global_step counts finished optimizer steps; the one in progress is the next.
        return f"reward function {name}" + (f", step {state.global_step + 1}" if state is not None else "")

    def synchronous(**arguments: Any) -> list[float | None]:
        try:
            rewards = function(**arguments)
        except Exception as error:
            raise failure(arguments, [_raises(function, one) for one in _singles(arguments)], error) from error
        return _validated(rewards, len(arguments["completions"]), where(arguments))

    async def asynchronous(**arguments: Any) -> list[float | None]:
        try:
            rewards = await function(**arguments)
        except Exception as error:
            results = await asyncio.gather(*[function(**one) for one in _singles(arguments)], return_exceptions=True)
            raise failure(arguments, [isinstance(result, Exception) for result in results], error) from error
        return _validated(rewards, len(arguments["completions"]), where(arguments))

    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(reward).__call__)
    wrapper = asynchronous if is_async else synchronous
    wrapper.__name__ = wrapper.__qualname__ = name
    return wrapper


def _singles(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each sample alone: lists that have one entry per completion are cut."""
    count = len(arguments["completions"])
    per_sample = {key for key, value in arguments.items() if isinstance(value, list) and len(value) == count}
    return [
        {key: value[index : index + 1] if key in per_sample else value for key, value in arguments.items()}
        for index in range(count)
    ]


def _raises(function: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    try:
        function(**arguments)
    except Exception:  # the caller holds the error; this only finds the sample
        return True
    return False


def _validated(rewards: Any, count: int, where: str) -> list[float | None]:
    if isinstance(rewards, (str, bytes)) or not hasattr(rewards, "__len__") or not hasattr(rewards, "__iter__"):
        raise UserError(f"{where}: returned {type(rewards).__name__}, expected a list of {count} numbers")
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if len(rewards) != count:
        first = f", sample {len(rewards)} is the first without one" if len(rewards) < count else ""
        raise UserError(f"{where}: returned {len(rewards)} rewards, expected {count}, one per completion{first}")
    for index, value in enumerate(rewards):
        value = value.item() if hasattr(value, "item") else value
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise UserError(f"{where}, sample {index}: returned {value!r}, expected a finite number or None")
    return list(rewards)


def check_dataset(dataset: Any, name: str) -> None:
    """Refuse a dataset that is empty, has a row without `prompt`, or asks for what is not supported."""
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise UserError(f"{name} dataset: expected a datasets.Dataset, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise UserError(f"{name} dataset: expected at least one row, found none")
    columns: Sequence[str] = dataset.column_names
    found = f"columns found: {', '.join(columns)}"
    if "prompt" not in columns:
        raise UserError(f"{name} dataset, row 0: no `prompt`; {found}")
    for index, prompt in enumerate(dataset["prompt"]):
        if not prompt:
            raise UserError(f"{name} dataset, row {index}: no `prompt`, found {prompt!r}; {found}")
    for column in ("image", "images", "tools"):
        if column in columns:
            raise UserError(f"{name} dataset: column `{column}` is not supported, only text prompts; drop it")

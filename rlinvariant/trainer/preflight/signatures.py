"""Find which columns reward functions ask for, by their signatures, before any of them is called."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from rlinvariant.trainer.preflight.rows import KEPT_COLUMNS, RESERVED_COLUMNS
from rlinvariant.types import RewardCall


def functions(rewards: object) -> list[RewardCall]:
    """Return the reward functions among what the user gave: models and names of models are not called with columns."""
    given = rewards if isinstance(rewards, list) else [rewards]
    return [f for f in given if callable(f) and (inspect.isroutine(f) or not hasattr(f, "forward"))]


def needed_columns(rewards: object) -> list[str]:
    """Return the arguments without a default that TRL does not give by itself: columns, none of whose values may be None."""
    own = {*RESERVED_COLUMNS, *KEPT_COLUMNS}
    return sorted({name for function in functions(rewards) for name in _required(function)} - own)


def signature_problems(rewards: object, columns: Sequence[str], name: str) -> list[str]:
    """List the reward functions that a data set's columns cannot be handed to.

    Args:
        rewards: reward functions, models or names, one or a list.
        columns: of the data set.
        name: "train" or "eval".
    """
    given = {*RESERVED_COLUMNS, *columns} - {*KEPT_COLUMNS}
    found = []
    for function in functions(rewards):
        where = f"reward function {_name(function)}"
        for argument in _required(function):
            if argument in KEPT_COLUMNS:
                fix = f"`{argument}s` has all of them" if argument in ("prompt", "completion") else "rename it"
                found.append(f"{where}: needs `{argument}`, which TRL does not hand on; {fix}")
            elif argument not in given:
                fix = f"add it to the {name} dataset, whose columns are {', '.join(columns)}"
                found.append(f"{where}: needs `{argument}`, and there is no such column; {fix}")
        if surplus := sorted(given - _taken(function, given)):
            names = ", ".join(f"`{one}`" for one in surplus)
            found.append(f"{where}: does not take {names}, which TRL gives it; end its arguments with **_")
    return found


def _parameters(function: Callable[..., Any]) -> Sequence[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a builtin, nothing is known
        return [inspect.Parameter("anything", inspect.Parameter.VAR_KEYWORD)]


def _required(function: Callable[..., Any]) -> list[str]:
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)
    return [p.name for p in _parameters(function) if p.kind in plain and p.default is inspect.Parameter.empty]


def _taken(function: Callable[..., Any], given: set[str]) -> set[str]:
    parameters = _parameters(function)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return given
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _name(function: Any) -> str:
    return str(getattr(getattr(function, "func", function), "__name__", type(function).__name__))

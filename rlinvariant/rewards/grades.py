"""The grades that a reward function gives: for each sample a number, None, or a failure with the line that says it."""

import reprlib
import struct
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from rlinvariant.errors import one_line
from rlinvariant.text import plural, printable
from rlinvariant.types import JsonObject, RewardArguments, RewardCall


@dataclass(frozen=True)
class Failure:
    """Says how a reward function failed.

    Args:
        kind: "error": it raised, or gave something else than a number; "timeout"; "crash": its process died; "wrong": it gave
            not one value for each sample, so that none can be blamed.
        text: one line, without control characters.
        cause: what it raised, where that was in this process.
    """

    kind: Literal["error", "timeout", "crash", "wrong"]
    text: str
    cause: BaseException | None = field(default=None, compare=False)


Grade: TypeAlias = float | None | Failure


@dataclass
class Attempt:
    """Holds what came of one call: a grade for each sample or one failure, and what the function logged meanwhile."""

    result: list[Grade] | Failure
    metrics: list[tuple[str, Any]] = field(default_factory=list)
    extras: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class Graded:
    """Holds a batch's grades, failures of several samples together of which none failed alone, and what was logged."""

    grades: list[Grade]
    together: list[Failure]
    metrics: list[tuple[str, Any]]
    extras: dict[str, list[Any]]


def cut(arguments: RewardArguments, samples: Sequence[int]) -> JsonObject:
    """Return a call's arguments for some of its samples: lists that have one entry per completion are cut."""
    count = len(arguments["completions"])
    return {
        key: [value[i] for i in samples] if isinstance(value, list) and len(value) == count else value
        for key, value in arguments.items()
    }


def attempt(function: RewardCall, arguments: RewardArguments, first: int = 0) -> Attempt:
    """Call a function once. What it logs is kept until it is known whether the call counts.

    Args:
        first: number of the first sample, for messages.
    """
    made, logging = recorder(arguments)
    try:
        returned = function(**{**arguments, **logging})
    except (Exception, SystemExit) as error:
        made.result = raised(error)
    else:
        made.result = grades(returned, len(arguments["completions"]), first)
    return made


async def attempt_async(function: RewardCall, arguments: RewardArguments) -> Attempt:
    """Call a coroutine function once, as `attempt` does."""
    made, logging = recorder(arguments)
    try:
        returned = await function(**{**arguments, **logging})
    except (Exception, SystemExit) as error:
        made.result = raised(error)
    else:
        made.result = grades(returned, len(arguments["completions"]))
    return made


def recorder(arguments: RewardArguments) -> tuple[Attempt, JsonObject]:
    """Return an attempt without a result, and TRL's two functions for logging, as far as the call has them, that fill it."""
    made = Attempt([])
    logging = {
        "log_metric": lambda name, value: made.metrics.append((name, value)),
        "log_extra": lambda column, values: made.extras.setdefault(column, []).extend(values),
    }
    return made, {name: record for name, record in logging.items() if arguments.get(name) is not None}


def to_retry(parts: Sequence[Sequence[int]], attempts: Sequence[Attempt]) -> list[int]:
    """List the samples that are called alone next, to find the one that fails: those of parts that failed as a whole."""
    return [i for part, made in zip(parts, attempts, strict=True) if len(part) > 1 and _retried(made) for i in part]


def _retried(made: Attempt) -> bool:
    return isinstance(made.result, Failure) and made.result.kind != "wrong"


def merged(parts: Sequence[Sequence[int]], attempts: Sequence[Attempt], alone: Iterable[Attempt]) -> Graded:
    """Put a batch together again, in the order of its samples.

    Args:
        parts: the samples of each first call.
        attempts: what came of these calls.
        alone: what came of the samples of `to_retry`, each alone.
    """
    pieces: list[tuple[int, Attempt]] = []  # how many samples, and what came of them
    together, single = [], iter(alone)
    for part, made in zip(parts, attempts, strict=True):
        if len(part) > 1 and _retried(made):
            own = [next(single) for _ in part]
            pieces += [(1, one) for one in own]
            if isinstance(made.result, Failure) and not any(_failed(one) for one in own):
                together.append(made.result)
        else:
            pieces.append((len(part), made))
    columns = dict.fromkeys(column for _, made in pieces for column in made.extras)
    return Graded(
        [g for n, made in pieces for g in ([made.result] * n if isinstance(made.result, Failure) else made.result)],
        together,
        [entry for _, made in pieces if not isinstance(made.result, Failure) for entry in made.metrics],
        {column: [x for n, made in pieces for x in made.extras.get(column, [None] * n)] for column in columns},
    )


def _failed(made: Attempt) -> bool:
    return isinstance(made.result, Failure) or any(isinstance(grade, Failure) for grade in made.result)


def grades(returned: Any, count: int, first: int = 0) -> list[Grade] | Failure:
    """Read what a reward function returned for `count` samples: numbers that float32 can hold, or None, one for each."""
    if hasattr(returned, "tolist") and not isinstance(returned, (str, bytes)):
        returned = returned.tolist()  # a tensor of numbers, or an array
    sized = hasattr(returned, "__len__") and hasattr(returned, "__iter__")
    if not sized or isinstance(returned, (str, bytes, Mapping, Set)):
        return Failure("wrong", f"returned {type(returned).__name__}, expected a list of {plural(count, 'number')}")
    values = list(returned)
    if len(values) != count:
        text = f"returned {plural(len(values), 'reward')}, expected {count}, one per completion"
        without = f", sample {first + len(values)} is the first without one" if len(values) < count else ""
        return Failure("wrong", text + without)
    return [_grade(value) for value in values]


def _grade(value: Any) -> Grade:
    try:
        number = value.item() if hasattr(value, "item") else value  # a number of torch or numpy
        if number is None:
            return None
        if isinstance(number, (str, bytes)):
            raise TypeError
        number = float(number)
        if number - number == 0:  # neither NaN nor infinite
            struct.pack("<f", number)  # in standard size it refuses what is too large
            return number
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    return Failure("error", f"returned {_shown(value)}, expected None or a finite number that float32 can hold")


def raised(error: BaseException) -> Failure:
    """Say what a function raised."""
    try:
        said = one_line(error)
    except Exception:  # an exception's own __str__ may fail
        said = "without a readable message"
    said = "" if said == type(error).__name__ else f": {said}"
    return Failure("error", f"raised {type(error).__name__}{printable(said)}", error)


def _shown(value: Any) -> str:
    try:
        return printable(reprlib.repr(value))
    except Exception:
        return f"a {type(value).__name__}"

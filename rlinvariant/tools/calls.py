"""The guard of a call: a tool that fails, hangs or returns no text is text to the model, or the end, as the run says."""

import asyncio
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from rlinvariant.errors import UserError
from rlinvariant.rewards.cage import Cage
from rlinvariant.rewards.grades import Failure
from rlinvariant.rewards.watchdog import OverdueReward, watchdog
from rlinvariant.text import say, shown
from rlinvariant.tools.limits import EnvironmentLimits, ToolLimits
from rlinvariant.tools.results import Garbage, Images, as_text, error_text, require_plain, without
from rlinvariant.types import JsonRow, ToolCall

ASYNC_GRACE_S = 0.5  # by which an event loop that is alive ends a coroutine before the watchdog's signal
FAILED = (Exception, SystemExit)


@dataclass(frozen=True)
class Place:
    """Says where a call stands: the optimizer step, from 1, the sample of the step over all ranks, and its turn, from 1.

    A step of None is an evaluation.
    """

    step: int | None
    sample: int
    turn: int

    def __str__(self) -> str:
        return f"{'evaluation' if self.step is None else f'step {self.step}'}, sample {self.sample}, turn {self.turn}"


class ToolFailure(Exception):
    """Tells the model a line, of which TRL makes a message."""


class Ended(str):
    """Marks the result of a call after which a sample has no more turns."""

    def __str__(self) -> str:
        return self  # TRL makes a message of str(result)


class ToolBox(dict[str, ToolCall]):
    """Maps a name to its guarded tool, and any other name to a function that tells the model which there are.

    Args:
        tools: by name.
        awaited: names of tools that are coroutines, which TRL looks for elsewhere.
        failure: makes what is raised of a line for the model.
    """

    def __init__(self, tools: Mapping[str, ToolCall], awaited: Collection[str], failure: Callable[[str], ToolFailure]) -> None:
        super().__init__(tools)
        self._awaited, self._failure = awaited, failure

    def __contains__(self, name: object) -> bool:
        return name not in self._awaited

    def __missing__(self, name: str) -> ToolCall:
        def unknown(**_: object) -> str:
            raise self._failure(f"no tool {shown(name, 60)}; there are: {', '.join([*self, *self._awaited])}")

        return unknown


class CagedTool:
    """Stands before a tool in a cage, which knows reward functions alone: the result is what it logs."""

    def __init__(self, func: ToolCall) -> None:
        self.func = func

    def __call__(self, completions: Sequence[JsonRow], log_extra: Callable[..., None], **_: object) -> list[float]:
        returned = [self.func(**arguments) for arguments in completions]
        log_extra("text", [as_text(asyncio.run(x) if inspect.iscoroutine(x) else x) for x in returned])
        return [0.0] * len(completions)


class Calls:
    """Calls tools and environments as `limits` says.

    Args:
        limits: the settings.
        special: the tokenizer's special tokens, as text.

    Attributes:
        error: what ends the run, where a call has failed so. Kept, not raised: TRL makes text of every exception, and all ranks
            have to end alike.
    """

    def __init__(self, limits: ToolLimits, special: Sequence[str] = ()) -> None:
        self._limits, self._special, self._cages = limits, special, dict[ToolCall, Cage]()
        self._here = replace(limits, tool_cage=False)
        self._of_environments = EnvironmentLimits(limits.tool_timeout, False, limits.tool_errors)
        self.error: UserError | None = None
        watchdog().listen()

    def cage(self, tools: Sequence[ToolCall]) -> None:
        """Start a process for each tool, where they are to have one. Raises UserError where a tool cannot be sent there."""
        if self._limits.tool_cage:
            self._cages |= {tool: Cage(CagedTool(tool), tool.__name__, self._limits, "tool") for tool in tools}

    def boxes(
        self, tools: Sequence[ToolCall], methods: Sequence[ToolCall], place: Callable[[], Place]
    ) -> tuple[ToolBox, dict[str, ToolCall]]:
        """Return one sample's guarded tools by name, as TRL's loop looks them up: plain ones, and coroutines.

        Args:
            tools: functions of no environment.
            methods: those of the sample's environment.
            place: says where the sample stands.
        """
        plain, awaited = {}, {}
        limits = [(tool, self._here) for tool in tools] + [(method, self._of_environments) for method in methods]
        for tool, own in limits:
            if inspect.iscoroutinefunction(tool) and tool not in self._cages:
                awaited[tool.__name__] = self._guarded_async(tool, place, own)
            else:
                plain[tool.__name__] = self._guarded(tool, place, own)
        return ToolBox(plain, awaited, self._failure), awaited

    def _guarded(self, tool: ToolCall, place: Callable[[], Place], limits: ToolLimits) -> ToolCall:
        name = tool.__name__

        def call(**arguments: Any) -> str:
            if self.error is not None:
                return Ended()
            self._require_fitting(tool, name, arguments)
            where = f"tool {name}, {(at := place())}"
            if (cage := self._cages.get(tool)) is not None:
                return self._in_cage(cage, arguments, where, at)
            try:
                with watchdog().watching(where, limits):
                    return self._read(tool(**arguments))
            except OverdueReward:
                return self._failed(where, self._overdue, loud=True)
            except FAILED as error:
                return self._raised(where, error)

        return call

    def _guarded_async(self, tool: ToolCall, place: Callable[[], Place], limits: ToolLimits) -> ToolCall:
        name = tool.__name__

        async def call(**arguments: Any) -> str:
            if self.error is not None:
                return Ended()
            self._require_fitting(tool, name, arguments)
            where = f"tool {name}, {place()}"
            try:
                with watchdog().watching(where, limits, ASYNC_GRACE_S):
                    return self._read(await asyncio.wait_for(tool(**arguments), self._limits.limit_s))
            except TimeoutError:
                return self._failed(where, self._overdue, loud=True)
            except FAILED as error:
                return self._raised(where, error)

        return call

    def _in_cage(self, cage: Cage, arguments: Mapping[str, Any], where: str, place: Place) -> str:
        state = SimpleNamespace(global_step=str(place))  # of which the cage makes the seed of a tool that draws at random
        try:
            graded = cage.grade({"completions": [arguments], "log_extra": True, "trainer_state": state})
        except UserError as error:
            return self._stop(f"{where}: {error}")
        (grade,) = graded.grades
        if not isinstance(grade, Failure):
            try:
                return self._read(graded.extras["text"][0])
            except Garbage as error:
                return self._failed(where, str(error))
        if grade.kind == "timeout":
            return self._failed(where, self._overdue, loud=True)
        text = grade.text.removeprefix("raised ")
        if text.startswith("Images: "):
            return self._stop(f"{where}: {text.removeprefix('Images: ')}")
        return self._failed(where, text.removeprefix("Garbage: "), loud=grade.kind == "crash")

    def reset(self, environment: object, reset: ToolCall, row: JsonRow, place: Place) -> str | None:
        """Reset an environment, and return what it says to the model; None, too, where that failed, and `error` says how."""
        where = f"environment {type(environment).__name__}, {place}, reset"
        try:
            with watchdog().watching(where, self._of_environments):
                returned = reset(**row)
            return None if returned is None else self._read(returned)
        except OverdueReward:
            self._stop(self._of_environments.overdue(where))
        except FAILED as error:
            self._stop(f"{where}: {error_text(error)}")
        return None

    def _read(self, returned: Any) -> str:
        text = as_text(returned)
        require_plain(text, self._special)
        return text

    @property
    def _overdue(self) -> str:
        return f"no answer within {self._limits.tool_timeout:g} s"

    def _failed(self, where: str, text: str, loud: bool = False) -> str:
        """Do what the run says of a failure: tell the model, by raising, or end the sample or the run, by what is returned."""
        if self._limits.tool_errors == "stop":
            return self._stop(f"{where}: {text}")
        if loud:
            say(f"{where}: {text} (tool_errors={self._limits.tool_errors})", error=True)
        if self._limits.tool_errors == "end":
            return Ended(text)
        raise self._failure(text)

    def _raised(self, where: str, error: BaseException) -> str:
        """Do what the run says of a call that raised; an image ends the run, as no text model can read it."""
        return self._stop(f"{where}: {error}") if isinstance(error, Images) else self._failed(where, error_text(error))

    def _failure(self, text: str) -> ToolFailure:
        """Make a line for the model: a failure may repeat what the model wrote, or hold a special token of its own."""
        return ToolFailure(without(text, self._special))

    def _stop(self, line: str) -> str:
        self.error = self.error or UserError(line)
        return Ended()

    def _require_fitting(self, tool: ToolCall, name: str, arguments: Mapping[str, Any]) -> None:
        """Refuse arguments that a tool does not take: that is the model's mistake, and always told to the model."""
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError as error:
            raise self._failure(f"{name}: {error}") from None
        except ValueError:
            pass  # of a builtin, nothing is known

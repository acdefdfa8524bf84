"""Look at tools, environments and the chat template that is to render them, before weights are loaded."""

import copy
import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from transformers.utils.chat_template_utils import get_json_schema
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    supports_tool_calling,
)

from rlinvariant.errors import located, one_line
from rlinvariant.text import shown
from rlinvariant.tools import Calls, Place, ToolLimits
from rlinvariant.types import EnvironmentFactory, Json, JsonObject, JsonRow, ToolCall

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from rlinvariant.config import Config

NO_REWARD = "reward functions: none; write one"
NOT_TOOLS = ("reset", "get_reward")  # methods of an environment that the model does not call
PLAIN = (
    "choose a model whose template has tools, or let them be called in plain text: tool_format=plain, or plain_tools(tokenizer)"
)


@dataclass(frozen=True)
class Tooling:
    """Holds what a trainer was given beside reward functions and rows.

    Args:
        tools: functions that the model may call.
        environment: what makes an environment, or a dict of such by name; None: there is none.
        limits: how they are called.
    """

    tools: Sequence[ToolCall] = ()
    environment: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None
    limits: ToolLimits = field(default_factory=ToolLimits)

    @classmethod
    def asked(cls, config: "Config") -> Self:
        """Return what a configuration names."""
        return cls(config.tool_funcs(), config.environment_factory(), config.tool_limits)

    @classmethod
    def of(cls, options: JsonRow) -> Self:
        """Return what is among a trainer's further arguments."""
        return cls(options.get("tools") or (), options.get("environment_factory"), ToolLimits.taken(dict(options)))

    @classmethod
    def taken(cls, options: JsonObject) -> Self:
        """Take what is among a trainer's further arguments out of these."""
        made = cls.of(options)
        for name in made.given():
            options.pop(name, None)
        return made

    def given(self) -> JsonObject:
        """Return what it holds as a trainer's further arguments."""
        return {"tools": self.tools, "environment_factory": self.environment, **asdict(self.limits)}

    def __bool__(self) -> bool:
        return bool(self.tools) or self.environment is not None

    @property
    def factories(self) -> Mapping[str | None, EnvironmentFactory]:
        """Return what makes environments, by name; None is the name of an only one."""
        if self.environment is None:
            return {}
        return {**self.environment} if isinstance(self.environment, dict) else {None: self.environment}

    def schemas(self) -> list[Json] | None:
        """Return what a chat template is told of all tools; None where there are none. Called where nothing is wrong."""
        found = [*self.tools]
        for make in self.factories.values():
            found += methods(make())
        return [get_json_schema(tool) for tool in found] or None


def methods(environment: object) -> list[ToolCall]:
    """Return the methods of an environment that the model may call, as TRL finds them."""
    names = [name for name, _ in inspect.getmembers(type(environment), inspect.isfunction)]
    return [getattr(environment, name) for name in names if name not in NOT_TOOLS and not name.startswith("_")]


def tooling_problems(
    tooling: Tooling, tokenizer: "PreTrainedTokenizerBase", rows: "Dataset | None", rewards: object
) -> list[str]:
    """List what is wrong with tools, environments and chat template, one line each. Makes one environment of each kind.

    Args:
        tooling: what the user gave.
        tokenizer: the run's.
        rows: the training data, with whose first row an environment is tried; None: there is none.
        rewards: reward functions.
    """
    if not tooling:
        return [] if rewards else [NO_REWARD]
    found = tooling.limits.problems()
    if not isinstance(tooling.tools, Sequence):
        return [*found, f"tools: expected a list of functions, got {type(tooling.tools).__name__}"]
    found += [line for tool in tooling.tools for line in tool_problems(tool)] + _collisions(tooling.tools, "tools")
    if tooling.limits.tool_cage and not tooling.tools:
        why = "an environment, whose state is in the trainer's process, has no cage"
        found.append(f"tool_cage=True: expected False without tools: {why}")
    for name, make in tooling.factories.items():
        found += environment_problems(make, name, tooling, tokenizer, rows)
    makes = () if found else [make() for make in tooling.factories.values()]
    if not rewards and not found and not any(hasattr(type(environment), "get_reward") for environment in makes):
        found.append(f"{NO_REWARD}, or the environment a method get_reward")
    return found + template_problems(tokenizer)


def call_limit_problems(tooling: Tooling, most: int | None, prefix: str = "") -> list[str]:
    """Refuse a limit under which no call is ever answered; `prefix` is what the user writes before a field's name."""
    if not tooling or most is None or most >= 1:
        return []
    why = "no call of a tool would be answered; raise it, or remove the tools"
    return [f"{prefix}max_tool_calling_iterations={most}: expected 1 or more: {why}"]


def tool_problems(tool: object, of: str = "") -> list[str]:
    """Say why a tool cannot be described to a model, or called by it."""
    where = f"tool {of}{getattr(tool, '__name__', shown(tool, 60))}"
    if not callable(tool) or not hasattr(tool, "__name__"):
        return [f"{where}: expected a function, got {type(tool).__name__}"]
    hints = _hints(tool)
    signature = inspect.signature(tool).parameters.values()
    if bare := [p.name for p in signature if p.name not in hints and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]:
        return [f"{where}: `{bare[0]}` has no type hint, of which the model is told; write {bare[0]}: str, int, ..."]
    if starred := [p.name for p in signature if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY)]:
        return [f"{where}: `{starred[0]}` cannot be given by its name; write each argument out"]
    if "PIL." in str(hints.get("return", "")):
        return [f"{where}: returns an image; tools return text, as no image model is supported"]
    try:
        get_json_schema(tool)
    except Exception as error:  # transformers raises several types
        line = one_line(error).removeprefix("Cannot generate JSON schema for ")
        fix = "write a docstring with one sentence and, under Args:, a line for each argument"
        return [f"{where}: cannot be described to the model: {line}; {fix}"]
    return []


def _hints(tool: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(tool)
    except Exception:  # a name in quotes that is nowhere
        return dict(getattr(tool, "__annotations__", {}))


def _collisions(tools: Sequence[Any], where: str) -> list[str]:
    names = [getattr(tool, "__name__", "") for tool in tools]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    return [f"{where}: two tools are called {name}, and the model can call one; rename one" for name in twice]


def environment_problems(
    make: EnvironmentFactory, name: str | None, tooling: Tooling, tokenizer: "PreTrainedTokenizerBase", rows: "Dataset | None"
) -> list[str]:
    """Make an environment, and list what it lacks; reset it with the first row, as a step will."""
    where = "environment" if name is None else f"environment {name}"
    if not callable(make):
        return [f"{where}: expected a class, or a function that makes an environment, got {type(make).__name__}"]
    try:
        environment = make()
    except Exception as error:  # the user's own code
        return [f"{where}: cannot be made: {located(error)}; it takes no arguments"]
    where = f"environment {type(environment).__name__}"
    if not inspect.isfunction(getattr(type(environment), "reset", None)):
        return [f"{where}: no method `reset`, which begins an episode and returns what the model is told, or None"]
    if inspect.iscoroutinefunction(environment.reset):
        return [f"{where}: `reset` is a coroutine; write a plain method"]
    if not hasattr(environment, "__dict__"):
        return [f"{where}: has __slots__, and its `reset` is to be watched; remove them"]
    own = methods(environment)
    found = [line for tool in own for line in tool_problems(tool, f"{type(environment).__name__}.")]
    found += [] if own or tooling.tools else [f"{where}: no method that the model could call; write one without a leading _"]
    found += _collisions([*tooling.tools, *own], f"{where} and tools")
    if found or rows is None or not len(rows):
        return found
    names: list[Any] = [name] if name is None or "environment" not in rows.column_names else list(rows["environment"])
    if name not in names:
        return []
    number = names.index(name)
    row = {key: value for key, value in rows[number].items() if name is None or key != "environment"}
    return _trial(environment, row, number, tooling, tokenizer)


def routing_problems(tooling: Tooling, rows: "Dataset", name: str) -> list[str]:
    """Say which row names no environment, where there are several by name.

    Args:
        tooling: what the user gave.
        rows: a data set.
        name: "train" or "eval".
    """
    if not isinstance(tooling.environment, dict):
        return []
    names = list(tooling.environment)
    which = f"expected one of {', '.join(map(str, names))}, the names in environment_factory"
    if "environment" not in rows.column_names:
        return [f"{name} dataset: no column `environment`, which says of each row what is played; {which}"]
    strange = [(i, value) for i, value in enumerate(rows["environment"]) if value not in names]
    more = f" ({len(strange) - 1:,} more such rows)" if len(strange) > 1 else ""
    return [f"{name} dataset, row {i}: environment={shown(value, 60)}: {which}{more}" for i, value in strange[:1]]


def _trial(environment: Any, row: Mapping[str, Any], number: int, tooling: Tooling, tokenizer: Any) -> list[str]:
    """Reset an environment with a row, and return the line that says why that fails."""
    where = f"environment {type(environment).__name__}"
    row = with_seed(environment.reset, row, 0)
    try:
        inspect.signature(environment.reset).bind(**row)
    except TypeError as error:
        fix = f"it is given the columns {', '.join(row)} by name; end its arguments with **_"
        return [f"{where}: reset(): {error}; {fix}"]
    calls = Calls(tooling.limits, tokenizer.all_special_tokens)
    calls.reset(environment, environment.reset, row, Place(0, 0, 0))
    if calls.error is None:
        return []
    place, row_of = f"{Place(0, 0, 0)}, reset", f"reset() with row {number} of the train dataset"
    return [f"{str(calls.error).replace(place, row_of)}; mend it"]


def with_seed(reset: ToolCall, row: JsonRow, seed: int) -> JsonObject:
    """Return the arguments of a reset: a row's columns, and `seed` where reset takes it and the row has none."""
    parameters = inspect.signature(reset).parameters
    takes = "seed" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"seed": seed, **row} if takes else dict(row)


def template_problems(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Say why a tokenizer's chat template cannot render tools, or what a model writes cannot be read as a call."""
    where = f"model={tokenizer.name_or_path}: its chat template"
    try:
        if not supports_tool_calling(tokenizer):
            return [f"{where} cannot render a call of a tool and its result; {PLAIN}"]
    except Exception as error:  # a template is code of others, which may raise anything
        return [f"{where} fails on a call of a tool: {type(error).__name__}: {one_line(error)}; {PLAIN}"]
    if getattr(tokenizer, "response_template", None) is None and getattr(tokenizer, "response_schema", None) is None:
        try:
            add_response_schema(copy.deepcopy(tokenizer))
        except ValueError:
            return [f"{where} is none that TRL can read calls of; set the tokenizer's response_template; or {PLAIN}"]
    try:
        if not is_chat_template_prefix_preserving(tokenizer):
            get_training_chat_template(copy.deepcopy(tokenizer))
    except Exception as error:
        return [f"{where} renders earlier messages anew at each turn, so that no turn could go on: {one_line(error)}; {PLAIN}"]
    return _end_problems(tokenizer, where)


def _end_problems(tokenizer: "PreTrainedTokenizerBase", where: str) -> list[str]:
    """Say where a turn ends after another token than the tokenizer's: TRL would repeat what is between to the model."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    _, found, rest = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(str(tokenizer.eos_token))
    if not found or not rest.strip():  # none is in it: TRL takes the turn as it is
        return []
    why = f"ends a call with {rest[-20:].lstrip()!r}, and the tokenizer's eos_token is {tokenizer.eos_token!r}"
    return [f"{where} {why}; save the tokenizer with the token that ends an answer as its eos_token"]

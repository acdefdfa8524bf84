"""Tools, environments and templates that could not work are a line each, before weights are loaded."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from rlinvariant.tools import ToolLimits
from rlinvariant.tools.plain import plain_tools
from rlinvariant.trainer.preflight.tools import (
    Tooling,
    call_limit_problems,
    routing_problems,
    template_problems,
    tool_problems,
    tooling_problems,
)
from tests.recipes.hub_rows import chat_tokenizer

ROWS = Dataset.from_list([{"prompt": [{"role": "user", "content": "u"}], "answer": "1"}])


def good(word: str) -> str:
    """Find a word.

    Args:
        word: the word
    """
    return word


def no_hint(word) -> str:
    """Find a word.

    Args:
        word: the word
    """
    return word


def no_docstring(word: str) -> str:
    return word


def half_a_docstring(word: str) -> str:
    """Find a word."""
    return word


def starred(*words: str) -> str:
    """Find words.

    Args:
        words: the words
    """
    return ""


def draws(word: str) -> "PIL.Image.Image":  # noqa: F821  # pyright: ignore
    """Draw a word.

    Args:
        word: the word
    """


def of_no_json(word: Callable[[], str]) -> str:
    """Find a word.

    Args:
        word: the word
    """
    return ""


class Game:
    def reset(self, **_: object) -> str:
        return "Begin."

    def move(self, to: str) -> str:
        """Move.

        Args:
            to: where to
        """
        return to

    def get_reward(self) -> float:
        return 1.0

    def _own(self) -> None: ...


class NoReset:
    move = Game.move


class NoMove:
    reset = Game.reset


class Raises(Game):
    def reset(self, **_: object) -> str:
        raise OSError("no such world")


class Fakes(Game):
    def reset(self, **_: object) -> str:
        return "<eos>"


class TakesNothing(Game):
    def reset(self) -> str:
        return ""


class Slotted:
    __slots__ = ()
    reset, move = Game.reset, Game.move


class Bare(Game):
    def look(self, at) -> str:
        return ""


class NeedsMore(Game):
    def __init__(self, world: str) -> None: ...


class Waits(Game):
    async def reset(self, **_: object) -> str:  # type: ignore[override]
        return ""


def problems(tools: Any = (), environment: Any = None, rewards: Any = (len,), tokenizer: Any = None) -> list[str]:
    return tooling_problems(Tooling(tools, environment), tokenizer or plain_tools(chat_tokenizer()), ROWS, list(rewards))


def test_what_is_right_has_no_line():
    assert problems([good]) == problems([good], Game) == problems((), Game, ()) == problems((), {"a": Game}) == []


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        (no_hint, "tool no_hint: `word` has no type hint"),
        (no_docstring, "tool no_docstring: cannot be described to the model: no_docstring because it has no docstring!"),
        (half_a_docstring, "tool half_a_docstring: cannot be described to the model: half_a_docstring because the docstring"),
        (starred, "tool starred: `words` cannot be given by its name"),
        (draws, "tool draws: returns an image"),
        (of_no_json, "tool of_no_json: cannot be described"),
        ("good", "tool good: expected a function, got str"),
    ],
)
def test_a_tool_that_cannot_be_described(tool, said):
    (line,) = tool_problems(tool)
    assert line.startswith(said) and "\n" not in line


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (NoReset, "environment NoReset: no method `reset`"),
        (NoMove, "environment NoMove: no method that the model could call"),
        (Raises, "environment Raises, reset() with row 0 of the train dataset: OSError: no such world; mend it"),
        (Fakes, "environment Fakes, reset() with row 0 of the train dataset: returned the special token <eos>"),
        (TakesNothing, "environment TakesNothing: reset(): got an unexpected keyword argument 'prompt'"),
        (Slotted, "environment Slotted: has __slots__"),
        (Bare, "tool Bare.look: `at` has no type hint"),
        (NeedsMore, "environment: cannot be made: TypeError"),
        (Waits, "environment Waits: `reset` is a coroutine"),
        (3, "environment: expected a class, or a function that makes an environment, got int"),
    ],
)
def test_an_environment_that_could_not_be_played(make, said):
    (line,) = problems((), make)
    assert line.startswith(said) and "\n" not in line


def test_a_row_of_several_environments_names_one():
    several = Tooling((), {"a": Game, "b": Raises})
    rows = Dataset.from_list([{**ROWS[0], "environment": name} for name in ("a", "b", "c", None)])
    (line,) = routing_problems(several, rows, "train")
    said = "environment=c: expected one of a, b, the names in environment_factory (1 more such rows)"
    assert line == f"train dataset, row 2: {said}"
    (line,) = routing_problems(several, ROWS, "eval")
    assert line.startswith("eval dataset: no column `environment`")
    assert routing_problems(several, rows.select([0, 1]), "train") == routing_problems(Tooling((), Game), ROWS, "train") == []
    (line,) = tooling_problems(several, plain_tools(chat_tokenizer()), rows, [len])
    assert line.startswith("environment Raises, reset() with row 1 of the train dataset"), "each with a row of its own"


def test_a_cage_for_environments_alone_is_refused():
    caged = ToolLimits(tool_cage=True)
    (line,) = tooling_problems(Tooling((), Game, caged), plain_tools(chat_tokenizer()), ROWS, [len])
    assert line.startswith("tool_cage=True: expected False without tools: an environment, whose state is")
    assert tooling_problems(Tooling([good], Game, caged), plain_tools(chat_tokenizer()), ROWS, [len]) == []


def test_names_that_collide():
    def move(to: str) -> str:
        """Move.

        Args:
            to: where to
        """
        return to

    assert problems([good, good]) == ["tools: two tools are called good, and the model can call one; rename one"]
    (line,) = problems([move], Game)
    assert line.startswith("environment Game and tools: two tools are called move")


def test_there_has_to_be_a_reward():
    assert tooling_problems(Tooling(), chat_tokenizer(), ROWS, []) == ["reward functions: none; write one"]
    assert problems([good], None, ()) == ["reward functions: none; write one, or the environment a method get_reward"]


def test_a_template_without_tools():
    (line,) = problems([good], tokenizer=chat_tokenizer())
    assert "its chat template cannot render a call of a tool and its result" in line and "tool_format=plain" in line


def test_a_template_whose_calls_nobody_can_read():
    tokenizer = plain_tools(chat_tokenizer())
    assert template_problems(tokenizer) == []  # the control
    tokenizer.response_template = None
    (line,) = template_problems(tokenizer)
    assert "is none that TRL can read calls of" in line


def test_a_call_ends_with_the_tokenizers_eos_token():
    """TRL cuts a result's tokens behind the last eos_token of a call: behind an earlier one the model would read it again."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<{{", "<bos><{{").replace("\n", "<eos>\n")
    tokenizer = plain_tools(tokenizer)
    assert template_problems(tokenizer) == []  # the control
    tokenizer.eos_token = "<bos>"
    (line,) = template_problems(tokenizer)
    assert "its chat template ends a call with" in line and "eos_token is '<bos>'; save the tokenizer with" in line


def test_wrong_limits_are_lines():
    tooling = Tooling([good], None, ToolLimits(tool_timeout=-1.0))
    (line,) = tooling_problems(tooling, plain_tools(chat_tokenizer()), ROWS, [len])
    assert line.startswith("tool_timeout=-1.0: expected seconds")


def test_a_limit_under_which_no_tool_is_called_is_refused():
    tooling = Tooling([good])
    for most in (0, -1):
        (line,) = call_limit_problems(tooling, most, "trainer.")
        assert line.startswith(f"trainer.max_tool_calling_iterations={most}: expected 1 or more")
    assert call_limit_problems(tooling, 1) == call_limit_problems(tooling, None) == call_limit_problems(Tooling(), 0) == []

"""Sums, differences and products too large for a small model, and a calculator that it may call.

Every prompt shows two problems for which the calculator was called, the results, and the answers. The reward is 1 if the last
number of the last message is the answer, however it was found. A call is plain text (`rlinvariant/tools/plain.py`), as the
template of SmolLM2-135M-Instruct has none; with `tool_format=template` a model whose own template has tools calls in that.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import chz

from rlinvariant.config import Config
from rlinvariant.recipes import _tiny, words
from rlinvariant.recipes.words import WORDINGS, Problem, answer, draw, last_number, same

__all__ = ["DEFAULTS", "Data", "check", "datasets", "reward_funcs", "tools"]
DEFAULTS = words.DEFAULTS | {
    "tool_format": "plain",
    "steps": 60,
    "trainer.learning_rate": 2e-5,
    "trainer.per_device_train_batch_size": 16,  # 2 prompts x 8 samples
    "trainer.max_completion_length": 64,  # of all turns together: a call, its result, the answer
    "trainer.max_tool_calling_iterations": 2,
    "sampler.max_model_len": 512,
}


@chz.chz
class Data(_tiny.Data):
    smallest: int = chz.field(default=12, doc="Smallest number in a question.")
    largest: int = chz.field(default=99, doc="Largest number in a question.")
    operators: str = chz.field(default="+-*", doc="Which of + - * there are.")
    eval_size: int = chz.field(default=16, doc="Held-out prompts; their problems are not trained on, in no wording.")


def task(config: Config) -> _tiny.Task:
    """Describe problems of `data.operators` on numbers of `data.smallest` to `data.largest`."""
    smallest, largest, operators = config.data.smallest, config.data.largest, config.data.operators
    span = max(1, largest - smallest)

    return _tiny.Task(
        name="calculator",
        ranges={"smallest": (2, 10**6), "largest": (smallest + 4, 10**6 + 4)},
        patterns={"operators": (r"(?!.*(.).*\1)[-+*]+", "some of + - *, each once")},
        problems=lambda: len(operators) * span * (span + 1) / 2,
        draw=lambda generator: draw(generator, operators, smallest, largest),
        row=lambda problem: {"prompt": [*EXAMPLES, {"role": "user", "content": question(problem)}], "answer": answer(problem)},
        solution=answer,
        read=lambda row: None,  # rows of a file are kept as they are
        same=same,
    )


check, datasets, *_ = _tiny.functions(task)


def reward_funcs(config: Config) -> list[Callable[..., list[float]]]:
    return [last_number]


def tools(config: Config) -> list[Callable[..., str]]:
    return [calculator]


def calculator(expression: str) -> str:
    """Work out an expression in numbers, + - * / and parentheses.

    Args:
        expression: what to work out, such as 3 * (4 + 5)
    """
    text = str(expression).strip()  # a model may write a number in place of text
    # Nothing but these characters is parsed: no names, no calls, no powers; the length bounds depth and digits.
    if not re.fullmatch(r"(?:[0-9.()\s]|[+\-/]|\*(?!\*)){1,80}", text):
        raise ValueError("expected numbers, + - * / and parentheses")
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (SyntaxError, KeyError, TypeError):
        raise ValueError("this cannot be read as an expression") from None
    return str(value) if value.denominator == 1 else f"{float(value):.6g}"


SIGNS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))  # what stands there, not the nearest float
    if isinstance(node, ast.BinOp):
        return SIGNS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return SIGNS[type(node.op)](_value(node.operand))
    raise KeyError(type(node))


def question(problem: Problem) -> str:
    """Ask for a problem's result."""
    sign, a, b, wording = problem
    return WORDINGS[sign][wording].format(a=a, b=b)


def called(name: str, **arguments: str) -> dict[str, Any]:
    """Return the message in which a model calls a tool."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def shown(asked: str, expression: str) -> list[dict[str, Any]]:
    """Return the messages that show how a question is answered."""
    result = calculator(expression)
    return [
        {"role": "user", "content": asked},
        called("calculator", expression=expression),
        {"role": "tool", "name": "calculator", "content": result},
        {"role": "assistant", "content": result},
    ]


# Their problems are not among those that are drawn: 7 and 5 are too small
EXAMPLES = [
    {"role": "system", "content": "Use the calculator, then answer with the number."},
    *shown("What is 7 plus 61?", "7 + 61"),
    *shown("Multiply 12 by 5.", "12 * 5"),
]

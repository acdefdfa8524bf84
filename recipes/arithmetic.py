"""Column addition, learned in minutes on two CPU cores: prompt `348+275=`, completion `8+5+0=13,4+7+1=12,3+2+1=06;623`.

Each column is written as digit + digit + carry = two digits, units first; the answer follows the semicolon. A small
Qwen3 with a character tokenizer is taught the form by a supervised stage that stops early, and GRPO does the rest.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import chz

from rlinvariant.config import Config
from rlinvariant.recipes import _tiny
from rlinvariant.recipes._tiny import build_model, build_tokenizer

__all__ = ["DEFAULTS", "Data", "build_model", "build_tokenizer", "check", "datasets"]
__all__ += ["prepare_model", "reward_funcs", "untrained"]
DEFAULTS = _tiny.DEFAULTS


@chz.chz
class Data(_tiny.Data):
    digits: int = chz.field(default=3, doc="Digits of each operand.")


def task(config: Config) -> _tiny.Task:
    """Describe the sums of two numbers of `data.digits` digits."""
    digits = config.data.digits

    def draw(generator: random.Random) -> tuple[int, int]:
        low, high = 10 ** (digits - 1), 10**digits - 1
        return generator.randint(low, high), generator.randint(low, high)

    def read(row: Mapping[str, Any]) -> tuple[int, int] | None:
        operands = _tiny.read_prompt(row, r"(\d{1,99})\+(\d{1,99})=?")
        return operands and (int(operands[0]), int(operands[1]))

    return _tiny.Task(
        name="arithmetic",
        ranges={"digits": (1, 6)},
        problems=lambda: (9 * 10 ** (digits - 1)) ** 2 / 2,
        draw=draw,
        row=lambda pair: {"prompt": f"{pair[0]}+{pair[1]}=", "answer": str(sum(pair))},
        solution=lambda pair: worked_sum(*pair),
        read=read,
        same=lambda pair: (min(pair), max(pair)),  # a+b and b+a have one answer
    )


check, datasets, prepare_model, untrained = _tiny.functions(task)


def reward_funcs(config: Config) -> list[Callable[..., list[float]]]:
    return [exact_answer]


def exact_answer(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Give 1 for the right sum after the last semicolon, else 0."""
    return [float(text.rpartition(";")[2] == right) for text, right in zip(completions, answer, strict=True)]


def worked_sum(a: int, b: int) -> str:
    """Write a + b column by column, units first, then the sum; `a` and `b` have as many digits."""
    columns, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return ",".join(columns) + f";{a + b}"

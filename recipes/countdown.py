"""Countdown, learned in minutes on two CPU cores: prompt `9,7,4,2=8:`, completion `9-7=2,2+4=6,6+2=8;9-7+4+2`.

Reach the target with every number once. The completion works out one operation at a time; the expression follows the semicolon,
and it alone is graded, exactly: by + - * / and parentheses, and any that is right, not only the one that was taught.
"""

import ast
import functools
import itertools
import math
import operator
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import chz

from rlinvariant.config import Config
from rlinvariant.recipes import _tiny

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULTS = _tiny.DEFAULTS | {
    "steps": 240,
    "trainer.learning_rate": 4e-4,
    "trainer.num_generations": 16,
    "trainer.per_device_train_batch_size": 256,  # 16 prompts x 16 samples
    "sampler.max_num_seqs": 256,
}


@chz.chz
class Data(_tiny.Data):
    numbers: int = chz.field(default=4, doc="Numbers of a problem.")
    largest: int = chz.field(default=9, doc="Largest number; the smallest is 1.")
    operators: str = chz.field(default="+-", doc="What reaches the targets that are drawn: some of + - *; harder with *.")


def task(config: Config) -> _tiny.Task:
    """Describe the problems that `data.numbers`, `data.largest` and `data.operators` give."""
    numbers, largest, operators = config.data.numbers, config.data.largest, config.data.operators

    def draw_numbers(generator: random.Random) -> tuple[int, ...]:
        return tuple(sorted((generator.randint(1, largest) for _ in range(numbers)), reverse=True))

    def draw(generator: random.Random) -> tuple[tuple[int, ...], int]:
        """Draw numbers, the largest first, and a target that they reach."""
        while True:
            nums = draw_numbers(generator)
            if reached := sorted(solutions(nums, operators)):
                return nums, generator.choice(reached)

    def problems() -> float:
        """Estimate from 200 draws; 0 where fewer than 10 of them reach a target, so that `draw` would go on and on."""
        generator, reaching, total = random.Random("problems"), 0, 0.0
        for _ in range(200):
            nums = draw_numbers(generator)
            orders = math.factorial(numbers) / math.prod(math.factorial(n) for n in Counter(nums).values())
            reaching += bool(targets := solutions(nums, operators))
            total += len(targets) * largest**numbers / orders  # each by how seldom its numbers are drawn
        return total / 200 if reaching >= 10 else 0

    return _tiny.Task(
        name="countdown",
        ranges={"numbers": (2, 4), "largest": (2, 99)},
        patterns={"operators": (r"[+\-*]+", f"some of {' '.join(OPERATORS)}, e.g. +-")},
        problems=problems,
        draw=draw,
        row=lambda problem: {"prompt": prompt(*problem), "nums": list(problem[0]), "target": problem[1]},
        solution=lambda problem: solutions(problem[0], operators)[problem[1]],
        read=read,
        columns=("nums", "target"),
        stop_at=0.2,  # the share that is written as taught; about twice as many are right
    )


check, drawn_or_read, prepare_model, untrained = _tiny.functions(task)


def datasets(config: Config, tokenizer: Any) -> "tuple[Dataset, Dataset]":
    """Give the rows of a file a prompt, which those of the hub's Jiayi-Pan/Countdown-Tasks-3to4 do not have."""
    train, evaluation = drawn_or_read(config, tokenizer)
    if config.data.path is not None:
        train = train.from_list([row | {"prompt": prompt(row["nums"], row["target"])} for row in train.to_list()])
    return train, evaluation


def reward_funcs(config: Config) -> list[Callable[..., list[float]]]:
    return [reaches_target]


def reaches_target(completions: list[str], nums: list[list[int]], target: list[int], **_: object) -> list[float]:
    """Give 1 if the expression after the last semicolon uses each number once and equals the target, else 0."""
    found = [evaluate(text.rpartition(";")[2]) for text in completions]
    return [float(f is not None and f == (goal, sorted(n))) for f, n, goal in zip(found, nums, target, strict=True)]


def read(row: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """Return the problem of a row with `nums` and `target`. Raises ValueError if they are no whole numbers."""
    nums, target = row["nums"], row["target"]
    if not isinstance(nums, list) or not all(isinstance(number, int) for number in [*nums, target]):
        found = {"nums": nums, "target": target}
        raise ValueError(f"expected whole numbers, `nums` a list and `target` one, found {found}")
    return tuple(sorted(nums, reverse=True)), target


def prompt(nums: Any, target: int) -> str:
    """Write a problem as the model reads it."""
    return f"{','.join(map(str, nums))}={target}:"


EXACT = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """Return the exact value of an expression in + - * / and parentheses, and the whole numbers in it in ascending order.

    Returns None for anything else, for a division by zero, and for more than 100 characters.
    """
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp):
            return EXACT[type(node.op)](value(node.left), value(node.right))
        raise KeyError(type(node))

    # Nothing but these characters is parsed: no names, no calls, no floats; the length bounds depth and digits.
    if not re.fullmatch(r"[0-9+\-*/()]{1,100}", expression):
        return None
    try:
        return value(ast.parse(expression, mode="eval").body), sorted(used)
    except (SyntaxError, KeyError, ZeroDivisionError):
        return None


@functools.cache
def solutions(nums: tuple[int, ...], operators: str) -> dict[int, str]:
    """Map every target of 1 to 99 that `operators` reach to the worked solution that is taught."""
    reached: dict[int, list[Term]] = {}
    for term in _join([Term(n, (), str(n), 3, (n,)) for n in nums], operators):
        reached.setdefault(term.value, []).append(term)
    # One way of many, so that there is a rule to learn: the shortest, its larger numbers first.
    taught = {value: min(terms, key=lambda t: (len(t.text), [-n for n in t.order])) for value, terms in reached.items()}
    return {value: ",".join(term.steps) + ";" + term.text for value, term in taught.items() if 1 <= value <= 99}


class Term(NamedTuple):
    """Holds an expression on the way to a target, and the steps that work it out."""

    value: int
    steps: tuple[str, ...]
    text: str
    binds: int  # how tightly its last operator does
    order: tuple[int, ...]  # its numbers as they stand in the text


def _join(terms: list[Term], operators: str) -> Iterator[Term]:
    """Yield every way to make one of all terms, two at a time, the larger first: nothing negative on the way."""
    if len(terms) == 1:
        yield terms[0]
    for i, j in itertools.combinations(range(len(terms)), 2):
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        a, b = sorted((terms[i], terms[j]), key=lambda term: -term.value)
        for sign in operators:
            function, binds = OPERATORS[sign]
            value = function(a.value, b.value)
            left = a.text if a.binds >= binds else f"({a.text})"
            right = b.text if b.binds > binds or (b.binds == binds and sign != "-") else f"({b.text})"
            steps = (*a.steps, *b.steps, f"{a.value}{sign}{b.value}={value}")
            yield from _join([Term(value, steps, f"{left}{sign}{right}", binds, a.order + b.order), *rest], operators)


OPERATORS = {"+": (operator.add, 1), "-": (operator.sub, 1), "*": (operator.mul, 2)}

"""Sums, differences and products asked in words, such as `What is nine plus two?`, for a model that can chat.

Every prompt shows one problem answered by an equation, so that answers are short and a small model is right now and then. The
reward is 1 if the last number of the completion is the answer. `model=` is SmolLM2-135M-Instruct, out of a wheel of the
package index, unless another one is named: two CPU cores train it in minutes, and no hub is needed.
"""

import functools
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import chz

from rlinvariant.config import Config
from rlinvariant.recipes import _tiny

__all__ = ["DEFAULTS", "Data", "check", "datasets", "reward_funcs"]
DEFAULTS = {
    "model": "smollm2-135m-instruct",
    "steps": 100,
    "trainer.learning_rate": 1e-5,
    "trainer.adam_beta2": 0.99,  # a run of 100 steps is short for 0.999
    "trainer.warmup_steps": 5,
    "trainer.lr_scheduler_type": "constant_with_warmup",
    "trainer.num_generations": 8,
    "trainer.per_device_train_batch_size": 32,  # 4 prompts x 8 samples
    "trainer.max_completion_length": 24,
    "trainer.loss_type": "dapo",
    "trainer.gradient_checkpointing": False,  # the model is small
    "sampler.max_model_len": 192,
    "sampler.max_num_seqs": 32,
    "sampler.kv_cache_gib": 0.5,
}
NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:,\d{3})*(?:\.\d+)?")
OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
WORDINGS = {
    "+": ("What is {a} plus {b}?", "Add {a} and {b}.", "Tom has {a} apples and gets {b} more. How many apples in all?"),
    "-": ("What is {a} minus {b}?", "Subtract {b} from {a}.", "Tom had {a} apples and ate {b}. How many are left?"),
    "*": ("What is {a} times {b}?", "Multiply {a} by {b}.", "How many apples are in {a} boxes of {b}?"),
}
# Its problem is not among those that are drawn: none has a one
EXAMPLE = [
    {"role": "system", "content": "Write the equation in digits, and nothing else."},
    {"role": "user", "content": "What is one plus six?"},
    {"role": "assistant", "content": "1 + 6 = 7"},
]
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
ONES = f"zero one two three four five six seven eight nine {TEENS}".split()
TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@chz.chz
class Data(_tiny.Data):
    largest: int = chz.field(default=12, doc="Largest number in a question; the smallest is 2.")
    operators: str = chz.field(default="+-*", doc="Which of + - * there are.")
    eval_size: int = chz.field(default=16, doc="Held-out prompts; their problems are not trained on, in no wording.")


Problem = tuple[str, int, int, int]
"""Operator, first number, second number, and which of the operator's wordings."""


def task(config: Config) -> _tiny.Task:
    """Describe problems of `data.operators` on numbers of 2 to `data.largest`."""
    largest, operators = config.data.largest, config.data.operators

    return _tiny.Task(
        name="words",
        ranges={"largest": (5, 99)},
        patterns={"operators": (r"(?!.*(.).*\1)[-+*]+", "some of + - *, each once")},
        problems=lambda: len(operators) * (largest - 1) * largest / 2,
        draw=lambda generator: draw(generator, operators, 2, largest),
        row=lambda problem: {"prompt": [*EXAMPLE, {"role": "user", "content": question(problem)}], "answer": answer(problem)},
        solution=answer,
        read=lambda row: read(row, largest),
        same=same,
    )


check, datasets, *_ = _tiny.functions(task)


def reward_funcs(config: Config) -> list[Callable[..., list[float]]]:
    return [last_number]


def draw(generator: random.Random, operators: str, smallest: int, largest: int) -> Problem:
    """Draw a problem; of a difference the larger number comes first."""
    operator = generator.choice(operators)
    a, b = generator.randint(smallest, largest), generator.randint(smallest, largest)
    wording = generator.randrange(len(WORDINGS[operator]))
    return (operator, max(a, b), min(a, b), wording) if operator == "-" else (operator, a, b, wording)


def same(problem: Problem) -> Problem:
    """Return the one of all problems that have an answer in common for which the numbers choose the wording."""
    operator, a, b, _ = problem
    return operator, max(a, b), min(a, b), (a + b) % len(WORDINGS[operator])


def last_number(completions: list[list[dict[str, str]]], answer: list[str], **_: object) -> list[float]:
    """Give 1 where the last number of an answer is the right one, a whole number, else 0."""
    texts = [messages[-1]["content"] for messages in completions]
    found = [NUMBER.findall(text)[-1:] for text in texts]
    return [float([right] == [x.replace(",", "") for x in last]) for last, right in zip(found, answer, strict=True)]


def question(problem: Problem) -> str:
    """Ask for a problem's result in words."""
    operator, a, b, wording = problem
    return WORDINGS[operator][wording].format(a=in_words(a), b=in_words(b))


def answer(problem: Problem) -> str:
    """Return a problem's result in digits."""
    operator, a, b, _ = problem
    return str(OPERATORS[operator](a, b))


def read(row: Mapping[str, Any], largest: int) -> Problem | None:
    """Return the problem that a row of a file asks for, if it asks in the recipe's words."""
    prompt = row["prompt"]
    asked = prompt[-1].get("content") if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict) else prompt
    return _known(largest).get(asked) if isinstance(asked, str) else None


@functools.cache
def _known(largest: int) -> dict[str, Problem]:
    """Map every question of numbers up to `largest` to its problem."""
    numbers = range(2, largest + 1)
    problems = [(x, a, b, w) for x in WORDINGS for a in numbers for b in numbers for w in range(len(WORDINGS[x]))]
    return {question(problem): problem for problem in problems}


def in_words(number: int) -> str:
    """Write a number of 0 to 99 in words."""
    tens, ones = divmod(number, 10)
    if number < len(ONES):
        return ONES[number]
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")

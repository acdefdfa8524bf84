"""A string backwards, learned in minutes on two CPU cores: prompt `qxkzt>`, completion `tzkxq`.

The whole completion is the answer. The supervised stage stops when short strings go well, and GRPO gets on to longer ones.
"""

import random
import string
from collections.abc import Callable, Mapping
from typing import Any

import chz

from rlinvariant.config import Config
from rlinvariant.recipes import _tiny

DEFAULTS = _tiny.DEFAULTS | {
    "steps": 300,
    "trainer.learning_rate": 1e-3,
    "trainer.per_device_train_batch_size": 256,  # 32 prompts x 8 samples
    "trainer.max_completion_length": 24,
    "sampler.max_num_seqs": 256,
}


@chz.chz
class Data(_tiny.Data):
    longest: int = chz.field(default=8, doc="Letters of the longest string; the shortest has two.")


def task(config: Config) -> _tiny.Task:
    """Describe strings of two to `data.longest` letters."""
    longest = config.data.longest

    def draw(generator: random.Random) -> str:
        return "".join(generator.choices(string.ascii_lowercase, k=generator.randint(2, longest)))

    def read(row: Mapping[str, Any]) -> str | None:
        text = _tiny.read_prompt(row, r"([a-z]+)>?")
        return text and text[0]

    return _tiny.Task(
        name="reverse",
        ranges={"longest": (2, 22)},
        problems=lambda: 26**longest,
        draw=draw,
        row=lambda text: {"prompt": f"{text}>", "answer": text[::-1]},
        solution=lambda text: text[::-1],
        read=read,
        same=lambda text: min(text, text[::-1]),  # either is the other's answer
    )


check, datasets, prepare_model, untrained = _tiny.functions(task)


def reward_funcs(config: Config) -> list[Callable[..., list[float]]]:
    return [exact_match]


def exact_match(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Give 1 for the answer and nothing else, else 0."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]

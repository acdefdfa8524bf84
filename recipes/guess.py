"""A game of several turns: find a number by guessing, told each time whether it is higher or lower.

An environment (`Game`) keeps the number and says `higher`, `lower` or `right`; its method `guess` is the tool. The reward is
the environment's own: 1 if the number was found within `data.guesses` guesses, else 0.1 for each guess, so that a model that
seldom finds it learns to guess at all. The number is drawn from the seed that `reset` is given, one for all samples of a group.
Halving what is left finds any of 2^n - 1 numbers in n guesses.
"""

import functools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import chz

from rlinvariant.config import Config
from rlinvariant.config import Data as BaseData
from rlinvariant.recipes import words
from rlinvariant.recipes.calculator import called

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULTS = words.DEFAULTS | {
    "tool_format": "plain",
    "steps": 60,
    "trainer.learning_rate": 2e-5,
    "trainer.per_device_train_batch_size": 16,  # 2 games x 8 samples
    "trainer.max_completion_length": 96,
    "trainer.max_tool_calling_iterations": 4,
    "sampler.max_model_len": 768,
}


@chz.chz
class Data(BaseData):
    largest: int = chz.field(default=7, doc="Largest number to be found; the smallest is 1.")
    guesses: int = chz.field(default=3, doc="Guesses within which it has to be found.")
    train_size: int = chz.field(default=1024, doc="Training rows; all are alike, as the number comes from the seed.")
    eval_size: int = chz.field(default=16, doc="Held-out rows, each a game of its own.")


def check(config: Config) -> list[str]:
    """List what is wrong with `data.*`, one line each."""
    ranges = {"largest": (2, 1000), "guesses": (1, 20), "train_size": (1, 10**6), "eval_size": (1, 10**5)}
    return [
        f"data.{key}={value}: expected {least} to {most}"
        for key, (least, most) in ranges.items()
        if not least <= (value := getattr(config.data, key)) <= most
    ]


def datasets(config: Config, tokenizer: Any) -> "tuple[Dataset, Dataset]":
    """Return rows that are all alike: the rules, a game as an example, and the request for another."""
    from datasets import Dataset

    row = {"prompt": _prompt(config.data.largest)}
    return Dataset.from_list([row] * config.data.train_size), Dataset.from_list([row] * config.data.eval_size)


def reward_funcs(config: Config) -> list[Callable[..., list[float]]]:
    return []  # the environment has its own


def environment(config: Config) -> "Callable[[], Game]":
    return functools.partial(Game, config.data.largest, config.data.guesses)


class Game:
    """Keeps the number that is to be found, and counts the guesses."""

    def __init__(self, largest: int, guesses: int) -> None:
        self._largest, self._guesses = largest, guesses

    def reset(self, seed: int, **_: object) -> None:
        """Draw another number."""
        self._number, self._used, self._found = random.Random(seed).randint(1, self._largest), 0, False

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: the guess
        """
        if self._found or self._used == self._guesses:
            raise ValueError("the game is over")
        if not isinstance(number, int):
            raise ValueError("expected a number")
        self._used += 1
        self._found = number == self._number
        if self._found:
            return "right"
        return "lower" if number > self._number else "higher"

    def get_reward(self) -> float:
        """Return 1 if the number was found, else 0.1 for each guess."""
        return 1.0 if self._found else 0.1 * self._used


def _prompt(largest: int) -> list[dict[str, Any]]:
    """Return the rules, and a game in which the middle was guessed twice, as an example."""
    middle = (largest + 1) // 2
    upper = (middle + 1 + largest) // 2
    return [
        {"role": "system", "content": f"Find the number from 1 to {largest}."},
        {"role": "user", "content": "Guess."},
        called("guess", number=str(middle)),
        {"role": "tool", "name": "guess", "content": "higher"},
        called("guess", number=str(upper)),
        {"role": "tool", "name": "guess", "content": "right"},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Guess."},
    ]

"""A reward function that is wrong is refused by a line that says where."""

import asyncio
import functools
import math
from types import SimpleNamespace
from typing import Any

import pytest

from rlinvariant.errors import UserError
from rlinvariant.rewards import checked_reward

BATCH = {
    "prompts": ["a", "b", "c"],
    "completions": ["1", "2", "x"],
    "completion_ids": [[1], [2], [3]],
    "answer": ["1", "1", "1"],
    "trainer_state": SimpleNamespace(global_step=6),
}


def equals(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(int(a) == int(b)) for a, b in zip(completions, answer, strict=True)]


def call(reward: Any) -> Any:
    return checked_reward(reward)(**BATCH)


def message(reward: Any) -> str:
    with pytest.raises(UserError) as raised:
        call(reward)
    return str(raised.value)


def test_good_rewards_pass_unchanged() -> None:
    reward = checked_reward(lambda completions, **_: [1, None, 0.5])
    assert reward(**BATCH) == [1, None, 0.5]
    assert checked_reward(equals).__name__ == "equals"
    assert checked_reward(functools.partial(equals, answer=["1"])).__name__ == "equals"


def test_a_raise_names_function_step_and_sample() -> None:
    expected = "reward function equals, step 7, sample 2: raised ValueError: invalid literal for int() with base 10: 'x'"
    assert message(equals) == expected
    with pytest.raises(UserError) as raised:
        call(equals)
    assert isinstance(raised.value.__cause__, ValueError)


def test_a_raise_on_the_whole_batch_alone_says_so() -> None:
    def pairs(completions: list[str], **_: Any) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too many\nat once")
        return [0.0]

    assert message(pairs) == (
        "reward function pairs, step 7, no sample alone, only the whole batch: raised RuntimeError: too many at once"
    )


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1.0], "step 7: returned 1 reward, expected 3, one per completion, sample 1 is the first without one"),
        ([1.0] * 4, "step 7: returned 4 rewards, expected 3, one per completion"),
        ([0.0, math.nan, 0.0], "step 7, sample 1: returned nan, expected None or a finite number that float32 can hold"),
        ([0.0, 0.0, math.inf], "step 7, sample 2: returned inf, expected None or a finite number that float32 can hold"),
        ([0.0, "1", 0.0], "step 7, sample 1: returned '1', expected None or a finite number that float32 can hold"),
        (None, "step 7: returned NoneType, expected a list of 3 numbers"),
        (0.5, "step 7: returned float, expected a list of 3 numbers"),
        ("yes", "step 7: returned str, expected a list of 3 numbers"),
    ],
)
def test_wrong_returns_are_named(returned: Any, expected: str) -> None:
    def reward(completions: list[str], **_: Any) -> Any:
        return returned

    assert message(reward) == f"reward function reward, {expected}"


def test_tensors_and_numpy_are_numbers() -> None:
    import numpy as np
    import torch

    assert call(lambda **_: torch.tensor([1.0, 0.0, 0.5])) == [1.0, 0.0, 0.5]
    assert call(lambda **_: list(np.array([1, 0, 1]))) == [1, 0, 1]


def test_coroutines_stay_coroutines() -> None:
    async def slow(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return equals(completions, answer)

    wrapped = checked_reward(slow)
    assert asyncio.iscoroutinefunction(wrapped) and wrapped.__name__ == "slow"
    assert asyncio.run(wrapped(**BATCH | {"completions": ["1", "2", "1"]})) == [1.0, 0.0, 1.0]
    with pytest.raises(UserError, match=r"^reward function slow, step 7, sample 2: raised ValueError"):
        asyncio.run(wrapped(**BATCH))


def test_reward_models_pass_through() -> None:
    import torch

    model = torch.nn.Linear(1, 1)
    assert checked_reward(model) is model
    assert checked_reward("org/reward-model") == "org/reward-model"

"""A reward function that is wrong is refused by a line that says where."""

import asyncio
import functools
import math
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.rewards import RewardLimits, checked_reward

BATCH = {
    "prompts": ["a", "b", "c"],
    "completions": ["1", "2", "x"],
    "completion_ids": [[1], [2], [3]],
    "answer": ["1", "1", "1"],
    "trainer_state": SimpleNamespace(global_step=6, log_history=[]),
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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (10**400, "returned 1000"),
        (1e39, "returned 1e+39"),
        ("1\x1b[31m", r"returned '1\x1b[31m'"),
        (1j, "returned 1j"),
        ([1.0], "returned [1.0]"),
    ],
)
def test_what_float32_cannot_hold_is_named(value: Any, shown: str) -> None:
    assert message(lambda **_: [0.0, value, 0.0]).startswith(f"reward function <lambda>, step 7, sample 1: {shown}")


def test_tensors_of_every_shape_are_numbers_or_a_line() -> None:
    import numpy as np
    import torch

    assert call(lambda **_: [torch.tensor(1.0), np.float32(0.5), True]) == [1.0, 0.5, 1.0]
    assert "step 7: returned float, expected a list of 3 numbers" in message(lambda **_: torch.tensor(1.0))
    assert "sample 0: returned tensor([1., 2.])" in message(lambda **_: [torch.tensor([1.0, 2.0])] * 3)
    assert "sample 0: returned [1.0]" in message(lambda **_: torch.ones(3, 1))


def test_errors_are_counted_and_replaced_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    counted: dict[str, int] = {}
    zero = checked_reward(equals, RewardLimits(reward_errors="zero"), counted.__setitem__)
    assert zero(**BATCH) == [1.0, 0.0, 0.0] and counted == {"error": 1}
    assert "step 7, sample 2: raised ValueError" in capsys.readouterr().err
    assert checked_reward(equals, RewardLimits(reward_errors="none"))(**BATCH) == [1.0, 0.0, None]
    with pytest.raises(UserError, match="returned 1 reward"):  # of which no sample is to blame
        checked_reward(lambda **_: [1.0], RewardLimits(reward_errors="zero"))(**BATCH)


def test_an_exit_is_an_error_and_ctrl_c_passes() -> None:
    def exits(**_: Any) -> Any:
        raise SystemExit(0)

    def interrupted(**_: Any) -> Any:
        raise KeyboardInterrupt

    assert message(exits) == "reward function exits, step 7, sample 0: raised SystemExit: 0"
    with pytest.raises(KeyboardInterrupt):
        call(interrupted)


@pytest.mark.parametrize("reward", [5, None, [equals]])
def test_what_is_no_function_is_refused(reward: Any) -> None:
    with pytest.raises(ConfigErrors, match="expected a function, a reward model or its name"):
        checked_reward(reward if not isinstance(reward, list) else [reward])


def test_wrong_limits_are_refused() -> None:
    wrong = RewardLimits(math.nan, -1, "never")  # type: ignore[arg-type]
    assert [line.partition("=")[0] for line in wrong.problems()] == ["reward_timeout", "reward_cage", "reward_errors"]
    assert RewardLimits(0.0).problems() == []


def test_a_cage_grades_as_the_trainer_does_and_in_order() -> None:
    """Random grades are equal too; the control is the next step, which draws others."""
    drawn = lambda completions, **_: [__import__("random").random() for _ in completions]  # noqa: E731
    caged = checked_reward(drawn, RewardLimits(reward_cage=2))
    later = BATCH | {"trainer_state": SimpleNamespace(global_step=7, log_history=[])}
    first = caged(**BATCH)
    assert first == caged(**BATCH) == checked_reward(drawn, RewardLimits(reward_cage=2))(**BATCH) != caged(**later)
    logged: list[Any] = []

    def logs(completions: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric("count", len(completions))
        log_extra("text", completions)
        return [float(ord(text)) for text in completions]

    arguments = BATCH | {"log_metric": lambda *x: logged.append(x), "log_extra": lambda *x: logged.append(x)}
    rewards = checked_reward(logs, RewardLimits(reward_cage=2))(**arguments)
    assert rewards == [49.0, 50.0, 120.0]
    assert logged == [("count", 1), ("count", 2), ("text", ["1", "2", "x"])]


def test_what_a_caged_function_forks_is_ended_by_its_signal() -> None:
    """The cage's own processes leave signals to the trainer."""

    def forks(completions: list[str], **_: Any) -> list[float]:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
        child.terminate()
        child.join(20)
        code = child.exitcode
        child.kill()
        os.kill(os.getpid(), signal.SIGTERM)
        return [float(code or 0)] * len(completions)

    assert checked_reward(forks, RewardLimits(120, 1, "stop"))(completions=["a"], prompts=["b"]) == [-signal.SIGTERM]


def test_a_cage_imports_nothing_to_read_the_state() -> None:
    """The import of transformers would be part of the first call's time."""
    from transformers import TrainerState

    def reward(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        loaded = "transformers" in __import__("sys").modules
        return [float(loaded) + trainer_state.global_step] * len(completions)

    state = TrainerState(global_step=6, log_history=[{"loss": 1.0}])
    assert checked_reward(reward, RewardLimits(reward_cage=1))(**BATCH | {"trainer_state": state}) == [6.0] * 3


def test_a_cage_may_take_longer_to_start_than_a_call_may_take() -> None:
    """No process starts in 10 ms."""
    assert checked_reward(equals, RewardLimits(0.01, 1)).__name__ == "equals"


def processes_of(module: str) -> set[psutil.Process]:
    """Return the processes of this one that run a module of `rlinvariant.rewards`."""
    found = set()
    for process in psutil.Process().children():
        with suppress(psutil.Error):  # it is ending
            if f"rewards.{module} import main" in " ".join(process.cmdline()):
                found.add(process)
    return found


def end(process: psutil.Process) -> None:
    """Kill a child and wait for its end, which is left for its `subprocess.Popen` to find."""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def test_a_keeper_that_was_ended_between_two_calls_is_started_again() -> None:
    """A keeper that ends in the middle of a call is told in one line, as nobody knows what the function did; nobody waits."""

    def ends_its_keeper(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        if answer[0] == "end":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        return [float(text == "1") for text in completions]

    before = processes_of("keeper")
    caged = checked_reward(ends_its_keeper, RewardLimits(60.0, 2))
    (keeper,) = processes_of("keeper") - before
    end(keeper)
    assert caged(**BATCH) == [1.0, 0.0, 0.0]
    with pytest.raises(UserError, match=r"reward function ends_its_keeper.*: the process that keeps its cage was ended from"):
        caged(**BATCH | {"answer": ["end"] * 3})
    assert caged(**BATCH) == [1.0, 0.0, 0.0]


def test_what_cannot_be_sent_to_a_cage_is_refused() -> None:
    lock = __import__("threading").Lock()
    with pytest.raises(UserError, match=r"reward_cage=1: reward function .*: cannot be pickled"):
        checked_reward(lambda **_: [lock], RewardLimits(reward_cage=1))

"""Tools and environments in a trainer: exact, begun from seeds, and ended with a line where they fail."""

import asyncio
from typing import Any

import pytest
from datasets import Dataset

from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.rewards import watchdog
from rlinvariant.trainer.evaluate import greedy_reward
from tests.parity.harness import assert_exact
from tests.trainer.tool_model import Echo, questions, reversed_text, tool_trainer


class Fails(Echo):
    def reset(self, seed: int, **_: object) -> str:
        if Echo.seeds:  # not at the trial before the first step
            raise OSError("the world has ended")
        return super().reset(seed)


def fails(text: str) -> str:
    """Turn a text round.

    Args:
        text: what to turn round
    """
    raise RuntimeError("no")


fails.__name__ = "reversed_text"


@pytest.fixture
def new(arithmetic_dir, exact_engine, tmp_path):
    """A trainer with tools; the rows of what it draws are in `samples`."""
    Echo.seeds = []

    def start(**changes: Any) -> Any:
        samples: list[dict[str, Any]] = []
        run: Any = tool_trainer(arithmetic_dir, exact_engine, tmp_path, on_samples=samples.extend, **changes)
        run.samples = samples
        Echo.seeds = []
        return run

    return start


def test_an_environment_is_exact_and_begins_from_seeds(new):
    run = new(tools=None, environment_factory=Echo)
    run.trainer.train()
    assert_exact(run, 200)
    group, steps = run.trainer.num_generations, run.trainer.state.global_step
    of_groups = [Echo.seeds[i : i + group] for i in range(0, len(Echo.seeds), group)]
    assert all(len(set(seeds)) == 1 for seeds in of_groups), "the samples of a group meet one episode"
    assert len({seeds[0] for seeds in of_groups}) == len(of_groups) >= 2 * steps, "no two groups do"
    assert any("over" in text for row in run.samples for text in row["tool_results"])
    assert {name for row in run.samples for name in row["rewards"]} == {"talkative", "Echo"}
    first = list(Echo.seeds)
    again = new(tools=None, environment_factory=Echo)
    again.trainer.train()
    assert Echo.seeds == first
    other = new(tools=None, environment_factory=Echo, seed=run.trainer.args.seed + 1)
    other.trainer.train()
    assert not set(Echo.seeds) & set(first)


@pytest.mark.parametrize(
    ("later", "words"), [("same", "Echo: its factory has returned the same object twice"), ("none", "OSError: no more")]
)
def test_environments_that_cannot_be_made_anew_are_a_line(new, later, words):
    made: list[Echo] = []

    def factory() -> Echo:
        if len(made) > 5 and later == "none":
            raise OSError("no more")
        made.append(made[0] if made and later == "same" else Echo())
        return made[-1]

    with pytest.raises(UserError, match=words):
        new(tools=None, environment_factory=factory).trainer.train()


def test_held_out_rows_are_played_and_leave_no_trace(new):
    run = new(tools=None, environment_factory=Echo)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": str(i)}]} for i in range(5)])
    before = greedy_reward(run.trainer, rows)
    seeds, Echo.seeds = Echo.seeds, []
    assert greedy_reward(run.trainer, rows) == before and Echo.seeds == seeds and len(set(seeds)) == 5


@pytest.mark.parametrize("errors", ["tell", "end"])
def test_a_tool_that_fails_is_told_or_ends_the_sample(new, errors):
    run = new(tools=[fails], tool_errors=errors)
    run.trainer.train()
    assert_exact(run, 100)
    told = [text for row in run.samples for text in row["tool_results"]]
    assert (errors == "tell") == any("RuntimeError: no" in text for text in told)
    assert errors == "tell" or not told


def test_a_tool_that_fails_stops_the_run(new):
    run = new(tools=[fails], tool_errors="stop")
    with pytest.raises(UserError, match=r"tool reversed_text, step 1, sample \d+, turn 1: RuntimeError: no"):
        run.trainer.train()


def test_a_reset_that_fails_stops_the_run(new):
    run = new(tools=None, environment_factory=Fails)
    Echo.seeds = [0]
    with pytest.raises(UserError, match=r"environment Fails, step 1, sample 0, turn 1, reset: OSError: the world has ended"):
        run.trainer.train()


async def later(text: str) -> str:
    """Turn a text round.

    Args:
        text: what to turn round
    """
    await asyncio.sleep(0)
    if len(text) > 1:
        raise ValueError("too long")
    return text[::-1]


async def sleeps_for_ever(text: str) -> str:
    """Turn a text round.

    Args:
        text: what to turn round
    """
    await asyncio.sleep(600)
    return text


later.__name__ = sleeps_for_ever.__name__ = "reversed_text"


def test_a_tool_may_be_a_coroutine(new, monkeypatch):
    run = new(tools=[later])
    run.trainer.train()
    assert_exact(run, 200)
    told = [text for row in run.samples for text in row["tool_results"]]
    assert {"ValueError: too long" in text for text in told} == {True, False}
    monkeypatch.setattr(watchdog, "KILL_AFTER_S", 600.0)  # a loaded machine may answer the signal late
    stopped = new(tools=[sleeps_for_ever], tool_errors="stop", tool_timeout=0.2)
    with pytest.raises(UserError, match=r"tool reversed_text, step 1, sample \d+, turn 1: no answer within 0.2 s"):
        stopped.trainer.train()


class Loud(Echo):
    def reset(self, seed: int, **_: object) -> str:
        return super().reset(seed) + "!"


def test_environments_of_several_classes_are_exact_together(new):
    rows = [{**row, "environment": ("plain", "loud")[i % 2]} for i, row in enumerate(questions().to_list())]
    several = {"plain": Echo, "loud": Loud}
    run = new(tools=None, environment_factory=several, train_dataset=Dataset.from_list(rows))
    run.trainer.train()
    assert_exact(run, 200)
    assert {"!" in row["prompt"] for row in run.samples} == {True, False}, "each is begun by its own"
    for row in run.samples:
        own = "Loud" if "!" in row["prompt"] else "Echo"
        assert [name for name, given in row["rewards"].items() if given is not None] == ["talkative", own]
    wrong = Dataset.from_list([row | {"environment": "quiet"} for row in rows])
    with pytest.raises(ConfigErrors, match="train dataset, row 0: environment=quiet: expected one of plain, loud"):
        new(tools=None, environment_factory=several, train_dataset=wrong)


def test_what_cannot_work_is_said_before_the_first_step(new):
    with pytest.raises(ConfigErrors) as raised:
        new(tools=[reversed_text, reversed_text], train_dataset=Dataset.from_list([{"prompt": "text"}] * 8))
    lines = str(raised.value)
    assert "two tools are called reversed_text" in lines
    with pytest.raises(ConfigErrors, match="is text, and tools need chat messages"):
        new(train_dataset=Dataset.from_list([{"prompt": "text"}] * 8))
    with pytest.raises(ConfigErrors, match="reward_cage=1: expected 0 with environment_factory"):
        new(tools=None, environment_factory=Echo, reward_cage=1)

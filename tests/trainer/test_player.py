"""An evaluation without a trainer draws and grades what a run would: all turns, the same episodes, rewards weighed alike."""

from typing import Any

import pytest
from datasets import Dataset
from transformers import GenerationConfig
from trl.trainer.grpo_config import GRPOConfig

from rlinvariant.errors import ConfigErrors
from rlinvariant.rewards import RewardLimits
from rlinvariant.rollout import ALL_TOKENS, Truncation
from rlinvariant.trainer.evaluate import greedy_reward
from rlinvariant.trainer.player import Player, play
from rlinvariant.trainer.preflight import Tooling
from tests.parity.device import CUDA
from tests.trainer.tool_model import Echo, end_tokens, questions, talkative, tool_tokenizer, tool_trainer


@pytest.fixture
def new(arithmetic_dir, exact_engine):
    """A player on the shared engine, which has the weights of the checkpoint."""

    def start(rewards: Any = (talkative,), tooling: Any = None, rows: Any = None, **settings: Any) -> Player:
        settings = {"seed": 0} | settings
        args = GRPOConfig("out", use_cpu=not CUDA, bf16=False, max_completion_length=80, **settings)
        tokenizer = tool_tokenizer(arithmetic_dir)
        generation = GenerationConfig(eos_token_id=end_tokens(tokenizer))
        parts = args, tokenizer, generation, rewards, RewardLimits(), tooling or Tooling(), rows or questions(5)
        return Player(*parts, lambda: exact_engine)

    return start


def test_an_evaluation_plays_what_a_run_holds_out(new, arithmetic_dir, exact_engine, tmp_path):
    rows = questions(5)
    run = tool_trainer(arithmetic_dir, exact_engine, tmp_path, tools=None, environment_factory=Echo)
    Echo.seeds = []
    held_out, seeds = greedy_reward(run.trainer, rows), Echo.seeds
    player, Echo.seeds = new((talkative,), Tooling((), Echo)), []
    played = player.play(rows.to_list(), 0.0, 1, ALL_TOKENS)
    assert Echo.seeds == seeds and len(set(seeds)) == 5
    assert sum(one["reward"] for one in played) / 5 == pytest.approx(held_out.reward, rel=1e-6)
    drawn = player.play(rows.to_list(), 1.0, 1, ALL_TOKENS)
    assert max(len(one["tool_results"]) for one in drawn) > 1, "several turns"
    assert {reward["name"] for one in drawn for reward in one["rewards"]} == {"talkative", "Echo"}
    run.trainer._seeds, run.trainer.num_generations_eval = player._seeds, 1  # all in which a run's evaluation differs
    run.trainer.model.eval()
    sampled = play(run.trainer, rows.to_list())
    assert [player._tokenizer.decode(ids) for ids in sampled.ids] == [one["completion"] for one in drawn]
    assert sampled.sampled is not None and [sum(mask) for mask in sampled.sampled] == [one["length"] for one in drawn]
    without = new().play(rows.to_list(), 1.0, 1, ALL_TOKENS)
    assert "tool_results" not in without[0] and [x["reward"] for x in without] != [x["reward"] for x in drawn], "the control"


def test_samples_of_a_problem_meet_one_episode_and_depend_on_no_batch(new):
    rows = [row for row in questions(3).to_list() for _ in range(4)]
    player, Echo.seeds = new((talkative,), Tooling((), Echo)), []
    played = player.play(rows, 1.0, 4, ALL_TOKENS)
    assert [len(set(Echo.seeds[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1] and len(set(Echo.seeds)) == 3
    assert len({one["seed"] for one in played}) == 12
    assert player.play(rows[:4], 1.0, 4, ALL_TOKENS) == played[:4], "alone, as among others"
    assert player.play(rows[:4], 1.0, 4, Truncation(top_k=1)) != played[:4]
    assert len({str(one["completion"]) for one in player.play(rows[:4], 1.0, 4, Truncation(top_k=1))}) == 1, "the likeliest"
    other = new((talkative,), Tooling((), Echo), seed=7)
    assert other.play(rows[:4], 1.0, 4, ALL_TOKENS) != played[:4], "the control"


def test_rewards_are_weighed_as_training_does(new):
    def some(completions, **_):
        return [1.0, None, 0.5]

    def first(completions, **_):
        return [1.0, None, None]

    rows = Dataset.from_list([{"prompt": "1+1="}] * 3)
    player = new([some, first], rows=rows, reward_weights=[1.0, 2.0])
    assert [one["reward"] for one in player.play(rows.to_list(), 0.0, 3, ALL_TOKENS)] == [3.0, None, 0.5]
    assert player.reward_func_names == ["some", "first"]
    first.__name__ = "some"
    assert new([some, first], rows=rows).reward_func_names == ["some", "some_2"], "as in training"
    with pytest.raises(ConfigErrors, match="a reward model; eval takes reward functions"):
        new(["org/reward-model"])

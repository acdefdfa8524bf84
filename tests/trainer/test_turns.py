"""Rollouts of several turns, through TRL's loop: every sampled token of every turn has the sampler's bits in the trainer."""

import ast
import json
import math
import os
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from rlinvariant.config import PPOConfig
from rlinvariant.rollout import Completion, request_seed
from rlinvariant.trainer import turns as turns_module
from rlinvariant.trainer.drawing import DrawingTrainer
from rlinvariant.trainer.turns import Turns
from tests import forks
from tests.parity.device import cpu_only
from tests.parity.harness import assert_exact, assert_same_weights, assert_stops, critic_weights, weights
from tests.trainer.tool_model import questions, tool_trainer
from tests.trees import parsed


@pytest.fixture
def new(arithmetic_dir, exact_engine, tmp_path):
    """A trainer with a tool; the rows of what it draws are in `samples`."""
    samples = []

    def start(**changes):
        run = tool_trainer(arithmetic_dir, exact_engine, tmp_path, on_samples=samples.extend, **changes)
        run.samples = samples
        return run

    return start


def test_every_sampled_token_of_every_turn_is_compared_and_equal(new):
    run = new()
    run.trainer.train()
    assert_exact(run, 200)
    sampled = sum(row["length"] for row in run.samples)
    assert run.total("compared_tokens") == sampled < sum(len(row["token_ids"]) for row in run.samples)
    turns = [len(row["tool_results"]) for row in run.samples]
    assert max(turns) >= 3 and min(turns) == 0, "samples of one turn and of four"
    for row in run.samples:
        assert len(row["tool_mask"]) == len(row["token_ids"]) and row["tool_mask"].sum() == len(row["sampler_logprobs"])
        assert all("T:" in text and text.endswith("A:") for text in row["tool_results"])
        assert row["mismatched_tokens"] == 0
    assert {row["tools/call_frequency"] > 0.5 for row in run.rows} == {True}
    for row in run.rows:
        drawn = [turns for turns, sample in zip(turns, run.samples, strict=True) if sample["step"] == row["step"]]
        assert row["rollout/turns"] >= 1 + sum(drawn) / len(drawn) > 1 and row["time/tools"] > 0


def test_a_turn_computes_its_new_tokens_alone(new, exact_engine):
    """Pages are as long as BLOCK: what a page does not fill is computed again. Control: an engine whose cache is emptied."""
    run = new(max_steps=1)
    run.trainer.train()
    (row,) = run.rows
    assert row["perf/later_cached_tokens"] > 0 and row["perf/cached_tokens"] >= row["perf/later_cached_tokens"]
    batches = run.trainer._turns.batches
    prompts, later = [len(p) for b in batches for p in b.prompts], [len(p) for b in batches[1:] for p in b.prompts]
    assert row["perf/prefill_tokens"] + row["perf/cached_tokens"] == sum(prompts)
    assert row["perf/later_prefill_tokens"] + row["perf/later_cached_tokens"] == sum(later)
    assert row["rollout/turns"] == len(prompts) / len(run.samples)
    again, ask = new(max_steps=1), DrawingTrainer._ask

    def cold(self, *given):
        exact_engine.llm.reset_prefix_cache()
        return ask(self, *given)

    with mock.patch.object(DrawingTrainer, "_ask", cold):
        again.trainer.train()
    assert again.rows[0]["perf/later_cached_tokens"] < row["perf/later_cached_tokens"]
    assert again.rows[0]["reward"] == row["reward"], "the same tokens"


def test_an_earlier_token_of_another_id_is_found(new):
    """Control: what tokenizing the text anew does. A tool's token changes after the sampler has read it."""
    run, generate = new(), DrawingTrainer._generate

    def retokenized(self, prompts):
        output = generate(self, prompts)
        ids, mask = next((i, m) for i, m in zip(output[1], output[2], strict=True) if m[-1] == 1 and 0 in m)
        ids[mask.index(0)] = 10 + (ids[mask.index(0)] + 1) % 50
        return output

    with mock.patch.object(DrawingTrainer, "_generate", retokenized):
        assert_stops(run)
    assert run.mismatches[-1].turn == 2 and f"turn 2, position {run.mismatches[-1].position}" in str(run.mismatches[-1])


def test_a_turn_drawn_with_other_weights_is_found(new, exact_engine):
    """Control: weights that change between turns."""
    run, draw = new(), DrawingTrainer.draw

    def moved(self, *args, **kwargs):
        drawn = draw(self, *args, **kwargs)
        exact_engine.sync((name, weight * 1.01) for name, weight in self._weights())
        return drawn

    with mock.patch.object(DrawingTrainer, "draw", moved):
        assert_stops(run)
    assert run.mismatches[-1].turn >= 2


def test_a_lost_tool_mask_is_found(new):
    """Control: a tool's tokens that count as sampled."""
    run, generate = new(), DrawingTrainer._generate

    def without(self, prompts):
        output = generate(self, prompts)
        self._sampled = self._tool_mask = None
        return *output[:2], None, *output[3:]

    more = pytest.raises(ValueError, match="tokens compared, but only")  # than were sampled
    with mock.patch.object(DrawingTrainer, "_generate", without), more:
        run.trainer.train()


def test_a_turn_has_a_seed_of_its_own(new):
    run, seeds = new(), []
    ask = DrawingTrainer._ask

    def recording(self, prompts, own, limits):
        seeds.append((self.state.global_step, own))
        return ask(self, prompts, own, limits)

    with mock.patch.object(DrawingTrainer, "_ask", recording):
        run.trainer.train()
    flat = [seed for _, own in seeds for seed in own]
    assert len(seeds) > 6 and len(set(flat)) == len(flat)
    first = [own for step, own in seeds if step == 0][:2]
    assert set(first[1]) <= {request_seed(seed, 1, 0, 0) for seed in first[0]}


def test_a_turn_goes_on_with_the_samples_that_called():
    """One of four samples has ended, one had its tool's answer taken back, and one had no room left to say more."""
    turns, asked, said = Turns([1, 2, 3, 4]), {"role": "assistant"}, {"role": "tool"}
    prompts, first = [[5], [6], [7], [5]], [Completion([i], [-1.0]) for i in range(4)]
    turns.add(prompts, range(4), first)
    turns.conversations = [[asked], [asked, said], [asked, said], [asked, said]]
    assert turns.continued([[6, 1, 9], [7, 2, 9], [5, 3, 9]]) == [1, 2, 3]
    assert turns.limits([[6, 1, 9], [7, 2, 9], [5, 3, 9]], [1, 2, 3], 3, 5) == [1, 1, 1]
    turns.add(
        [[6, 1, 9], [7, 2, 9], [5, 3, 9]], [1, 2, 3], [Completion([4], [-1.0]), Completion([], []), Completion([4], [-1.0])]
    )
    assert turns.continued([[6, 1, 9, 4, 9], [5, 3, 9, 4, 9]]) == [1, 3]
    assert turns.limits([[6, 1, 9, 4, 9], [5, 3, 9, 4, 9]], [1, 3], 4, 9) == [0, 0]
    assert turns.limits([[6, 1, 9, 4, 9], [5, 3, 9, 4, 9]], [1, 3], 9, 6) == [1, 1]
    assert turns.seeds([0, 1]) == [request_seed(1, 1, 0, 0), request_seed(2, 2, 0, 0)]
    assert turns.seeds([0, 0]) == [request_seed(1, 1, 0, 0), request_seed(1, 2, 0, 0)], "twice in one call: two seeds"
    for other in ([[5, 3, 9, 4, 9], [6, 1, 9, 4, 9]], [[6, 1, 9, 4, 9]], [[6, 1, 9, 4, 9], [5, 3, 9, 4]]):
        with pytest.raises(RuntimeError, match="TRL has changed"):
            turns.continued(other)


def test_ppo_over_turns(new):
    """Advantages and values are of the sampled tokens alone; the step's count holds, and both models learn."""
    run = new(ppo=PPOConfig(kl_coef=0.1))
    before = critic_weights(run)
    run.trainer.train()
    assert_exact(run, 200)
    assert any(not torch.equal(before[name], weight) for name, weight in critic_weights(run).items())
    assert all(math.isfinite(row["value/loss"]) for row in run.rows)


def test_masked_completions_of_turns_are_compared(new):
    run = new(mask_truncated_completions=True, max_completion_length=40)
    run.trainer.train()
    assert_exact(run, 100)
    assert run.total("masked_tokens") == sum(row["length"] for row in run.samples if row["truncated"]) > 0


@cpu_only("two processes of one run take a GPU each; here they are joined by gloo")
def test_ranks_take_as_many_turns_as_their_samples(arithmetic_dir, tmp_path):
    """One rank may call tools once, the other as often as it likes: no rank waits in a turn, no two requests share a seed.

    A tool that fails on one of them ends both, or neither, as the run says.
    """
    script = Path(__file__).parent / "turns_on_ranks.py"
    env = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    for done in forks.run_ranks(2, [str(script), str(tmp_path), arithmetic_dir], cwd=tmp_path, env=env):
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for one, other in zip(ranks[0]["turns"], ranks[1]["turns"], strict=True):
        assert len(one) == 2 < len(other), "blind: as many turns"
        seeds = [seed for batch in (*one, *other) for seed in batch]
        assert len(set(seeds)) == len(seeds)
    for how, words in (("raises", "ValueError: of one rank"), ("hangs", "no answer within 0.5 s")):
        own, other = ranks[1][f"stop, {how}"], ranks[0][f"stop, {how}"]
        assert (
            re.fullmatch(rf"tool reversed_text, step 1, sample (\d|1[0-5]), turn 1: {words}", own) and other == f"rank 1: {own}"
        )
    for row in ranks[0]["rows"] + ranks[0]["tell, raises"]:
        assert row["onpolicy/mismatched_tokens"] == 0 == row["onpolicy/unscored_tokens"] < row["onpolicy/compared_tokens"]


ALLOWED = {  # where the mask of all tokens is meant: what a row costs, which rows TRL has masked, which tokens a model reads
    "turns.py": {"sampled_mask"},
    "division.py": {"lengths", "rows_of", "sizes_of"},
    "grpo.py": {"_compare_masked"},
    "leaves.py": {"without_padding"},
    "ppo.py": {"_values"},
}


def masks_read(source: str) -> set[str]:
    """The functions in which a batch's "completion_mask", or all of its masks by name, are read."""
    tree, found = parsed(source), set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            texts = [ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Subscript)]
            if any("'completion_mask'" in text or "completion_{what}" in text for text in texts):
                found.add(function.name)
    return found


def test_nobody_takes_all_tokens_for_the_sampled_ones():
    """Every use of `completion_mask` alone is one that means a tool's tokens too; all others ask `sampled_mask`."""
    files = {file.name: masks_read(file.read_text()) for file in Path(turns_module.__file__).parent.glob("*.py")}
    assert {name: found for name, found in files.items() if found} == ALLOWED
    assert masks_read("def f(x):\n    return x['completion_mask'].sum()") == {"f"}, "blind"


def test_evaluation_calls_tools(new):
    """TRL's evaluation draws turns with seeds of its own, and its numbers are of sampled tokens."""
    seen = []
    run = new(eval_dataset=questions(4), eval_strategy="steps", eval_steps=1, max_steps=1, on_evaluation=seen.append)
    run.trainer.train()
    assert_exact(run, 100)
    (row,) = seen
    assert row["eval_tools/call_frequency"] > 0 and row["eval_completions/mean_length"] < 80 and math.isfinite(row["eval_loss"])


def test_a_run_goes_on_in_the_midst_of_a_rollout_of_turns(new, tmp_path):
    """The checkpoint holds tokens and masks of the rollout in progress; the weights are those of a run that did not stop."""
    half = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
    settings = half | {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    straight = new(**settings)
    straight.trainer.train()
    assert_exact(straight, 200)
    again = new(**settings)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_exact(again, 100)
    assert_same_weights(weights(straight), weights(again), "resumed")


def test_turns_of_a_truncated_policy_are_exact(new):
    run = new(top_k=40, top_p=0.95)
    run.trainer.train()
    assert_exact(run, 150)
    assert any(len(row["tool_results"]) > 1 for row in run.samples)

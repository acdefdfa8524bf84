"""A step's completions are handed on: every one, once, with the numbers that it was trained with."""

import math
from typing import Any

import numpy as np
import pytest

from rlinvariant.config import PPOConfig
from rlinvariant.errors import ParityError
from rlinvariant.trainer.samples import Samples
from tests.parity.harness import assert_same_weights, new_trainer, off_by_an_ulp, questions, train, variety, weights


def short(completions, log_extra, **_):
    """A second reward, which does not apply to every completion, and logs a column."""
    log_extra("first", [text[:1] for text in completions])
    return [None if len(text) % 3 == 0 else -float(len(text)) for text in completions]


@pytest.fixture
def collected(arithmetic_dir, exact_engine, tmp_path):
    """Train, and return (the trainer with its rows, the samples of each step, the loss's inputs of each step)."""

    def start(**changes: Any):
        steps: dict[int, list[dict[str, Any]]] = {}
        settings = {"reward_funcs": [variety, short], "reward_weights": [2.0, 0.5], "max_steps": 2} | changes
        run = new_trainer(
            arithmetic_dir, exact_engine, tmp_path, on_samples=lambda rows: steps.update({rows[0]["step"]: rows}), **settings
        )
        inputs: list[dict[str, Any]] = []
        compute = run.trainer._compute_loss
        run.trainer._compute_loss = lambda model, batch: (inputs.append(dict(batch)), compute(model, batch))[1]  # type: ignore[method-assign]
        run.trainer.train()
        return run, steps, inputs

    return start


@pytest.mark.parametrize("ppo", [False, True])
def test_every_completion_has_what_it_was_trained_with(ppo, collected):
    """The rows, found again by their tokens in what the loss was given: shuffled and padded there."""
    run, steps, inputs = collected(**({"ppo": PPOConfig()} if ppo else {}))
    assert {step: len(rows) for step, rows in steps.items()} == {1: 16, 2: 16}
    rows = {(row["step"], tuple(row["token_ids"])): row for rows in steps.values() for row in rows}
    for step, batch in enumerate(inputs, 1):
        mask = batch["completion_mask"].bool()
        for i, ids in enumerate(batch["completion_ids"]):
            row = rows[step, tuple(ids[mask[i]].tolist())]
            expected = batch["advantages"][i][mask[i]].mean() if ppo else batch["advantages"][i]
            assert row["advantage"] == pytest.approx(expected.item(), abs=1e-6)
            assert np.array_equal(row["sampler_logprobs"], batch["sampling_per_token_logps"][i][mask[i]].numpy())
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
            assert row["prompt_token_ids"].tolist() == prompt.tolist()
    for row in rows.values():
        assert row["mismatched_tokens"] == 0 and row["trainer_logprobs"] is None
        text = row["completion"]
        assert row["rewards"]["variety"] == np.float32(len(set(text)) / 10)
        other = None if len(text) % 3 == 0 else -float(len(text))
        assert row["rewards"]["short"] == other and row["extra"] == {"first": text[:1]}
        assert row["reward"] == pytest.approx(2 * len(set(text)) / 10 + 0.5 * (other or 0))
        assert row["length"] == len(row["token_ids"]) and row["prompt"].endswith("=")
        assert row["truncated"] == (row["token_ids"][-1] not in run.trainer.end_ids)
    for step, rows_of in steps.items():
        assert [row["sample_id"] for row in rows_of] == list(range(16))
        assert [row["group"] for row in rows_of] == [i // 4 for i in range(16)]
        assert len({row["prompt_id"] for row in rows_of}) == 4 and all(row["step"] == step for row in rows_of)
        mean = sum(row["reward"] for row in rows_of) / 16
        assert run.rows[step - 1]["reward"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("schedule", "drawn"),
    [
        ({"steps_per_generation": 4, "max_steps": 5}, {1: 64, 5: 64}),
        ({"num_iterations": 2, "max_steps": 4}, {1: 16, 3: 16}),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, {1: 32, 2: 32}),
        ({"gradient_accumulation_steps": 2}, {1: 32, 2: 32}),
    ],
)
def test_a_rollout_that_is_used_again_is_kept_once_and_compared_whole(schedule, drawn, collected):
    run, steps, _ = collected(**schedule)
    assert {step: len(rows) for step, rows in steps.items()} == drawn
    rows = [row for rows in steps.values() for row in rows]
    assert all(row["mismatched_tokens"] == 0 for row in rows), "None: one that was not compared"
    assert sum(row["length"] for row in rows) == run.total("compared_tokens")
    for of in steps.values():
        assert [row["sample_id"] for row in of] == list(range(len(of)))


def test_an_evaluation_between_adds_nothing(collected):
    plain = collected(max_steps=3)[1]
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": questions(4), "per_device_eval_batch_size": 4}
    between = collected(max_steps=3, **evaluation)[1]
    assert {k: [repr(row) for row in rows] for k, rows in between.items()} == {
        k: [repr(row) for row in rows] for k, rows in plain.items()
    }


def test_a_stock_trainer_s_log_probs_are_kept_beside_the_sampler_s(arithmetic_dir, stock_engine, tmp_path):
    samples: list[dict[str, Any]] = []
    run = new_trainer(arithmetic_dir, stock_engine, tmp_path, invariance="off", on_samples=samples.extend)
    run.trainer.train()
    assert sum(row["mismatched_tokens"] for row in samples) == run.total("mismatched_tokens") > 0
    for row in samples:
        assert (row["trainer_logprobs"] is None) == (row["mismatched_tokens"] == 0)
        if row["mismatched_tokens"]:
            differs = row["trainer_logprobs"].view(np.int32) != row["sampler_logprobs"].view(np.int32)
            assert differs.sum() == row["mismatched_tokens"]


def test_the_step_that_is_not_exact_is_kept(arithmetic_dir, exact_engine, tmp_path, monkeypatch):
    """The completions that stopped the run are those to look at."""
    from rlinvariant.sampler import vllm_linear

    monkeypatch.setattr(vllm_linear._Head, "apply", off_by_an_ulp(5))
    samples: list[dict[str, Any]] = []
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, on_samples=samples.extend)
    with pytest.raises(ParityError):
        run.trainer.train()
    assert len(samples) == 16 and sum(row["mismatched_tokens"] or 0 for row in samples) > 0


@pytest.mark.parametrize("invariance", ["exact", "off"])
def test_what_masking_leaves_out_was_compared(arithmetic_dir, exact_engine, stock_engine, tmp_path, invariance):
    samples: list[dict[str, Any]] = []
    settings = {"invariance": invariance, "mask_truncated_completions": True, "on_samples": samples.extend}
    run = train(arithmetic_dir, exact_engine if invariance == "exact" else stock_engine, tmp_path, **settings)
    assert {row["mismatched_tokens"] is None for row in samples} == {False}
    assert {row["truncated"] for row in samples} == {True, False}
    assert run.total("masked_tokens") == sum(row["length"] for row in samples if row["truncated"]) > 0
    assert run.total("compared_tokens") == sum(row["length"] for row in samples) and run.total("unscored_tokens") == 0
    assert (run.total("mismatched_tokens") == 0) == (invariance == "exact")


def test_a_completion_no_reward_applies_to_has_none(collected):
    def none(completions, **_):
        return [None if i == 0 else float(i) for i in range(len(completions))]

    _, steps, _ = collected(reward_funcs=[none], reward_weights=[1.0])
    rows = steps[1]
    assert rows[0]["reward"] is None and rows[0]["rewards"] == {"none": None} and rows[0]["advantage"] == 0.0
    assert all(math.isfinite(row["reward"]) for row in rows[1:])


def test_collecting_changes_no_bit(arithmetic_dir, exact_engine, tmp_path, monkeypatch):
    """Against a trainer whose layer that collects does nothing but count the tokens drawn."""
    with_it = train(arithmetic_dir, exact_engine, tmp_path / "with")
    for name in ("score", "compare"):
        monkeypatch.setattr(Samples, name, lambda *args: None)
    monkeypatch.setattr(Samples, "weigh", lambda self, output: output.update(sample=output["completion_ids"][:, 0]))
    kept: list[dict] = []
    without = train(arithmetic_dir, exact_engine, tmp_path / "without", on_samples=kept.extend)
    assert kept and not any({"completion", "reward", "advantage"} & row.keys() for row in kept)
    assert_same_weights(weights(with_it), weights(without), "with and without")

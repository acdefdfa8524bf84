"""A step's numbers are of all tokens and completions alike, however they were cut, and of the rewards that train."""

import math
from typing import Any
from unittest import mock

import pytest
import torch

from rlinvariant.config import PPOConfig
from rlinvariant.errors import UserError
from rlinvariant.keys import CLOCKS, KEYS
from rlinvariant.trainer.measured import MeasuredTrainer
from tests.parity.harness import new_trainer, questions, variety

ROUNDED = {
    "loss": 1e-6,
    "grad_norm": 2e-2,
    "value/grad_norm": 2e-2,
    "policy_loss": 1e-6,
}  # float sums, in the order of training
CUTS = {1: None, 2: 190, 4: 90}  # micro-batches of a rollout, and their tokens


@pytest.fixture
def new(arithmetic_dir, exact_engine, tmp_path):
    def start(**changes: Any):
        return new_trainer(arithmetic_dir, exact_engine, tmp_path / str(len(list(tmp_path.iterdir()))), **changes)

    return start


def half(completions: list[str], **_: Any) -> list[float | None]:
    """Applies to every other completion."""
    return [float(len(text)) if i % 2 else None for i, text in enumerate(completions)]


# With a clip range below 0 every ratio of an exact run, which is 1, is clipped where its advantage is not 0.
KINDS: dict[str, dict[str, Any]] = {
    "clipped, with a reference": {"epsilon": -0.5, "beta": 0.1},
    "two rewards": {"reward_funcs": [variety, half], "reward_weights": [1.0, 0.5], "loss_type": "grpo"},
    "sequence ratios": {"epsilon": -0.5, "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 0.5},
    "entropy bonus": {"entropy_coef": 0.01},
    "corrected": {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "sequence_mask"},
    "ppo": {"ppo": PPOConfig(kl_coef=0.1)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_number_of_micro_batches(kind, new):
    """All keys but clocks, to the last bit; the loss and its gradient are float sums in another order."""
    rows = []
    for parts, tokens in CUTS.items():
        run, taken = new(max_steps=1, tokens_per_microbatch=tokens, **KINDS[kind]), []
        divide = run.trainer._divide
        run.trainer._divide = lambda batch, divide=divide, taken=taken: taken.append(divide(batch)) or taken[-1]
        run.trainer.train()
        assert len(taken[-1]) == parts
        rows += run.rows
    whole = {key: value for key, value in rows[0].items() if not key.startswith(CLOCKS)}
    assert set(KEYS) <= rows[0].keys()
    for row, parts in zip(rows[1:], list(CUTS)[1:], strict=True):
        assert row.keys() == rows[0].keys()
        for key, value in whole.items():
            if kind == "entropy bonus" and key in ("loss", "grad_norm"):
                continue  # TRL's bonus is a mean of the means of micro-batches: what trains is another loss
            if key in ROUNDED:
                assert row[key] == pytest.approx(value, rel=ROUNDED[key], abs=ROUNDED[key]), f"{key} in {parts} micro-batches"
            else:
                assert repr(row[key]) == repr(value), f"{key} in {parts} micro-batches"
    if "epsilon" in KINDS[kind]:
        assert 0 < whole["clip_ratio/low_mean"] < whole["clip_ratio/region_mean"]
    if kind == "cispo":
        assert whole["cispo_clip_ratio"] > 0


def test_trls_means_of_micro_batches_are_other_numbers(new):
    """The control of the test above: what TRL has noted of each micro-batch, averaged as TRL does."""
    noted: dict[str, list[float]] = {}
    others = MeasuredTrainer._others

    def noting(self, mode, row):
        noted.update({key: list(values) for key, values in self._metrics[mode].items()})
        return others(self, mode, row)

    with (
        mock.patch.object(MeasuredTrainer, "_others", noting),
        mock.patch.object(MeasuredTrainer, "_weigh_metrics", lambda *_: None),
    ):
        run = new(max_steps=1, tokens_per_microbatch=90, **KINDS["clipped, with a reference"])
        run.trainer.train()
    for key in ("entropy", "clip_ratio/low_mean", "clip_ratio/region_mean"):
        assert len(noted[key]) == 4 and abs(sum(noted[key]) / 4 - run.rows[0][key]) > 1e-6, key


def test_two_rollouts_of_a_step_are_one(new):
    """The spread of a step's rewards is that of all its completions; TRL has the mean of the rollouts' spreads."""
    drawn: list[float] = []

    def kept(completions: list[str], **_: Any) -> list[float]:
        drawn.extend(variety(completions))
        return drawn[-len(completions) :]

    run = new(
        max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=2, steps_per_generation=1, reward_funcs=kept
    )
    run.trainer.train()
    values = torch.tensor(drawn, dtype=torch.float32).double()
    (row,) = run.rows
    assert len(drawn) == 16 and row["reward"] == pytest.approx(values.mean().item(), rel=1e-12)
    assert row["reward_std"] == pytest.approx(values.std().item(), rel=1e-12)


# ---- rewards


def test_a_sample_has_the_reward_that_trains_it(new):
    """Two rewards of one name, None here and there, a coroutine, weights; an evaluation between; a rollout reused."""

    def named(value: float):
        def same(completions: list[str], **_: Any) -> list[float | None]:
            return [value if len(text) % 2 else None for text in completions]

        return same

    async def later(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    samples: list[dict[str, Any]] = []
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": questions(4), "per_device_eval_batch_size": 16}
    run = new(
        reward_funcs=[named(1.0), named(2.0), later],
        reward_weights=[1.0, 10.0, 0.5],
        on_samples=samples.extend,
        num_iterations=2,
        max_steps=4,
        **evaluated,
    )
    run.trainer.train()
    assert [row["step"] for row in samples] == [1] * 16 + [3] * 16, (
        "each rollout is trained on twice; evaluations are no samples"
    )
    for row in samples:
        odd = len(row["completion"]) % 2
        assert row["rewards"] == {"same": 1.0 if odd else None, "same_2": 2.0 if odd else None, "later": len(row["completion"])}
        assert row["reward"] == (21.0 if odd else 0.0) + 0.5 * len(row["completion"])
    assert run.rows[0]["reward"] == sum(row["reward"] for row in samples[:16]) / 16
    assert repr(run.rows[0]["reward"]) == repr(run.rows[1]["reward"]) != repr(run.rows[2]["reward"])
    assert run.rows[0]["rewards/same_2/mean"] == 2 * run.rows[0]["rewards/same/mean"]


# ---- evaluations


def test_an_evaluation_is_a_row_of_all_its_completions(new):
    """20 completions in batches of 16 and 4: a mean of the batches' means would weigh the last four fourfold."""
    graded: list[float] = []

    def kept(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        values = variety(completions)
        if not run.trainer.model.training:
            graded.extend(values)
        return values

    found: list[dict[str, Any]] = []
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": questions(5), "per_device_eval_batch_size": 16}
    best = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}
    run = new(reward_funcs=kept, on_evaluation=found.append, max_steps=2, greater_is_better=True, **evaluated, **best)
    run.trainer.train()
    sets = run.trainer.evaluate({"easy": questions(5), "hard": questions(8)})
    assert [(row["kind"], row["step"]) for row in found] == [("evaluation", 2)] * 3 and len(run.rows) == 2
    plain, easy, hard = found
    values = torch.tensor(graded[:20], dtype=torch.float32).double()
    assert plain["eval_reward"] == pytest.approx(values.mean().item(), rel=1e-12)
    assert abs((values[:16].mean() + values[16:].mean()).item() / 2 - plain["eval_reward"]) > 1e-6, "control"
    assert {"eval_loss", "eval_entropy", "eval_completions/mean_length", "eval_runtime"} <= plain.keys()
    assert math.isfinite(plain["eval_entropy"]) and run.trainer.state.best_metric == plain["eval_reward"]
    assert not [key for key in hard if key.startswith("eval_easy")] and sets["eval_hard_reward"] == hard["eval_hard_reward"]
    assert easy["eval_easy_num_tokens"] == plain["eval_num_tokens"] and "eval_reward" not in easy
    assert not any(key.startswith("eval") for row in run.rows for key in row)
    run.trainer.log({"data_runtime": 1.0})  # a user's own, which is no evaluation
    assert len(found) == 3 and run.trainer.state.log_history[-1]["data_runtime"] == 1.0


def test_one_of_several_evaluation_sets_chooses_the_best_model_and_the_learning_rate(new):
    found: list[dict[str, Any]] = []
    sets = {"eval_dataset": {"easy": questions(4), "hard": questions(8)}, "eval_strategy": "steps", "eval_steps": 1}
    best = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "hard_reward"}
    run = new(on_evaluation=found.append, max_steps=2, lr_scheduler_type="reduce_lr_on_plateau", **sets, **best)
    run.trainer.train()
    assert len(found) == 4
    assert run.trainer.state.best_metric == max(row["eval_hard_reward"] for row in found if "eval_hard_reward" in row)


@pytest.mark.parametrize("settings", [{}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_a_metric_that_no_evaluation_has_is_one_line(settings, new):
    settings |= {"eval_dataset": questions(4), "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "merit"}
    with pytest.raises(UserError, match=r"^metric_for_best_model=merit: expected a metric of the evaluations, as eval_reward"):
        new(max_steps=1, **settings).trainer.train()

"""The record that a step leaves behind is merged over ranks, and turned into a row, without TRL, a model or an engine."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlinvariant import metrics
from rlinvariant.keys import KEYS, PPO_KEYS
from rlinvariant.metrics import FirstMismatch, Trained
from rlinvariant.trainer.grading import different_names, weighted_sums
from rlinvariant.trainer.record import PARTS, Graded, Pair, PPORecord, StepRecord
from rlinvariant.trainer.samples import Samples
from rlinvariant.trainer.versions import PolicyVersions

SETTINGS = {"group_size": 2, "clip_max": 2.0, "step_s": 3.0}


def pair(sampler: list[float], trainer: list[float]) -> Pair:
    return Pair(np.array(sampler, np.float32), np.array(trainer, np.float32))


def drawn(*rollouts: list[list[int]], rank: int = 0, ranks: int = 1, group_size: int = 2) -> Samples:
    """Return the samples of a rank that drew these rollouts."""
    accelerator = SimpleNamespace(process_index=rank, num_processes=ranks)
    trainer: Any = SimpleNamespace(accelerator=accelerator, end_ids={9}, state=SimpleNamespace(global_step=0))
    samples = Samples()
    for rollout in rollouts:
        samples.draw(trainer, [[1]] * len(rollout), rollout, [[-1.0] * len(ids) for ids in rollout], None, group_size)
    return samples


def record(**changes) -> StepRecord:
    settings = {"compared": [pair([-1, -2, -3], [-1, -2, -3])], "samples": drawn([[4, 9], [4]])} | changes
    return StepRecord(**settings)


def test_the_record_of_all_ranks_has_every_token_and_the_slowest_seconds():
    a = record(seconds=dict.fromkeys(PARTS, 1.0) | {"rollout": 5.0}, samples=drawn([[4, 9], [4]], rank=0, ranks=2))
    mismatch = FirstMismatch(0, 1, -1.0, -2.0, "0x0", "0x1")
    samples = drawn([[7], [9]], rank=1, ranks=2)
    b = record(compared=[pair([-4], [-5])], first_mismatch=mismatch, weights_equal=False, samples=samples)
    whole = StepRecord.merge([a, b])
    assert Pair.join(whole.compared).sampler.tolist() == [-1, -2, -3, -4]
    assert [row["token_ids"].tolist() for row in whole.samples.rows] == [[4, 9], [4], [7], [9]] and whole.sampled == 5
    assert whole.seconds == dict.fromkeys(PARTS, 1.0) | {"rollout": 5.0} and whole.began == a.began
    assert whole.first_mismatch is mismatch and not whole.weights_equal
    row = whole.row(**SETTINGS)
    assert row["onpolicy/mismatched_tokens"] == 1 and row["onpolicy/compared_tokens"] == 4
    assert row["onpolicy/unscored_tokens"] == 1 and row["onpolicy/weights_equal"] == 0
    assert row["perf/sampler_tok_s"] == 1.0 and row["perf/trainer_tok_s"] == 4.0 and row["step_time"] == 3.0


@pytest.mark.parametrize("group_size", [2, 4])
def test_a_group_is_that_of_one_prompt_over_ranks_and_rollouts(group_size):
    """Two ranks draw half of each rollout; a group of 4 lies on both. Rank after rank, groups of two rollouts would mix."""
    first, second = [[1], [2], [3], [4]], [[5], [5], [5], [5]]  # all different, all the same
    halves = [drawn(first[i : i + 2], second[i : i + 2], rank=i // 2, ranks=2, group_size=group_size) for i in (0, 2)]
    whole = StepRecord.merge([record(samples=half) for half in halves])
    row = whole.row(**SETTINGS | {"group_size": group_size})
    assert row["onpolicy/group_unique_frac"] == (4 + 4 / group_size) / 8
    rows = [row["token_ids"].tolist() for half in halves for row in half.rows]
    by_rank = metrics.group_unique_frac(rows, group_size)
    assert (by_rank == row["onpolicy/group_unique_frac"]) == (group_size == 2), "the control: in the order of ranks"


def batch() -> Trained:
    one = np.ones(1, int)
    return Trained(one, np.ones(1, np.float32), np.zeros(0, np.float32), (0 * one, one, one), "both")


def test_a_row_has_every_key_that_is_not_counted_over_the_run():
    graded = Graded([2, 1], [False, True], {"f": [0.0, 0.5]}, [0.0, 0.5])
    known = record(trained=[batch()])
    row = known.row(**SETTINGS) | graded.row(2) | known.policy_row()
    counted = {f"onpolicy/{name}" for name in ("weight_version_lag", "exact_streak_tokens", "mismatched_tokens_total")}
    assert set(KEYS) - row.keys() == counted | {"loss", "grad_norm", "learning_rate", "num_tokens"}
    assert row["onpolicy/coverage"] == 1 and row["onpolicy/mismatched_tokens"] == 0
    assert row["onpolicy/group_unique_frac"] == 1 and row["completions/clipped_ratio"] == 0.5
    assert row["reward"] == row["rewards/f/mean"] == 0.25 and row["clip_ratio/high_max"] == row["entropy"] == 1
    assert math.isnan(row["policy/approx_kl"]) and math.isnan(row["perf/sampler_tok_s"])


def test_trls_correction_is_of_all_tokens_of_all_ranks():
    """Two ranks with three tokens and one: the mean of their means is another number."""
    corrected = [(np.array([0.0, 0.0, 0.3], np.float32), np.ones(3, np.float32)), (np.array([1.0]), np.array([0.5]))]
    row = StepRecord.merge([record(corrected=[part]) for part in corrected]).policy_row()
    name, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
    assert row[f"{name}/mean"] == pytest.approx(1.3 / 4) and row[f"{name}/max"] == 1
    assert [row[f"{ratio}/{of}"] for of in ("min", "mean", "max")] == [0.5, 0.875, 1]


def test_later_passes_count_as_trained_and_not_as_compared():
    moved = record(moved=[pair([-1], [-1.5])], seconds=dict.fromkeys(PARTS, 2.0))
    row = moved.row(**SETTINGS)
    assert row["onpolicy/compared_tokens"] == 3 and row["perf/trainer_tok_s"] == 2.0
    assert row["policy/approx_kl"] == pytest.approx(math.expm1(-0.5) + 0.5)


def test_a_part_inside_another_is_counted_once():
    timed = StepRecord()
    with timed.timed("train"), timed.timed("rollout"):
        pass
    timed.seconds["rollout"] = 0.0
    with timed.timed("train"):
        timed.seconds["rollout"] += 100.0  # as long as the rollout inside it took
    assert timed.seconds["train"] < 0 < timed.seconds["rollout"], "100 s of the block are the rollout's"


def test_ppos_record_is_of_all_ranks_too():
    ranks = [
        PPORecord(
            log_ratios=[torch.zeros(3, dtype=torch.float64)],
            value_losses=[torch.tensor([1.0, 2.0, 3.0])],
            values_clipped=[1],
            value_grad_norm=2.0,
        ),
        PPORecord(log_ratios=[torch.ones(1, dtype=torch.float64)], value_losses=[torch.tensor([2.0])], value_grad_norm=2.0),
    ]
    whole = PPORecord.merge(ranks)
    row = whole.ppo_row()
    assert row["value/loss"] == 2.0 and row["value/clip_frac"] == 0.25 and row["value/grad_norm"] == 2.0
    assert row["policy/ratio_min"] == 1.0 and row["policy/ratio_max"] == math.e
    assert row["policy/approx_kl"] == pytest.approx((math.e - 2) / 4) == whole.kl_of_tokens()
    empty = PPORecord().ppo_row()
    assert empty.keys() == row.keys() < {*PPO_KEYS, "policy/approx_kl"} and all(map(math.isnan, empty.values()))


def test_a_completion_has_the_reward_that_trains_it():
    none = math.nan
    names = different_names(["f", "f", "g", "f_2"])
    assert names == ["f", "f_3", "g", "f_2"] and different_names(["f", "f", "f"]) == ["f", "f_2", "f_3"]
    rewards_NF = torch.tensor([[1.0, 2.0, 0.5, none], [none, none, none, none]])
    total = weighted_sums(rewards_NF, torch.tensor([1.0, 10.0, 2.0, 1.0]))
    assert total[0] == 22 and math.isnan(total[1])


def test_versions_lag_by_as_many_steps_as_asked():
    versions, weights = PolicyVersions(2), torch.zeros(1)
    lags = []
    for step in range(5):
        versions.sampler, older = versions.to_sample_with(step, stale=True)
        assert older is None or older["w"].item() == versions.sampler
        versions.sampled(step)
        lags.append(versions.rollout_step - versions.rollout)
        assert versions.on_policy == (lags[-1] == 0) and versions.on_disk(step) == (step == 0)
        for _ in range(2):  # two micro-batches: the weights are those of one version
            versions.keep(step, [("w", weights)])
        weights += 1
    assert lags == [0, 1, 2, 2, 2] and versions.to_sample_with(5, stale=False) == (5, None)
    versions.forget()
    assert versions.sampler is None and versions.to_sample_with(0, stale=True) == (0, None)

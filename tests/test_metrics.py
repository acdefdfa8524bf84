import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinvariant import keys, metrics
from rlinvariant.keys import KEYS, PPO_KEYS
from rlinvariant.metrics import ONPOLICY_KEYS, first_mismatch, group_unique_frac, onpolicy

EXACT = {
    "onpolicy/mismatched_tokens": 0,
    "onpolicy/unscored_tokens": 0,
    "onpolicy/coverage": 1.0,
    "onpolicy/logprob_absdiff/mean": 0.0,
    "onpolicy/logprob_absdiff/p99": 0.0,
    "onpolicy/logprob_absdiff/max": 0.0,
    "onpolicy/ulp/max": 0,
    "onpolicy/kl_k1": 0.0,
    "onpolicy/kl_k3": 0.0,
    "onpolicy/is_ratio/min": 1.0,
    "onpolicy/is_ratio/mean": 1.0,
    "onpolicy/is_ratio/max": 1.0,
    "onpolicy/is_ess": 1.0,
    "onpolicy/is_clipped_frac": 0.0,
}
# The list that users are promised, as they read it.
PROMISED = """
onpolicy/mismatched_tokens  onpolicy/compared_tokens  onpolicy/unscored_tokens  onpolicy/coverage
onpolicy/logprob_absdiff/{mean,p99,max}   onpolicy/ulp/max   onpolicy/kl_k1   onpolicy/kl_k3
onpolicy/is_ratio/{min,mean,max}  onpolicy/is_ess  onpolicy/is_clipped_frac
onpolicy/group_unique_frac  onpolicy/weights_equal  onpolicy/weight_version_lag  onpolicy/exact_streak_tokens
onpolicy/mismatched_tokens_total  onpolicy/masked_tokens
reward  reward_std  frac_reward_zero_std  reward/{errors,timeouts,crashes}
completions/{mean_length,min_length,max_length,clipped_ratio}  rollout/{empty_frac,turns}
completions/{mean_terminated_length,min_terminated_length,max_terminated_length}
entropy  clip_ratio/region_mean  policy/approx_kl
loss  grad_norm  learning_rate  num_tokens
step_time  time/{rollout,tools,score,train,sync,save}  perf/{sampler_tok_s,trainer_tok_s}
perf/{prefill_tokens,cached_tokens,later_prefill_tokens,later_cached_tokens}
"""
COUNTS = ("mismatched_tokens", "compared_tokens", "unscored_tokens")


def fp32(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def logprobs(count: int, seed: int = 0) -> np.ndarray:
    return -np.random.default_rng(seed).exponential(2.0, count).astype(np.float32)


def test_keys_are_those_promised():
    promised = set()
    for word in PROMISED.split():
        prefix, _, names = word.rstrip("}").partition("{")
        promised |= {prefix + name for name in names.split(",")}
    assert set(KEYS) == promised and len(KEYS) == len(promised)


def test_functions_return_their_keys():
    x = logprobs(5)
    assert tuple(onpolicy(x, x, 5, 2.0)) == ONPOLICY_KEYS
    assert tuple(metrics.completion_stats([1], [False])) == keys.keys(keys.COMPLETIONS)
    assert set(ONPOLICY_KEYS) < set(KEYS)


def test_no_number_has_two_names():
    """A row of an earlier version has each of its numbers once, under the name of today."""
    names = keys.keys(*keys.SECTIONS)
    assert len(set(names)) == len(names) and not set(keys.RENAMED) & set(names)
    assert set(keys.RENAMED.values()) <= set(KEYS) and not set(KEYS) & set(PPO_KEYS)
    old = {"step": 3, "reward": 0.5, "reward/mean": 0.5, "step_time": 1.0, "perf/step_s": 2.0, "optim/lr": 1e-3, "kl": 0.1}
    assert keys.renamed(old) == {"step": 3, "reward": 0.5, "step_time": 2.0, "learning_rate": 1e-3, "kl": 0.1}
    assert keys.renamed(keys.renamed(old)) == keys.renamed(old)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(max_value=0.0, width=32, allow_nan=False), min_size=1, max_size=200))
def test_equal_bits_give_exact_numbers(values):
    x = np.array(values, dtype=np.float32)
    assert onpolicy(x, x.copy(), len(x), 2.0) == EXACT | {"onpolicy/compared_tokens": len(x)}


@pytest.mark.parametrize("count", [3, 7, 999, 61_440, 312_003])  # counts whose reciprocal is no binary fraction, too
def test_equal_bits_give_exact_numbers_at_any_count(count):
    x = logprobs(count)
    row = onpolicy(torch.from_numpy(x), x.copy(), count, 2.0)
    assert row == EXACT | {"onpolicy/compared_tokens": count}
    assert math.copysign(1.0, row["onpolicy/kl_k1"]) == 1.0  # not -0.0, which would be printed with its sign
    assert all(type(row[f"onpolicy/{name}"]) is int for name in COUNTS)


def test_one_ulp_in_one_token_shows_in_every_number_that_can_show_it():
    x = logprobs(1000)
    y = x.copy()
    y[500] = np.nextafter(x[500], np.float32(0.0))
    row = onpolicy(x, y, 1000, 2.0)
    assert (row["onpolicy/mismatched_tokens"], row["onpolicy/ulp/max"]) == (1, 1)
    assert row["onpolicy/logprob_absdiff/max"] == abs(float(y[500]) - float(x[500])) > 0
    assert row["onpolicy/kl_k1"] < 0 < row["onpolicy/kl_k3"]
    assert row["onpolicy/is_ratio/max"] > 1.0 == row["onpolicy/is_ratio/min"]


def test_numbers_follow_their_formulas():
    sampler, trainer = np.log(fp32([0.5, 0.2, 0.1])), np.log(fp32([0.25, 0.2, 0.4]))
    s, t = sampler.astype(np.float64), trainer.astype(np.float64)
    ratio = [math.exp(b - a) for a, b in zip(s, t, strict=True)]
    row = onpolicy(sampler, trainer, 4, 2.0)
    assert (row["onpolicy/mismatched_tokens"], row["onpolicy/compared_tokens"], row["onpolicy/unscored_tokens"]) == (
        2,
        3,
        1,
    )
    assert row["onpolicy/coverage"] == 0.75
    assert row["onpolicy/kl_k1"] == pytest.approx(np.mean(s - t))
    assert row["onpolicy/kl_k3"] == pytest.approx(np.mean([w - 1 - math.log(w) for w in ratio]))
    assert row["onpolicy/is_ratio/mean"] == pytest.approx(np.mean(ratio))
    assert row["onpolicy/is_ess"] == pytest.approx(sum(ratio) ** 2 / (3 * sum(w * w for w in ratio)))
    assert row["onpolicy/is_clipped_frac"] == pytest.approx(1 / 3)  # the ratio 4; 0.5 and 1 pass
    assert row["onpolicy/logprob_absdiff/p99"] == row["onpolicy/logprob_absdiff/max"] == pytest.approx(math.log(4))


def test_kl_estimates_the_divergence_of_trainer_from_sampler_under_the_sampler():
    rng = np.random.default_rng(0)
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    kl, other = float(np.sum(p * np.log(p / q))), float(np.sum(q * np.log(q / p)))
    tokens = rng.choice(3, 400_000, p=p)
    row = onpolicy(np.log(p).astype(np.float32)[tokens], np.log(q).astype(np.float32)[tokens], 400_000, 2.0)
    for key in ("onpolicy/kl_k1", "onpolicy/kl_k3"):
        assert abs(row[key] - kl) < 0.2 * abs(other - kl)  # closer to KL(p || q) than to the reverse by far


@pytest.mark.parametrize("side", ["sampler", "trainer", "both"])
def test_nan_equals_nothing(side):
    x, y = logprobs(100), logprobs(100)
    if side != "trainer":
        x[7] = np.nan
    if side != "sampler":
        y[7] = np.nan
    row = onpolicy(x, y, 100, 2.0)
    assert (row["onpolicy/mismatched_tokens"], row["onpolicy/compared_tokens"], row["onpolicy/unscored_tokens"]) == (
        1,
        100,
        0,
    )
    assert all(math.isnan(row[key]) for key in set(ONPOLICY_KEYS) - {f"onpolicy/{n}" for n in (*COUNTS, "coverage")})


def test_minus_zero_is_a_mismatch():
    row = onpolicy(fp32([0.0, -1.0]), fp32([-0.0, -1.0]), 2, 2.0)
    assert (row["onpolicy/mismatched_tokens"], row["onpolicy/ulp/max"], row["onpolicy/logprob_absdiff/max"]) == (
        1,
        1,
        0.0,
    )


@pytest.mark.filterwarnings("error")
def test_infinite_logprobs_are_reported():
    minus_inf = fp32([-np.inf, -1.0])
    assert onpolicy(minus_inf, minus_inf.copy(), 2, 2.0) == EXACT | {"onpolicy/compared_tokens": 2}
    row = onpolicy(fp32([-1.0, -1.0]), minus_inf, 2, 2.0)
    assert row["onpolicy/logprob_absdiff/max"] == row["onpolicy/kl_k3"] == math.inf
    assert (row["onpolicy/is_ratio/min"], row["onpolicy/is_ess"]) == (0.0, 0.5)
    assert onpolicy(fp32([-900.0]), fp32([-1.0]), 1, 2.0)["onpolicy/is_ess"] == 1.0  # exp(899) overflows


@pytest.mark.parametrize(("sampled", "unscored"), [(0, 0), (9, 9)])
def test_no_tokens_prove_nothing(sampled, unscored):
    row = onpolicy(np.zeros(0, np.float32), torch.zeros(0), sampled, 2.0)
    assert tuple(row) == ONPOLICY_KEYS
    assert (row["onpolicy/mismatched_tokens"], row["onpolicy/unscored_tokens"]) == (0, unscored)
    assert row["onpolicy/coverage"] == 0.0
    assert math.isnan(row["onpolicy/kl_k3"]) and math.isnan(row["onpolicy/is_ess"])


def test_coverage_is_1_only_if_all_tokens_were_compared():
    x = logprobs(1_000_000)
    assert onpolicy(x, x, 1_000_000, 2.0)["onpolicy/coverage"] == 1.0
    assert onpolicy(x, x, 1_000_001, 2.0)["onpolicy/coverage"] < 1.0


def test_bad_arguments_are_refused():
    x = logprobs(4)
    with pytest.raises(TypeError, match="sampler_logprobs is float64"):
        onpolicy(x.astype(np.float64), x, 4, 2.0)
    with pytest.raises(TypeError, match="trainer_logprobs is torch.bfloat16"):
        onpolicy(x, torch.from_numpy(x).bfloat16(), 4, 2.0)
    with pytest.raises(ValueError, match=r"\(4,\) and trainer \(3,\)"):
        onpolicy(x, x[:3], 4, 2.0)
    with pytest.raises(ValueError, match="4 tokens compared, but only 3 sampled"):
        onpolicy(x, x, 3, 2.0)


def test_first_mismatch_is_found_behind_padding():
    x = torch.from_numpy(logprobs(12).reshape(3, 4))
    y, mask = x.clone(), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    y[0, 2], y[1, 3] = 5.0, float("nan")  # padding may hold anything
    assert first_mismatch(x, y, mask) is None
    y[1, 2], y[2, 0] = -1.0, -0.0
    x[1, 2] = -1.0 - 2**-23
    found = first_mismatch(x, y, mask)
    assert found is not None
    assert (found.sequence, found.position, found.sampler_hex, found.trainer_hex) == (1, 2, "0xBF800001", "0xBF800000")
    assert str(found) == "sequence 1, position 2: sampler -1.00000012 0xBF800001, trainer -1 0xBF800000"


def test_first_mismatch_finds_a_nan_that_both_sides_share():
    x = torch.tensor([[-1.0, float("nan")]])
    found = first_mismatch(x, x.clone(), torch.ones(1, 2, dtype=torch.bool))
    assert found is not None and (found.sequence, found.position, found.sampler_hex) == (0, 1, "0x7FC00000")


def test_first_mismatch_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"mask \(2, 2\)"):
        first_mismatch(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 2))


def test_group_unique_frac():
    a, b, c = [1, 2], [1, 3], [1]
    assert group_unique_frac([a, b, c, a], 4) == 0.75
    assert group_unique_frac([a, b, a, b], 2) == 1.0  # the same completion in two groups is no duplicate
    assert group_unique_frac([a, a, a, a], 4) == 0.25  # what one seed for the whole group would give
    assert math.isnan(group_unique_frac([], 4))
    with pytest.raises(ValueError, match="3 completions do not fill groups of 2"):
        group_unique_frac([a, b, c], 2)


def test_completion_stats():
    assert metrics.completion_stats([4, 0, 2, 10], [False, False, False, True]) == {
        "completions/mean_length": 4.0,
        "completions/min_length": 0,
        "completions/max_length": 10,
        "completions/clipped_ratio": 0.25,
        "completions/mean_terminated_length": 2.0,
        "completions/min_terminated_length": 0,
        "completions/max_terminated_length": 4,
        "rollout/empty_frac": 0.25,
    }
    assert metrics.completion_stats([3], [True])["completions/mean_terminated_length"] == 0, "as TRL says it"
    assert all(math.isnan(value) for value in metrics.completion_stats([], []).values())
    with pytest.raises(ValueError, match="2 lengths, but 1 flags of what was cut"):
        metrics.completion_stats([1, 2], [True])


def test_reward_stats_leave_out_what_has_no_reward():
    none = math.nan
    rewards, by = [1.0, 3.0, none, none, 2.0, 2.0], {"f": [1.0, 3.0, none, none, 2.0, none]}
    row = metrics.reward_stats(rewards, by, 2)
    assert row["reward"] == 2.0 and row["rewards/f/mean"] == 2.0
    assert row["reward_std"] == pytest.approx(np.std([1, 3, 2, 2], ddof=1))
    assert row["frac_reward_zero_std"] == 1 / 3, "of three groups one has equal rewards, and one has none"
    assert math.isnan(metrics.reward_stats([none], {}, 1)["reward"])


def trained(lengths: list[int], seed: int, clips: Literal["both", "above"] | None = "both") -> list[metrics.Trained]:
    """One micro-batch for each sequence."""
    random = np.random.default_rng(seed)
    found = []
    for n in lengths:
        low, high = (np.array([random.integers(0, n // 2 + 1)]) for _ in range(2))
        entropies, kl = (random.random(n).astype(np.float32) for _ in range(2))
        found.append(metrics.Trained(np.array([n]), entropies, kl, (low, high, np.array([n])), clips))
    return found


def test_policy_stats_are_over_tokens_in_any_order():
    """The mean of the means of micro-batches, of which one is short, is another number."""
    parts = trained([40, 1, 7, 19], 0)
    row = metrics.policy_stats(parts)
    assert row == metrics.policy_stats(parts[::-1])
    tokens = np.concatenate([part.entropies for part in parts]).astype(np.float64)
    assert row["entropy"] == pytest.approx(tokens.mean(), rel=1e-12)
    assert abs(np.mean([part.entropies.mean() for part in parts]) - row["entropy"]) > 1e-3, "control"
    low = sum(int(part.clipped[0].sum()) for part in parts)
    assert row["clip_ratio/low_mean"] == low / 67
    assert row["clip_ratio/region_mean"] == pytest.approx(row["clip_ratio/low_mean"] + row["clip_ratio/high_mean"])
    assert math.isnan(metrics.policy_stats(trained([3], 0, None))["clip_ratio/region_mean"])
    assert "cispo_clip_ratio" in metrics.policy_stats(trained([3], 0, "above"))
    assert math.isnan(metrics.policy_stats([])["entropy"])


def test_the_first_sequences_are_those_of_the_first_micro_batches():
    parts = trained([4, 2, 3], 1)
    assert [len(part.entropies) for part in metrics.Trained.first(parts, 2)] == [4, 2, 0]
    assert metrics.policy_stats(metrics.Trained.first(parts, 2)) == metrics.policy_stats(parts[:2])


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(12)))
def test_no_number_depends_on_the_order_of_tokens(order):
    x = logprobs(12)
    y = x + np.random.default_rng(1).normal(0, 0.1, 12).astype(np.float32)
    assert onpolicy(x[order], y[order], 12, 1.05) == onpolicy(x, y, 12, 1.05)
    values = np.array([1e16, 1.0, -1e16, *y[:9]])
    assert metrics.mean(values[order]) == metrics.mean(values) and metrics.std(values[order]) == metrics.std(values)


def test_sums_that_no_number_holds_are_nan():
    assert math.isnan(metrics.mean([math.inf, -math.inf])) and math.isnan(metrics.mean([]))
    assert math.isnan(metrics.std([1.0])) and metrics.std([2.0, 2.0]) == 0

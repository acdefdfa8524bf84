import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlinvariant import metrics
from rlinvariant.metrics import KEYS, ONPOLICY_KEYS, ROLLOUT_KEYS, first_mismatch, group_unique_frac, onpolicy

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
reward/{mean,errors,timeouts,crashes}  rollout/{len_mean,len_max,truncated_frac,empty_frac}
policy/{entropy,clip_frac,approx_kl}
optim/{loss,grad_norm,lr}  time/{rollout,score,train,sync,save}  perf/{sampler_tok_s,trainer_tok_s,step_s}
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
    assert tuple(metrics.rollout_stats([1], [False])) == ROLLOUT_KEYS
    assert set(ONPOLICY_KEYS) | set(ROLLOUT_KEYS) < set(KEYS)


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


def test_rollout_stats():
    assert metrics.rollout_stats([4, 0, 2, 10], [False, False, False, True]) == {
        "rollout/len_mean": 4.0,
        "rollout/len_max": 10,
        "rollout/truncated_frac": 0.25,
        "rollout/empty_frac": 0.25,
    }
    assert all(math.isnan(value) for value in metrics.rollout_stats([], []).values())
    with pytest.raises(ValueError, match="2 lengths, but 1 truncation flags"):
        metrics.rollout_stats([1, 2], [True])

"""`rlinvariant bisect` finds planted faults: the right sequence, layer and op, and the cause where its catalogue has it."""

import re

import pytest

from rlinvariant.bisect import trials
from rlinvariant.rollout import Truncation
from tests.bisect.faults import (
    a_key_in_the_cache,
    all_stale,
    all_tokens_in_the_trainer,
    asked_for_a_window,
    cut_in_a_group,
    head_ulp,
    no_q_norm,
    norm_order,
    one_layer_stale,
    other_eps,
    other_top_p,
    padded_vocabulary,
    positions_shifted,
    predicted_one_early,
    reciprocal,
    rope_fp32,
    scaled,
    sdpa,
    split_k,
    split_k_fp32,
    swiglu_rounding,
    tile_switch,
    tile_switch_of_the_op,
    ulp_in_up,
    upcast,
    windowed,
)
from tests.bisect.pairs import LONGEST_REQUEST, STEP_TOKENS, VOCABULARY, changed
from tests.bisect.rare_faults import a_key_computed_again, a_later_turn, prefill_that_goes_on, rows_of_the_crowd, warm_prefix

FAULTS = [  # fault, layer, role, side that deviates or None, what the cause must say
    (ulp_in_up, 1, "up projection", None, "a weight of other bits.*gate_up_proj"),
    (one_layer_stale, 1, "o projection", None, "a weight of other bits.*o_proj"),
    (all_stale, None, "embedding", None, "stale or other weights"),
    (head_ulp, None, "lm_head", None, "the op was given others"),
    (split_k, 1, "down projection", "sampler", "split-K.* 2 parts, each rounded to bfloat16"),
    (split_k_fp32, 0, "down projection", "trainer", "split-K: .* 2 fp32 parts|number of rows"),
    (tile_switch, 1, "o projection", "sampler", "depends on the number of rows"),
    (tile_switch_of_the_op, 0, "down projection", None, "kernel of both sides depends on the number of rows"),
    (norm_order, 1, "input norm", "sampler", "other rounding order"),
    (other_eps, None, "final norm", None, "eps=0.001 in the sampler, 1e-06 in the trainer"),
    (swiglu_rounding, 0, "swiglu", "sampler", "inner rounding is left out"),
    (rope_fp32, None, "rope table", "sampler", "fp32 angles"),
    (no_q_norm, 1, "q norm and rotation", "trainer", "norm is left out"),
    (windowed, 1, "attention", "sampler", "sliding window: only the last 16 of"),
    (asked_for_a_window, 1, "attention", None, "window=16 in the sampler"),
    (sdpa, 0, "attention", "sampler", "scaled_dot_product_attention"),
    (a_key_in_the_cache, 1, "attention", "sampler", "cache"),
    (positions_shifted, None, "rope table", "trainer", r"position off by \+1"),
    (predicted_one_early, None, "lm_head", None, "position off by -1: the trainer's input"),
    (reciprocal, None, "log-prob", "sampler", "reciprocal"),
    (padded_vocabulary, None, "log-prob", "sampler", "vocabulary padding: .* 27 columns"),
    (scaled, 1, "layer output", None, "between the down projection and this"),
    (upcast, None, "lm_head", None, "autocast or an upcast"),
]


@pytest.mark.parametrize(("fault", "layer", "role", "deviates", "cause"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
def test_a_planted_fault_is_located_and_named(pair, fault, layer, role, deviates, cause):
    with fault(pair):
        result, said = pair.find()
    first = result.first
    assert first is not None and first.place == (layer, role), said
    assert first.sequence == 7 or fault is not reciprocal
    assert 0 < result.mismatched <= result.compared == 12 * 12
    text = "\n".join(said)
    assert re.search(rf"^cause .*{cause}", text, re.MULTILINE), text
    assert (f"deviates   the {deviates}" in text) if deviates else ("deviates" not in text), text


TRUNCATED = [  # fault, role, what the cause must say
    (all_tokens_in_the_trainer, "log-prob", "top_p=0.8 is left out: the softmax is over all tokens"),
    (other_top_p, "threshold", "top_p=0.8.* in the sampler, 0.72.* in the trainer"),
    (cut_in_a_group, "threshold", r"another kernel: what it keeps are the \d+ likeliest tokens"),
]


@pytest.mark.parametrize(("fault", "role", "cause"), TRUNCATED, ids=[f[0].__name__ for f in TRUNCATED])
def test_a_fault_of_truncation_is_located_and_named(pair, fault, role, cause):
    with fault(pair):
        result, said = pair.find(truncation=Truncation(top_p=0.8))
    text = "\n".join(said)
    assert result.first is not None and result.first.place == (None, role), text
    assert re.search(rf"^cause .*{cause}", text, re.MULTILINE), text


def test_truncated_draws_without_a_fault_are_equal(pair):
    result, said = pair.find(truncation=Truncation(top_k=30, top_p=0.8))
    assert said[0] == "nothing to bisect: 0 of 144 tokens differ (temperature 0.7, top_k=30, top_p=0.8)"


def test_without_a_fault_there_is_nothing_to_bisect(pair):
    result, said = pair.find()
    assert said[0] == "nothing to bisect: 0 of 144 tokens differ (temperature 0.7)" and result.first is None
    assert said[1] == "equal      12 prompts of up to 40 tokens (1 prefill cut)"
    assert said[2].startswith("exit code  0: none of these differ")


RARE = [  # fault, trials until it shows, what the first difference is, what the last line must say
    (rows_of_the_crowd, 4, "o projection", "only with so many rows: look at what depends on their number"),
    (prefill_that_goes_on, 5, "attention", "only with long prompts, which are cut: look at what the rest of one reads"),
    (warm_prefix, 6, "attention", "only on a warm prefix: look at what is read from the cache"),
    (a_key_computed_again, 7, "attention", "only when preempted: look at what is computed again"),
    (a_later_turn, 8, "attention", "only in a later turn: look at what one turn has left in the cache for the next"),
]


@pytest.mark.parametrize(("fault", "until", "role", "hint"), RARE, ids=[f[0].__name__ for f in RARE])
def test_a_fault_that_the_first_batch_does_not_show_is_found(pair, fault, until, role, hint):
    tried = trials.all_trials(VOCABULARY, 12, 20, 8, 0.7, 3, 5, STEP_TOKENS, LONGEST_REQUEST - 9)
    with fault(pair):
        result, said = pair.find_any(tried)
    assert len(result.tried) == until and result.first is not None and result.first.place == (1, role), said
    assert said[-3] == f"shows      {hint}" and said[-2].startswith("equal      12 prompts of up to 20 tokens"), said
    assert said[-1].startswith("differs    "), said


def test_nan_on_both_sides_is_traced_to_where_it_appears(pair):
    nan = [changed(w, lambda w: w[5].fill_(float("nan"))) for w in (pair.sampler("norm").weight, pair.trainer("norm").weight)]
    with nan[0], nan[1]:
        result, said = pair.find()
    assert result.mismatched == 144 and result.first is not None and result.first.place == (None, "final norm")
    assert any("not a number, on both sides" in line for line in said)

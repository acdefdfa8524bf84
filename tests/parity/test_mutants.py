"""Seven faults, each small enough to pass for correct: training in exact mode must see every one of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from rlinvariant.errors import ParityError, UserError
from rlinvariant.sampler import vllm_linear
from rlinvariant.trainer import routed
from tests.parity.device import CUDA
from tests.parity.harness import assert_exact, assert_stops, new_trainer, off_by_an_ulp, train

TOKENS = 2 * 16 * 8  # two steps of 16 completions of up to 12 tokens, of which a few end early


class Faulty:
    """An engine with a fault: each method is the engine's, unless replaced."""

    def __init__(self, engine: Any, **methods: Any) -> None:
        self.engine, self.methods = engine, methods

    def __getattr__(self, name: str) -> Any:
        return self.methods.get(name) or getattr(self.engine, name)


def trusting(engine: Any, **methods: Any) -> Faulty:
    """Return a faulty engine without the check of weights, so that the log-probs must show the fault."""
    return Faulty(engine, differing_weights=lambda weights: [], **methods)


@pytest.fixture
def exact_run(arithmetic_dir, exact_engine, tmp_path):
    """A trainer in exact mode, on `exact_engine` or another one."""

    def make(engine: Any = None, **changes: Any):
        return new_trainer(arithmetic_dir, engine or exact_engine, tmp_path, **changes)

    return make


def test_without_a_fault_nothing_is_mismatched(exact_run):
    run = exact_run()
    run.trainer.train()
    assert_exact(run, TOKENS)


@pytest.mark.parametrize("invariance", ["off", "sampler", "trainer"])
def test_invariance_off_on_either_side_is_seen(invariance, arithmetic_dir, exact_engine, stock_engine, tmp_path):
    engine = exact_engine if invariance == "sampler" else stock_engine
    run = train(arithmetic_dir, engine, tmp_path, invariance=invariance)
    assert all(row["onpolicy/mismatched_tokens"] > 0 for row in run.rows) and all(run.mismatches)
    assert run.total("unscored_tokens") == 0 and run.total("compared_tokens") >= TOKENS
    assert all(0 < row["onpolicy/logprob_absdiff/max"] < 1 for row in run.rows), "another model, not another rounding"


def test_a_stock_sampler_in_exact_mode_is_seen(exact_run, stock_engine):
    assert_stops(exact_run(stock_engine))


def test_an_lm_head_in_another_dtype_is_seen(exact_run):
    run = exact_run()

    def upcast(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state.float()

    run.trainer.model.model.register_forward_hook(upcast)
    if CUDA:  # where there is no such product
        with pytest.raises(ValueError, match="linear: expected .* in bfloat16"):
            run.trainer.train()
    else:
        assert_stops(run)


def test_weights_one_step_stale_are_seen(exact_run, exact_engine):
    synced = []

    def sync_once(weights):
        if not synced:
            exact_engine.sync(weights)
        synced.append(True)

    run = exact_run(trusting(exact_engine, sync=sync_once))
    assert_stops(run)
    assert [row["onpolicy/mismatched_tokens"] > 0 for row in run.rows] == [False, True]
    assert_stops(exact_run(Faulty(exact_engine, sync=lambda weights: None)), "after the weight sync")


def test_one_bf16_ulp_in_one_row_of_the_lm_head_is_seen(exact_run, monkeypatch):
    monkeypatch.setattr(vllm_linear._Head, "apply", off_by_an_ulp(40))
    assert_stops(exact_run())


def test_one_bf16_ulp_in_one_weight_is_named(exact_run, exact_engine):
    def sync(weights):
        exact_engine.sync(weights)
        exact_engine.model.get_parameter("model.embed_tokens.weight").data[40, 0:1].view(torch.int16).add_(1)

    assert_stops(exact_run(Faulty(exact_engine, sync=sync)), "after the weight sync.*model.embed_tokens.weight")


def test_a_position_off_by_one_is_seen(exact_run, monkeypatch):
    pack = routed.pack

    def shifted(*args, **kwargs):
        packed = pack(*args, **kwargs)
        return replace(packed, predicted_from=packed.predicted_from - 1)

    monkeypatch.setattr(routed, "pack", shifted)
    assert_stops(exact_run())


def test_a_mask_off_by_one_is_seen(exact_run, monkeypatch):
    """The last token of each completion is left out: what remains is equal, and coverage says that it is not all."""
    score = GRPOTrainer._generate_and_score_completions

    def without_last(self, inputs):
        output = score(self, inputs)
        mask = output["completion_mask"]
        mask[torch.arange(len(mask)), mask.sum(1) - 1] = 0
        return output

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", without_last)
    run = exact_run()
    with pytest.raises(ParityError, match="16 sampled tokens were trained on without being compared"):
        run.trainer.train()
    (row,) = run.rows
    assert row["onpolicy/mismatched_tokens"] == 0 and row["onpolicy/unscored_tokens"] == 16
    assert row["onpolicy/coverage"] < 1 and row["onpolicy/exact_streak_tokens"] == 0


def nucleus(engine: Any) -> Faulty:
    return trusting(engine, generate=lambda *args, **kwargs: engine.generate(*args, **{**kwargs, "top_p": 0.95}))


def test_a_truncated_sampler_beside_a_trainer_of_all_tokens_is_seen(exact_run, exact_engine):
    """The sampler's log-probs are larger by the logarithm of the kept tokens' share."""
    assert_stops(exact_run(nucleus(exact_engine)), "mismatched")


def test_top_p_of_a_stock_sampler_is_seen(arithmetic_dir, stock_engine, tmp_path):
    whole = train(arithmetic_dir, stock_engine, tmp_path, invariance="trainer")
    cut = train(arithmetic_dir, nucleus(stock_engine), tmp_path, invariance="trainer")
    # Two roundings of one model differ by a few ulps of bf16; dividing by 0.95 adds log(1 / 0.95) = 0.051 to a log-prob.
    assert whole.rows[0]["onpolicy/logprob_absdiff/mean"] < 0.02 < cut.rows[0]["onpolicy/logprob_absdiff/mean"]
    assert cut.rows[0]["onpolicy/kl_k1"] > 0.02


def test_a_nan_log_prob_is_seen(exact_run, exact_engine):
    def generate(*args, **kwargs):
        first, *rest = exact_engine.generate(*args, **kwargs)
        return [replace(first, sampler_logprobs=[float("nan"), *first.sampler_logprobs[1:]]), *rest]

    run = exact_run(Faulty(exact_engine, generate=generate))
    with pytest.raises(UserError, match=r"^step 1: sampler_logprobs: 1 of [\d,]+ numbers are not finite; stopped before"):
        run.trainer.train()


def test_a_nan_log_prob_on_both_sides_is_seen(exact_run):
    """One NaN weight would make both sides NaN, which are the same bits: nothing is sampled from it."""
    run = exact_run()
    run.trainer.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match=r"weight model.norm.weight: 1 of 128 numbers are not finite"):
        run.trainer.train()
    assert not run.rows

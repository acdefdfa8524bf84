"""Truncated sampling in a whole run: the trainer trains the policy that the sampler draws from, the kept tokens alone."""

import pytest

from rlinvariant.errors import ConfigErrors
from rlinvariant.rollout import ALL_TOKENS
from tests.parity.harness import assert_exact, assert_stops, new_trainer, train

SETTINGS = [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.95, "top_k": 20, "min_p": 0.02}]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_truncated_run_is_exact(setting, arithmetic_dir, exact_engine, tmp_path):
    recorded = []
    run = train(arithmetic_dir, exact_engine, tmp_path, on_rollout=lambda step, rollout: recorded.append(rollout), **setting)
    assert_exact(run, floor=2 * 16 * 8)
    (rollout,) = recorded
    assert {name: getattr(rollout.truncation, name) for name in setting} == setting


def test_a_trainer_of_all_tokens_is_stopped(arithmetic_dir, exact_engine, tmp_path):
    """Control: the trainer's log-probs are too small by that of the kept share."""
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, top_p=0.9)
    score = run.trainer._packed_logprobs

    def whole(*args):
        truncation, run.trainer.truncation = run.trainer.truncation, ALL_TOKENS
        try:
            return score(*args)
        finally:
            run.trainer.truncation = truncation

    run.trainer._packed_logprobs = whole
    assert_stops(run)
    found = run.mismatches[-1]
    assert found.trainer_logprob < found.sampler_logprob


def test_ppo_truncates_exactly(arithmetic_dir, exact_engine, tmp_path):
    from rlinvariant.config import PPOConfig

    run = train(arithmetic_dir, exact_engine, tmp_path, ppo=PPOConfig(kl_coef=0.0), loss_type="dapo", **SETTINGS[-1])
    assert_exact(run, floor=2 * 16 * 8)


@pytest.mark.parametrize(
    "setting", [{"num_iterations": 2}, {"steps_per_generation": 2}, {"staleness": 1}, {"beta": 0.1}], ids=str
)
def test_what_would_score_with_another_set_is_refused(setting, arithmetic_dir, exact_engine, tmp_path):
    with pytest.raises(ConfigErrors, match=f"{next(iter(setting))}=.*with top_p=0.9"):
        new_trainer(arithmetic_dir, exact_engine, tmp_path, top_p=0.9, **setting)

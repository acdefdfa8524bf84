"""A constant policy lag: the sampler runs the weights of k optimizer steps ago, exactly those, and the lag is counted."""

from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from rlinvariant.bits import assert_bits_equal
from rlinvariant.errors import ConfigErrors
from rlinvariant.models import make_invariant
from rlinvariant.sampler import vllm_linear
from rlinvariant.trainer import InvariantGRPOTrainer
from tests.parity.harness import Layout, assert_stops, fp32, new_trainer, off_by_an_ulp, questions, score, train, weights

K, STEPS = 2, 5
LAGS = [0, 1, 2, 2, 2]


class Versions(TrainerCallback):
    """The weights before each optimizer step."""

    def __init__(self) -> None:
        self.kept: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args, state, control, model: Any = None, **kwargs):
        self.kept.append({name: p.detach().clone() for name, p in model.named_parameters()})


@pytest.fixture(scope="module")
def stale(arithmetic_dir, exact_engine, tmp_path_factory):
    """A run with a lag of K, evaluated after each step; its weights and rollouts, step by step."""
    versions, drawn, at_evaluation = Versions(), [], []
    generate = InvariantGRPOTrainer._generate_single_turn

    def recording(self, prompt_ids, *args, **kwargs):
        ids, logprobs = generate(self, prompt_ids, *args, **kwargs)
        if self.model.training:
            drawn.append((prompt_ids, ids, logprobs))
        else:
            at_evaluation.append(self.sampler.differing_weights(self._weights()))
        return ids, logprobs

    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": questions(4), "per_device_eval_batch_size": 16}
    with mock.patch.object(InvariantGRPOTrainer, "_generate_single_turn", recording):
        run = train(
            arithmetic_dir,
            exact_engine,
            tmp_path_factory.mktemp("stale"),
            staleness=K,
            max_steps=STEPS,
            callbacks=[versions],
            **evaluated,
        )
    return run, versions.kept, drawn, at_evaluation


def test_the_lag_is_constant_and_every_token_is_counted(stale):
    run, *_ = stale
    assert [row["onpolicy/weight_version_lag"] for row in run.rows] == LAGS
    for row, lag in zip(run.rows, LAGS, strict=True):
        assert row["onpolicy/coverage"] == 1 == row["onpolicy/weights_equal"]
        assert (row["onpolicy/mismatched_tokens"] > 0) == (row["onpolicy/kl_k3"] > 0) == (lag > 0)


def test_the_sampler_computes_what_the_trainer_would_have_then(stale, arithmetic_dir):
    """Parity at the sampler's own version, bit for bit; control: the trainer's version at the time gives other bits."""
    _, versions, drawn, _ = stale
    model = make_invariant(AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.float32), torch.bfloat16)
    assert len(versions) == len(drawn) == STEPS

    def scored(version: int, step: int) -> torch.Tensor:
        model.load_state_dict(versions[version], strict=False)
        prompts, ids, logprobs = drawn[step]
        completions = [mock.Mock(token_ids=c, sampler_logprobs=x) for c, x in zip(ids, logprobs, strict=True)]
        return torch.cat(score(model.to(versions[0]["model.norm.weight"].device), prompts, completions, 1.0, Layout(8)))

    for step, lag in enumerate(LAGS):
        sampled = torch.cat([fp32(x) for x in drawn[step][2]])
        assert_bits_equal(scored(step - lag, step), sampled, f"step {step}, lag {lag}")
        if lag:
            assert (scored(step, step) != sampled).any(), "blind: the weights have not moved"


def test_evaluation_is_of_the_current_weights(stale):
    *_, at_evaluation = stale
    assert len(at_evaluation) == STEPS and not any(at_evaluation)


def test_a_correction_sees_the_lag(stale, arithmetic_dir, exact_engine, tmp_path):
    """The old log-probs are then the trainer's, scored anew: the sampler's would make every ratio 1."""
    mode = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate"}
    run = train(arithmetic_dir, exact_engine, tmp_path, staleness=K, max_steps=3, **mode)
    ratios = [row["sampling/importance_sampling_ratio/max"] for row in run.rows]
    assert ratios[0] == 1.0 and all(ratio > 1 for ratio in ratios[1:])
    _, versions, *_ = stale
    assert any((w != versions[3][name]).any() for name, w in weights(run).items()), "the correction changed nothing"


def test_at_lag_0_parity_is_still_required(arithmetic_dir, exact_engine, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_linear._Head, "apply", off_by_an_ulp(40))
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path, staleness=K)
    assert_stops(run)
    assert len(run.rows) == 1


def test_a_negative_lag_is_refused(arithmetic_dir, exact_engine, tmp_path):
    with pytest.raises(ConfigErrors, match="staleness=-1: expected 0 or more"):
        new_trainer(arithmetic_dir, exact_engine, tmp_path, staleness=-1)

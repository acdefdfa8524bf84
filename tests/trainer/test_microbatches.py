"""Micro-batches by tokens: however a step is divided, its log-probs have the same bits and its gradients are the same sums."""

import random
import re
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlinvariant.errors import ConfigErrors
from rlinvariant.trainer import InvariantGRPOTrainer
from rlinvariant.trainer.passes import SUMMED
from tests.parity.harness import assert_exact, new_trainer
from tests.trainer.gradients import distance
from tests.trainer.test_training import LOSSES, STEP, numbers

ONE_ROW = 22  # the tokens of the longest row: with so many, each row is a part

divide = InvariantGRPOTrainer._divide


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_has_the_same_gradients_and_bits_however_it_is_divided(loss, divided, monkeypatch):
    settings = {"loss_type": loss, "importance_sampling_level": "sequence" if loss == "luspo" else "token"}
    whole, expected = divided(None, **settings)
    assert_exact(whole, STEP)
    rounded = [key for key in whole.rows[0] if key in ("loss", "grad_norm") or key.startswith("vespo/")]
    for tokens in (100, ONE_ROW):
        run, found = divided(tokens, **settings)
        assert_exact(run, STEP)
        assert numbers(run, *rounded) == numbers(whole, *rounded)
        for key in rounded:  # sums of the same numbers in another order
            assert run.rows[0][key] == pytest.approx(whole.rows[0][key], rel=2e-3, abs=1e-6), key
        assert distance(found, expected) < 2**-8, f"{tokens} tokens: more than a rounding to bf16"
    if loss in SUMMED:  # whose parts are normalised by the tokens of the whole step
        return
    monkeypatch.setattr(InvariantGRPOTrainer, "_weights_of", lambda self, inputs, parts: [1.0] * len(parts))
    _, wrong = divided(ONE_ROW, **settings)
    assert distance(wrong, expected) > 0.2, "a part's weight is not seen"


class Drifting:
    """An engine whose log-probs are not the trainer's: of each completion by another amount, and of each token."""

    def __init__(self, engine):
        self.sync, self.differing_weights, self._engine = engine.sync, engine.differing_weights, engine
        self.max_model_len = engine.max_model_len

    def generate(self, prompts, seeds, **settings):
        completions = self._engine.generate(prompts, seeds, **settings)
        for seed, completion in zip(seeds, completions, strict=True):
            rng = random.Random(seed)
            of_all = rng.gauss(0, 0.3)
            completion.sampler_logprobs[:] = [x + of_all + rng.gauss(0, 0.3) for x in completion.sampler_logprobs]
        return completions


CORRECTED = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_clip_max": 1.3}
TERMS = {  # what a loss has beside advantages and ratios: it must be seen in the gradient, and be the same in parts
    "a reference": {"beta": 2.0},
    "tokens truncated": {**CORRECTED, "vllm_importance_sampling_mode": "token_truncate"},
    "sequences masked": {**CORRECTED, "vllm_importance_sampling_mode": "sequence_mask"},
    "off-policy sequences masked": {"off_policy_mask_threshold": 0.0},
    "an entropy bonus": {"entropy_coef": 0.3},
    "high entropy only": {"top_entropy_quantile": 0.5},
    "a bonus of high entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.3},
}
MORE_TERMS = {
    "a reference, unbiased": {"beta": 2.0, "use_bias_correction_kl": True},
    "tokens masked": {**CORRECTED, "vllm_importance_sampling_mode": "token_mask"},
    "sequences truncated": {**CORRECTED, "vllm_importance_sampling_mode": "sequence_truncate"},
}
slow = [pytest.param(settings, "grpo", id=f"{name}-grpo", marks=pytest.mark.slow) for name, settings in MORE_TERMS.items()]
slow += [
    pytest.param(settings, "dapo", id=f"{name}-dapo", marks=pytest.mark.slow) for name, settings in (TERMS | MORE_TERMS).items()
]


@pytest.fixture(scope="module")
def known() -> dict[str, torch.Tensor]:
    """The gradient of each loss without any of the terms, once there is one."""
    return {}


@pytest.mark.parametrize(
    ("term", "loss"), [*(pytest.param(settings, "grpo", id=f"{name}-grpo") for name, settings in TERMS.items()), *slow]
)
def test_every_term_of_a_loss_has_the_same_gradient_in_parts(term, loss, known, divided, arithmetic_dir, exact_engine):
    """Sampler and policy differ here, and policy and reference: else ratios are 1, KL is 0, and no mask has a hole."""

    def gradient(tokens, **settings):
        model = AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.float32)
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * torch.randn(weight.shape, generator=rng)
        settings |= {"invariance": "trainer", "engine": Drifting(exact_engine), "model": model, "loss_type": loss}
        run, found = divided(tokens, **settings)
        return run.rows[0], found

    if loss not in known:
        known[loss] = gradient(None)[1]
    row, whole = gradient(None, **term)
    assert distance(whole, known[loss]) > 2**-5, "blind: the term is not seen"
    in_parts, found = gradient(60, **term)
    assert distance(found, whole) < 2**-8, "more than a rounding to bf16"
    assert in_parts["loss"] == pytest.approx(row["loss"], rel=2e-3)


def test_the_number_of_parts_follows_from_the_tokens(divided):
    counts = []

    def counted(self, batch):
        counts.append(len(parts := divide(self, batch)))
        return parts

    with mock.patch.object(InvariantGRPOTrainer, "_divide", counted):
        for tokens in (None, 100, ONE_ROW):
            divided(tokens)
    assert counts[0] == 1 and 3 <= counts[1] <= 5 and counts[2] >= 14  # of 16 rows, of which a few are short


TWICE = {
    "two rollouts a step": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "straddling a step": {"gradient_accumulation_steps": 3, "steps_per_generation": 2},
    "used twice": {"num_iterations": 2, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("schedule", TWICE)
def test_every_schedule_is_exact_in_parts(schedule, divided):
    run, _ = divided(ONE_ROW, max_steps=3, per_device_train_batch_size=8, **TWICE[schedule])
    assert_exact(run, STEP)


MISTAKES = {
    "too small": ({"tokens_per_microbatch": 12}, "tokens_per_microbatch=12: expected at least 13"),
    "no longer prompt": ({"tokens_per_microbatch": 14}, "tokens_per_microbatch = 14 less max_completion_length=12 leaves room"),
    "a stock trainer": ({"tokens_per_microbatch": 99, "invariance": "off"}, "a stock trainer counts rows; remove it"),
    "layers by number": (
        {"gradient_checkpointing_kwargs": {"every_n_layers": 2}},
        "expected no every_n_layers: which layers recompute is decided by the free memory; remove it",
    ),
    "stock, recomputed": ({"recompute": True, "invariance": "off"}, "recompute=True: expected None with invariance=off"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_loaded(mistake, arithmetic_dir, tmp_path):
    settings, line = MISTAKES[mistake]
    with pytest.raises(ConfigErrors, match=re.escape(line)):
        new_trainer(arithmetic_dir, None, tmp_path, **settings)

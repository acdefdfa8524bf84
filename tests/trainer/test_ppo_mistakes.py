"""PPO: each mistake is refused in one line, and what is not finite stops a run before the optimizer step."""

import shutil
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, Qwen3Config

from rlinvariant.bits import assert_bits_equal
from rlinvariant.config import parse
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.trainer import InvariantPPOTrainer
from tests.parity.harness import Run, assert_same_weights, critic_weights, variety, weights


def poisoned(what: str, run: Run) -> Any:
    """Make `what` NaN at the second step."""
    trainer = run.trainer

    def nan(x: Tensor) -> Tensor:
        return x * (float("nan") if trainer.state.global_step == 1 else 1)

    if what == "values":
        return trainer.critic.register_forward_hook(lambda m, i, out: nan(out))
    if what == "policy_loss":
        packed = InvariantPPOTrainer._packed_logprobs
        trainer._packed_logprobs = lambda *args: (packed(trainer, *args)[0], nan(packed(trainer, *args)[1]))
        trainer._entropy_bonus_enabled, trainer.entropy_coef, trainer.use_adaptive_entropy = True, 1.0, False
        return None
    return dict([*trainer.model.named_parameters(), ("critic", trainer.critic.head.weight)])[what].register_hook(nan)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("values", "values"),
        ("policy_loss", "loss"),
        ("model.layers.1.mlp.up_proj.weight", "gradient of model.layers.1.mlp.up_proj.weight"),
        ("critic", "gradient of the critic's head.weight"),
    ],
)
def test_nan_stops_before_the_step_by_name(what, name, new, tmp_path):
    started = new(max_steps=3, save_strategy="steps", save_steps=1)
    poisoned(what, started)
    with pytest.raises(UserError, match=rf"step 2: {name}: [\d,]+ of [\d,]+ numbers are not finite; stopped before") as error:
        started.trainer.train()
    assert "\n" not in str(error.value) and len(started.rows) == 1
    checkpoint = tmp_path / "0" / "checkpoint-1"
    kept = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert_same_weights(dict(kept.named_parameters()), weights(started), "the weights are the checkpoint's")
    assert all(p.isfinite().all() for p in critic_weights(started).values())


REFUSED = {
    "ppo.gamma=1.5": "ppo.gamma=1.5: expected 0 to 1",
    "ppo.lam=-0.1": "ppo.lam=-0.1: expected 0 to 1",
    "ppo.kl_coef=-1": "ppo.kl_coef=-1.0: expected 0 or more",
    "ppo.value_clip=0": "ppo.value_clip=0.0: expected more than 0",
    "ppo.target_kl=0": "ppo.target_kl=0.0: expected more than 0",
    "ppo.value_warmup_steps=120": "ppo.value_warmup_steps=120: expected less than steps=120, or the policy learns nothing",
    "ppo.critic=/no/where": "ppo.critic=/no/where: no such directory",
    "trainer.loss_type=grpo": "trainer.loss_type=grpo: expected dapo with algorithm=ppo",
    "trainer.beta=0.1": "trainer.beta=0.1: expected 0.0 with algorithm=ppo: the penalty is in the rewards; use ppo.kl_coef",
    "trainer.scale_rewards=none": "trainer.scale_rewards=none: expected group with algorithm=ppo",
}


def test_settings_that_cannot_be_are_refused_in_one_line_each(arithmetic_dir):
    with pytest.raises(ConfigErrors) as error:
        parse([f"model={arithmetic_dir}", "recipe=arithmetic_ppo", *REFUSED])
    assert len(error.value.errors) == len(REFUSED)
    for expected, found in zip(sorted(REFUSED.values()), sorted(error.value.errors), strict=True):
        assert found.startswith(expected)


def test_a_reference_that_is_not_there_cannot_move(arithmetic_dir):
    settings = [f"model={arithmetic_dir}", "recipe=arithmetic_ppo", "trainer.sync_ref_model=true"]
    with pytest.raises(ConfigErrors, match=r"^trainer.sync_ref_model=True: expected False .* without ppo.kl_coef there is no"):
        parse([*settings, "ppo.kl_coef=0"])
    assert parse([*settings, "ppo.kl_coef=0.1"]).trainer.sync_ref_model


def test_settings_of_ppo_are_refused_where_they_do_nothing(arithmetic_dir):
    model = f"model={arithmetic_dir}"
    with pytest.raises(ConfigErrors, match=r"^ppo.gamma=0.9: expected algorithm=ppo, or it does nothing; remove it$"):
        parse([model, "recipe=arithmetic", "ppo.gamma=0.9"])
    settings = [model, "recipe=arithmetic_ppo", "algorithm=grpo", "trainer.num_generations=8"]
    assert parse(settings).algorithm == "grpo", "the recipe's own rest"
    with pytest.raises(ConfigErrors, match=r"ppo.lam=0.9: expected algorithm=ppo"):
        parse([*settings, "ppo.lam=0.9"])


def test_a_critic_of_another_vocabulary_is_refused(new, tmp_path_factory, arithmetic_dir):
    directory = tmp_path_factory.mktemp("critics")
    sizes = {"vocab_size": 99, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64}
    AutoModel.from_config(Qwen3Config(**sizes, head_dim=64, intermediate_size=64)).save_pretrained(directory / "small")
    with pytest.raises(UserError, match="small: expected the policy's vocabulary of 100 tokens, found 99"):
        new({"critic": str(directory / "small")})
    other = shutil.copytree(arithmetic_dir, directory / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"7": 11', '"7": 12', 1).replace('"8": 12', '"8": 11', 1))
    with pytest.raises(UserError, match="other: expected the policy's tokenizer, found another vocabulary"):
        new({"critic": str(other)})
    with pytest.raises(UserError, match=r"^ppo.critic=nowhere: cannot be loaded: "):
        new({"critic": "nowhere"})


def test_a_reference_that_cannot_be_loaded_is_refused(new, arithmetic_dir):
    model = AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.float32)
    model.config._name_or_path = ""
    with pytest.raises(ConfigErrors, match=r"^ppo.kl_coef=0.1: expected a model with a directory or hub id"):
        new({"kl_coef": 0.1}, model=model)


def test_no_reward_and_no_token_are_refused(new):
    started = new(reward_funcs=lambda completions, **_: [None] * len(completions))
    with pytest.raises(UserError, match="step 1: every reward is None: no reward function gave any completion a number"):
        started.trainer.train()
    started = new()
    generate = started.trainer.sampler.generate

    def one_is_empty(*args: Any, **kwargs: Any) -> Any:
        completions = generate(*args, **kwargs)
        completions[3].token_ids.clear()
        completions[3].sampler_logprobs.clear()
        return completions

    with (
        mock.patch.object(started.trainer, "sampler", mock.Mock(wraps=started.trainer.sampler, generate=one_is_empty)),
        pytest.raises(UserError, match="step 1, sample 3: empty completion: no token can carry its reward"),
    ):
        started.trainer.train()


def test_a_completion_without_a_reward_teaches_nothing(new):
    """Its advantages are 0, and its returns what the critic says."""
    started, seen = new(reward_funcs=lambda completions, **_: [None, *variety(completions)[1:]], max_steps=1), {}
    estimate = InvariantPPOTrainer._estimate

    def looking(self, output):
        estimate(self, output)
        seen.update(output)

    with mock.patch.object(InvariantPPOTrainer, "_estimate", looking):
        started.trainer.train()
    assert not seen["advantages"][0].any() and seen["advantages"][1].any()
    assert_bits_equal(seen["returns"][0], seen["old_values"][0], "returns")

"""Every right configuration has the values that were asked for, and knows where each came from."""

import json
import os
import time
from pathlib import Path

import pytest

from rlinvariant.config import check
from tests.config.common import errors, good


def test_defaults_then_recipe_then_command_line() -> None:
    resolved = good("trainer.beta=0.5", "data.path=x").resolved()
    json.dumps(resolved, allow_nan=False)
    assert resolved["steps"] == {"value": 7, "source": "recipe mine"}
    assert resolved["data.size"] == {"value": 5, "source": "recipe mine"}
    assert resolved["data.path"] == {"value": "x", "source": "command line"}
    assert resolved["trainer.beta"] == {"value": 0.5, "source": "command line"}
    assert resolved["trainer.epsilon"] == {"value": 0.2, "source": "default"}
    assert "sources" not in resolved


def test_secrets_are_not_taken_and_not_shown() -> None:
    (line,) = errors("trainer.hub_token=hf_secret")
    assert line.startswith("trainer.hub_token=***: not a setting here") and "set HF_TOKEN" in line
    (line,) = errors("trainer.hub_token=hf_secret", "trainer.hub_token=hf_other")[:1]
    assert line.startswith("trainer.hub_token=*** and trainer.hub_token=***")


def test_values_take_the_types_of_their_fields() -> None:
    config = good(
        "trainer.learning_rate=2e-5",
        "trainer.lr_scheduler_type=cosine",
        "trainer.gradient_checkpointing_kwargs={'use_reentrant': False}",
        "trainer.reward_weights=0.5,2",
        "trainer.epsilon_high=None",
        "wandb.tags=a,b",
        "sampler.enforce_eager=true",
    )
    assert config.trainer.learning_rate == 2e-5
    assert config.resolved()["trainer.lr_scheduler_type"]["value"] == "cosine"
    assert config.trainer.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert config.trainer.reward_weights == [0.5, 2.0]
    assert config.trainer.epsilon_high is None
    assert config.wandb.tags == ["a", "b"]
    assert config.sampler.enforce_eager is True


def test_grpo_config_holds_the_values(in_tmp: Path) -> None:
    config = good("steps=3", "seed=5", "trainer.beta=0.1", "run=one")
    grpo = config.grpo_config()
    assert (grpo.max_steps, grpo.seed, grpo.beta, grpo.learning_rate) == (3, 5, 0.1, 1e-3)
    assert grpo.bf16 is False and grpo.use_vllm is False and grpo.logging_steps == 1
    assert grpo.vllm_importance_sampling_correction is False
    assert grpo.output_dir == os.path.join("runs", "one", "checkpoints")


def test_ranks_agree_on_the_name_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    first = good(env=env | {"RANK": "0"}).run
    later = time.time() + 5
    monkeypatch.setattr(time, "time", lambda: later)
    assert first.startswith("mine-") and good(env=env | {"RANK": "1"}).run == first
    assert errors(env={"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}) == [
        "run: missing; with several hosts write run=NAME, so that all use one directory"
    ]


def test_check_is_pure(in_tmp: Path) -> None:
    config = good("run=one")
    before = dict(os.environ), sorted(in_tmp.rglob("*"))
    assert check(config, {}) == [] == check(config, {})
    assert (dict(os.environ), sorted(in_tmp.rglob("*"))) == before

"""LoRA with PPO: policy and critic have adapters of their own on one frozen base, which is the sampler's, too."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlinvariant import bits
from rlinvariant.config import PPOConfig, parse
from rlinvariant.errors import ConfigErrors, ParityError, UserError
from rlinvariant.models import lora
from rlinvariant.report.rundir import read_metrics
from rlinvariant.trainer.critic import VALUE_HEAD_FILE
from tests.parity.harness import assert_same_weights
from tests.trainer.test_adapters_in_shards import FILE
from tests.trainer.test_lora import shared_with_the_sampler, trained
from tests.trainer.test_sharding import assert_same, finished, runs, two

PPO = PPOConfig(kl_coef=0.1, critic_learning_rate=1e-2)
TIMES = ("time/", "perf/", "step_time", "profiling/", "onpolicy/exact_streak", "num_tokens")


def learned(trainer: Any) -> dict[str, torch.Tensor]:
    """Return what the optimizer trains, by whose it is."""
    return {name: weight.detach().cpu().clone() for name, weight in trainer._trained() if weight.requires_grad}


@pytest.fixture(scope="module")
def straight(arithmetic_dir, tmp_path_factory) -> tuple[Any, list[dict[str, Any]], Path]:
    """Three steps, a checkpoint after each."""
    directory = tmp_path_factory.mktemp("ppo")
    trainer, rows = trained(arithmetic_dir, directory, ppo=PPO, max_steps=3)
    return trainer, rows, directory


@pytest.mark.slow
def test_policy_and_critic_train_adapters_on_one_base(straight, arithmetic_dir):
    trainer, rows, directory = straight
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0, 0]
    assert all(row["onpolicy/coverage"] == 1 and row["onpolicy/compared_tokens"] >= 64 for row in rows)
    assert all(row["policy/ratio_min"] == row["policy/ratio_max"] == 1 for row in rows)
    assert rows[0]["reward/kl_penalty"] == 0 != rows[2]["reward/kl_penalty"], "the reference is the base without adapters"

    policy, critic = trainer.accelerator.unwrap_model(trainer.model), trainer.critic
    own = {id(weight) for _, weight in lora.base(policy)}
    frozen = [(name, weight) for name, weight in critic.named_parameters() if not weight.requires_grad]
    assert frozen and all(id(weight) in own for _, weight in frozen), "the base exists once"
    base = AutoModelForCausalLM.from_pretrained(arithmetic_dir)
    assert shared_with_the_sampler(trainer) == {lora.plain(name) for name, _ in base.named_parameters()}
    for name, weight in base.named_parameters():
        kept = policy.get_base_model().get_parameter(name.replace("_proj.", "_proj.base_layer."))
        assert bits.same(kept, weight.to(kept)), f"{name} is frozen"
    adapters = dict(lora.trained(critic))
    assert all(weight.any() for weight in adapters.values()) and critic.head.weight.any(), "the critic learns"
    policys = {name.removeprefix("base_model.model.model."): weight for name, weight in lora.trained(policy)}
    assert all(not bits.same(weight, policys[name.removeprefix("backbone.")]) for name, weight in adapters.items())

    saved = directory / "checkpoint-3"
    assert not [*saved.rglob("model.safetensors")] and (saved / "critic" / VALUE_HEAD_FILE).is_file()
    for at, prefix in ((saved, ""), (saved / "critic", "base_model.model.model.")):
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(arithmetic_dir), str(at)).state_dict()
        ours = dict(lora.trained(critic.backbone if prefix else policy))
        assert all(bits.same(theirs[prefix + name].to(weight), weight) for name, weight in ours.items()), "as peft loads them"


@pytest.mark.slow
def test_a_resumed_run_is_the_straight_run(straight, arithmetic_dir, tmp_path):
    trainer, rows, directory = straight
    again, more = trained(arithmetic_dir, tmp_path, resume=str(directory / "checkpoint-1"), ppo=PPO, max_steps=3)
    assert [row["onpolicy/mismatched_tokens"] for row in more] == [0, 0]
    assert_same_weights(learned(again), learned(trainer), "adapters of both, and the head")
    names = [key for key in rows[0] if not key.startswith(TIMES)]
    for a, b in zip(more, rows[1:], strict=True):
        assert [repr(a[key]) for key in names] == [repr(b[key]) for key in names]


@pytest.mark.slow
def test_neither_adapters_nor_whole_weights_go_on_from_the_other(straight, new):
    """The first had ended in FileNotFoundError, the second in a ValueError about an index."""
    trainer, _, directory = straight
    whole = new(max_steps=1, save_strategy="steps", save_steps=1).trainer
    whole.train()
    for one, path, kinds in (
        (trainer, Path(whole.args.output_dir, "checkpoint-1"), ("whole weights", "LoRA adapters")),
        (whole, directory / "checkpoint-1", ("LoRA adapters", "whole weights")),
    ):
        with pytest.raises(UserError, match="written by a run of {}, this one is of {}; start a new run".format(*kinds)):
            one.train(resume_from_checkpoint=str(path))


@pytest.mark.slow
def test_adapters_one_sync_old_are_seen(arithmetic_dir, tmp_path, monkeypatch):
    """Control: a sampler that leaves out the second sync, and a check of its weights that says that it has them."""
    from rlinvariant.trainer.drawing import DrawingTrainer

    def ignored(trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step:
            monkeypatch.setattr(trainer.sampler, "sync", lambda weights: None)
            monkeypatch.setattr(trainer, "_differing", lambda older: [])
        sync(trainer, *args, **kwargs)

    sync = DrawingTrainer.sync
    monkeypatch.setattr(DrawingTrainer, "sync", ignored)
    with pytest.raises(ParityError, match=r"step 2: mismatched [\d,]+ / [\d,]+ tokens"):
        trained(arithmetic_dir, tmp_path, ppo=PPO, max_steps=2, save_strategy="no")


def test_a_critic_of_another_model_is_refused(arithmetic_dir):
    settings = [f"model={arithmetic_dir}", "recipe=arithmetic", "algorithm=ppo", "lora.r=8"]
    assert parse(settings).lora.r == 8
    with pytest.raises(ConfigErrors, match=r"^ppo.critic=\S+: expected None with lora.r=8: the critic has adapters of its own"):
        parse([*settings, f"ppo.critic={arithmetic_dir}"])


def test_a_reference_of_adapters_cannot_move(arithmetic_dir):
    """TRL says so when weights are loaded already, in five sentences."""
    settings = [f"model={arithmetic_dir}", "recipe=arithmetic", "lora.r=8", "trainer.beta=0.1"]
    assert parse(settings).lora.r == 8
    with pytest.raises(ConfigErrors, match=r"^trainer.sync_ref_model=True: expected False with lora.r=8: the reference is"):
        parse([*settings, "trainer.sync_ref_model=true"])


@runs
@pytest.mark.slow
def test_shards_train_the_adapters_of_whole_models_bit_for_bit(arithmetic_dir, tmp_path):
    """A run in shards goes on from its checkpoint as the one that was not stopped."""
    settings = ("steps=4", "lora.r=3", "algorithm=ppo", "ppo.kl_coef=0.05")
    for name, sharded in (("whole", False), ("shards", True)):
        finished(two(tmp_path, arithmetic_dir, f"run={name}", *settings, sharded=sharded))
    whole, cut, again = (tmp_path / "runs" / name for name in ("whole", "shards", "again"))
    for run in (whole, cut):
        rows = read_metrics(run)
        assert [row["onpolicy/mismatched_tokens"] + row["onpolicy/unscored_tokens"] for row in rows] == [0] * 4
        assert all(row["onpolicy/coverage"] == 1 == row["onpolicy/weights_equal"] for row in rows)
        assert rows[0]["reward/kl_penalty"] == 0 != rows[3]["reward/kl_penalty"]
    shutil.copytree(cut, again)
    shutil.rmtree(again / "checkpoints/checkpoint-4")
    finished(two(tmp_path, arithmetic_dir, "run=again", *settings, "resume=true", sharded=True))
    for file in (FILE, f"critic/{FILE}", f"critic/{VALUE_HEAD_FILE}"):
        before, end = (f"checkpoints/checkpoint-{step}/{file}" for step in (2, 4))
        assert_same(cut / end, again / end)
        two_steps, four_steps = assert_same(whole / before, cut / before), assert_same(whole / end, cut / end)
        assert all(bits.compare(x, four_steps[name]) is not None for name, x in two_steps.items()), "control: each moves"

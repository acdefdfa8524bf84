"""LoRA through TRL: adapters train exactly, are saved as PEFT's, resume bit for bit, and leave the base as it was."""

import functools
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

import rlinvariant
from rlinvariant import bits, checksums, replay
from rlinvariant.config import PPOConfig
from rlinvariant.errors import ConfigErrors, ParityError, UserError
from rlinvariant.models import lora
from rlinvariant.rollout import Rollout
from rlinvariant.sampler.engine import Sampler
from rlinvariant.trainer import InvariantGRPOTrainer, InvariantPPOTrainer
from tests import forks
from tests.parity.device import CUDA
from tests.parity.harness import questions, small_config, variety


def trained(
    directory: str,
    output: Any,
    resume: str | None = None,
    model: Any = None,
    on_rollout: Any = None,
    invariance: Any = "exact",
    ppo: Any = None,
    **changes: Any,
):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "beta": 0.0, **changes}
    args = GRPOConfig(
        str(output),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=12,
        logging_steps=1,
        bf16=False,
        use_cpu=not CUDA,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    rows: list[dict[str, Any]] = []
    kind: Any = rlinvariant.grpo_trainer if ppo is None else functools.partial(rlinvariant.ppo_trainer, ppo=ppo)
    trainer = kind(
        directory if model is None else model,
        variety,
        args,
        questions(),
        processing_class=AutoTokenizer.from_pretrained(directory),
        **({} if model is not None else {"peft_config": LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")}),
        sampler_options={"max_model_len": 64, "kv_cache_gib": 0.02, "options": {"enforce_eager": True}},
        on_row=lambda row, mismatch: rows.append(row),
        on_rollout=on_rollout,
        invariance=invariance,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, rows


def shared_with_the_sampler(trainer: Any) -> set[str]:
    """Name the weights of the trainer's model that lie in the memory of the sampler's."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    engine = [weight.untyped_storage() for weight in trainer.sampler.model.parameters()]
    ends = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in engine]
    return {name for name, weight in lora.base(model) if any(first <= weight.data_ptr() < end for first, end in ends)}


def test_an_edit_of_the_frozen_base_is_seen_though_both_sides_have_it(arithmetic_dir, tmp_path, monkeypatch):
    """PEFT merges in place: what is left of the base after it is taken out again is another base than the one on the disk."""
    trainer, _ = trained(arithmetic_dir, tmp_path, max_steps=1, save_strategy="no")
    trainer._versions.sampler, sums, wholes = None, [], checksums.wholes
    with monkeypatch.context() as counted:
        counted.setattr(checksums, "wholes", lambda named: sums.append(wholes(named)) or sums[-1])
        trainer.sync()  # a first one
    assert [x.keys() for x in sums] == [trainer._shared] * 2, "the base is summed before and after, and no more"
    assert trainer._frozen == sums[0] != {}
    numbers: list[int] = []
    sync = trainer.sampler.sync
    monkeypatch.setattr(trainer.sampler, "sync", lambda weights: (numbers.append(len(given := [*weights])), sync(given)))
    trainer.sync()
    assert not numbers, "nothing has moved"
    trainer.model.get_base_model().model.norm.weight.data.mul_(2)
    trainer.sync()
    trainer.sync()
    assert numbers == [len([*lora.pairs(trainer.model)])], "cached prefixes are of the weights before"
    trainer.model.merge_adapter()
    trainer.model.unmerge_adapter()
    trainer.state.global_step += 1
    with pytest.raises(ParityError, match=r"weight \(frozen, but edited; both have the edit\)"):
        trainer.sync()


@pytest.mark.slow
def test_what_is_merged_after_training_is_saved_as_any_model(arithmetic_dir, tmp_path):
    """transformers saved no model whose weights lie apart in one storage, as the parts of the sampler's merged weights do."""
    trainer, _ = trained(arithmetic_dir, tmp_path, max_steps=1, save_strategy="no")
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    for (name, weight), (_, saved) in zip(merged.named_parameters(), loaded.named_parameters(), strict=True):
        assert bits.same(weight, saved), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"r": 129}, "peft_config.r=129: expected at most 128, the model's width"),
        ({"target_modules": ["q_proj", "w1"]}, "peft_config.target_modules has w1: expected projections of the model"),
    ],
)
def test_what_a_script_s_adapters_cannot_be_had_with_is_refused_before_weights_are_loaded(
    given, said, arithmetic_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("rlinvariant.models.load.load", lambda *_, **__: pytest.fail("weights are loaded"))
    args = GRPOConfig(str(tmp_path), use_cpu=not CUDA, bf16=False, report_to="none", max_completion_length=12)
    adapter = LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | given)
    with pytest.raises(ConfigErrors) as raised:
        rlinvariant.grpo_trainer(arithmetic_dir, variety, args, questions(), peft_config=adapter)
    assert [line for line in raised.value.errors if line.startswith(said)], raised.value.errors


def test_adapters_train_exactly_and_resume_bit_for_bit(arithmetic_dir, tmp_path):
    """TRL keeps a reference as an adapter of its own: where that was saved too, a resumed run began from it."""
    drawn: dict[int, Rollout] = {}
    trainer, rows = trained(arithmetic_dir, tmp_path, beta=0.1, on_rollout=drawn.__setitem__)
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0]
    assert all(row["onpolicy/coverage"] == 1 and row["onpolicy/compared_tokens"] >= 64 for row in rows)
    assert rows[0]["grad_norm"] > 0 and trainer.proof["mismatched"] == 0

    model, base = trainer.accelerator.unwrap_model(trainer.model), AutoModelForCausalLM.from_pretrained(arithmetic_dir)
    moved = {name for name, w in model.named_parameters() if "lora_B.default" in name and w.abs().sum() > 0}
    assert len(moved) == sum("lora_B.default" in name for name, _ in model.named_parameters()) > 0
    for name, weight in base.named_parameters():
        own = model.get_base_model().get_parameter(name.replace("_proj.", "_proj.base_layer."))
        assert bits.same(own, weight.to(own)), f"{name} is frozen"

    assert shared_with_the_sampler(trainer) == {lora.plain(name) for name, _ in base.named_parameters()}
    saved = tmp_path / "checkpoint-2"
    assert json.loads((saved / "adapter_config.json").read_text())["r"] == 4 and not (saved / "model.safetensors").exists()
    theirs = PeftModel.from_pretrained(base, str(saved)).state_dict()
    for name, weight in model.state_dict().items():
        if "lora_" in name and ".default." in name:
            assert bits.same(theirs[name].to(weight), weight), f"{name}, as peft loads it"

    replayed(tmp_path / "checkpoint-1", drawn[2], trainer.sampler)

    again, more = trained(arithmetic_dir, tmp_path / "again", resume=str(tmp_path / "checkpoint-1"), beta=0.1)
    assert len(more) == 1 and more[0]["onpolicy/mismatched_tokens"] == 0
    for (name, weight), (_, right) in zip(again.model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert bits.same(weight, right), f"{name} after a resume"
    names = {path.name for path in again.publish().iterdir()}
    assert "adapter_model.safetensors" in names and "ref" not in names


def replayed(checkpoint: Path, rollout: Rollout, sampler: Any) -> None:
    """Replay a step from the adapters that it began with; others are refused by their hash."""
    about = {"invariance": "exact", "dtype": "bfloat16"}
    model = replay.load_model(str(checkpoint), rollout, about, 2)
    *found, ulp = replay.relations(rollout, model, sampler, "bfloat16", True)
    assert [relation.mismatched for relation in found] == [0, 0, 0] and found[0].compared > 50 and ulp.mismatched > 0
    with pytest.raises(UserError, match="has other weights"):
        replay.load_model(str(checkpoint.with_name("checkpoint-2")), rollout, about, 2)


@pytest.mark.slow
def test_merged_adapters_reach_a_stock_sampler_in_part(arithmetic_dir, tmp_path):
    """TRL's way, the arm `lora_merged`: the sampler has what is left of adapters after rounding, and no token agrees."""
    handed: dict[int, Rollout] = {}
    how = {"max_steps": 3, "learning_rate": 1e-5, "on_rollout": handed.__setitem__, "save_strategy": "no"}
    trainer, rows = trained(arithmetic_dir, tmp_path, invariance="off", **how)
    assert rows[0]["lora/merged_share"] == 1, "B is zero"
    assert all(0 < row["lora/merged_share"] < 0.6 for row in rows[1:]), [row["lora/merged_share"] for row in rows]
    assert all(row["onpolicy/mismatched_tokens"] > 0.5 * row["onpolicy/compared_tokens"] > 0 for row in rows)
    assert all(row["onpolicy/weights_equal"] == 1 for row in rows), "the sampler has the merged weights"
    assert not handed, "nothing is recorded that replay could not load"
    assert not shared_with_the_sampler(trainer), "its weights are other weights"
    model = trainer.accelerator.unwrap_model(trainer.model)
    trainer.sampler.sync(lora.base(model))
    assert trainer.sampler.differing_weights(lora.merged(model)), "control: weights without adapters differ from the merged"


@pytest.mark.slow
def test_the_commands_take_a_run_of_adapters(arithmetic_dir, tmp_path):
    """Step 1 is replayed from the adapters that the run has kept of its start, step 2 from a checkpoint."""

    def said(*command: str) -> str:
        done = forks.run(["-m", "rlinvariant.cli", *command], cwd=tmp_path, env=dict(os.environ))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    sizes = ["trainer.per_device_train_batch_size=8", "trainer.num_generations=4", "trainer.max_completion_length=12"]
    saving = ["trainer.save_strategy=steps", "trainer.save_steps=1", "wandb.mode=disabled"]
    recipe = [f"recipe={Path(__file__).parent / 'tiny_recipe.py'}", f"model={arithmetic_dir}", "run=adapters", "lora.r=4"]
    assert "mismatched 0 / " in said("train", *recipe, "steps=2", *sizes, *saving)
    for step in (1, 2):
        assert f"exact: step {step} was replayed bit for bit" in said("replay", "runs/adapters", "--step", str(step))


def test_the_start_sees_whether_adapters_count(arithmetic_dir, tmp_path, monkeypatch):
    """Control: with B = 0, as adapters begin, nothing differs without them, and a start that compared so would be blind."""
    monkeypatch.setattr(lora, "counting", lambda model: nullcontext())
    with pytest.raises(ParityError, match=r"0 / \d+ without the trainer's adapters: the comparison is blind"):
        trained(arithmetic_dir, tmp_path)


@pytest.mark.slow
def test_the_reference_is_the_model_without_its_adapter(arithmetic_dir, tmp_path):
    """Policy and reference are one function at the first step, where the penalty is 0; then they part."""
    _, rows = trained(arithmetic_dir, tmp_path, beta=0.1, save_strategy="no", max_steps=3)
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0, 0]
    assert rows[0]["kl"] == 0 < rows[2]["kl"], "where the sampler's log-probs stood for the reference's, it stayed 0"


@pytest.mark.slow
@pytest.mark.parametrize("ppo", [{}, {"ppo": PPOConfig()}], ids=["grpo", "ppo"])
def test_the_trainer_s_own_class_takes_adapters_as_trl_s_does(ppo, arithmetic_dir, tmp_path):
    """TRL had put PEFT's own layers around those of the exact model: a mismatch at the second step."""
    model = AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.float32)
    rows: list[dict[str, Any]] = []

    def engine() -> Sampler:
        room = {"max_model_len": 64, "kv_cache_gib": 0.02, "options": {"enforce_eager": True}}
        return Sampler(arithmetic_dir, invariant=True, ranks=lora.ranks(model), **room)

    kind: Any = InvariantPPOTrainer if ppo else InvariantGRPOTrainer
    trainer = kind(
        model,
        variety,
        small_config(tmp_path),
        questions(),
        sampler=engine,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        on_row=lambda row, mismatch: rows.append(row),
        **ppo,
    )
    trainer.train()
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0]
    assert all(row["onpolicy/compared_tokens"] > 60 for row in rows)
    assert {name for name, weight in trainer._trained() if weight.requires_grad and ".lora_" not in name} == (
        {"the critic's head.weight"} if ppo else set()
    )


@pytest.mark.slow
def test_a_model_that_is_peft_s_already(arithmetic_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    _, rows = trained(arithmetic_dir, tmp_path, model=adapted, save_strategy="no")
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0]

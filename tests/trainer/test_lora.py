"""LoRA through TRL: adapters train exactly, are saved as PEFT's, resume bit for bit, and leave the base as it was."""

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

import rlinvariant
from rlinvariant import bits
from rlinvariant.errors import ParityError
from rlinvariant.models import lora
from tests.parity.device import CUDA, cpu_only
from tests.parity.harness import questions, variety

pytestmark = cpu_only("adapters are refused on a GPU so far")


def trained(directory: str, output: Any, resume: str | None = None, model: Any = None, **changes: Any):
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
    trainer = rlinvariant.grpo_trainer(
        directory if model is None else model,
        variety,
        args,
        questions(),
        processing_class=AutoTokenizer.from_pretrained(directory),
        **({} if model is not None else {"peft_config": LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")}),
        sampler_options={"max_model_len": 64, "kv_cache_gib": 0.02, "options": {"enforce_eager": True}},
        on_row=lambda row, mismatch: rows.append(row),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, rows


def test_adapters_train_exactly_and_resume_bit_for_bit(arithmetic_dir, tmp_path):
    """TRL keeps a reference as an adapter of its own: where that was saved too, a resumed run began from it."""
    trainer, rows = trained(arithmetic_dir, tmp_path, beta=0.1)
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0]
    assert all(row["onpolicy/coverage"] == 1 and row["onpolicy/compared_tokens"] >= 64 for row in rows)
    assert rows[0]["grad_norm"] > 0 and trainer.proof["mismatched"] == 0

    model, base = trainer.accelerator.unwrap_model(trainer.model), AutoModelForCausalLM.from_pretrained(arithmetic_dir)
    moved = {name for name, w in model.named_parameters() if "lora_B.default" in name and w.abs().sum() > 0}
    assert len(moved) == sum("lora_B.default" in name for name, _ in model.named_parameters()) > 0
    for name, weight in base.named_parameters():
        own = model.get_base_model().get_parameter(name.replace("_proj.", "_proj.base_layer."))
        assert bits.same(own, weight.to(own)), f"{name} is frozen"

    saved = tmp_path / "checkpoint-2"
    assert json.loads((saved / "adapter_config.json").read_text())["r"] == 4 and not (saved / "model.safetensors").exists()
    theirs = PeftModel.from_pretrained(base, str(saved)).state_dict()
    for name, weight in model.state_dict().items():
        if "lora_" in name and ".default." in name:
            assert bits.same(theirs[name].to(weight), weight), f"{name}, as peft loads it"

    again, more = trained(arithmetic_dir, tmp_path / "again", resume=str(tmp_path / "checkpoint-1"), beta=0.1)
    assert len(more) == 1 and more[0]["onpolicy/mismatched_tokens"] == 0
    for (name, weight), (_, right) in zip(again.model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert bits.same(weight, right), f"{name} after a resume"
    names = {path.name for path in again.publish().iterdir()}
    assert "adapter_model.safetensors" in names and "ref" not in names


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
def test_a_model_that_is_peft_s_already(arithmetic_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    _, rows = trained(arithmetic_dir, tmp_path, model=adapted, save_strategy="no")
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0]

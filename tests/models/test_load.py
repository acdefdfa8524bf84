"""A checkpoint's weights are the model's, by name and shape, or it is not loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from trl.trainer.grpo_config import GRPOConfig

from rlinvariant.api import grpo_trainer
from rlinvariant.errors import UserError
from rlinvariant.models.families import FAMILIES
from rlinvariant.models.load import load
from rlinvariant.models.random import save_random
from rlinvariant.models.shapes import tokenizer
from rlinvariant.trainer.critic import load_critic
from rlinvariant.verification import load as verify_load
from tests.parity.device import CUDA
from tests.parity.harness import variety

LAYER = "model.layers.0.mlp.up_proj.weight"
RUN: dict[str, Any] = {"logging_steps": 1, "vllm_importance_sampling_correction": False, "gradient_checkpointing": False}
Change = Callable[[dict[str, torch.Tensor]], object]
FAULTS: dict[str, tuple[Change, str]] = {
    "missing": (lambda w: (w.pop(LAYER), w.pop("model.norm.weight")), f"2 weights of the model, {LAYER} first, missing"),
    "no head": (lambda w: w.pop("lm_head.weight"), "1 weight of the model, lm_head.weight first, missing"),
    "unexpected": (lambda w: w.update(extra=torch.ones(2)), "1 weight of the checkpoint, extra first, not in the model"),
    "shape": (lambda w: w.update({LAYER: torch.ones(3, 4)}), rf"{LAYER} first: \[3, 4\], expected \[3072, 128\]"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = Path(save_random(FAMILIES["llama"](), tmp_path_factory.mktemp("models") / "llama"))
    tokenizer(FAMILIES["llama"]().vocab_size).save_pretrained(path)
    return path


def changed(whole: Path, to: Path, change: Change) -> str:
    path = shutil.copytree(whole, to) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    return str(to)


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_models_are_refused(fault, whole, tmp_path, capfd):
    """Training, verify and, but for the head, a critic refuse such weights in one line, and nothing else is printed."""
    change, message = FAULTS[fault]
    path, policy = changed(whole, tmp_path / "model", change), load(AutoModelForCausalLM, whole)
    args = GRPOConfig(output_dir=str(tmp_path), bf16=False, max_completion_length=12, use_cpu=not CUDA, **RUN)
    readers = [
        lambda: grpo_trainer(path, variety, args, Dataset.from_list([{"prompt": "w1"}] * 64)),
        lambda: verify_load.masters(path),
    ]
    readers += [] if fault == "no head" else [lambda: load_critic(path, policy, None)]
    for read in readers:
        capfd.readouterr()
        with pytest.raises(UserError, match=message.replace("model.layers", r"(model\.)?layers")) as error:
            read()
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_what_the_model_has_no_use_for_may_be_there(whole, tmp_path):
    """Tables that old checkpoints have, a causal LM's head for a critic; a tied head may be there, or not."""
    old = changed(whole, tmp_path / "old", lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}))
    load(AutoModelForCausalLM, old)
    policy = load(AutoModelForCausalLM, whole)
    assert torch.equal(load_critic(str(whole), policy, None).norm.weight, policy.model.norm.weight)
    with pytest.raises(UserError, match="lm_head.weight first, not in the model"):
        load(AutoModel, whole)
    tied = Path(save_random(FAMILIES["qwen3"](), tmp_path / "tied"))
    load(AutoModelForCausalLM, tied)

    def head(of: float) -> Change:
        return lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] * of})

    load(AutoModelForCausalLM, changed(tied, tmp_path / "same", head(1.0)))
    with pytest.raises(UserError, match="its lm_head is another than its embedding, which config.json ties"):
        load(AutoModelForCausalLM, changed(tied, tmp_path / "another", head(2.0)))

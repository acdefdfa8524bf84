"""Run `train.py`'s command again and again in one process: interrupted, resumed, and with a mistake each time.

Prints the exit code and stderr of each as JSON:

    python -m tests.trainer.bad_runs MODEL
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

NUMBERS = itertools.count()
RECIPE = str(Path(__file__).with_name("tiny_recipe.py"))


def attempt(*arguments: str) -> dict[str, Any]:
    from rlinvariant.cli import train

    error, run = io.StringIO(), f"bad{next(NUMBERS)}"
    with contextlib.redirect_stderr(error):
        try:
            code: Any = train([f"recipe={RECIPE}", "wandb.mode=disabled", f"run={run}", *arguments])
        except BaseException:
            code = "traceback"
            traceback.print_exc()
    return {"code": code, "error": error.getvalue()}


def damaged(model: str, name: str, **changes: Any) -> str:
    """A copy of the checkpoint with another config.json, or without readable weights."""
    shutil.copytree(model, name)
    config = Path(name, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return name


def random_model(model: str, name: str, config: Any) -> str:
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, name, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    AutoModelForCausalLM.from_config(config).save_pretrained(name)
    return name


def main(model: str) -> None:
    from transformers import GPT2Config, MistralConfig, Qwen3Config

    sizes = {"vocab_size": 99, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 64}
    results = {
        "interrupted": attempt(f"model={model}", "run=resumed", "trainer.save_steps=2"),
        "resumed": attempt(f"model={model}", "run=resumed", "resume=true", "steps=4"),
    }
    for fault in ("no prompt", "long prompt", "reward raises", "reward too short"):
        results[fault] = attempt(f"model={model}", f"data.fault={fault}")

    no_weights = damaged(model, "no_weights")
    Path(no_weights, "model.safetensors").unlink()
    results["no weights"] = attempt(f"model={no_weights}")
    torn = damaged(model, "torn")
    Path(torn, "model.safetensors").write_bytes(Path(model, "model.safetensors").read_bytes()[:5000])
    results["torn weights"] = attempt(f"model={torn}")
    results["unknown architecture"] = attempt(f"model={damaged(model, 'unknown', model_type='qwen99')}")
    no_tokenizer = damaged(model, "no_tokenizer")
    for file in Path(no_tokenizer).glob("tokenizer*"):
        file.unlink()
    results["no tokenizer"] = attempt(f"model={no_tokenizer}")

    gpt2 = random_model(
        model, "gpt2", GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=2, n_positions=128, eos_token_id=2)
    )
    results["GPT-2"] = attempt(f"model={gpt2}")
    results["GPT-2, sampler"] = attempt(f"model={gpt2}", "invariance=sampler")
    small_heads = random_model(model, "small_heads", Qwen3Config(**sizes, num_key_value_heads=2, head_dim=16))
    results["head of 16"] = attempt(f"model={small_heads}")
    window = random_model(model, "window", MistralConfig(**sizes, num_key_value_heads=2, head_dim=32, sliding_window=8))
    results["sliding window"] = attempt(f"model={window}")

    from vllm.model_executor.layers import quantization

    methods = [m for m in quantization.QUANTIZATION_METHODS if m != "rlinvariant"]
    with mock.patch.object(quantization, "QUANTIZATION_METHODS", methods):
        results["no plugin"] = attempt(f"model={model}")

    from rlinvariant.kernels import cpu

    cpu.library.cache_clear()
    with mock.patch.dict(os.environ, CC="no-such-compiler", RLINVARIANT_CACHE=os.path.abspath("kernels")):
        results["no compiler"] = attempt(f"model={model}")
    print("RESULTS", json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])

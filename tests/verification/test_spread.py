"""`rlinvariant verify MODEL --tensor-parallel-size 2` as a user starts it, and what is refused before weights are loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlinvariant.models.families import FAMILIES, REFUSED
from rlinvariant.models.limits import uncuttable
from rlinvariant.sampler.refusals import process_problems
from tests.parity.device import cpu_only

ROOT = Path(__file__).parents[2]


def test_models_that_cannot_be_cut_by_columns_are_refused_by_name():
    reasons = {name: list(uncuttable(make(), 2)) for name, make in (FAMILIES | REFUSED).items()}
    refused = {name for name, found in reasons.items() if found}
    assert {"phi3", "phi3-window", "olmo2"} <= refused and not {"llama", "qwen2", "qwen3", "mistral", "gemma3"} & refused
    assert reasons["phi3"] == ["model_type=phi3: qkv_proj is not one of whole heads, as the processes must have them"]
    assert list(uncuttable(FAMILIES["llama"](), 4)) == [], "two heads of keys: over four processes two have the same"
    assert list(uncuttable(FAMILIES["llama"](), 3)) == [
        "num_attention_heads=4 is no multiple of 3",
        "hidden_size=128 is no multiple of 3",
        "vocab_size=101, of which vLLM makes 128, is no multiple of 3",
        "num_key_value_heads=2 is neither a multiple nor a divisor of 3",
    ]
    odd: Any = SimpleNamespace(**FAMILIES["llama"]().to_dict() | {"base_model_tp_plan": {"q": "colwise"}})
    odd.num_attention_heads, odd.num_key_value_heads, odd.hidden_size, odd.intermediate_size = 15, 5, 960, 2560
    assert list(uncuttable(odd, 5)) == ["vocab_size=101, of which vLLM makes 128, is no multiple of 5"], "SmolLM2-360M's sizes"
    odd.vocab_size = 319
    assert list(uncuttable(odd, 5)) == []


def test_processes_that_are_not_there_are_refused(monkeypatch):
    def found(count: int) -> list[str]:
        return process_problems(count, "M", FAMILIES["qwen3"]())

    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert found(1) == []
    alone = "a divisor of the 1 process of a host; start more by machine=, or choose one"
    assert found(2) == [f"sampler.tensor_parallel_size=2: expected {alone}"]
    assert found(0) == [f"sampler.tensor_parallel_size=0: expected {alone}"]
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert found(2) == [] == found(4)
    config: Any = SimpleNamespace(**FAMILIES["qwen3"]().to_dict() | {"base_model_tp_plan": None})
    (line,) = process_problems(2, "M", config)
    assert line.startswith("sampler.tensor_parallel_size=2: model=M: model_type=qwen3: transformers has no plan for it")
    assert "a divisor of the 2 processes of a host" in process_problems(4, "M", config, started=2)[-1]


@cpu_only("two processes of one engine take a GPU each; here they are joined by gloo")
@pytest.mark.slow
@pytest.mark.parametrize("adapters", [[], ["--lora", "r=8", "alpha=32"]], ids=["whole", "adapters"])
def test_verify_starts_its_processes_and_shows_that_vllm_s_own_cut_is_not_exact(adapters, arithmetic_dir, tmp_path):
    launched = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
    env = {k: v for k, v in os.environ.items() if k not in launched}
    env |= {"PYTHONPATH": str(ROOT), "RLINVARIANT_CACHE": str(tmp_path / "cache")}

    def verify(count: int) -> subprocess.CompletedProcess[str]:
        spread = ["--tensor-parallel-size", str(count), "--out", str(tmp_path / "found.json")]
        line = [sys.executable, "-m", "rlinvariant", "verify", arithmetic_dir, "--short", *adapters, *spread]
        return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)

    done = verify(2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("sampler = trainer, packed") == 1, "said by one process"
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["exact"] and found["mismatched"] == 0 and found["subject"]["tensor_parallel_size"] == 2
    assert found["model"]["lora"] == (" ".join(adapters[1:]) or None)
    (control,) = [x for x in found["controls"] if x["name"] == "planted: sums added over processes"]
    assert control["mismatched"] > 0.9 * control["compared"] > 0
    (alike,) = [x for x in found["relations"] if x["name"] == "every process of the sampler = every other"]
    assert alike["compared"] == 2 * control["compared"]
    refused = verify(3)
    lines = refused.stderr.splitlines()
    assert refused.returncode == 2 and all(line.startswith("error: sampler.tensor_parallel_size=3: model=") for line in lines)
    assert lines and "engine" not in refused.stdout, "before any process is started"

"""Capabilities two by two: a few steps of each pair that no other test has, on a CPU, every token the same 32 bits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import AutoTokenizer

import rlinvariant
from rlinvariant.config import PPOConfig
from rlinvariant.models.families import FAMILIES
from rlinvariant.models.random import save_random
from rlinvariant.recipes._tiny import build_tokenizer
from rlinvariant.report.rundir import read_metrics
from tests import forks
from tests.parity.device import cpu_only
from tests.parity.harness import questions, small_config, variety
from tests.trainer.test_sharding import ENV, FSDP
from tests.trainer.tool_model import tool_run

pytestmark = [pytest.mark.slow, cpu_only("proven on CPUs alone so far")]

ROOT = Path(__file__).parents[2]
WINDOW = 6  # of keys: less than any prompt and its completion
LORA = {"peft_config": LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])}
TOP_P = {"top_p": 0.8}
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # a family, with which other numbers; settings
    "mixture, LoRA": ("qwen3-moe", {}, LORA),
    "mixture, top-p": ("olmoe", {}, TOP_P),
    "mixture, PPO": ("qwen3-moe", {}, {"ppo": PPOConfig()}),
    "mixture, window": ("mixtral", {"sliding_window": WINDOW}, {}),
    "window, LoRA": ("mistral-window", {"sliding_window": WINDOW}, LORA),
    "window, top-p": ("mistral-window", {"sliding_window": WINDOW}, TOP_P),
    "window, PPO": ("mistral-window", {"sliding_window": WINDOW}, {"ppo": PPOConfig()}),
    "LoRA, top-p": ("qwen3", {}, LORA | TOP_P),
}


def small(family: str, **numbers: Any) -> Any:
    """Return the configuration of a family, with narrow MLPs, and with other numbers."""
    config = FAMILIES[family]()
    for name, value in {"intermediate_size": 128, "moe_intermediate_size": 64, "router_aux_loss_coef": 0.0, **numbers}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_trains_exactly(pair: str, tmp_path: Path) -> None:
    family, numbers, settings = PAIRS[pair]
    build_tokenizer().save_pretrained(save_random(small(family, **numbers), tmp_path / "model"))
    trainer, rows = trained(str(tmp_path / "model"), tmp_path / "out", **settings)
    assert [row["onpolicy/mismatched_tokens"] for row in rows] == [0, 0], rows
    assert all(row["onpolicy/coverage"] == 1 and row["onpolicy/compared_tokens"] > 60 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    if "mixture" in pair:
        assert all(row["onpolicy/router_flips"] == 0 for row in rows)
    if "window" in pair:
        assert trainer.model.config.sliding_window == WINDOW


def test_a_mixture_in_shards_trains_exactly(tmp_path: Path) -> None:
    """Two processes, each with half of every expert's rows. Control of the flips: a trainer that sees another expert."""
    build_tokenizer().save_pretrained(save_random(small("qwen3-moe"), tmp_path / "model"))
    sizes = ("per_device_train_batch_size=8", "num_generations=4", "max_completion_length=12", "router_aux_loss_coef=0")
    settings = ["recipe=arithmetic", "model=model", "steps=2", "data.eval_size=4", "data.train_size=64", "wandb.mode=disabled"]
    settings += [f"trainer.{size}" for size in sizes]
    done = subprocess.run(
        [sys.executable, "-m", "rlinvariant", "train", *settings, "run=shards", "machine=cpu2_fsdp2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "runs/shards/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "onpolicy/compared_tokens" in row]
    assert len(steps) == 2 and all(row["onpolicy/compared_tokens"] > 100 for row in steps)
    assert all(row["onpolicy/mismatched_tokens"] == 0 == row["onpolicy/unscored_tokens"] for row in steps)
    assert all(row["onpolicy/router_flips"] == 0 for row in steps)
    planted = [str(Path(__file__).parent / "flips_on_ranks.py"), *settings, "run=planted"]
    (one, other) = forks.run_ranks(2, planted, cwd=tmp_path, env=ENV | FSDP)
    assert one.returncode == other.returncode == 0, one.stderr[-3000:]
    for row in read_metrics(tmp_path / "runs/planted"):
        assert row["onpolicy/router_flips"] == row["onpolicy/router_flips/0"] >= 2 and row["onpolicy/mismatched_tokens"] == 0


def test_two_processes_with_shards_and_a_shared_sampler_train_exactly_what_else_there_is(tmp_path: Path) -> None:
    """Turns, top-p, PPO and a window at once, in two processes that have half of the weights and half of a sampler each."""
    settings = tool_run(tmp_path, small("mistral-window", sliding_window=WINDOW))
    pairs = ("algorithm=ppo", "trainer.top_p=0.8", "sampler.tensor_parallel_size=2")
    sizes = ("steps=2", "trainer.per_device_train_batch_size=8", "sampler.max_model_len=128", "sampler.kv_cache_gib=0.05")
    command = [str(ROOT / "train.py"), *settings, *pairs, *sizes, "run=all"]
    done = forks.run_ranks(2, command, cwd=tmp_path, env=ENV | FSDP)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    assert "weights in shards over 2 processes" in done[0].stdout
    (ulp, all_kept) = re.findall(r"(\d+) / \d+ (?:with one ulp|where the trainer keeps all tokens)", done[0].stdout)
    assert int(ulp) > 0 < int(all_kept), "controls, which have to differ"
    rows = read_metrics(tmp_path / "runs/all")
    assert [(row["onpolicy/mismatched_tokens"], row["onpolicy/unscored_tokens"]) for row in rows] == [(0, 0)] * 2
    assert all(row["onpolicy/coverage"] == 1 == row["onpolicy/weights_equal"] for row in rows)
    assert all(row["onpolicy/compared_tokens"] > 100 for row in rows)
    assert all(row["rollout/turns"] > 1 and row["grad_norm"] > 0 < row["value/loss"] for row in rows)


def trained(directory: str, output: Path, ppo: PPOConfig | None = None, peft_config: Any = None, **changes: Any) -> Any:
    args = small_config(output, **changes)
    rows: list[dict[str, Any]] = []
    shared: dict[str, Any] = {
        "processing_class": AutoTokenizer.from_pretrained(directory),
        "sampler_options": {"max_model_len": 64, "kv_cache_gib": 0.02, "options": {"enforce_eager": True}},
        "on_row": lambda row, mismatch: rows.append(row),
    }
    if ppo is not None:
        trainer = rlinvariant.ppo_trainer(directory, variety, args, questions(), ppo=ppo, **shared)
    else:
        more = {} if peft_config is None else {"peft_config": peft_config}
        trainer = rlinvariant.grpo_trainer(directory, variety, args, questions(), **shared, **more)
    trainer.train()
    return trainer, rows

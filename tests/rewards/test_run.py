"""Whole runs with rewards that misbehave: survived, with the same weights every time, or ended by one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlinvariant.report.rundir import read_metrics

ROOT = Path(__file__).parents[2]
RECIPE = """
import itertools, os
BASE = "arithmetic"


def reward(completions, trainer_state, **_):
    step = trainer_state.global_step + 1
    if {name!r} == "flaky" and step == 2 and any(len(text) % 2 for text in completions):
        os._exit(0)
    if {name!r} == "flaky" and step == 3 and any(len(text) % 2 for text in completions):
        raise ValueError(completions[0])
    if {name!r} == "hangs" and step == 2 and os.environ.get("RANK", "0") == {rank!r}:
        all(itertools.repeat(True))
    if {name!r} == "raises" and step == 2 and os.environ.get("RANK", "0") == {rank!r}:
        raise ValueError("no")
    return [len(set(text)) / 10 for text in completions]


def reward_funcs(config):
    return [reward]
"""


def train(directory: Path, model: str, name: str, *arguments: str, rank: str = "0") -> subprocess.CompletedProcess[str]:
    (directory / "bad.py").write_text(RECIPE.format(name=name, rank=rank))
    sizes = ["trainer.per_device_train_batch_size=8", "trainer.num_generations=4", "trainer.max_completion_length=12"]
    fixed = ["recipe=bad.py", f"model={model}", "steps=4", "data.eval_size=8", "wandb.mode=disabled", *sizes]
    command = [sys.executable, "-m", "rlinvariant", "train", *fixed, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_a_cage_lets_a_run_go_on_to_the_same_weights(arithmetic_dir, tmp_path):
    """Control: without the failures the weights are others."""
    weights = {}
    for run, name in {"a": "flaky", "b": "flaky", "c": "good"}.items():
        done = train(tmp_path, arithmetic_dir, name, "reward_cage=2", "reward_errors=zero", f"run={run}")
        assert done.returncode == 0, done.stderr
        (file,) = (tmp_path / "runs" / run).glob("checkpoints/checkpoint-4/model.safetensors")
        weights[run] = file.read_bytes()
        rows = read_metrics(tmp_path / "runs" / run)
        counted = [(row["reward/errors"] > 0, row["reward/timeouts"] > 0, row["reward/crashes"] > 0) for row in rows]
        nothing, flaky = (False, False, False), name == "flaky"
        assert counted == [nothing, (False, False, flaky), (flaky, False, False), nothing]
    assert weights["a"] == weights["b"] != weights["c"]


@pytest.mark.slow
def test_a_call_that_holds_the_interpreter_leaves_a_result(arithmetic_dir, tmp_path):
    done = train(tmp_path, arithmetic_dir, "hangs", "reward_timeout=5", "run=a")
    line = "reward function reward, step 2: no answer within 5 s; raise reward_timeout="
    assert done.returncode != 0 and f"error: {line}" in done.stderr
    result = json.loads((tmp_path / "runs/a/result.json").read_text())
    assert result["outcome"] == "failed" and not result["finished"] and result["error"].startswith(line)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_on_one_rank_ends_both(rank, arithmetic_dir, tmp_path):
    done = train(tmp_path, arithmetic_dir, "raises", "machine=cpu2", "run=a", rank=rank)
    assert done.returncode != 0
    result = json.loads((tmp_path / "runs/a/result.json").read_text())
    assert "reward function reward, step 2, sample 0: raised ValueError: no" in result["error"]

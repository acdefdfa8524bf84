"""Runs of recipes with SmolLM2, from the command line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlinvariant.model_source import model_problems
from rlinvariant.recipes import words
from rlinvariant.report.rundir import read_metrics

ROOT = Path(__file__).parents[2]
MODEL = words.DEFAULTS["model"]
needs_the_model = pytest.mark.skipif(
    bool(model_problems("model", MODEL)), reason=f"needs {MODEL}: {'; '.join(model_problems('model', MODEL))}"
)
SHORT = (
    "steps=2",
    "wandb.mode=disabled",
    "data.eval_size=4",
    "trainer.per_device_train_batch_size=8",
    "trainer.num_generations=4",
    "trainer.save_strategy=no",
    "sampler.kv_cache_gib=0.1",
)
SMALL = (*SHORT, "trainer.max_completion_length=16", "trainer.warmup_steps=0")


def rlinvariant(directory: Path, *argv: str) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "rlinvariant", *argv]
    done = subprocess.run(command, cwd=directory, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def rows(directory: Path, name: str) -> list[dict[str, Any]]:
    return read_metrics(directory / "runs" / name)

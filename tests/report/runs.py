"""Run and ablation directories whose rows are computed as training computes them, from drawn log-probs."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlinvariant.keys import KEYS
from rlinvariant.machine import environment
from rlinvariant.metrics import onpolicy
from rlinvariant.report import completions
from rlinvariant.report.rundir import SCHEMA, RunDir, _append_lines
from tests.report.said import said

ARMS = {"exact": ["invariance=exact"], "drift": ["invariance=off"]}
Change = Callable[[dict[str, Any]], dict[str, Any]]


def row(step: int, seed: int, drift: float, reward: float = 0.0) -> dict[str, Any]:
    """A row with every key of training: 64 tokens, whose log-probs differ by about `drift`."""
    random = np.random.default_rng([step, seed])
    sampler = random.uniform(-2, 0, 64).astype(np.float32)
    trainer = sampler if drift == 0 else (sampler + drift * random.standard_normal(64)).astype(np.float32)
    others = {"reward": 0.2 + 0.02 * step + reward + 0.05 * random.random(), "entropy": 1 / step}
    others |= {"step_time": 0.5 + 0.1 * random.random(), "onpolicy/weights_equal": 1}
    return {"step": step, **dict.fromkeys(KEYS, 1.0), **onpolicy(sampler, trainer, 64, 2.0), **others}


here = functools.cache(environment)


def write_run(
    path: Path,
    seed: int,
    overrides: Sequence[str] = (),
    steps: int = 20,
    drift: float = 0.0,
    reward: float = 0.0,
    finished: bool = True,
    change: Change = dict,
    recipe: str = "arithmetic",
    **extra: Any,
) -> RunDir:
    given = {"recipe": recipe, "seed": seed, "steps": steps if finished else 20, **dict(o.split("=") for o in overrides)}
    config = {key: {"value": value, "source": "command line"} for key, value in given.items()}
    config["run"] = {"value": "/".join(path.parts[-3:]), "source": "command line"}
    config["wandb.project"] = {"value": "rlinvariant", "source": "default"}
    run = RunDir.create(path, config)
    run.environment.write_text(json.dumps({"schema": SCHEMA, **here(), "kernels": {"linear": "vendor GEMM"}, **extra}))
    _append_lines(run.metrics, [change(row(step, seed, drift, reward)) for step in range(1, steps + 1)])  # synced once
    completions.write(path, said(1))
    if finished:
        held = {"heldout_reward_before": 0.5, "heldout_reward_after": 0.8 + 0.01 * seed, "heldout_is_accuracy": True}
        run.write_result({"finished": True, **held, "seconds": 9.0})
    return run


def write_ablation(
    path: Path, seeds: Sequence[int] = (0, 1, 2), arms: Mapping[str, Sequence[str]] = ARMS, steps: int = 20
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    described = [{"name": name, "description": f"arm {name}", "overrides": list(given)} for name, given in arms.items()]
    spec = {"schema": 1, "command": "rlinvariant ablate recipe=arithmetic", "recipe": "arithmetic", "steps": steps}
    (path / "ablation.json").write_text(json.dumps(spec | {"seeds": list(seeds), "arms": described}))
    for name, given in arms.items():
        for seed in seeds:
            drift = 0.0 if "invariance=exact" in given else 0.01
            write_run(path / name / f"seed-{seed}", seed, given, steps, drift, reward=0.001 * (seed - 1) * bool(drift))
    return path

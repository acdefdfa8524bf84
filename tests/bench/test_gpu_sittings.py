"""Sides of a benchmark that share a card fit on it, and a part of tests/gpu1 and tests/gpu2 ends in time."""

import os
import subprocess
from pathlib import Path

import pytest

from rlinvariant.bench import gpu_step, lora, sampler
from rlinvariant.models import shapes

ROOT = Path(__file__).parents[2]
CARD = 0.9 * 139.8  # GiB of an H200, with room for what allocators leave unused
CONTEXT = 2.0  # of a process, with CUDA graphs
PADDED = 1.2e-3  # GiB of a token of TRL's padded micro-batch at the 1.7B shape: 8.6 for 16 x 768, as measured on an H100
KEPT = 2.0e-3  # GiB of a token of ours with no activations recomputed, at the 1.7B shape: 63 for 32,768, as measured on an H200
ACTIVATIONS = 8.0  # GiB of the 2k rows of `bench trainer`: 4.2 at the 1.7B shape on an H100, and the experts of one layer
MASTER, STATES, BF16 = 4, 12, 2  # bytes of a parameter


def parameters(model: str) -> float:
    """Return the parameters of the matrices of a model, in units that make bytes of each GiB."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(shapes.config(model)).parameters()) / 2**30


def step(side: str, rank: int, size: gpu_step.Size) -> float:
    """Return the GiB of one side of steps, an upper bound."""
    p = parameters(gpu_step.MODEL)
    base = 0 if rank and side == "exact" else MASTER * p  # ours is the sampler's
    held = BF16 * p + size.kv_gib + base + (0.3 if rank else STATES * p)
    tokens = size.rows * (size.length + gpu_step.PROMPT_TOKENS[1])
    return CONTEXT + held + (KEPT * (size.tokens or 32768) if side == "exact" else PADDED * tokens)


@pytest.mark.parametrize(
    "sides, size, fits",
    [
        ([("exact", 0), ("stock", 0)], "full", True),
        ([*lora.SIDES.values()], "adapters", True),
        ([*lora.SIDES.values()], "full", False),  # the control
    ],
)
def test_sides_of_steps_that_share_a_card_fit_on_it(sides, size, fits):
    assert (sum(step(side, rank, gpu_step.SIZES[size]) for side, rank in sides) < CARD) is fits


def test_both_sides_of_a_mixture_fit_on_a_card():
    p = parameters(sampler.SETUPS["moe"].model)
    ours, stock = 2 * MASTER * p, 2 * BF16 * p  # weights and gradients
    assert ours + stock + 2 * (ACTIVATIONS + CONTEXT) < CARD < 2 * ours + 2 * (ACTIVATIONS + CONTEXT)  # the control: both fp32


def part(steps: str, work: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a part of these steps."""
    env = {name: value for name, value in os.environ.items() if name not in ("TINY", "ONLY")} | {"WORK": str(work), **variables}
    script = f"part=1 suite=x; . tests/gpu_steps.sh; {steps}; ended"
    return subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)


def test_a_part_ends_in_time_and_says_what_it_left_out(tmp_path):
    done = part("step long 90 sleep 60; step late 90 true", tmp_path, WHOLE="2")
    assert "== 1 long: FAILED (exit code 124)" in done.stdout and "== 1 late: FAILED (no time was left)" in done.stdout
    assert done.returncode == 2 and "== part 1: 2 failed" in done.stdout


def test_some_steps_alone_and_a_step_that_is_not_there(tmp_path):
    steps = "step one 9 true; step other 9 false"
    done = part(steps, tmp_path, ONLY="one")
    assert done.returncode == 0 and "== 1 one: ok" in done.stdout and "other" not in done.stdout
    done = part(steps, tmp_path, ONLY="one on")
    assert done.returncode == 1 and "== 1 on: FAILED (ONLY names a step that part 1 has not)" in done.stdout

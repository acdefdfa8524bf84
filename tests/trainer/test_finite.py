"""A number that is not finite stops a run by its name, on every rank; without the check it would have come into the weights."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlinvariant.errors import UserError
from rlinvariant.trainer.distributed import DistributedTrainer
from rlinvariant.trainer.finite import norm, not_finite
from tests.parity.harness import new_trainer
from tests.trainer.plants import INF, NAN, plants, poisoned, stopped, tried, unchecked

FEW = [p for p in plants() if p.algorithm == "grpo" and p.value is NAN and p.place in ("a gradient", "exp_avg")]
FEW += [p for p in plants() if p.algorithm == "ppo" and p.value == -INF and p.place == "the critic's gradient"]
FEW += [p for p in plants() if p.algorithm == "grpo" and p.place == "the learning rate" and "checkpoint" in p.then]


@pytest.mark.parametrize("plant", FEW, ids=str)
def test_a_plant_stops_the_run(plant, arithmetic_dir, exact_engine, tmp_path):
    """A few; `make reliability` has all of them, in tests/reliability/test_nan.py."""
    run, said = tried(plant, arithmetic_dir, exact_engine, tmp_path / "checked")
    assert stopped(plant, run, said, tmp_path / "checked") is None
    with unchecked():
        run, said = tried(plant, arithmetic_dir, exact_engine, tmp_path / "unchecked")
    assert not said and poisoned(run.trainer, tmp_path / "unchecked"), "blind: nothing would have come of it"


def test_every_micro_batch_is_looked_at(arithmetic_dir, exact_engine, tmp_path):
    """The loss of the first of several is NaN."""
    plant = next(p for p in plants() if p.algorithm == "grpo" and p.place == "the loss")
    _, said = tried(plant, arithmetic_dir, exact_engine, tmp_path, tokens_per_microbatch=100)
    assert re.match(rf"UserError: step 2: {plant.says}", said), said


def test_without_clipping_gradients_are_looked_at(arithmetic_dir, exact_engine, tmp_path):
    plant = next(p for p in plants() if p.algorithm == "grpo" and p.place == "a gradient")
    _, said = tried(plant, arithmetic_dir, exact_engine, tmp_path, max_grad_norm=0.0)
    assert re.match(rf"UserError: step 2: {plant.says}", said), said


def test_before_the_first_checkpoint_the_message_says_so(arithmetic_dir, exact_engine, tmp_path):
    run = new_trainer(arithmetic_dir, exact_engine, tmp_path)
    run.trainer.model.model.norm.weight.data[3] = INF
    with pytest.raises(UserError) as error:
        run.trainer.train()
    said = "step 1: weight model.norm.weight: 1 of 128 numbers are not finite; stopped before the optimizer step"
    assert str(error.value) == f"{said}; there is no checkpoint"
    run.trainer.model.eval()
    with pytest.raises(
        UserError, match=r"^after step 0: weight .*; stopped before they were sampled from; there is no checkpoint$"
    ):
        run.trainer.sync()


def test_a_norm_that_overflows_stops_the_run_when_gradients_are_clipped(arithmetic_dir, exact_engine, tmp_path):
    """It would make every gradient 0, in silence. In shards only the norm of whole gradients shows it."""
    trainer = new_trainer(arithmetic_dir, exact_engine, tmp_path).trainer
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, 1e18)
    assert not DistributedTrainer._clipped(trainer, trainer.model, 1.0).isfinite()
    assert not any(p.grad.any() for p in trainer.model.parameters()), "control: what would be stepped with"
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, 1e18)
    with pytest.raises(UserError, match="^step 1: the gradient's norm is not finite, though each number of it is; stopped"):
        trainer._clipped(trainer.model, 1.0)
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, 1.0)
    assert trainer._clipped(trainer.model, 1.0) > 1, "control: a norm that is finite"


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_number_in_any_place_is_found(value, dtype):
    for size, at in ((1, 0), (7, 6), (4097, 4095), (100_003, 50_000)):
        tensors = [("first", torch.randn(5)), ("second", torch.randn(size).to(dtype))]
        assert norm(tensors).isfinite() and not_finite(tensors) is None, "control: without it"
        tensors[1][1][at] = value
        assert not norm(tensors).isfinite()
        assert not_finite(tensors) == f"second: 1 of {size:,} numbers are not finite"


def test_large_numbers_are_finite():
    """Their squares are not: the norm asks for a look, which finds nothing."""
    tensors = [("large", torch.full((5,), 3e38))]
    assert not norm(tensors).isfinite() and not_finite(tensors) is None


@pytest.mark.slow
def test_a_number_on_one_rank_stops_both_with_one_error(arithmetic_dir, tmp_path):
    """Rank 1 alone has a NaN in its log-probs; rank 0 must neither hang nor say something else."""
    here = Path(__file__).parent
    settings = [f"recipe={here / 'tiny_recipe.py'}", f"model={arithmetic_dir}", "steps=3", "run=two", "wandb.mode=disabled"]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q", "--num_cpu_threads_per_process", "1"]
    command += ["--config_file", str(here.parents[1] / "configs/cpu2.yaml"), str(here / "nan_on_a_rank.py"), str(tmp_path)]
    command += [*settings, "trainer.per_device_train_batch_size=8"]
    environment = os.environ | {"PYTHONPATH": str(here.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert done.returncode != 0 and said[0] == said[1], done.stdout[-2000:] + done.stderr[-4000:]
    assert re.match(r"step 2: rank 1: sampler_logprobs: 1 of [\d,]+ numbers are not finite; stopped before", said[0]), said

"""Fixtures that several files start from: trainers of PPO, and steps taken in parts."""

from typing import Any

import pytest

from rlinvariant.config import PPOConfig
from tests.parity.harness import Run, new_trainer, train
from tests.trainer.gradients import Gradients


@pytest.fixture
def new(arithmetic_dir, exact_engine, tmp_path):
    """A PPO trainer; settings of PPO by `ppo`, others as for `new_trainer`."""

    def start(ppo: dict[str, Any] | None = None, **changes: Any) -> Run:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        return new_trainer(arithmetic_dir, exact_engine, directory, ppo=PPOConfig(**(ppo or {})), **changes)

    return start


@pytest.fixture
def divided(arithmetic_dir, exact_engine, tmp_path):
    """Train one step in fp32, with so many tokens in a part; return the run and its gradients."""

    def start(tokens, **changes):
        kept = Gradients()
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        settings = {"max_steps": 1, "max_grad_norm": 1e9, "callbacks": [kept], "engine": exact_engine} | changes
        run = train(arithmetic_dir, settings.pop("engine"), directory, tokens_per_microbatch=tokens, **settings)
        return run, kept.steps[0]

    return start

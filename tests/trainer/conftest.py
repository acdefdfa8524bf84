"""Fixtures that tests of PPO start from."""

from typing import Any

import pytest

from rlinvariant.config import PPOConfig
from tests.parity.harness import Run, new_trainer


@pytest.fixture
def new(arithmetic_dir, exact_engine, tmp_path):
    """A PPO trainer; settings of PPO by `ppo`, others as for `new_trainer`."""

    def start(ppo: dict[str, Any] | None = None, **changes: Any) -> Run:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        return new_trainer(arithmetic_dir, exact_engine, directory, ppo=PPOConfig(**(ppo or {})), **changes)

    return start

"""Exact on-policy RL: the policy that samples and the policy that is trained are the same function, bit for bit."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlinvariant.config import PPOConfig
    from rlinvariant.models import make_invariant
    from rlinvariant.run import grpo_trainer, ppo_trainer
    from rlinvariant.trainer import InvariantGRPOTrainer, InvariantPPOTrainer

__version__ = "0.1.0"
__all__ = ["InvariantGRPOTrainer", "InvariantPPOTrainer", "PPOConfig", "grpo_trainer", "make_invariant", "ppo_trainer"]
_HOMES = {
    **dict.fromkeys(("grpo_trainer", "ppo_trainer"), "run"),
    **dict.fromkeys(("InvariantGRPOTrainer", "InvariantPPOTrainer"), "trainer"),
    "PPOConfig": "config",
    "make_invariant": "models",
}


def __getattr__(name: str) -> Any:
    """Import on first use: importing rlinvariant loads no framework and touches no device."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rlinvariant' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rlinvariant.{_HOMES[name]}"), name)

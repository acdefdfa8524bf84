"""Exact on-policy RL: the policy that samples and the policy that is trained are the same function, bit for bit."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlinvariant.api import GRPOTrainer, PPOTrainer, grpo_trainer, ppo_trainer
    from rlinvariant.config import PPOConfig
    from rlinvariant.errors import ConfigErrors, ParityError, UserError
    from rlinvariant.models import UnsupportedModel, make_invariant
    from rlinvariant.sampler.engine import Sampler
    from rlinvariant.tools.plain import plain_tools
    from rlinvariant.trainer import InvariantGRPOTrainer, InvariantPPOTrainer
    from rlinvariant.trainer.fields import GRPOConfig
    from rlinvariant.verification.verify import verify

__version__ = "0.1.0"
__all__ = [
    "ConfigErrors",
    "GRPOConfig",
    "GRPOTrainer",
    "InvariantGRPOTrainer",
    "InvariantPPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "ParityError",
    "Sampler",
    "UnsupportedModel",
    "UserError",
    "grpo_trainer",
    "make_invariant",
    "plain_tools",
    "ppo_trainer",
    "verify",
]
_HOMES = {
    **dict.fromkeys(("GRPOTrainer", "PPOTrainer", "grpo_trainer", "ppo_trainer"), "api"),
    **dict.fromkeys(("ConfigErrors", "ParityError", "UserError"), "errors"),
    **dict.fromkeys(("InvariantGRPOTrainer", "InvariantPPOTrainer"), "trainer"),
    **dict.fromkeys(("UnsupportedModel", "make_invariant"), "models"),
    "GRPOConfig": "trainer.fields",
    "PPOConfig": "config",
    "Sampler": "sampler.engine",
    "plain_tools": "tools.plain",
    "verify": "verification.verify",
}


def __getattr__(name: str) -> object:
    """Import on first use: importing rlinvariant loads no framework and touches no device."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rlinvariant' has no attribute {name!r}")
    importlib.import_module("rlinvariant.runtime").before_torch()
    return getattr(importlib.import_module(f"rlinvariant.{_HOMES[name]}"), name)

"""The trainers: TRL's, with exact log-probs and the comparison with the sampler; by GRPO, and by PPO with a critic."""

import importlib
from typing import TYPE_CHECKING

from rlinvariant import runtime

if TYPE_CHECKING:
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer
    from rlinvariant.trainer.ppo import InvariantPPOTrainer

__all__ = ["InvariantGRPOTrainer", "InvariantPPOTrainer"]
runtime.quiet()  # before TRL is imported, which warns of vLLM's version
_MODULES = {"InvariantGRPOTrainer": "grpo", "InvariantPPOTrainer": "ppo"}


def __getattr__(name: str) -> object:
    """Import on first use: TRL takes seconds to import, and scoring needs none of it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

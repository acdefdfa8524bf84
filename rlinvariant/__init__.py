"""Exact on-policy RL: the policy that samples and the policy that is trained are the same function, bit for bit."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlinvariant.models import make_invariant
    from rlinvariant.run import grpo_trainer
    from rlinvariant.trainer import InvariantGRPOTrainer

__version__ = "0.1.0"
__all__ = ["InvariantGRPOTrainer", "grpo_trainer", "make_invariant"]


def __getattr__(name: str) -> Any:
    """Import on first use: importing rlinvariant loads no framework and touches no device."""
    if name == "grpo_trainer":
        from rlinvariant.run import grpo_trainer as value
    elif name == "make_invariant":
        from rlinvariant.models import make_invariant as value
    elif name == "InvariantGRPOTrainer":
        from rlinvariant.trainer import InvariantGRPOTrainer as value
    else:
        raise AttributeError(f"module 'rlinvariant' has no attribute {name!r}")
    return value

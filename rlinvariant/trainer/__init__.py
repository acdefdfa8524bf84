"""The trainer: TRL's, with exact log-probs and the comparison with the sampler."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer

__all__ = ["InvariantGRPOTrainer"]


def __getattr__(name: str) -> Any:
    """At first use: TRL takes seconds to import, and scoring needs none of it."""
    if name in __all__:
        from rlinvariant.trainer import grpo

        return getattr(grpo, name)
    raise AttributeError(name)

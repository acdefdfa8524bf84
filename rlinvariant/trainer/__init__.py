"""The trainer: TRL's, with exact log-probs and the comparison with the sampler."""

from rlinvariant.trainer.grpo import InvariantGRPOTrainer

__all__ = ["InvariantGRPOTrainer"]

"""The trainer: TRL's, with exact log-probs and the comparison with the sampler. Nothing else imports trl or accelerate."""

from rlinvariant.trainer.grpo import InvariantGRPOTrainer

__all__ = ["InvariantGRPOTrainer"]

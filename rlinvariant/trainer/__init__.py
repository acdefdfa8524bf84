"""The trainers: TRL's, with exact log-probs and the comparison with the sampler."""

from rlinvariant.trainer.grpo import InvariantGRPOTrainer
from rlinvariant.trainer.ppo import InvariantPPOTrainer

__all__ = ["InvariantGRPOTrainer", "InvariantPPOTrainer"]

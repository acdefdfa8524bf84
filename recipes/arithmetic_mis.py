"""arithmetic with stock kernels on both sides, sequences whose importance ratio is too large left out of the loss."""

from rlinvariant.recipes.arithmetic_tis import DEFAULTS as PARENT
from rlinvariant.recipes.arithmetic_tis import Data, check, datasets, prepare_model, reward_funcs

__all__ = ["DEFAULTS", "Data", "check", "datasets", "prepare_model", "reward_funcs"]
DEFAULTS = PARENT | {"trainer.vllm_importance_sampling_mode": "sequence_mask"}

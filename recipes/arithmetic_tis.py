"""arithmetic with stock kernels on both sides, the drift corrected by truncated importance sampling of each token."""

from rlinvariant.recipes.arithmetic_off import DEFAULTS as PARENT
from rlinvariant.recipes.arithmetic_off import Data, check, datasets, prepare_model, reward_funcs

__all__ = ["DEFAULTS", "Data", "check", "datasets", "prepare_model", "reward_funcs"]
DEFAULTS = PARENT | {
    "trainer.vllm_importance_sampling_correction": True,
    "trainer.vllm_importance_sampling_mode": "token_truncate",
}

"""gsm8k with stock kernels on both sides, and nothing done about the drift."""

from rlinvariant.recipes.gsm8k import DEFAULTS as PARENT
from rlinvariant.recipes.gsm8k import Data, check, datasets, reward_funcs

__all__ = ["DEFAULTS", "Data", "check", "datasets", "reward_funcs"]
DEFAULTS = PARENT | {"invariance": "off"}

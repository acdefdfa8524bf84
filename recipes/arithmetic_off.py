"""arithmetic with stock kernels on both sides, and nothing done about the drift."""

from rlinvariant.recipes.arithmetic import DEFAULTS as PARENT
from rlinvariant.recipes.arithmetic import Data, check, datasets, prepare_model, reward_funcs

__all__ = ["DEFAULTS", "Data", "check", "datasets", "prepare_model", "reward_funcs"]
DEFAULTS = PARENT | {"invariance": "off"}

"""arithmetic, exact, but sampled with weights that are four optimizer steps old: off policy, and not for a kernel's sake."""

from rlinvariant.recipes.arithmetic import DEFAULTS as PARENT
from rlinvariant.recipes.arithmetic import Data, check, datasets, prepare_model, reward_funcs

__all__ = ["DEFAULTS", "Data", "check", "datasets", "prepare_model", "reward_funcs"]
DEFAULTS = PARENT | {"staleness": 4}

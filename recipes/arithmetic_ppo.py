"""arithmetic with PPO: the same rollouts, and a critic's advantages in place of a group's mean."""

from rlinvariant.recipes.arithmetic import DEFAULTS as PARENT
from rlinvariant.recipes.arithmetic import Data, check, datasets, prepare_model, reward_funcs

__all__ = ["DEFAULTS", "Data", "check", "datasets", "prepare_model", "reward_funcs"]
# A constant is a good critic for long: with lam below 1 it would take credit from early tokens, for nothing
DEFAULTS = PARENT | {"algorithm": "ppo", "ppo.lam": 1.0, "ppo.critic_learning_rate": 3e-4}

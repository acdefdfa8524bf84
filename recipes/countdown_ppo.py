"""countdown with PPO: the same rollouts, and a critic's advantages in place of a group's mean."""

from recipes.countdown import DEFAULTS as PARENT
from recipes.countdown import Data, check, datasets, prepare_model, reward_funcs

__all__ = ["DEFAULTS", "Data", "check", "datasets", "prepare_model", "reward_funcs"]
DEFAULTS = PARENT | {"algorithm": "ppo", "ppo.critic_learning_rate": 1e-3}

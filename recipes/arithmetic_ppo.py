"""arithmetic with PPO: a critic in place of a group's mean, so that every prompt is another one."""

from recipes.arithmetic import DEFAULTS as PARENT
from recipes.arithmetic import Data, check, datasets, prepare_model, reward_funcs

__all__ = ["DEFAULTS", "Data", "check", "datasets", "prepare_model", "reward_funcs"]
DEFAULTS = PARENT | {
    "algorithm": "ppo",
    "trainer.num_generations": 1,  # 128 prompts x 1 sample
    "ppo.critic_learning_rate": 6e-4,
}

"""countdown with PPO: the same rollouts, and a critic's advantages in place of a group's mean."""

BASE = "countdown"
# A constant is a good critic for long: with lam below 1 it would take credit from early tokens, for nothing
DEFAULTS = {"algorithm": "ppo", "ppo.lam": 1.0, "ppo.critic_learning_rate": 3e-4}

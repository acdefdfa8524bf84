"""Reward functions at the user's border: a time limit, a cage if asked for, errors that say where.

grades.py     what a function returns, read sample by sample
limits.py     the settings
checked.py    the wrapper that TRL calls
watchdog.py   the time limit in the trainer's own process, and watch.py, the process that counts it
cage.py       processes of their own for a function, and keeper.py, which starts and ends them
grader.py     the grader of mathematics
"""

from rlinvariant.rewards.checked import checked_reward, reward_problems
from rlinvariant.rewards.grader import final_answer, math_answer
from rlinvariant.rewards.limits import RewardLimits

__all__ = ["RewardLimits", "checked_reward", "final_answer", "math_answer", "reward_problems"]

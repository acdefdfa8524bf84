"""The reward functions of all ranks, called so that an error on one rank ends all alike: none waits for another for ever.

N: completions, F: reward functions.
"""

import atexit
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import shutdown_event_loop_in_daemon

from rlinvariant.errors import UserError
from rlinvariant.launch import raise_on_all
from rlinvariant.rewards import RewardLimits, checked_reward
from rlinvariant.rewards.watchdog import OverdueReward, watchdog

if TYPE_CHECKING:
    from rlinvariant.trainer.collecting import CollectingTrainer


def checked_rewards(trainer: "CollectingTrainer", rewards: Any, limits: RewardLimits, name: str | None = None) -> list[Any]:
    """Wrap reward functions for a trainer, which counts the failures that a training step has survived.

    Args:
        trainer: the trainer.
        rewards: reward functions, models or names, one or a list.
        limits: how they are called.
        name: what they are called in messages; None: what their functions are called.
    """

    def count(kind: str, failures: int) -> None:
        if trainer.model.training:
            trainer._record.failures[kind] += failures

    return [checked_reward(reward, limits, count, name) for reward in (rewards if isinstance(rewards, list) else [rewards])]


def settle_rewards(trainer: GRPOTrainer, count: int, limits: RewardLimits) -> None:
    """Give the reward functions of a new trainer names of their own, and wrap those that TRL has made of environments.

    Args:
        trainer: whose first `count` functions are wrapped already.
        limits: how they are called; those of environments, which keep a state in this process, in no cage.
    """
    own: Any = trainer
    own.reward_func_names = different_names(own.reward_func_names)
    for index, name in list(enumerate(own.reward_func_names))[count:]:
        (own.reward_funcs[index],) = checked_rewards(own, own.reward_funcs[index], replace(limits, reward_cage=0), name)


def weighted_sums(rewards_NF: Tensor, weights_F: Tensor) -> list[float]:
    """Return the reward that trains each of N completions, as TRL computes it in fp32.

        reward = sum over the functions that apply of weight * reward

    Args:
        rewards_NF: [N, F] fp32, NaN where a function does not apply.
        weights_F: [F] fp32.

    Returns:
        One number for each completion; NaN where no function applies.
    """
    sums = (rewards_NF * weights_F.to(rewards_NF.device)).nansum(1)
    return torch.where(rewards_NF.isnan().all(1), torch.nan, sums).tolist()


def different_names(names: Sequence[str]) -> list[str]:
    """Return the names of reward functions, the second of one name with _2 behind it, and so on: no number is of two."""
    found: list[str] = []
    for name in names:
        number, new = 1, name
        while new in found or (number > 1 and new in names):
            number += 1
            new = f"{name}_{number}"
        found.append(new)
    return found


def call_rewards(trainer: GRPOTrainer, inputs: Any, prompts: Any, *completions: Any) -> Tensor:
    """Call the reward functions on this rank's completions, as TRL does, and return the rewards of all ranks, [N, F] fp32.

    Raises:
        UserError: on every rank, if a reward function of one failed, or passed its limit.
    """
    own: UserError | None = None
    rewards_NF: Any = None
    try:
        rewards_NF = GRPOTrainer._calculate_rewards(trainer, inputs, prompts, *completions)
    except UserError as error:
        own = error
    except OverdueReward as overdue:  # a coroutine that holds TRL's event loop: no function can be called on it again
        own = UserError(str(overdue))
        watchdog().abandon()
        atexit.unregister(shutdown_event_loop_in_daemon)  # it would wait for the loop
    if own is not None:  # TRL gathers once, after the last function: that is where the other ranks wait
        rewards_NF = gather(torch.zeros(len(prompts), len(trainer.reward_funcs), device=trainer.accelerator.device))
    raise_on_all(own)
    return rewards_NF

"""The reward functions of all ranks, called so that an error on one rank ends all alike: none waits for another for ever.

N: completions, F: reward functions.
"""

import atexit
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather, gather_object
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import shutdown_event_loop_in_daemon

from rlinvariant.errors import UserError
from rlinvariant.rewards import RewardLimits, checked_reward
from rlinvariant.rewards.watchdog import OverdueReward, watchdog

if TYPE_CHECKING:
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer


def checked_rewards(trainer: "InvariantGRPOTrainer", rewards: Any, limits: RewardLimits) -> list[Any]:
    """Wrap reward functions for a trainer, which counts the failures that a training step has survived."""

    def count(kind: str, failures: int) -> None:
        if trainer.model.training:
            trainer._record.failures[kind] += failures

    return [checked_reward(reward, limits, count) for reward in (rewards if isinstance(rewards, list) else [rewards])]


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
    errors = gather_object([None if own is None else str(own)])
    if own is not None:
        raise own
    if found := [(rank, error) for rank, error in enumerate(errors) if error is not None]:
        raise UserError(f"rank {found[0][0]}: {found[0][1]}")
    return rewards_NF

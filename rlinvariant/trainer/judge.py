"""Rewards as TRL computes them in training, without a trainer: for the evaluation of a model that is only sampled from.

N: completions, F: reward functions.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import is_async_callable, start_event_loop_in_daemon

from rlinvariant.errors import ConfigErrors
from rlinvariant.rewards import RewardLimits, checked_reward
from rlinvariant.trainer.grading import call_rewards, different_names, weighted_sums
from rlinvariant.types import RewardCall


class Judge(GRPOTrainer):
    """Holds what TRL's call of reward functions reads of a trainer, and nothing else of one.

    Args:
        args: TRL's configuration, for `reward_weights`.
        rewards: reward functions, plain or async.
        limits: how they are called.

    Raises:
        ConfigErrors: one of them is a reward model, which only a trainer loads.
    """

    def __init__(self, args: GRPOConfig, rewards: Sequence[RewardCall], limits: RewardLimits) -> None:
        models = [reward for reward in rewards if isinstance(reward, str) or hasattr(reward, "forward")]
        if models:
            raise ConfigErrors([f"reward {models[0]}: a reward model; eval takes reward functions: call the model in one"])
        self.args, self.accelerator, self.state = args, Accelerator(cpu=args.use_cpu), TrainerState()
        self.reward_funcs = [checked_reward(reward, limits) for reward in rewards]
        self.reward_func_names = different_names([r.__name__ for r in self.reward_funcs])
        self.reward_processing_classes = [None] * len(rewards)
        given = args.reward_weights
        self.reward_weights = torch.ones(len(rewards)) if given is None else torch.tensor(given, dtype=torch.float32)
        self.chat_template_kwargs, self.environments = {}, None
        self._pending_metrics, self._pending_extra_logs = defaultdict(list), defaultdict(list)
        if any(is_async_callable(reward) for reward in self.reward_funcs):
            _, self.async_loop, ready = start_event_loop_in_daemon(name="eval")
            ready.wait()

    def grade(self, rows: Any, prompts: Any, texts: Any, ids: Sequence[Sequence[int]]) -> tuple[Tensor, list[float]]:
        """Return the rewards [N, F] fp32, NaN where one does not apply, and N weighted sums, NaN where none does.

        Raises:
            UserError: a reward function failed, or passed its limit.
        """
        rewards_NF = call_rewards(self, rows, prompts, texts, ids).cpu()
        return rewards_NF, weighted_sums(rewards_NF, self.reward_weights)

"""A number that is not finite stops a run: named, on every rank alike, before it is stepped with, sampled from or saved.

Methods of TRL's trainer, and of transformers' below it, that are overridden:

    train                             looks at weights and optimizer states after the last step
    _calculate_rewards                calls TRL's by `grading.call_rewards`, and looks at the rewards of all ranks
    _generate_and_score_completions   looks at what a rollout is trained on: log-probs, advantages
    _compute_loss                     looks at a micro-batch's log-probs and loss
    _clip_grad_norm, _get_grad_norm   look at weights, optimizer states, gradients and hyperparameters, right before the step
    _save_checkpoint                  looks at weights and optimizer states, before anything is written

An optimizer step can make weights and states that are not finite out of numbers that all are, by overflow. They need no look of
their own right after the step: each use of them begins with one, of the sampler (`InvariantGRPOTrainer.sync`), of a checkpoint,
of the next step, and of the caller whom `train` returns to.

One look is the 2-norm of many tensors (`get_total_norm`, which reads each number once), one sum over ranks and one wait for the
device. The norm is not finite if any number is not; which tensor that is, is looked up only then.

N: completions, F: reward functions.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from rlinvariant.errors import UserError
from rlinvariant.models.shards import local
from rlinvariant.trainer.grading import call_rewards
from rlinvariant.trainer.leaves import LeavesTrainer
from rlinvariant.trainer.turns import sampled_mask

Named = Iterable[tuple[str, Tensor]]
NORM = "the gradient's norm is not finite, though each number of it is"


def not_finite(tensors: Named) -> str | None:
    """Name the first tensor that has a NaN or an infinity, and count them; None if there is none."""
    for name, tensor in tensors:
        x = local(tensor.detach())
        if bad := int((~x.isfinite()).sum()):
            return f"{name}: {bad:,} of {x.numel():,} numbers are not finite"
    return None


def norm(tensors: Named) -> Tensor:
    """Return the 2-norm of all numbers of some tensors, []: finite only if all numbers are."""
    return get_total_norm([local(x.detach()) for _, x in tensors if x.is_floating_point()])


class FiniteTrainer(LeavesTrainer):
    """Stops with UserError at the first number that is not finite, as the module says."""

    _trainer_logprobs: Tensor  # [B, T] fp32, of the last micro-batch
    reward_funcs: Any
    reward_func_names: list[str]
    reward_weights: Tensor
    accelerator: Any

    def _trl_args(self, args: Any) -> Any:
        """Return what TRL is given for the user's settings."""
        args = super()._trl_args(args)
        args.logging_nan_inf_filter = False  # would show another loss in the place of one that is not finite
        return args

    def train(self, *args, **kwargs):
        """Train as `LeavesTrainer` does.

        Raises:
            UserError: a number is not finite; one line names the tensor, the same on all ranks.
        """
        result = super().train(*args, **kwargs)
        self._require_finite(self._weights_and_states(), f"after step {self.state.global_step}", "training has ended")
        return result

    # ---- the checks

    def _require_finite(self, tensors: Named, when: str = "", then: str = "") -> bool:
        """Raise UserError, on all ranks, if any rank has a number that is not finite. Every rank must call this.

        Args:
            tensors: names and tensors, of any floating dtype.
            when, then: what the message says before and after it; by default that the step in progress was not taken.

        Returns:
            Whether the sum of their squares, over all ranks, is finite too.
        """
        named = [*tensors]
        total = norm(named).to(self.accelerator.device)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, "sum")
        if math.isfinite(total.item()):
            return True
        self._raise_agreed(not_finite(named), when, then)
        return False

    def _raise_agreed(self, problem: str | None, when: str = "", then: str = "") -> None:
        """Raise UserError, on all ranks, with the problem of the first rank that has one. Every rank must call this."""
        problems = gather_object([problem])
        if rank := next((rank for rank, found in enumerate(problems) if found is not None), None):
            problem = f"rank {rank}: {problems[rank]}"
        elif rank == 0:
            problem = problems[0]
        else:
            return
        when, then = when or f"step {self.state.global_step + 1}", then or "stopped before the optimizer step"
        raise UserError(f"{when}: {problem}; {then}; {self._last_checkpoint()}", agreed=True)

    def _weights_and_states(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self._trained():
            yield f"weight {name}", p
        if self.optimizer is None:
            return
        states = self.optimizer.state
        for name, p in self._trained():
            for key, value in states.get(p, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point() and value.device == p.device:  # not a CPU's counter
                    yield f"optimizer state {key} of {name}", value

    def _require_finite_step(self) -> None:
        """Look at all that the optimizer is about to read."""
        groups = self.optimizer.param_groups
        settings = [(f"{key} of parameter group {i}", value) for i, group in enumerate(groups) for key, value in group.items()]
        for name, value in settings:
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):  # the same on all ranks
                    self._raise_agreed(f"{name} is {number}")
        gradients = [(f"gradient of {name}", p.grad) for name, p in self._trained() if p.grad is not None]
        if getattr(self.accelerator, "scaler", None) is not None:
            gradients = []  # which are scaled until they overflow, and not followed then
        squares_are_finite = self._require_finite([*self._weights_and_states(), *gradients])
        if squares_are_finite:
            return
        if not self.sharded and not math.isfinite(norm(gradients).item()):  # the same on all ranks; of shards, see `_clipped`
            self._raise_agreed(NORM)

    def _clipped(self, model, most):
        norm = super()._clipped(model, most)
        if not math.isfinite(norm.item()):  # of whole gradients: the ranks' shares may all be finite
            self._raise_agreed(NORM)
        return norm

    # ---- where they are made

    def _calculate_rewards(self, inputs, prompts, *args, **kwargs):
        rewards_NF = call_rewards(self, inputs, prompts, *args, **kwargs)
        if not self.model.training:
            return rewards_NF
        for name, function, rewards in zip(self.reward_func_names, self.reward_funcs, rewards_NF.T, strict=True):
            given = rewards if isinstance(function, nn.Module) else rewards[~rewards.isnan()]  # a function's NaN was a None
            if bad := int((~given.square().isfinite()).sum()):
                why = f"{bad:,} of {len(given):,} rewards are not finite, or too large for float32 to hold their square"
                self._raise_agreed(f"{name}: {why}")
        if rewards_NF.isnan().all():
            self._raise_agreed("every reward is None: no reward function gave any completion a number; return some")
        return rewards_NF

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            mask = sampled_mask(output)
            names = {"sampler_logprobs": "sampling", "old log-probs": "old", "log-probs of the reference": "ref"}
            found = {name: output.get(f"{kind}_per_token_logps") for name, kind in names.items()}
            logprobs = [(name, torch.where(mask, x, 0.0)) for name, x in found.items() if x is not None]
            self._require_finite([*logprobs, ("advantages", output["advantages"])])
        return output

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.model.training:
            logprobs = torch.where(sampled_mask(inputs), self._trainer_logprobs, 0.0)
            found = [("trainer_logprobs", logprobs), ("loss", loss.detach())]
            self._put_off(lambda: self._require_finite(found))
        return loss

    def _clip_grad_norm(self, model):
        self._require_finite_step()  # before clipping, which would spread one NaN over all gradients
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:  # nothing was clipped
            self._require_finite_step()
        return super()._get_grad_norm(model, grad_norm)

    def _save_checkpoint(self, model, trial):
        step = self.state.global_step
        self._require_finite(self._weights_and_states(), f"after step {step}", f"checkpoint-{step} was not written")
        super()._save_checkpoint(model, trial)

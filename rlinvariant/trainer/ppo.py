"""PPO on top of the GRPO trainer: a critic, advantages per token, and the same exact rollouts.

TRL's clipped policy loss takes an advantage for each token as it stands; the old log-probs are the sampler's, which in exact
mode are the trainer's own. What is added is the critic, beside the policy and never inside it: weight sync, checkpoints of the
policy and TRL see a plain causal LM.

Ten of TRL's methods are overridden here, and each calls the one below it:

    _generate_single_turn                  refuses a completion without tokens
    _calculate_rewards                     keeps the rewards of this rank's completions
    _generate_and_score_completions        estimates advantages and returns, for each token
    _compute_loss                          trains the critic, and leaves TRL's own penalty out
    training_step                          prepares the optimizer step, or skips what is left of a rollout
    create_optimizer                       adds the critic's parameters
    create_scheduler                       adds them where weights are in shards
    save_model                             gathers the critic there
    _save, _load_from_checkpoint           add the critic
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig

from rlinvariant import metrics
from rlinvariant.config import PPOConfig
from rlinvariant.errors import UserError
from rlinvariant.launch import main_process_fetches
from rlinvariant.model_source import local_model
from rlinvariant.models import shards
from rlinvariant.trainer import advantages
from rlinvariant.trainer.critic import Critic, beside, load_critic
from rlinvariant.trainer.division import lengths, sizes
from rlinvariant.trainer.grpo import InvariantGRPOTrainer
from rlinvariant.trainer.interface import InvariantOptions, RewardFunction, Row
from rlinvariant.trainer.microbatches import Rows
from rlinvariant.trainer.record import PPORecord
from rlinvariant.trainer.turns import sampled_mask


class InvariantPPOTrainer(InvariantGRPOTrainer):
    """Trains as `InvariantGRPOTrainer` does, with a critic's advantages, for each token, in place of a group's mean.

    Args:
        ppo: PPO's own settings; see `config.PPOConfig`.
        model, reward_funcs, args, ...: as for `InvariantGRPOTrainer`. `args.num_generations` may be 1 (set it after GRPOConfig
            is made, which asks for 2). The policy's clip range is `args.epsilon`, `args.epsilon_high`.

    A completion that is cut at `max_completion_length` ends there like any other, without a bootstrapped value: the limit is
    part of the task, the reward function has judged the text as it is, and a value beyond the cut would reward running on.

    Both losses are means over the tokens of an optimizer step, of all ranks. Policy and critic share an optimizer and a
    schedule, with a learning rate each, and are clipped apart, each to `args.max_grad_norm`.

    Raises:
        ConfigErrors: as `InvariantGRPOTrainer`, and what PPO cannot be.
        UserError: a completion without tokens, or a number that is not finite; both before the optimizer step.
    """

    ppo: PPOConfig
    _kind = "PPO"
    _critic_gathered: dict[str, Tensor] | None = None  # the weights of a critic in shards, while they are saved
    record_type = PPORecord
    _record: PPORecord
    accelerator: Any
    processing_class: Any
    lr_scheduler: Any
    _step: int
    beta: float
    current_gradient_accumulation_steps: int

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: GRPOConfig,
        train_dataset: Dataset | None = None,
        *,
        ppo: PPOConfig | None = None,
        **kwargs: Unpack[InvariantOptions],
    ) -> None:
        self.ppo = ppo or PPOConfig()
        self._stopped = False  # the rest of the rollout is skipped
        super().__init__(model, reward_funcs, args, train_dataset, **kwargs)
        if args.gradient_checkpointing and not self._trainer_is_invariant:
            self.critic.backbone.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)

    def _trl_args(self, args: GRPOConfig) -> GRPOConfig:
        args = super()._trl_args(args)
        args.beta = self.ppo.kl_coef  # makes TRL load the reference and score it; its term of the loss is left out, see below
        return args

    def _prepare_models(self, model: Any, args: GRPOConfig, dtype: torch.dtype, tokenizer: Any) -> None:
        path = self.ppo.critic and local_model(self.ppo.critic)
        own = beside(model, shared=False) if path is None and self.sharded else None  # before the policy is cut
        super()._prepare_models(model, args, dtype, tokenizer)
        backbone: Any  # transformers' types do not know its `to`
        if path is None:
            backbone = beside(model, shared=True) if own is None else own
        else:
            with main_process_fetches(path):
                backbone = load_critic(path, model, tokenizer)
        adapter = getattr(model, "peft_config", {}).get("default")
        if self.sharded:
            self.critic = Critic(backbone, dtype, True, args.device, adapter)
            if path is not None:  # else it is cut as the policy, which was looked at
                self._look_at_cuts(self.critic.backbone, args)
        else:
            self.critic = Critic(backbone.to(args.device), dtype, self._trainer_is_invariant, adapter=adapter)
        if path is not None:
            self.critic.load_head(Path(path))

    # ---- the rollout

    def _generate_single_turn(self, *args, **kwargs):
        ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        empty = [i for i, completion in enumerate(ids) if not completion]
        if empty and self.model.training and self._turns.conversations is None:  # a later turn may find no room
            where = f"step {self.state.global_step + 1}, sample {empty[0]}"
            raise UserError(f"{where}: empty completion: no token can carry its reward; raise trainer.max_completion_length")
        return ids, logprobs

    def _calculate_rewards(self, inputs, prompts, *args, **kwargs):
        """Keep the rewards of this rank's completions before TRL compares them within groups."""
        rewards = super()._calculate_rewards(inputs, prompts, *args, **kwargs)
        first = self.accelerator.process_index * len(prompts)
        own = rewards[first : first + len(prompts)]
        self._scores = (own * self.reward_weights.to(own.device)).nansum(1)
        self._scored = ~own.isnan().all(1)  # False: no reward function applies
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self._stopped = False
            if not self.vllm_importance_sampling_correction:
                # PPO's ratio is to the policy that sampled. Exact, TRL's choice has the same bits; else the drift is in it.
                output["old_per_token_logps"] = output["sampling_per_token_logps"]
            self._estimate(output)
            self._record.samples.weigh(output)
        return output

    def _estimate(self, output: dict[str, Any]) -> None:
        """Add `old_values` and `returns`, and put advantages per token in place of a group's: [B, T] fp32 each."""
        mask, old = sampled_mask(output), output["old_per_token_logps"]
        # Where the rollout is one micro-batch, the first pass trains these rows with these weights: it takes the values, with
        # their graph, as they are, and no pass is added.
        once = self.args.steps_per_generation == 1 and not self._adds_leaves
        once = once and (not self._trainer_is_invariant or len(self._divide(output)) == 1)
        graphed = self._values_with_graph(output) if once else None
        once = graphed is not None
        values = self._rollout_values(output, False) if graphed is None else graphed
        known = values.detach()
        rewards = advantages.token_rewards(self._scores, old, output.get("ref_per_token_logps"), mask, self.ppo.kl_coef)
        estimates, returns = advantages.over_sampled(rewards, known, mask, self.ppo.gamma, self.ppo.lam)
        named = {"values": known, "rewards per token": rewards, "advantages": estimates, "returns": returns}
        self._require_finite(named.items())
        counted = mask & self._scored[:, None]
        penalty = (self._scores - rewards.sum(1))[self._scored]
        own = [x.double().cpu().numpy() for x in (known[counted], returns[counted], penalty, estimates[counted])]
        value, returned, penalties, every = (np.concatenate(x) for x in zip(*gather_object([own]), strict=True))
        if self.ppo.whiten_advantages:
            estimates = advantages.whiten(estimates, counted, *advantages.mean_and_variance(every))
        output["advantages"] = torch.where(counted, estimates, 0.0)
        output["returns"] = torch.where(counted, returns, known)  # without a reward, nothing to learn
        output["old_values"] = known
        if once:
            output["values"] = values
        self._rollout_numbers = {
            "value/mean": metrics.mean(value),
            "value/explained_variance": advantages.explained_variance(returned, value),
            "reward/kl_penalty": metrics.mean(penalties) + 0.0,
        }

    def _values_with_graph(self, output: dict[str, Any]) -> Tensor | None:
        """Return the values of a rollout with their graph; None where memory is too small for it, and parts are halved."""
        try:
            return self._rollout_values(output, True)
        except torch.OutOfMemoryError as error:
            if not self._trainer_is_invariant:
                raise
            problem = error.with_traceback(None)  # whose frames hold what has to be freed
        self._halve(problem, int(lengths(output).max()), "the critic's pass")
        return None

    def _rollout_values(self, output: dict[str, Any], grad: bool) -> Tensor:
        """Return the values of a rollout's completions, [B, T] fp32, computed in micro-batches."""
        self.critic.train(grad)
        rows, count = self.args.per_device_train_batch_size, len(output["completion_ids"])
        with torch.set_grad_enabled(grad), self.compute_loss_context_manager():
            if self._trainer_is_invariant:
                return self._in_parts(lengths(output), lambda part: (self._values(output, part),))[0]
            return torch.cat([self._values(output, slice(i, i + rows)) for i in range(0, count, rows)])

    def _values(self, inputs: dict[str, Any], rows: Rows = slice(None)) -> Tensor:
        ids, mask = (
            torch.cat([inputs[f"prompt_{what}"][rows], inputs[f"completion_{what}"][rows]], 1) for what in ("ids", "mask")
        )
        return self.critic(ids, mask, inputs["completion_ids"].shape[1], sizes(inputs, "completion_tokens"))

    def _models(self) -> Iterator[nn.Module]:
        yield from super()._models()
        yield self.critic.backbone

    def _models_of_ranks(self) -> Iterator[nn.Module]:
        yield from super()._models_of_ranks()
        yield self.critic.backbone

    # ---- the losses

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        self._learn_values(inputs)
        beta, self.beta = self.beta, 0.0  # the penalty is in the rewards
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        log_ratio, mask = self._trainer_logprobs - inputs["old_per_token_logps"], sampled_mask(inputs)
        self._put_off(lambda: self._record.log_ratios.append(log_ratio[mask].double().cpu()))
        return loss

    def _learn_values(self, inputs: dict[str, Any]) -> None:
        """Run the critic's forward and backward: its graph is gone before the policy's is built."""
        mask = sampled_mask(inputs)
        values = inputs.pop("values", None)
        if values is None:
            self.critic.train()
            values = self._values(inputs)
        losses, clipped = advantages.value_loss(values, inputs["old_values"], inputs["returns"], self.ppo.value_clip)
        total = (losses * mask).sum()
        found = [("values", values.detach()), ("value_loss", total.detach())]
        self._put_off(lambda: self._require_finite(found))
        if self.sharded:  # as the policy's, its gradients are averaged after the last part, but for leaves
            shards.average_gradients(self.critic.backbone, self.accelerator.sync_gradients or self._adds_leaves)
        # as TRL's loss_type=dapo: a mean over the tokens of the optimizer step, of all ranks
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) * share / self.accelerator.num_processes
        with torch.autocast(values.device.type, enabled=False):
            (total / tokens).backward()
        losses = losses.detach()
        self._put_off(lambda: self._record.value_losses.append(losses[mask].cpu()))
        self._put_off(lambda: self._record.values_clipped.append(int((clipped & mask).sum())))

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._stopped and self._step % (self.args.steps_per_generation * self.num_iterations):
            model.train()  # as TRL's: a resumed run may begin here
            self._step += 1  # TRL's, which says when to sample again
            self._keep_weights()
            return torch.zeros((), device=self.accelerator.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._before_optimizer_step()
        return loss

    def _before_optimizer_step(self) -> None:
        """Average and clip the critic's gradients, and drop those that are not to be followed."""
        if self.ppo.target_kl is not None and self._approx_kl() > self.ppo.target_kl:
            self._stopped = True
            self.model.zero_grad()
            self.critic.zero_grad()
            return
        for p in self.critic.parameters():
            if p.grad is not None and not shards.is_shard(p) and not self._adds_leaves:  # else they are sums over all ranks
                p.grad = self._mean(p.grad)
        critic = [(f"gradient of {name}", p.grad) for name, p in self._critic_parameters() if p.grad is not None]
        if not self._require_finite(critic):  # before clipping, which would spread one NaN over all
            self._raise_agreed("the norm of the critic's gradient is not finite, though each number of it is")
        most = self.args.max_grad_norm
        norm = self._clipped(self.critic, most if most and most > 0 else float("inf"))
        self._record.value_grad_norm = norm.item()
        if self.state.global_step < self.ppo.value_warmup_steps:
            self.model.zero_grad()

    def _approx_kl(self) -> float:
        """Estimate KL(old || new), in nats, on the tokens of this optimizer step, of all ranks."""
        return PPORecord(log_ratios=gather_object(self._record.log_ratios)).kl_of_tokens()

    def _critic_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((f"the critic's {name}", p) for name, p in self.critic.named_parameters())

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super()._trained()
        yield from self._critic_parameters()

    # ---- optimizer, checkpoints

    def create_optimizer(self, model=None):
        """Add the critic's parameters to TRL's optimizer as two groups: a learning rate of their own, the same schedule."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and not self.sharded:
            self._add_critic(optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Make TRL's scheduler; of weights in shards the critic comes first: accelerate has looked for the policy's alone."""
        if self.sharded and len(self.optimizer.param_groups) == 2:
            self._add_critic(self.optimizer.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _add_critic(self, optimizer: Any) -> None:
        lr = self.args.learning_rate if self.ppo.critic_learning_rate is None else self.ppo.critic_learning_rate
        decayed = self.get_decay_parameter_names(self.critic)
        for cut, decays in product((True, False), (True, False)):  # one call of the optimizer's takes shards or none
            trained = ((name, p) for name, p in self.critic.named_parameters() if p.requires_grad)
            own = [(name, p) for name, p in trained if shards.is_shard(p) == cut]
            group = [p for name, p in own if (name in decayed) == decays]
            if group or not (cut or self.sharded):
                optimizer.add_param_group(
                    {"params": group, "lr": lr, "weight_decay": self.args.weight_decay if decays else 0.0}
                )

    def save_model(self, output_dir=None, _internal_call=False):
        if self.sharded:
            found = shards.state(self.critic.saved(), keep=self.args.should_save)
            self._critic_gathered = found if self.args.should_save else None
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._critic_gathered = None

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        directory = Path(output_dir or self.args.output_dir) / "critic"
        self.critic.save(directory, self._critic_gathered)
        self.processing_class.save_pretrained(directory)

    def _progress(self) -> dict[str, Any]:
        return super()._progress() | {"stopped": self._stopped, "rollout_numbers": self._rollout_numbers}

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        super()._restore_progress(progress)
        self._stopped, self._rollout_numbers = progress["stopped"], progress["rollout_numbers"]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.critic.load(Path(resume_from_checkpoint) / "critic")

    # ---- metrics

    def _start_step(self) -> None:
        super()._start_step()
        self.critic.zero_grad()

    def _row(self, record: PPORecord, logs: dict[str, float]) -> Row:
        row = super()._row(record, logs) | self._rollout_numbers | record.ppo_row()
        return row | {"value/lr": self.lr_scheduler.get_last_lr()[-1], "policy/early_stopped": int(self._stopped)}

"""PPO on top of the GRPO trainer: a critic, advantages per token, and the same exact rollouts.

TRL's clipped policy loss takes an advantage for each token as it stands; the old log-probs are the sampler's, which in exact
mode are the trainer's own. What is added is the critic, beside the policy and never inside it: weight sync, checkpoints of the
policy and TRL see a plain causal LM.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig

from rlinvariant import ops
from rlinvariant.config import PPOConfig
from rlinvariant.conflicts import ppo_conflicts
from rlinvariant.errors import UserError
from rlinvariant.models import UnsupportedModel, make_trainable, watch
from rlinvariant.models.load import load
from rlinvariant.trainer import advantages
from rlinvariant.trainer.grpo import InvariantGRPOTrainer
from rlinvariant.trainer.packing import pack

HEAD = "value_head.safetensors"
OTHER_HEADS = ("lm_head.", "score.")  # of a causal LM or a reward model that a critic starts from: not its own


class Critic(nn.Module):
    """The value of every prefix that a token is sampled after: a Hugging Face decoder, and a scalar head that starts at 0.

    Args:
        backbone: a decoder without lm_head, fp32 parameters, on its device; patched in place.
        dtype: of activations, and so of values, where invariant.
        invariant: through `ops`, packed; else the stock forward, padded, under autocast, as TRL runs the policy.

    Bits: where invariant, a value depends on the tokens before it alone: not on micro-batch, order of rows or padding.
    """

    def __init__(self, backbone: Any, dtype: torch.dtype, invariant: bool) -> None:
        super().__init__()
        self.invariant = invariant
        self.backbone = make_trainable(backbone, dtype) if invariant else backbone
        weight = next(backbone.parameters())
        self.head = nn.Linear(backbone.config.hidden_size, 1, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        if invariant:
            self._require_exact()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """[B, length] fp32: the value before each of the last `length` tokens, 0 where there is none; arguments as `pack`'s."""
        if not self.invariant:
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            values = self.head(hidden[:, -length - 1 : -1])[..., 0].float()
            return values.masked_fill(attention_mask[:, -length:] == 0, 0.0)
        batch = pack(input_ids, attention_mask, length)
        hidden = self.backbone(**batch.inputs, attention_mask=None, use_cache=False).last_hidden_state
        values = ops.linear(hidden[0, batch.predicted_from], self.head.weight)
        return batch.unpack(values[:, 0].float())

    def save(self, directory: Path) -> None:
        """As a Hugging Face model directory, and the head beside it."""
        self.backbone.save_pretrained(directory)
        save_file({"weight": self.head.weight.detach().cpu().contiguous()}, directory / HEAD)

    def load(self, directory: Path) -> None:
        """What `save` wrote, in place."""
        if not (directory / HEAD).is_file():
            raise UserError(f"{directory}: no {HEAD}: the checkpoint has no critic, it is not one of PPO; start a new run")
        saved = load(AutoModel, directory, "critic", dtype=torch.float32)
        self.backbone.load_state_dict(saved.state_dict())
        self._load_head(directory)

    def _load_head(self, directory: Path) -> None:
        with torch.no_grad():
            self.head.weight.copy_(load_file(directory / HEAD)["weight"])

    def _require_exact(self) -> None:
        """What `models.require_exact` is to a policy."""
        device = self.head.weight.device
        ids = torch.arange(10, device=device).view(2, 5) % self.backbone.config.vocab_size
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        with torch.no_grad(), watch() as findings:
            self.backbone(**pack(ids, mask, 3).inputs, attention_mask=None, use_cache=False)
        if findings:
            listed = ", ".join(sorted(f"{f.op} in {f.module}" for f in findings))
            raise UnsupportedModel(f"critic {type(self.backbone).__name__} computes outside rlinvariant.ops: {listed}")


def load_critic(path: str, policy: Any, tokenizer: Any) -> Any:
    """The decoder of a Hugging Face checkpoint, fp32.

    Raises:
        UserError: it cannot be loaded whole, or reads other tokens than the policy writes.
    """
    backbone = load(AutoModel, path, "ppo.critic", OTHER_HEADS, dtype=torch.float32)
    ours, theirs = policy.config.vocab_size, backbone.config.vocab_size
    if ours != theirs:
        raise UserError(f"ppo.critic={path}: expected the policy's vocabulary of {ours} tokens, found {theirs}; choose another")
    if tokenizer is not None and _has_tokenizer(path):
        found = AutoTokenizer.from_pretrained(path).get_vocab()
        if found != tokenizer.get_vocab():
            raise UserError(f"ppo.critic={path}: expected the policy's tokenizer, found another vocabulary; choose another")
    return backbone


def _has_tokenizer(path: str) -> bool:
    return (Path(path) / "tokenizer.json").is_file() or not Path(path).is_dir()


class InvariantPPOTrainer(InvariantGRPOTrainer):
    """`InvariantGRPOTrainer` with PPO's advantages: a critic's, for each token, in place of a group's mean.

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

    accelerator: Any
    processing_class: Any
    lr_scheduler: Any
    _step: int
    beta: float
    current_gradient_accumulation_steps: int

    def __init__(self, model: Any, reward_funcs: Any, args: GRPOConfig, *, ppo: PPOConfig | None = None, **kwargs: Any) -> None:
        self.ppo = ppo or PPOConfig()
        self._given = args
        args = copy.copy(args)
        args.beta = self.ppo.kl_coef  # makes TRL load the reference and score it; its term of the loss is left out, see below
        self._stopped = False  # the rest of the rollout is skipped
        super().__init__(model, reward_funcs, args, **kwargs)
        if args.gradient_checkpointing:
            self.critic.backbone.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)

    def _conflicts(self, model: Any, args: GRPOConfig, kwargs: dict[str, Any]) -> list[str]:
        found = super()._conflicts(model, args, kwargs) + ppo_conflicts(self._given, self.ppo)
        if self.ppo.kl_coef and not getattr(model.config, "_name_or_path", ""):
            missing = "a model with a directory or hub id, from which the reference is loaded; save it and load it from there"
            found.append(f"ppo.kl_coef={self.ppo.kl_coef}: expected {missing}, or use 0")
        if kwargs.get("peft_config") is not None or hasattr(model, "peft_config"):
            found.append("peft_config: expected None with PPO: the critic is a copy of a whole model")
        return found

    def _prepare_models(self, model: Any, args: GRPOConfig, dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
        path = self.ppo.critic
        if path is None:
            backbone = copy.deepcopy(model.base_model)
        else:
            backbone = load_critic(path, model, kwargs.get("processing_class"))
        self.critic = Critic(backbone.to(args.device), dtype, self._trainer_is_invariant)
        if path is not None and (Path(path) / HEAD).is_file():
            self.critic._load_head(Path(path))

    # ---- the rollout

    def _generate_single_turn(self, *args, **kwargs):
        ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        if empty := [i for i, completion in enumerate(ids) if not completion]:
            where = f"step {self.state.global_step + 1}, sample {empty[0]}"
            raise UserError(f"{where}: empty completion: no token can carry its reward; raise trainer.max_completion_length")
        return ids, logprobs

    def _calculate_rewards(self, inputs, prompts, *args, **kwargs):
        """TRL's; keeps the rewards of this rank's completions before TRL compares them within groups."""
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
        return output

    def _estimate(self, output: dict[str, Any]) -> None:
        """Add `old_values` and `returns`, and put advantages per token, [B, T] each, in place of a group's."""
        mask, old = output["completion_mask"], output["old_per_token_logps"]
        # Where the rollout is one micro-batch, the first pass trains these rows with these weights: it takes the values, with
        # their graph, as they are, and no pass is added.
        once = self.args.steps_per_generation == 1
        values = self._rollout_values(output, once)
        known = values.detach()
        rewards = advantages.token_rewards(self._scores, old, output.get("ref_per_token_logps"), mask, self.ppo.kl_coef)
        estimates, returns = advantages.gae(rewards, known, mask, self.ppo.gamma, self.ppo.lam)
        self._require_finite(values=known, rewards=rewards, advantages=estimates)
        counted = mask.bool() & self._scored[:, None]
        penalty = self._scores - rewards.sum(1)
        of = [estimates, returns, returns - known, known]
        sums = torch.stack([*(advantages.moments(x, counted) for x in of), advantages.moments(penalty, self._scored)])
        estimated, returned, left, value, penalties = self.accelerator.reduce(sums, "sum").cpu()
        if not estimated[0]:
            step = f"step {self.state.global_step + 1}"
            raise UserError(f"{step}: every completion is masked: no reward function gave any of them a number; return some")
        if self.ppo.whiten_advantages:
            estimates = advantages.whiten(estimates, counted, *advantages.mean_and_variance(estimated))
        output["advantages"] = torch.where(counted, estimates, 0.0)
        output["returns"] = torch.where(counted, returns, known)  # without a reward, nothing to learn
        output["old_values"] = known
        if once:
            output["values"] = values
        self._rollout_numbers = {
            "value/mean": advantages.mean_and_variance(value)[0],
            "value/explained_variance": advantages.explained_variance(returned, left),
            "reward/kl_penalty": advantages.mean_and_variance(penalties)[0] + 0.0,
        }

    def _rollout_values(self, output: dict[str, Any], grad: bool) -> Tensor:
        """[B, T] fp32, in micro-batches."""
        self.critic.train(grad)
        rows, count = self.args.per_device_train_batch_size, len(output["completion_ids"])
        with torch.set_grad_enabled(grad), self.compute_loss_context_manager():
            return torch.cat([self._values(output, slice(i, i + rows)) for i in range(0, count, rows)])

    def _values(self, inputs: dict[str, Any], rows: slice = slice(None)) -> Tensor:
        ids, mask = (
            torch.cat([inputs[f"prompt_{what}"][rows], inputs[f"completion_{what}"][rows]], 1) for what in ("ids", "mask")
        )
        return self.critic(ids, mask, inputs["completion_ids"].shape[1])

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
        self._require_finite(policy_loss=loss)
        log_ratio = (self._trainer_logprobs - inputs["old_per_token_logps"])[inputs["completion_mask"].bool()].double()
        self._ratios.append(log_ratio)
        return loss

    def _learn_values(self, inputs: dict[str, Any]) -> None:
        """The critic's forward and backward: its graph is gone before the policy's is built."""
        mask = inputs["completion_mask"]
        values = inputs.pop("values", None)
        if values is None:
            self.critic.train()
            values = self._values(inputs)
        losses, clipped = advantages.value_loss(values, inputs["old_values"], inputs["returns"], self.ppo.value_clip)
        total = (losses * mask).sum()
        self._require_finite(values=values, value_loss=total)
        # as TRL's loss_type=dapo: a mean over the tokens of the optimizer step, of all ranks
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) * share / self.accelerator.num_processes
        with torch.autocast(values.device.type, enabled=False):
            (total / tokens).backward()
        self._value_sums += torch.tensor([total.item(), (clipped * mask).sum().item(), mask.sum().item()], dtype=torch.float64)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._stopped and self._step % (self.args.steps_per_generation * self.num_iterations):
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
            if p.grad is not None:
                p.grad = self.accelerator.reduce(p.grad, "mean")
        self._require_finite(**{f"gradient of {name}": p.grad for name, p in self.model.named_parameters()})
        self._require_finite(**{f"gradient of the critic's {name}": p.grad for name, p in self.critic.named_parameters()})
        most = self.args.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.critic.parameters(), most if most and most > 0 else float("inf"))
        self._value_grad_norm = norm.item()
        if self.state.global_step < self.ppo.value_warmup_steps:
            self.model.zero_grad()

    def _approx_kl(self) -> float:
        """KL(old || new), k3, of the tokens of this optimizer step, of all ranks."""
        log_ratio = torch.cat(self._ratios)
        sums = torch.stack([(torch.expm1(log_ratio) - log_ratio).sum(), log_ratio.new_tensor(float(len(log_ratio)))])
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        return total / count

    def _require_finite(self, **tensors: Tensor | None) -> None:
        """Stop at the first tensor that is not, by its name."""
        given = {name: x for name, x in tensors.items() if x is not None}
        if bool(torch.stack([x.detach().isfinite().all() for x in given.values()]).all()) if given else True:
            return
        name = next(name for name, x in given.items() if not x.isfinite().all())
        bad, count = int((~given[name].isfinite()).sum()), given[name].numel()
        raise UserError(
            f"step {self.state.global_step + 1}: {name}: {bad:,} of {count:,} numbers are not finite; stopped before the "
            "optimizer step; the last checkpoint is good"
        )

    # ---- optimizer, checkpoints

    def create_optimizer(self, model=None):
        """TRL's, with the critic's parameters as two groups more: a learning rate of their own, the same schedule."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new:
            lr = self.args.learning_rate if self.ppo.critic_learning_rate is None else self.ppo.critic_learning_rate
            decayed = self.get_decay_parameter_names(self.critic)
            for decays in (True, False):
                group = [p for name, p in self.critic.named_parameters() if (name in decayed) == decays]
                optimizer.add_param_group(
                    {"params": group, "lr": lr, "weight_decay": self.args.weight_decay if decays else 0.0}
                )
        return optimizer

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        directory = Path(output_dir or self.args.output_dir) / "critic"
        self.critic.save(directory)
        self.processing_class.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.critic.load(Path(resume_from_checkpoint) / "critic")

    # ---- metrics

    def _start_step(self) -> None:
        super()._start_step()
        self._ratios: list[Tensor] = []
        self._value_sums = torch.zeros(3, dtype=torch.float64)  # loss, clipped, tokens
        self._value_grad_norm = float("nan")
        self.critic.zero_grad()

    def _row(self, logs: dict[str, float], trl: dict[str, float]) -> dict[str, Any]:
        row = super()._row(logs, trl)
        ranks = gather_object([(torch.cat(self._ratios).cpu() if self._ratios else torch.zeros(0), self._value_sums)])
        log_ratio = torch.cat([rank[0] for rank in ranks]).double()
        loss, clipped, tokens = torch.stack([rank[1] for rank in ranks]).sum(0).tolist()
        ratio, none = log_ratio.exp(), float("nan")
        seen = bool(len(ratio))
        return row | self._rollout_numbers | {
            "value/loss": loss / tokens if tokens else none,
            "value/clip_frac": clipped / tokens if tokens else none,
            "value/grad_norm": self._value_grad_norm,
            "value/lr": self.lr_scheduler.get_last_lr()[-1],
            "policy/approx_kl": (torch.expm1(log_ratio) - log_ratio).mean().item() if seen else none,
            "policy/ratio_mean": ratio.mean().item() if seen else none,
            "policy/ratio_min": ratio.min().item() if seen else none,
            "policy/ratio_max": ratio.max().item() if seen else none,
            "policy/early_stopped": int(self._stopped),
        }  # fmt: skip

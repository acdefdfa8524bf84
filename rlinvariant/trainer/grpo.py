"""GRPO as TRL does it, on rollouts whose log-probs the trainer reproduces bit for bit.

Eight methods of TRL's trainer are overridden here. One has a body of our own:

    _get_per_token_logps_and_entropies     scores packed rows by `rlinvariant.ops`; TRL's own where the trainer is stock

Seven call TRL's, and do something before or after it:

    train                                  forgets what was counted
    _generate_and_score_completions        compares a rollout at once, if part of it is trained on after a step
    _compute_loss                          compares the log-probs that the loss has just computed
    _calculate_rewards                     is timed
    training_step                          is timed, stops all ranks at a mismatch, and keeps weights for a sampler that lags
    _save_checkpoint                       is timed, and notes which weights the disk holds
    log                                    says our numbers in place of TRL's averages, hands the row on, starts the next record

Rewards, advantages, losses, tools and optimisation stay TRL's. `distributed.DistributedTrainer` knows of several processes and
of weights in shards, `drawing.DrawingTrainer` draws from the attached engine, `routed.RoutedTrainer` compares the experts of
a mixture, `checkpointed.CheckpointedTrainer` saves and resumes, `passes.PassingTrainer` lets the device run on until a step's
end, `finite.FiniteTrainer` stops at NaN and infinity, `collecting.CollectingTrainer` keeps the completions,
`measured.MeasuredTrainer` the numbers. What a step has seen is in `record.StepRecord`, which weights are where in
`versions.PolicyVersions`.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback
from trl.trainer.grpo_config import GRPOConfig

from rlinvariant import metrics, stopping
from rlinvariant.conflicts import SIDES, Gradients, Invariance
from rlinvariant.errors import ConfigErrors, ParityError
from rlinvariant.launch import main_process_fetches
from rlinvariant.model_source import load_tokenizer
from rlinvariant.models import audit_config, lora, make_invariant, make_trainable, require_exact, shards
from rlinvariant.models.load import load
from rlinvariant.rewards import RewardLimits
from rlinvariant.rollout import Truncation
from rlinvariant.text import say
from rlinvariant.trainer.episodes import Episodes
from rlinvariant.trainer.grading import checked_rewards, settle_rewards
from rlinvariant.trainer.interface import (
    OnEvaluation,
    OnRollout,
    OnRow,
    OnSamples,
    RewardFunction,
    SamplerLike,
    TrainerArguments,
)
from rlinvariant.trainer.memory import decoder_layers
from rlinvariant.trainer.preflight import Start, Tooling, check_start, constructing
from rlinvariant.trainer.record import Pair
from rlinvariant.trainer.refusals import settings_problems
from rlinvariant.trainer.routed import RoutedTrainer
from rlinvariant.trainer.turns import sampled_mask
from rlinvariant.trainer.versions import PolicyVersions

PROCESSES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
SHARDED = (DistributedType.FSDP,)


class InvariantGRPOTrainer(RoutedTrainer):
    """Trains as `trl.GRPOTrainer` does, samples from an attached engine, and proves, at every step, what it trains on.

    Args:
        model: a Hugging Face causal LM with fp32 parameters; patched in place where the trainer is invariant.
        reward_funcs, args, train_dataset, ...: as for `trl.GRPOTrainer`. `args.use_vllm` must be off: the sampler is ours.
        sampler: called once, when models and process group exist; returns the engine.
        invariance: "exact" (both sides), "off", "sampler" or "trainer" (that side only).
        dtype: of the trainer's activations where it is invariant.
        staleness: k, a constant policy lag: a rollout is sampled with the weights of k optimizer steps ago (of the first
            step, until there are so many; also after a resume). Costs k fp32 copies of the weights, in host memory. The
            log-probs of two versions differ, as they should: they are counted, and required to be equal only at lag 0.
        gradients: how gradients are added: "stock": over processes as NCCL or gloo does; "ordered": in a fixed order of the
            ranks, the same in DDP and in shards, whatever the library chooses; "invariant": a backward for each sample, and
            their sum in a tree over the samples of the step, the same for 1, 2, 4, ... processes and any micro-batch
            (`trainer.leaves` says what that takes).
        tokens_per_microbatch: the most tokens of a forward and backward, where the trainer is invariant: the rows of a step
            are divided by them, whatever `args` says of micro-batches. None: as many as fit, a power of two.
        recompute: whether a backward computes the activations of all layers again, or of none; None: of as many as memory
            needs, and of none where `args.gradient_checkpointing` is off. Changes no bit.
        reward_timeout, reward_cage, reward_errors: how reward functions are called; `rlinvariant.rewards.RewardLimits` says it.
        tool_timeout, tool_cage, tool_errors: how tools are called; `rlinvariant.tools.ToolLimits` says it.
        on_row: called on the main process with the metrics of every optimizer step, and the first mismatch or None.
        on_samples: called on the main process, before `on_row`, with a row for each completion that the step drew;
            `trainer.samples` says what is in it. A step that uses an earlier rollout again draws none.
        on_evaluation: called on the main process with the numbers of each of TRL's evaluations, `kind` and `step`.
        on_rollout: called on the main process with the step and what it has drawn, where the weights that it was drawn with
            are on the disk: the first step of `train`, and each step after a checkpoint. Before the optimizer step.
        checked: whether settings and datasets were checked already, as `rlinvariant.grpo_trainer` does before it loads weights.

    Raises:
        ConfigErrors: settings that would break exactness, all of them.
        UnsupportedModel: the model computes something that no op owns.
        ParityError: with invariance="exact", from `train`: when a log-prob differs, before the optimizer step; when a sampled
            token was not compared, after the step that trained on it.

    Example:
        >>> trainer = InvariantGRPOTrainer(model, reward, args, train_dataset=prompts, processing_class=tokenizer,
        ...                                sampler=lambda: Sampler(path, invariant=True))
        >>> trainer.train()

    `rlinvariant.grpo_trainer` loads the model, starts the engine and makes this trainer in one call.
    """

    model: Any  # PreTrainedModel, with what `make_invariant` adds to its forward
    ref_model: Any
    args: Any  # GRPOConfig, whose fields that may be None TRL has set
    proof: dict[str, Any] | None = None  # what was compared before the first step, where `rlinvariant.grpo_trainer` did

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: GRPOConfig,
        train_dataset: Dataset | None = None,
        *,
        sampler: Callable[[], SamplerLike],
        invariance: Invariance = "exact",
        dtype: torch.dtype = torch.bfloat16,
        staleness: int = 0,
        gradients: Gradients = "stock",
        tokens_per_microbatch: int | None = None,
        recompute: bool | None = None,
        on_row: OnRow | None = None,
        on_evaluation: OnEvaluation | None = None,
        on_samples: OnSamples | None = None,
        on_rollout: OnRollout | None = None,
        checked: bool = False,
        **kwargs: Unpack[TrainerArguments],
    ) -> None:
        self.invariance, self.staleness, self.truncation = invariance, staleness, Truncation.of(args)
        self.tokens_per_microbatch, self.gradients = tokens_per_microbatch, gradients
        self.recompute = False if recompute is None and not args.gradient_checkpointing else recompute
        self._sampler_is_invariant, self._trainer_is_invariant = SIDES[invariance]
        self._on_row, self.on_evaluation = on_row, on_evaluation
        self._on_samples, self._on_rollout = on_samples, on_rollout
        others: Any = kwargs
        limits, tooling = RewardLimits.taken(others), Tooling.taken(others)
        if not checked:
            own = {
                "staleness": staleness,
                "gradients": gradients,
                "tokens_per_microbatch": tokens_per_microbatch,
                "recompute": recompute,
            }
            options = {**kwargs, **own, **asdict(limits), **tooling.given()}
            if problems := settings_problems(args, invariance, dtype, options, getattr(self, "ppo", None), model):
                raise ConfigErrors(problems)
            name, ppo = model.config._name_or_path, getattr(self, "ppo", None)
            tokenizer = others["processing_class"] = kwargs.get("processing_class") or load_tokenizer(name, model.config)
            data = (reward_funcs, train_dataset, kwargs.get("eval_dataset"))
            parts = (args, name, model.config, model.generation_config, tokenizer, *data)
            adapter = others.get("peft_config") or getattr(model, "peft_config", {}).get("default")
            own = {"models": 1 if ppo is None else 2, "adapter": adapter, "tokens_per_microbatch": tokens_per_microbatch}
            start = Start(*parts, **own, tooling=tooling)
            for note in check_start(start):
                warnings.warn(note, stacklevel=2)
        if (adapter := others.pop("peft_config", None)) is not None:
            model = lora.applied(model, adapter, args.seed, "peft_config.")
        self._prepare_models(model, args, dtype, kwargs.get("processing_class"))
        rewards = checked_rewards(self, reward_funcs, limits)
        self._episodes = Episodes(self, tooling, others["processing_class"]) if tooling else None
        others |= {} if self._episodes is None else self._episodes.arguments()
        own_args, beta = self._trl_args(args), 0.0
        if self.sharded:  # TRL would load the whole reference on each device, and cut it as one unit
            beta, own_args.beta = own_args.beta, 0.0
        with constructing():
            super().__init__(model, rewards, own_args, train_dataset, **others)
        if self.accelerator.distributed_type not in (SHARDED if self.sharded else PROCESSES):
            kind = self.accelerator.distributed_type.value
            raise ConfigErrors([f"distributed_type={kind}: expected that of a file in configs/, as cpu.yaml; choose one"])
        if beta:
            self._load_sharded_reference(beta, dtype)
        if self._trainer_is_invariant:
            inner = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
            inner.__dict__.pop("forward", None)  # TRL's fused head, with another order of summation
            if self.ref_model is not None and not self.sharded:
                self.ref_model.__dict__.pop("forward", None)
                make_invariant(self.ref_model, dtype)
        self.remove_callback(PrinterCallback)  # prints every number of every step; our console and files have them
        self._attach(sampler())
        self._versions = PolicyVersions(staleness)
        self._scoring_rollout = False
        settle_rewards(self, len(rewards), limits)
        self._start_step()

    def _prepare_models(self, model: Any, args: GRPOConfig, dtype: torch.dtype, tokenizer: Any) -> None:
        """Patch the policy and check it on the device, whose kernels are what is checked; TRL has not started yet."""
        if (visible := args.n_gpu) > 1:  # of one process, which transformers would let train on all of them, as DataParallel
            args._n_gpu = 1
            say(f"note: one process trains on one GPU, {args.device}, of the {visible} visible; machine=2gpu has one for each")
        if self.sharded:
            audit_config(model.config, dtype, args.device, sharded=True)
            if self._trl_args(args).beta and lora.ranks(model):
                lora.add_reference(model)  # before it is cut; TRL is told of no reference
            units = self._shard(model, dtype, args.device)
            if args.process_index == 0:
                of = f"each of the {units - 1} decoder layers, and the rest"
                say(f"weights in shards over {args.world_size} processes: {units} units, {of}")
            self._look_at_cuts(model, args)
        elif self._trainer_is_invariant:
            require_exact(make_trainable(model.to(args.device), dtype))
        elif self._sampler_is_invariant:
            require_exact(make_invariant(copy.deepcopy(model).to(args.device), dtype))  # what the sampler will run

    @staticmethod
    def _shard(model: Any, dtype: torch.dtype, device: torch.device) -> int:
        """Patch a model on the host, and cut it layer by layer, so that it is never whole on a device; return the units."""
        return shards.shard(make_trainable(model, dtype, shards_on=device), decoder_layers(model))

    def _load_sharded_reference(self, beta: float, dtype: torch.dtype) -> None:
        """Load the reference that TRL would have loaded, patched and in shards; that of adapters is there already."""
        self.beta = self.args.beta = beta
        if lora.ranks(self.model):
            return
        name = self.model.config._name_or_path
        with main_process_fetches(name):
            model = load(AutoModelForCausalLM, name, dtype=torch.float32)
        self._shard(model.eval().requires_grad_(False), dtype, self.args.device)
        self.ref_model = model

    def train(self, *args, **kwargs):
        """Train as `RoutedTrainer` does; what was recorded before is forgotten."""
        self._start_step()
        return super().train(*args, **kwargs)

    @property
    def _must_be_equal(self) -> bool:
        """Return whether the last rollout was sampled by the function that is trained: exact, with the trainer's weights."""
        return self.invariance == "exact" and self._versions.on_policy

    def _generate_and_score_completions(self, inputs):
        self._scoring_rollout = True
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._scoring_rollout = False
        if self.model.training and self.mask_truncated_completions:
            self._compare_masked(output)
        if self.model.training and self._scores_ahead and "old_per_token_logps" in output:
            self._compare(output["old_per_token_logps"], output)
            output["compared"] = torch.ones_like(output["sample"], dtype=torch.bool)
        if self.model.training and (self.mask_truncated_completions or self._scores_ahead):
            self._stop_if_different()
        return output

    def _compare_masked(self, output: dict[str, Any]) -> None:
        """Compare the completions that TRL has masked because the limit cut them: nobody trains on them."""
        if self._trainer_is_invariant:
            _ = self.fit  # which all ranks settle together, though some may have nothing to compare
        device, width = output["completion_mask"].device, output["completion_mask"].shape[1]
        lengths = torch.tensor([len(row) for row in self._sampler_logprobs], device=device)
        rows = (output["completion_mask"].sum(1) == 0).nonzero()[:, 0]
        if not len(rows):
            return
        names = ("prompt_ids", "prompt_mask", "completion_ids", "sampling_per_token_logps", "sample")
        batch = {name: output[name][rows] for name in (*names, "experts") if name in output}
        batch["completion_mask"] = (torch.arange(width, device=device) < lengths[rows, None]).long()
        if self._tool_mask is not None:
            self._tool_mask = batch["tool_mask"] = F.pad(self._tool_mask, (0, width - self._tool_mask.shape[1]))[rows]
        ids, mask = (torch.cat([batch[f"{of}_{what}"] for of in ("prompt", "completion")], 1) for what in ("ids", "mask"))
        with torch.no_grad():
            size = self.args.per_device_train_batch_size
            logprobs = self._get_per_token_logps_and_entropies(self.model, ids, mask, width, batch_size=size)[0]
        self._record.masked += int(sampled_mask(batch).sum())
        self._compare(logprobs, batch)

    @property
    def _scores_ahead(self) -> bool:
        """Return whether part of a rollout is trained on after an optimizer step: then it is scored and compared before."""
        return self.args.gradient_accumulation_steps % self.args.steps_per_generation != 0

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        """Compute log-probs, for policy, old policy and reference: the one place where TRL does."""
        old = self._scoring_rollout and model is self.model and not lora.is_reference(model)
        if old and self._must_be_equal and not self._scores_ahead:
            # The old log-probs are the sampler's: the loss, which runs on the same weights, will prove it. TRL's extra pass
            # over the rollout, a quarter of a step's arithmetic, is not needed.
            rows = [torch.tensor(x, dtype=torch.float32) for x in self._sampler_logprobs]
            logprobs = pad_sequence(rows, batch_first=True)
            return F.pad(logprobs, (0, logits_to_keep - logprobs.shape[1])).to(input_ids.device), None, None
        if not self._trainer_is_invariant:
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        else:
            wanted = attention_mask[:, -logits_to_keep:].bool()
            if self._tool_mask is not None:  # nobody trains on a tool's tokens
                wanted &= F.pad(self._tool_mask, (0, logits_to_keep - self._tool_mask.shape[1])).bool()
            scored = lambda x: self._packed_logprobs(model, input_ids[x], attention_mask[x], wanted[x])  # noqa: E731
            logprobs, entropies = self._in_parts(attention_mask.sum(1), scored)
            result = logprobs, entropies if compute_entropy else None, None
        self._trainer_logprobs, entropies = result[0].detach(), result[1]
        if entropies is not None:
            self._trainer_entropies = entropies  # `entropy.WholeEntropyTrainer` takes them off their graph
        return result

    def _compute_loss(self, model, inputs):
        self._tool_mask = inputs.get("tool_mask")
        loss, logprobs = super()._compute_loss(model, inputs), self._trainer_logprobs
        if self.model.training and "compared" not in inputs and self._versions.rollout_step == self.state.global_step:
            self._put_off(lambda: self._compare(logprobs, inputs))
            inputs["compared"] = True
        elif self.model.training:  # a later pass over the rollout: the policy has moved, as it should
            self._put_off(lambda: self._record.moved.append(Pair.of(logprobs, inputs)))
        return loss

    def _compare(self, trainer_logprobs: Tensor, inputs: dict[str, Any]) -> None:
        """Keep both log-probs of every sampled token, and where the first stands that differs."""
        record, mask = self._record, sampled_mask(inputs)
        record.compared.append(pair := Pair.of(trainer_logprobs, inputs))
        record.samples.compare(inputs, *pair)
        self._count_flips(inputs, mask)
        if record.first_mismatch is None:
            found = metrics.first_mismatch(inputs["sampling_per_token_logps"], trainer_logprobs, mask)
            record.first_mismatch = found and replace(found, sequence=record.samples.number(inputs, found.sequence))

    def _stop_if_different(self) -> None:
        """Raise ParityError on all ranks, with one count, if any has log-probs that differ where they must be equal.

        Every rank must call this, as each does before its optimizer step: no rank is left to wait for one that has stopped.
        """
        if not self._must_be_equal:
            return
        different = self._record.first_mismatch is not None
        if self.accelerator.num_processes > 1:
            found = torch.tensor(float(different), device=self.accelerator.device)
            different = bool(self.accelerator.reduce(found, "sum").item())
        if not different:
            return
        record = self.record_type.merge(gather_object([self._record]))
        step, numbers = self.state.global_step + 1, record.onpolicy(self._clip_max)
        self._hand_on_samples(record)
        if self._on_row is not None and self.accelerator.is_main_process:
            self._on_row({"step": step, **numbers}, record.first_mismatch)
        count = f"{numbers['onpolicy/mismatched_tokens']:,} / {numbers['onpolicy/compared_tokens']:,} tokens"
        stopped = f"Stopped before the optimizer step; {self._last_checkpoint()}"
        raise ParityError(f"step {step}: mismatched {count}; {record.first_mismatch}. {stopped}", agreed=True)

    def _start_step(self) -> None:
        equal = self._record.weights_equal if hasattr(self, "_record") else True  # until the next sync
        self._record = self.record_type(weights_equal=equal)
        self._drawn = []

    def _calculate_rewards(self, *args, **kwargs):
        with self._timed("score"):
            return super()._calculate_rewards(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        with self._record.timed("train"):
            result = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                self._stop_if_different()
            self._keep_weights()
        return result

    def _keep_weights(self) -> None:
        self._versions.keep(self.state.global_step, self._held())

    def _save_checkpoint(self, model, trial):
        with self._timed("save"):
            super()._save_checkpoint(model, trial)
        self._versions.disk = self.state.global_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Say the numbers of `keys.KEYS` in place of what TRL has averaged of a step, and hand the row on."""
        if "loss" not in logs:
            return super().log(logs, start_time)
        step = self.state.global_step
        self._record.stop = stopping.asked()
        record = self.record_type.merge(gather_object([self._record]))
        self._save_if_due(record.began)
        self._hand_on_samples(record)
        row = self._row(record, logs)
        logs |= row
        super().log(logs, start_time)
        if self._on_row is not None and self.accelerator.is_main_process:
            self._on_row({"step": step, **row}, record.first_mismatch)
        if (unscored := row["onpolicy/unscored_tokens"]) and self.invariance == "exact":
            raise ParityError(f"step {step}: {unscored:,} sampled tokens were trained on without being compared", agreed=True)
        stopping.obey(record.stop, self.control)
        if record.stop:
            self._put_off_evaluation()
        self._start_step()

"""GRPO as TRL does it, on rollouts whose log-probs the trainer reproduces bit for bit.

Four of TRL's methods are replaced, each by a leaf that does the same job: sampling, log-probs, loss (to compare in passing),
logging. Rewards, advantages, losses, optimisation, checkpoints and resuming stay TRL's.
"""

import copy
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers import PrinterCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from rlinvariant import bits, metrics
from rlinvariant.conflicts import SIDES, conflicts
from rlinvariant.errors import ConfigErrors, ParityError
from rlinvariant.models import make_invariant, make_trainable, require_exact
from rlinvariant.rewards import check_dataset, checked_reward
from rlinvariant.rollout import Batch, Completion, Rollout, request_seed
from rlinvariant.support import device_problems
from rlinvariant.trainer.packing import pack


class SamplerLike(Protocol):
    """What the trainer needs of a sampler; `rlinvariant.sampler.engine.Sampler` has it."""

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, temperature: float, max_tokens: int, **kwargs: Any
    ) -> list[Completion]: ...

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def differing_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[str]: ...


class InvariantGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` that samples from an attached engine and proves, at every step, what it trains on.

    Args:
        model: a Hugging Face causal LM with fp32 parameters.
        reward_funcs, args, train_dataset, ...: as for `trl.GRPOTrainer`. `args.use_vllm` must be off: the sampler is ours.
        sampler: called once, when models and process group exist; returns the engine.
        invariance: "exact" (both sides), "off", "sampler" or "trainer" (that side only).
        dtype: of the trainer's activations where it is invariant.
        staleness: k, a constant policy lag: a rollout is sampled with the weights of k optimizer steps ago (of the first
            step, until there are so many; also after a resume). Costs k fp32 copies of the weights, in host memory. The
            log-probs of two versions differ, as they should: they are counted, and required to be equal only at lag 0.
        on_row: called on the main process with the metrics of every optimizer step, and the first mismatch or None.
        on_samples: called on the main process, every `samples_every` steps, with a few rows (prompt, completion, reward).
        on_rollout: called on the main process with the step and what it has drawn, where the weights that it was drawn with
            are on the disk: the first step of `train`, and each step after a checkpoint. Before the optimizer step.

    Raises:
        ConfigErrors: settings that would break exactness, all of them.
        UnsupportedModel: the model computes something that no op owns.
        ParityError: with invariance="exact", from `train`, when a log-prob differs; raised before the optimizer step.
    """

    model: Any
    ref_model: Any
    args: Any
    max_completion_length: int
    num_generations: int
    eos_token_ids: list[int]
    proof: dict[str, Any] | None = None  # of before the first step, where `rlinvariant.grpo_trainer` has made one

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: GRPOConfig,
        *,
        sampler: Callable[[], SamplerLike],
        invariance: str = "exact",
        dtype: torch.dtype = torch.bfloat16,
        staleness: int = 0,
        on_row: Callable[[dict[str, Any], metrics.FirstMismatch | None], None] | None = None,
        on_samples: Callable[[list[dict[str, Any]]], None] | None = None,
        on_rollout: Callable[[int, Rollout], None] | None = None,
        samples_every: int = 10,
        **kwargs: Any,
    ) -> None:
        self.invariance, self.staleness = invariance, staleness
        self._sampler_is_invariant, self._trainer_is_invariant = SIDES[invariance]
        self._on_row, self._on_samples, self._samples_every = on_row, on_samples, samples_every
        self._on_rollout = on_rollout
        if problems := [*device_problems(args, invariance, dtype), *self._conflicts(model, args, kwargs)]:
            raise ConfigErrors(problems)
        for name in ("train_dataset", "eval_dataset"):
            if kwargs.get(name) is not None:
                check_dataset(kwargs[name], name.removesuffix("_dataset"))
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if self._trainer_is_invariant:  # on the device: its kernels are what is checked
            require_exact(make_trainable(model.to(args.device), dtype))
        elif self._sampler_is_invariant:
            require_exact(make_invariant(copy.deepcopy(model).to(args.device), dtype))  # what the sampler will run
        self._prepare_models(model, args, dtype, kwargs)
        super().__init__(model, [checked_reward(f) for f in rewards], args, **kwargs)
        if self.accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            kind = self.accelerator.distributed_type.value
            raise ConfigErrors([f"distributed_type={kind}: expected one process or data parallel; choose configs/cpu.yaml"])
        if self._trainer_is_invariant:
            self.model.__dict__.pop("forward", None)  # TRL's fused head, with another order of summation
            if self.ref_model is not None:
                self.ref_model.__dict__.pop("forward", None)
                make_invariant(self.ref_model, dtype)
        self.remove_callback(PrinterCallback)  # prints every number of every step; our console and files have them
        self.use_vllm = True  # TRL's name for "the rollout carries log-probs": turns on its correction, if asked for
        self.sampler = sampler()
        self._older: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=staleness)  # (step, weights before it), oldest first
        self._sampler_version = -1  # how many optimizer steps the sampler's weights have had
        self._saved_version: int | None = None  # and those on the disk; None: whatever the first rollout has
        self._batches: list[Batch] = []  # of a step whose rollout is handed on
        self._rollouts: dict[bool, tuple[int, int]] = {}  # training or not -> (step, rollouts that this step has had before)
        self._sampler_logprobs: list[list[float]] = []
        self._scoring_rollout = False
        self._exact_streak = 0
        self._rollout_step = self._rollout_version = 0
        self._start_step()

    def _conflicts(self, model: Any, args: GRPOConfig, kwargs: dict[str, Any]) -> list[str]:
        """What in TRL's own arguments cannot be: for those who come without our configuration."""
        found = conflicts(args, self.invariance, os.environ)
        if self.staleness < 0:
            found.append(f"staleness={self.staleness}: expected 0 or more optimizer steps")
        if args.use_vllm:
            found.append("use_vllm=True: expected False; the sampler is attached by rlinvariant")
        for name in ("rollout_func", "tools", "environment_factory"):
            if kwargs.get(name):
                found.append(f"{name}: expected None: only plain completions of the dataset's prompts are compared so far")
        if self._trainer_is_invariant and model.dtype != torch.float32:
            found.append(f"model.dtype={model.dtype}: expected torch.float32 masters; load with dtype=torch.float32")
        if self._trainer_is_invariant and (kwargs.get("peft_config") is not None or hasattr(model, "peft_config")):
            found.append(f"peft_config: expected None with invariance={self.invariance}: adapters are not supported yet")
        return found

    def _prepare_models(self, model: Any, args: GRPOConfig, dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
        """For a subclass that trains more than the policy: the policy is patched, TRL and the engine have not started."""

    def train(self, *args, **kwargs):
        """As TRL's; the first rollout syncs the weights, whatever the sampler held."""
        self._sampler_version, self._saved_version = -1, None
        self._older.clear()
        return super().train(*args, **kwargs)

    # ---- sampling

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        """Sample one completion per prompt; TRL has repeated each prompt `num_generations` times over all ranks."""
        self.sync(stale=self.model.training)
        seeds = self._seeds(len(prompt_ids), num_generations)
        with self._timed("rollout"):
            completions = self.sampler.generate(
                prompt_ids,
                seeds,
                temperature=self.temperature,
                max_tokens=self.max_completion_length,
                stop_token_ids=list(self.eos_token_ids),
            )
        self._sampler_logprobs = [c.sampler_logprobs for c in completions]
        if self.model.training:
            self._rollout_step, self._rollout_version = self.state.global_step, self._sampler_version
            self._completions += [c.token_ids for c in completions]
            self._hand_on(Batch(prompt_ids, seeds, completions))
        return [c.token_ids for c in completions], self._sampler_logprobs

    def _hand_on(self, batch: Batch) -> None:
        """Give `on_rollout` what this step has drawn so far, if the weights that it was drawn with can be loaded again."""
        step = self.state.global_step
        self._saved_version = step if self._saved_version is None else self._saved_version
        if self._on_rollout is None or not self._saved_version == self._sampler_version == step:
            return
        with self._timed("save"):
            batches = gather_object([batch])
            if not self.accelerator.is_main_process:
                return
            self._batches = [*(self._batches if self._rollouts[True][1] else []), *batches]
            stop, weights = list(self.eos_token_ids), bits.digest(self._weights())
            self._on_rollout(step + 1, Rollout(self._batches, self.temperature, self.max_completion_length, stop, weights))

    def _seeds(self, count: int, group: int) -> list[int]:
        """A seed for each request from (run seed, step, prompt, sample): distinct over a group and over ranks.

        A step that samples more than once, and evaluation, draw from runs of their own.
        """
        step, training = self.state.global_step, bool(self.model.training)
        last, earlier = self._rollouts.get(training, (-1, 0))
        earlier = earlier + 1 if last == step else 0
        self._rollouts[training] = (step, earlier)
        run = request_seed(self.args.seed, earlier, int(training), 0)
        first = self.accelerator.process_index * count
        return [request_seed(run, step, i // group, i % group) for i in range(first, first + count)]

    def sync(self, force: bool = False, stale: bool = False) -> None:
        """Give the sampler the current weights, unless it has them; `force` when they may have moved without a step.

        `stale`: those of `staleness` steps ago instead.
        """
        version, older = self._older[0] if stale and self._older else (self.state.global_step, None)
        if self._sampler_version == version and not force:
            return
        with self._timed("sync"):
            self.sampler.sync(self._weights(older))
            differing = self.sampler.differing_weights(self._weights(older))
        self._weights_equal = not differing
        self._sampler_version = version
        if differing and self.invariance == "exact":
            raise ParityError(
                f"step {self.state.global_step + 1}: after the weight sync, {len(differing)} of the sampler's parameters "
                f"differ from the trainer's, first {differing[0]}"
            )

    def _weights(self, older: dict[str, Tensor] | None = None) -> Iterable[tuple[str, Tensor]]:
        if older is not None:
            return ((name, w.to(self.accelerator.device)) for name, w in older.items())
        return self.accelerator.unwrap_model(self.model).named_parameters()

    def _keep_weights(self) -> None:
        """Before the optimizer step: what the sampler will be given `staleness` steps later."""
        step = self.state.global_step
        if self.staleness and not (self._older and self._older[-1][0] == step):
            self._older.append((step, {name: w.detach().to("cpu", copy=True) for name, w in self._weights()}))

    @property
    def _must_be_equal(self) -> bool:
        """Whether the last rollout was sampled by the function that is trained: exact, and with the trainer's own weights."""
        return self.invariance == "exact" and self._rollout_version == self._rollout_step

    # ---- log-probs

    def _generate_and_score_completions(self, inputs):
        self._scoring_rollout = True
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._scoring_rollout = False
        if self.model.training and self._scores_ahead and "old_per_token_logps" in output:
            self._compare(output["old_per_token_logps"], output)
            output["compared"] = torch.ones_like(output["completion_ids"][:, 0], dtype=torch.bool)
        return output

    @property
    def _scores_ahead(self) -> bool:
        """Whether part of a rollout is trained on only after an optimizer step: then it is scored, and compared, before."""
        return self.args.gradient_accumulation_steps % self.args.steps_per_generation != 0

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        """The one place where TRL computes log-probs: policy, old policy and reference."""
        old = self._scoring_rollout and model is self.model
        if old and self._must_be_equal and not self._scores_ahead:
            # The old log-probs are the sampler's: the loss, which runs on the same weights, will prove it. TRL's extra pass
            # over the rollout, a quarter of a step's arithmetic, is not needed.
            rows = [torch.tensor(x, dtype=torch.float32) for x in self._sampler_logprobs]
            logprobs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            return torch.nn.functional.pad(logprobs, (0, logits_to_keep - logprobs.shape[1])).to(input_ids.device), None, None
        if not self._trainer_is_invariant:
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        else:
            rows = batch_size or len(input_ids)
            parts = [
                self._packed_logprobs(model, input_ids[at : at + rows], attention_mask[at : at + rows], logits_to_keep)
                for at in range(0, len(input_ids), rows)
            ]
            logprobs, entropies = (torch.cat(x) for x in zip(*parts, strict=True))
            result = logprobs, entropies if compute_entropy else None, None
        self._trainer_logprobs = result[0].detach()
        return result

    def _packed_logprobs(self, model, input_ids: Tensor, attention_mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
        batch = pack(input_ids, attention_mask, length)
        logprobs, entropies = model(
            **batch.inputs,
            attention_mask=None,
            token_ids=batch.token_ids,
            predicted_from=batch.predicted_from,
            temperature=self.temperature,
        )
        return batch.unpack(logprobs), batch.unpack(entropies)

    # ---- comparison

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.model.training and "compared" not in inputs and self._rollout_step == self.state.global_step:
            self._compare(self._trainer_logprobs, inputs)
            inputs["compared"] = True
        elif self.model.training:  # a later pass over the rollout: the policy has moved, as it should
            self._moved.append(self._pair(self._trainer_logprobs, inputs))
        return loss

    @staticmethod
    def _pair(trainer_logprobs: Tensor, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """(sampler's, trainer's) log-probs of the completions' real tokens."""
        mask = inputs["completion_mask"].bool()
        return inputs["sampling_per_token_logps"][mask].cpu().numpy(), trainer_logprobs[mask].cpu().numpy()

    def _compare(self, trainer_logprobs: Tensor, inputs: dict[str, Any]) -> None:
        """Keep both log-probs of every sampled token; stop at the first that differs where they must be equal."""
        mask = inputs["completion_mask"].bool()
        sampler, trainer = inputs["sampling_per_token_logps"], trainer_logprobs
        self._pairs.append(self._pair(trainer, inputs))
        if self._first_mismatch is None:
            self._first_mismatch = metrics.first_mismatch(sampler, trainer, mask)
        if self._first_mismatch is not None and self._must_be_equal:
            step = self.state.global_step + 1
            numbers = self._onpolicy([self._pairs], sum(map(len, self._completions)))
            if self._on_row is not None and self.accelerator.is_main_process:
                self._on_row({"step": step, **numbers}, self._first_mismatch)
            raise ParityError(
                f"step {step}: mismatched {numbers['onpolicy/mismatched_tokens']:,} / "
                f"{numbers['onpolicy/compared_tokens']:,} tokens; {self._first_mismatch}. Stopped before the optimizer step; "
                "the last checkpoint is good"
            )

    def _onpolicy(self, pairs: list[list[tuple[np.ndarray, np.ndarray]]], sampled: int | None) -> dict[str, float | int]:
        """`metrics.onpolicy` of the pairs of all ranks; `sampled` None: as many tokens as there are pairs."""
        none = np.zeros(0, np.float32)
        sampler, trainer = (np.concatenate([none, *(p[i] for rank in pairs for p in rank)]) for i in (0, 1))
        sampled = len(sampler) if sampled is None else sampled
        return metrics.onpolicy(sampler, trainer, sampled, self.vllm_importance_sampling_clip_max or float("inf"))

    # ---- metrics

    def _start_step(self) -> None:
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._moved: list[tuple[np.ndarray, np.ndarray]] = []
        self._completions: list[list[int]] = []
        self._first_mismatch: metrics.FirstMismatch | None = None
        self._seconds: dict[str, float] = dict.fromkeys(("rollout", "score", "train", "sync", "save"), 0.0)
        self._step_began = time.perf_counter()

    @contextmanager
    def _timed(self, what: str):
        began = time.perf_counter()
        try:
            yield
        finally:
            if self.model.training:  # not what an evaluation between two steps takes
                self._seconds[what] += time.perf_counter() - began

    def _calculate_rewards(self, *args, **kwargs):
        with self._timed("score"):
            return super()._calculate_rewards(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        began, before = time.perf_counter(), sum(self._seconds.values())
        result = super().training_step(*args, **kwargs)
        self._keep_weights()
        self._seconds["train"] += time.perf_counter() - began - (sum(self._seconds.values()) - before)
        return result

    def _save_checkpoint(self, model, trial):
        with self._timed("save"):
            super()._save_checkpoint(model, trial)
        self._saved_version = self.state.global_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this step's `onpolicy/*` and the other keys of `metrics.KEYS` to what TRL logs, and hand the row on."""
        if "loss" not in logs or not self.model.training:
            return super().log(logs, start_time)
        trl = {k: sum(v) / len(v) for k, v in self._metrics["train"].items() if v}
        row = self._row(logs, trl)
        logs |= row
        super().log(logs, start_time)
        if self.accelerator.is_main_process:
            if self._on_row is not None:
                self._on_row({"step": self.state.global_step, **trl, **row}, self._first_mismatch)
            if self._on_samples is not None and (
                self.state.global_step == 1 or self.state.global_step % self._samples_every == 0
            ):
                self._on_samples(self._sample_rows())
        unscored = row["onpolicy/unscored_tokens"]
        if unscored and self.invariance == "exact":
            raise ParityError(
                f"step {self.state.global_step}: {unscored:,} sampled tokens were trained on without being compared"
            )
        self._start_step()

    def _row(self, logs: dict[str, float], trl: dict[str, float]) -> dict[str, Any]:
        mine = (self._pairs, self._completions, self._seconds, self._first_mismatch, self._weights_equal, self._moved)
        ranks = gather_object([mine])
        completions = [c for rank in ranks for c in rank[1]]
        sampled = sum(map(len, completions))
        trained = sum(len(pair[0]) for rank in ranks for pair in rank[0] + rank[5])
        seconds = {name: max(rank[2][name] for rank in ranks) for name in self._seconds}
        self._first_mismatch = next((rank[3] for rank in ranks if rank[3] is not None), None)
        onpolicy = self._onpolicy([rank[0] for rank in ranks], sampled)
        exact = onpolicy["onpolicy/mismatched_tokens"] == 0 == onpolicy["onpolicy/unscored_tokens"]
        self._exact_streak = self._exact_streak + int(onpolicy["onpolicy/compared_tokens"]) if exact else 0
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        step_s = time.perf_counter() - self._step_began
        return {
            **onpolicy,
            "onpolicy/group_unique_frac": metrics.group_unique_frac(completions, self.num_generations),
            "onpolicy/weights_equal": int(all(rank[4] for rank in ranks)),
            "onpolicy/weight_version_lag": self.state.global_step - 1 - self._rollout_version,
            "onpolicy/exact_streak_tokens": self._exact_streak,
            "reward/mean": trl.get("reward", float("nan")),
            **metrics.rollout_stats([len(c) for c in completions], [not c or c[-1] not in ends for c in completions]),
            "policy/entropy": trl.get("entropy", float("nan")),
            "policy/approx_kl": self._onpolicy([rank[5] for rank in ranks], None)["onpolicy/kl_k3"],
            "policy/clip_frac": trl.get("clip_ratio/region_mean", float("nan")),
            "optim/loss": logs["loss"],
            "optim/grad_norm": logs.get("grad_norm", float("nan")),
            "optim/lr": logs.get("learning_rate", float("nan")),
            **{f"time/{name}": value for name, value in seconds.items()},
            "perf/sampler_tok_s": sampled / seconds["rollout"] if seconds["rollout"] else float("nan"),
            "perf/trainer_tok_s": trained / seconds["train"] if seconds["train"] else float("nan"),
            "perf/step_s": step_s,
        }

    def _sample_rows(self, count: int = 3) -> list[dict[str, Any]]:
        logged = zip(self._logs["prompt"], self._logs["completion"], strict=True)
        rewards = {name: list(values) for name, values in self._logs["rewards"].items()}
        return [
            {"step": self.state.global_step, "prompt": prompt, "completion": completion,
             "reward": sum(values[i] for values in rewards.values()), "rewards": {n: v[i] for n, v in rewards.items()}}
            for i, (prompt, completion) in enumerate(logged) if i < count
        ]  # fmt: skip

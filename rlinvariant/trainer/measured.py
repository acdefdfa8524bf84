"""The layer of the trainer that says the numbers of a step, of every token and completion in all micro-batches and ranks.

TRL averages the means of micro-batches, and of ranks; here a mean over a step is one over its tokens, or its completions.

Methods of TRL's trainer, and of transformers' below it, that are overridden:

    _calculate_rewards                keeps the rewards of all ranks, and how this rank's completions ended
    _generate_and_score_completions   keeps what was drawn and graded, and the weights of TRL's correction
    _compute_loss                     keeps entropies, KL and what is clipped of a micro-batch
    evaluation_loop                   begins the record of an evaluation
    _evaluate, _determine_best_metric say in one line that a metric is not there
    log                               says the numbers of an evaluation in place of TRL's averages, and hands them on

N: completions of all ranks, F: reward functions.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from rlinvariant import keys, metrics
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.metrics import Trained
from rlinvariant.rollout import is_cut
from rlinvariant.trainer.collecting import CollectingTrainer
from rlinvariant.trainer.grading import weighted_sums
from rlinvariant.trainer.interface import OnEvaluation, Row
from rlinvariant.trainer.passes import SUMMED
from rlinvariant.trainer.preflight.parts import evaluation_problems
from rlinvariant.trainer.record import Graded, StepRecord
from rlinvariant.trainer.turns import sampled_mask
from rlinvariant.trainer.versions import PolicyVersions

CLIPPED_BOTH = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # TRL's losses that clip ratios at both ends


class MeasuredTrainer(CollectingTrainer):
    """Keeps what is measured of training steps and of TRL's evaluations, apart, as the module says."""

    record_type: type[StepRecord] = StepRecord
    on_evaluation: OnEvaluation | None = None
    _record: StepRecord
    _evaluation: StepRecord
    _versions: PolicyVersions
    _exact_streak: int = 0
    _mismatched_total: int = 0
    _graded: list[Graded]  # of training: of this step, or the last that drew
    _graded_at: int = -1  # the step at whose beginning that was drawn
    _evaluated: list[Graded]
    _evaluated_as: str | None = None  # prefix of the keys of an evaluation that is not logged yet
    _trainer_entropies: Tensor
    _sampled: list[list[int]] | None  # of the last rollout, 1 for each token that was sampled, 0 for a tool's; None: all were
    num_generations: int
    num_generations_eval: int
    loss_type: str
    beta: float

    def train(self, *args, **kwargs):
        """Train as `CollectingTrainer` does; what was drawn before is forgotten."""
        self._graded, self._graded_at, self._exact_streak, self._mismatched_total = [], -1, 0, 0
        return super().train(*args, **kwargs)

    @property
    def _now(self) -> StepRecord:
        """Return what is being recorded: the step, or an evaluation."""
        return self._record if self.model.training else self._evaluation

    def _timed(self, part: str) -> AbstractContextManager[None]:
        """Count a block's seconds, but not those that an evaluation between two steps takes."""
        return self._record.timed(part) if self.model.training else nullcontext()

    # ---- what is kept

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list, *args, **kwargs):
        rewards_NF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list, *args, **kwargs)
        sampled = [len(ids) for ids in completion_ids_list] if self._sampled is None else [sum(row) for row in self._sampled]
        self._drawn_lengths = [(n, is_cut(ids, self.end_ids)) for n, ids in zip(sampled, completion_ids_list, strict=True)]
        self._rewards_NF = rewards_NF
        return rewards_NF

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            self._now.corrected.append(_correction(output))
        lengths, cut = zip(*chain.from_iterable(gather_object([self._drawn_lengths])), strict=True)
        rewards = dict(zip(self.reward_func_names, self._rewards_NF.T.tolist(), strict=True))
        total = weighted_sums(self._rewards_NF, self.reward_weights)
        graded = Graded(list(lengths), list(cut), rewards, total)
        if not self.model.training:
            self._evaluated.append(graded)
            return output
        step = self.state.global_step
        self._graded, self._graded_at = [*(self._graded if self._graded_at == step else []), graded], step
        return output

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        found = self._trained_of(inputs)
        self._put_off(lambda: self._now.trained.append(found()))
        return loss

    @torch.no_grad()
    def _trained_of(self, inputs: dict[str, Any]) -> Callable[[], Trained]:
        """Take from a micro-batch what TRL's loss has just seen of it, by TRL's formulas; it is read when it is asked for."""
        mask, new, advantages = sampled_mask(inputs), self._trainer_logprobs, inputs["advantages"]
        log_ratio, terms = new - inputs.get("old_per_token_logps", new), mask
        if self.importance_sampling_level == "sequence":
            log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
            terms = torch.ones_like(mask[:, :1])
        ratio, advantages = log_ratio.exp(), advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        kl = None
        if self.beta != 0.0:
            distance = inputs["ref_per_token_logps"] - new
            kl = distance.exp() - distance - 1
            kl = kl * ratio if self.args.use_bias_correction_kl else kl
        above = self.epsilon_high if self.loss_type == "cispo" else 1 + self.epsilon_high
        ratio = ratio if self.args.delta is None else ratio.clamp(max=self.args.delta)
        low, high = (ratio < 1 - self.epsilon_low) & (advantages < 0), (ratio > above) & (advantages > 0)
        counts = [mask.sum(1), *((x & terms).sum(1) for x in (low, high, terms))]
        clips = "both" if self.loss_type in CLIPPED_BOTH else "above" if self.loss_type == "cispo" else None
        entropies = self._trainer_entropies.detach()

        def read() -> Trained:
            lengths, *clipped = (x.cpu().numpy() for x in counts)
            none = np.zeros(0, np.float32)
            numbers = [none if x is None else x[mask].float().cpu().numpy() for x in (entropies, kl)]
            return Trained(lengths, numbers[0], numbers[1], (clipped[0], clipped[1], clipped[2]), clips)

        return read

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        if problems := evaluation_problems(self.args):
            raise ConfigErrors(problems)
        self._evaluated_as = metric_key_prefix
        self._evaluation, self._evaluated = self.record_type(), []
        self._evaluation_rows = self.num_examples(dataloader) * self.num_generations_eval
        return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    def _evaluate(self, *args, **kwargs):
        with self._known_metric():
            return super()._evaluate(*args, **kwargs)

    def _determine_best_metric(self, *args, **kwargs) -> bool:
        with self._known_metric():
            return super()._determine_best_metric(*args, **kwargs)

    @contextmanager
    def _known_metric(self) -> Iterator[None]:
        """Say in one line that no evaluation has the metric by which the best model, or the learning rate, is chosen."""
        try:
            yield
        except KeyError as error:
            name = self.args.metric_for_best_model
            if name is None or f"eval_{name.removeprefix('eval_')}" not in str(error):
                raise
            why = "expected a metric of the evaluations, as eval_reward; metrics.jsonl, or on_evaluation, has all"
            raise UserError(f"metric_for_best_model={name}: {why}") from error

    # ---- what is said of it

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        prefix = self._evaluated_as
        if prefix is None or f"{prefix}_runtime" not in logs:
            return super().log(logs, start_time)
        self._evaluated_as = None
        # In place: whoever called chooses the best model by these logs
        logs |= {f"{prefix}_{key}": value for key, value in self._evaluation_numbers().items()}
        row = {"kind": keys.EVALUATED, "step": self.state.global_step, **logs}
        super().log(logs, start_time)
        if self.on_evaluation is not None and self.accelerator.is_main_process:
            self.on_evaluation(row)

    def _step_numbers(self, record: StepRecord, logs: dict[str, float]) -> Row:
        """Return TRL's numbers of a step.

        Args:
            record: of all ranks.
            logs: what transformers logs: loss, and where there are any grad_norm and learning_rate.
        """
        none = float("nan")
        row = {key: logs.get(key, none) for key in ("loss", "grad_norm", "learning_rate")}
        row |= {"num_tokens": self.state.num_input_tokens_seen}
        row |= Graded.join(self._graded).row(self.num_generations) | record.policy_row()
        return self._others("train", row) | row

    def _evaluation_numbers(self) -> Row:
        """Return TRL's numbers of an evaluation, of all ranks; rows that fill up its last batch are not counted."""
        ranks, rows = gather_object([self._evaluation]), self._evaluation_rows
        graded = Graded.join(self._evaluated).first(rows)
        batches = [x for batch in zip_longest(*(rank.trained for rank in ranks)) for x in batch if x is not None]
        whole = self.record_type.merge(ranks)
        whole.trained = Trained.first(batches, rows)
        row = graded.row(self.num_generations_eval) | whole.policy_row()
        return self._others("eval", row) | row

    def _others(self, mode: str, row: Row) -> Row:
        """Return what else TRL has noted, and forget it all: means over its parts, of which each is of as many completions."""
        others: Row = {}
        for key, values in self._metrics[mode].items():
            known = [value for value in values if not math.isnan(value)]
            summed = key == "policy_loss" and mode == "train" and self.loss_type in SUMMED
            if key not in row:
                others[key] = math.fsum(known) if summed else metrics.mean(known)
        self._metrics[mode].clear()
        return others

    def _row(self, record: StepRecord, logs: dict[str, float]) -> Row:
        """Return a value for each of `keys.KEYS`, and what else there is, from the record of all ranks and the loss."""
        step_s = time.perf_counter() - record.began
        row = self._step_numbers(record, logs)
        row |= record.row(group_size=self.num_generations, clip_max=self._clip_max, step_s=step_s)
        mismatched, compared = int(row["onpolicy/mismatched_tokens"]), int(row["onpolicy/compared_tokens"])
        exact = mismatched == 0 == row["onpolicy/unscored_tokens"]
        self._exact_streak = self._exact_streak + compared if exact else 0
        self._mismatched_total += mismatched
        row["onpolicy/exact_streak_tokens"] = self._exact_streak
        row["onpolicy/mismatched_tokens_total"] = self._mismatched_total
        row["onpolicy/weight_version_lag"] = self.state.global_step - 1 - self._versions.rollout
        return {key: row[key] for key in keys.KEYS} | row

    @property
    def _clip_max(self) -> float:
        return self.vllm_importance_sampling_clip_max or float("inf")

    # ---- over a resume

    def _progress(self) -> dict[str, Any]:
        progress = super()._progress()
        last = None if progress["rollout"] is None else vars(Graded.join(self._graded))
        return progress | {"graded": last, "exact_streak": self._exact_streak, "mismatched_total": self._mismatched_total}

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        super()._restore_progress(progress)
        last = progress.get("graded")  # checkpoints of earlier versions have none
        self._graded, self._graded_at = [] if last is None else [Graded(**last)], -1
        self._exact_streak, self._mismatched_total = progress["exact_streak"], progress.get("mismatched_total", 0)


def _correction(output: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return how far apart old and sampler's log-probs are, of each token, and the weights that TRL has made of it."""
    mask, ratio = sampled_mask(output), output["importance_sampling_ratio"]
    apart = (output["old_per_token_logps"] - output["sampling_per_token_logps"]).abs()[mask]
    weights = ratio[mask] if ratio.shape == mask.shape else ratio.flatten()
    return apart.cpu().numpy(), weights.cpu().numpy()

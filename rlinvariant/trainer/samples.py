"""A row for each completion of a step: the text, and the numbers that it was trained with. `on_samples` is given these.

A row has

    step, sample_id     optimizer step that drew it, and its number in that step, over all ranks
    group, prompt_id    number of its group in the step, and a name of its prompt that is the same at every step
    prompt, completion  texts; a conversation's prompt is what its chat template made of it
    prompt_token_ids, token_ids
                        int32 arrays; a completion of several turns has what tools answered in its place
    tool_mask           int8 array, for each token of `token_ids` 1 if it was sampled, 0 if a tool or an environment wrote it;
                        None where there is no tool: all were sampled
    tool_results        the texts that stand between turns, in order, as the model read them; None where there is no tool
    sampler_logprobs    [n] fp32, one for each sampled token
    trainer_logprobs    [n] fp32; None where each has the sampler's bits
    mismatched_tokens   how many have not; None: they were not compared
    rewards, reward     of each reward function by name, and their weighted sum, from which advantages are made; None: none
    advantage           what it was trained with; PPO's is the mean over its tokens
    length, truncated   n, sampled tokens, and whether the limit cut it
    extra               what reward functions logged of it by `log_extra`, by name

B: completions of one rollout on this rank, N: of all ranks, F: reward functions.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from rlinvariant import metrics
from rlinvariant.rollout import is_cut, runs
from rlinvariant.trainer.grading import weighted_sums
from rlinvariant.trainer.turns import sampled_mask
from rlinvariant.types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlinvariant.trainer.collecting import CollectingTrainer

Sample = dict[str, Any]
ID_BYTES = 6  # of a prompt's name: two of a million prompts have the same with a chance of 1 in 500


@dataclass
class Samples:
    """Collects the rows of what a rank draws in one optimizer step."""

    rows: list[Sample] = field(default_factory=list)

    @classmethod
    def merge(cls, ranks: Sequence[Self]) -> Self:
        """Return the rows of all ranks, in order of `sample_id`."""
        return cls(sorted((row for rank in ranks for row in rank.rows), key=lambda row: row["sample_id"]))

    def draw(
        self,
        trainer: "CollectingTrainer",
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
        tool_mask: Sequence[Sequence[int]] | None,
        group_size: int,
    ) -> None:
        """Add what a rollout drew, of N completions; every rank draws as many, and a group may be spread over ranks.

        Args:
            prompt_ids, completion_ids: token ids of each.
            logprobs: one for each token of each; a tool's may be any.
            tool_mask: 1 for each token that was sampled, 0 for a tool's; None: all were sampled.
        """
        place, count = (trainer.accelerator.process_index, trainer.accelerator.num_processes), len(completion_ids)
        first, ends = len(self.rows) * place[1] + place[0] * count, trainer.end_ids
        for i, (prompt, ids) in enumerate(zip(prompt_ids, completion_ids, strict=True), first):
            prompt, mask = (
                np.asarray(prompt, np.int32),
                None if tool_mask is None else np.asarray(tool_mask[i - first], np.int8),
            )
            given = np.asarray(logprobs[i - first], np.float32)
            self.rows.append(
                {
                    "step": trainer.state.global_step + 1,
                    "sample_id": i,
                    "group": i // group_size,
                    "prompt_id": hashlib.blake2b(prompt.tobytes(), digest_size=ID_BYTES).hexdigest(),
                    "prompt_token_ids": prompt,
                    "token_ids": np.asarray(ids, np.int32),
                    "tool_mask": mask,
                    "tool_results": None if mask is None else spans(trainer._tokenizer, ids, mask.tolist()),
                    "sampler_logprobs": given if mask is None else given[mask == 1],
                    "trainer_logprobs": None,
                    "mismatched_tokens": None,
                    "length": len(ids) if mask is None else int(mask.sum()),
                    "truncated": is_cut(ids, ends),
                }
            )

    def score(
        self, trainer: "CollectingTrainer", prompts: Sequence[object], completions: Sequence[object], rewards_NF: Tensor
    ) -> None:
        """Add texts and rewards to the rows of the last rollout, of this rank and in order."""
        first = trainer.accelerator.process_index * len(prompts)
        own_BF = rewards_NF[first : first + len(prompts)]
        sums = weighted_sums(own_BF, trainer.reward_weights)
        logged: Mapping[str, Sequence[Any]] = trainer._pending_extra_logs
        texts: dict[str, str] = {}
        rows = self.rows[-len(prompts) :]
        for i, (row, given) in enumerate(zip(rows, own_BF.tolist(), strict=True)):
            names = zip(trainer.reward_func_names, given, strict=True)
            own = {name: or_none(value) for name, value in names}
            prompt = prompts[i]
            if not isinstance(prompt, str):
                if row["prompt_id"] not in texts:
                    texts[row["prompt_id"]] = trainer._tokenizer.decode(row["prompt_token_ids"].tolist())
                prompt = texts[row["prompt_id"]]
            row |= {
                "prompt": prompt,
                "completion": _text(completions[i]) if row["tool_results"] is None else _whole(trainer._tokenizer, row),
                "rewards": own,
                "reward": or_none(sums[i]),
                "extra": {name: values[i] for name, values in logged.items() if len(values) == len(rows)},
            }

    def weigh(self, output: JsonObject) -> None:
        """Add advantages to the rows of the last rollout, and to the rollout the numbers of its rows: `sample`, [B]."""
        advantages, mask = output["advantages"], sampled_mask(output)
        if advantages.ndim == 2:  # PPO's: one for each token
            advantages = (advantages * mask).sum(1) / mask.sum(1)
        drawn, count = len(self.rows), len(advantages)
        output["sample"] = torch.arange(drawn - count, drawn, device=advantages.device)
        for row, advantage in zip(self.rows[-count:], advantages.tolist(), strict=True):
            row["advantage"] = advantage

    def number(self, inputs: Mapping[str, Tensor], row: int) -> int:
        """Return the `sample_id` of a row of a micro-batch."""
        return self.rows[int(inputs["sample"][row])]["sample_id"]

    def compare(self, inputs: Mapping[str, Tensor], sampler: np.ndarray, trainer: np.ndarray) -> None:
        """Add how the two sides' log-probs of a micro-batch's real tokens, each [n] fp32, compare."""
        differs, end = metrics.mismatches(sampler, trainer), 0
        lengths = sampled_mask(inputs).sum(1).tolist()
        for index, length in zip(inputs["sample"].tolist(), lengths, strict=True):
            row, own, end = self.rows[index], slice(end, end + length), end + length
            if length != row["length"]:  # masked: no part of the loss
                continue
            row["mismatched_tokens"] = int(differs[own].sum())
            if row["mismatched_tokens"]:
                row["trainer_logprobs"] = trainer[own].copy()


def or_none(value: float) -> float | None:
    """Return None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def spans(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], mask: Sequence[int]) -> list[str]:
    """Return the text of each run of tokens that were not sampled: where `mask` is 0."""
    return [str(tokenizer.decode(list(run))) for sampled, run in runs(ids, mask) if not sampled]


def _whole(tokenizer: Any, row: Sample) -> str:
    """Return the text of all turns, and of what stands between them."""
    return tokenizer.decode(row["token_ids"].tolist())


def _text(completion: Any) -> str:
    """Return a completion's text; of a conversation, what the assistant's messages say."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)

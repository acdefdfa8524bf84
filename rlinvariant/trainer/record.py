"""The record of one optimizer step, on a rank and on all of them, and the row of metrics computed from it."""

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from rlinvariant import metrics
from rlinvariant.trainer.samples import Samples

PARTS = ("rollout", "score", "train", "sync", "save")
"""The parts of a step whose seconds are counted, each on its own: none is part of another."""

FAILURES = {"error": "errors", "timeout": "timeouts", "crash": "crashes"}
"""The kinds of a reward function's failure, and the metrics that count them."""


class Pair(NamedTuple):
    """Holds the log-probs that the two sides gave to the same tokens: two arrays [N], fp32."""

    sampler: np.ndarray
    trainer: np.ndarray

    @classmethod
    def of(cls, trainer_logprobs: Tensor, inputs: Mapping[str, Tensor]) -> Self:
        """Return both sides' log-probs of a micro-batch's real tokens; `trainer_logprobs` is [B, T], padded."""
        mask = inputs["completion_mask"].bool()
        return cls(inputs["sampling_per_token_logps"][mask].cpu().numpy(), trainer_logprobs[mask].cpu().numpy())

    @classmethod
    def join(cls, pairs: Sequence[Self]) -> Self:
        """Return all tokens of several pairs as one pair."""
        none = np.zeros(0, np.float32)
        return cls(*(np.concatenate([none, *(pair[side] for pair in pairs)]) for side in (0, 1)))


@dataclass
class StepRecord:
    """Holds what one rank has seen of one optimizer step; `merge` makes one record of those of all ranks.

    Args:
        compared: log-probs of tokens that were trained on for the first time, with the weights that the step began with.
        moved: log-probs of a later pass over a rollout: the policy has moved since, as it should.
        completions: token ids of what was sampled for training.
        samples: the same with texts, rewards and all else that is known of each.
        seconds: wall time of each of PARTS.
        failures: how many failures of reward functions were survived, by kind.
        first_mismatch: where the first two compared log-probs that differ stand, on the rank that saw them.
        weights_equal: whether the sampler's parameters had the bits that they should have, after the last sync.
        stop: the signal that asks the run to end after this step, 0 if none does.
        began: `time.perf_counter()` when the step began, on this rank.
    """

    compared: list[Pair] = field(default_factory=list)
    moved: list[Pair] = field(default_factory=list)
    completions: list[list[int]] = field(default_factory=list)
    samples: Samples = field(default_factory=Samples)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    failures: Counter[str] = field(default_factory=Counter)
    first_mismatch: metrics.FirstMismatch | None = None
    weights_equal: bool = True
    stop: int = 0
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def merge(cls, ranks: Sequence[Self]) -> Self:
        """Return the record of the whole step: tokens of all ranks in order, the seconds of the slowest in each part."""
        return cls(
            compared=[pair for rank in ranks for pair in rank.compared],
            moved=[pair for rank in ranks for pair in rank.moved],
            completions=[ids for rank in ranks for ids in rank.completions],
            samples=Samples.merge([rank.samples for rank in ranks]),
            seconds={part: max(rank.seconds[part] for rank in ranks) for part in PARTS},
            failures=sum((rank.failures for rank in ranks), Counter()),
            first_mismatch=next((rank.first_mismatch for rank in ranks if rank.first_mismatch is not None), None),
            weights_equal=all(rank.weights_equal for rank in ranks),
            stop=max(rank.stop for rank in ranks),
            began=ranks[0].began,
        )

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds that a block takes to a part, without those that the block itself adds to other parts."""
        began, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - before
            self.seconds[part] += time.perf_counter() - began - inside

    @property
    def sampled(self) -> int:
        """Return how many tokens were sampled."""
        return sum(map(len, self.completions))

    def onpolicy(self, clip_max: float) -> dict[str, float | int]:
        """Return `metrics.onpolicy` of the tokens compared, out of all that were sampled."""
        return metrics.onpolicy(*Pair.join(self.compared), self.sampled, clip_max)

    def approx_kl(self, clip_max: float) -> float:
        """Estimate KL(sampler || trainer) on the tokens of later passes, in nats (k3); NaN if there are none."""
        moved = Pair.join(self.moved)
        return metrics.onpolicy(*moved, len(moved.sampler), clip_max)["onpolicy/kl_k3"]

    def row(self, *, group_size: int, end_ids: Collection[int], clip_max: float, step_s: float) -> dict[str, float | int]:
        """Compute what a step's row of metrics.jsonl has from the record itself.

        Args:
            group_size: completions per prompt.
            end_ids: tokens that end a completion; one without any at its end was cut.
            clip_max: the largest importance ratio that a correction would let pass.
            step_s: wall time of the whole step, in seconds.

        Returns:
            The keys of `metrics.KEYS`, but for those that `trl_row` gives and those that a run counts over its steps.
        """
        lengths = [len(ids) for ids in self.completions]
        cut = [not ids or ids[-1] not in end_ids for ids in self.completions]
        trained = sum(len(pair.sampler) for pair in (*self.compared, *self.moved))
        return {
            **self.onpolicy(clip_max),
            "onpolicy/group_unique_frac": metrics.group_unique_frac(self.completions, group_size),
            "onpolicy/weights_equal": int(self.weights_equal),
            **{f"reward/{name}": self.failures[kind] for kind, name in FAILURES.items()},
            **metrics.rollout_stats(lengths, cut),
            "policy/approx_kl": self.approx_kl(clip_max),
            **{f"time/{part}": self.seconds[part] for part in PARTS},
            "perf/sampler_tok_s": _per_second(self.sampled, self.seconds["rollout"]),
            "perf/trainer_tok_s": _per_second(trained, self.seconds["train"]),
            "perf/step_s": step_s,
        }


@dataclass
class PPORecord(StepRecord):
    """Holds what a step of PPO leaves behind besides.

    Args:
        log_ratios: log(policy / policy that sampled) of the tokens trained on, one [n] float64 for each micro-batch, on the
            CPU.
        value_sums: [3] float64: the critic's losses, how often its clipped error was the larger, tokens; all summed.
        value_grad_norm: norm of the critic's gradient, the same on all ranks; NaN where no step was taken.
    """

    log_ratios: list[Tensor] = field(default_factory=list)
    value_sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    value_grad_norm: float = float("nan")

    @classmethod
    def merge(cls, ranks: Sequence[Self]) -> Self:
        """Return the record of the whole step; see `StepRecord.merge`."""
        whole = super().merge(ranks)
        whole.log_ratios = [x for rank in ranks for x in rank.log_ratios]
        whole.value_sums = torch.stack([rank.value_sums for rank in ranks]).sum(0)
        whole.value_grad_norm = ranks[0].value_grad_norm
        return whole

    def kl_sums(self) -> Tensor:
        """Return [2] float64: the k3 estimate of KL(policy that sampled || policy), summed over tokens, and how many tokens."""
        log_ratio = torch.cat(self.log_ratios)
        return torch.stack([(torch.expm1(log_ratio) - log_ratio).sum(), log_ratio.new_tensor(float(len(log_ratio)))])

    def ppo_row(self) -> dict[str, float | int]:
        """Compute PPO's part of a row from the record itself; NaN for what the step did not compute."""
        log_ratio = torch.cat([torch.zeros(0, dtype=torch.float64), *self.log_ratios])
        loss, clipped, tokens = self.value_sums.tolist()
        ratio, none = log_ratio.exp(), float("nan")
        seen = bool(len(ratio))
        return {
            "value/loss": loss / tokens if tokens else none,
            "value/clip_frac": clipped / tokens if tokens else none,
            "value/grad_norm": self.value_grad_norm,
            "policy/approx_kl": (torch.expm1(log_ratio) - log_ratio).mean().item() if seen else none,
            "policy/ratio_mean": ratio.mean().item() if seen else none,
            "policy/ratio_min": ratio.min().item() if seen else none,
            "policy/ratio_max": ratio.max().item() if seen else none,
        }


def trl_row(logs: Mapping[str, float], means: Mapping[str, float]) -> dict[str, float]:
    """Rename what TRL knows of a step; NaN where it does not say.

    Args:
        logs: what TRL's trainer logs: loss, and where there are any grad_norm and learning_rate.
        means: TRL's own metrics of the step, averaged.
    """
    none = float("nan")
    return {
        "reward/mean": means.get("reward", none),
        "policy/entropy": means.get("entropy", none),
        "policy/clip_frac": means.get("clip_ratio/region_mean", none),
        "optim/loss": logs["loss"],
        "optim/grad_norm": logs.get("grad_norm", none),
        "optim/lr": logs.get("learning_rate", none),
    }


def _per_second(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds else float("nan")

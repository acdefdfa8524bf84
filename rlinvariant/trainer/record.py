"""The record of one optimizer step, on a rank and on all of them, and the row of metrics computed from it."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from rlinvariant import metrics
from rlinvariant.metrics import Trained
from rlinvariant.trainer.samples import Samples
from rlinvariant.trainer.turns import sampled_mask

PARTS = ("rollout", "tools", "score", "train", "sync", "save")
"""The parts of a step whose seconds are counted, each on its own: none is part of another."""

FAILURES = {"error": "errors", "timeout": "timeouts", "crash": "crashes"}
"""The kinds of a reward function's failure, and the metrics that count them."""


class Pair(NamedTuple):
    """Holds the log-probs that the two sides gave to the same tokens: two arrays [N], fp32."""

    sampler: np.ndarray
    trainer: np.ndarray

    @classmethod
    def of(cls, trainer_logprobs: Tensor, inputs: Mapping[str, Tensor]) -> Self:
        """Return both sides' log-probs of a micro-batch's sampled tokens; `trainer_logprobs` is [B, T], padded."""
        mask = sampled_mask(inputs)
        return cls(inputs["sampling_per_token_logps"][mask].cpu().numpy(), trainer_logprobs[mask].cpu().numpy())

    @classmethod
    def join(cls, pairs: Sequence[Self]) -> Self:
        """Return all tokens of several pairs as one pair."""
        none = np.zeros(0, np.float32)
        return cls(*(np.concatenate([none, *(pair[side] for pair in pairs)]) for side in (0, 1)))


@dataclass
class Graded:
    """Holds completions that were drawn and graded together, of all ranks, group after group.

    Args:
        lengths: tokens of each.
        cut: whether each was cut: it does not end in a token that ends it.
        rewards: of each reward function, by its name, what it gave each completion; NaN where it does not apply.
        total: the reward that trains each: the weighted sum; NaN where no function applies.
    """

    lengths: list[int] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)
    rewards: dict[str, list[float]] = field(default_factory=dict)
    total: list[float] = field(default_factory=list)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return the completions of several rollouts as those of one."""
        whole = cls()
        for part in parts:
            for name, values in vars(part).items():
                if name == "rewards":
                    for function, given in values.items():
                        whole.rewards.setdefault(function, []).extend(given)
                else:
                    getattr(whole, name).extend(values)
        return whole

    def first(self, count: int) -> Self:
        """Return the first completions alone."""
        rewards = {name: given[:count] for name, given in self.rewards.items()}
        return type(self)(self.lengths[:count], self.cut[:count], rewards, self.total[:count])

    def row(self, group_size: int) -> dict[str, float | int]:
        """Compute the numbers of rewards and completions; `group_size` is how many completions a prompt has."""
        return metrics.reward_stats(self.total, self.rewards, group_size) | metrics.completion_stats(self.lengths, self.cut)


@dataclass
class StepRecord:
    """Holds what one rank has seen of one optimizer step; `merge` makes one record of those of all ranks.

    Args:
        compared: log-probs of tokens that were trained on for the first time, with the weights that the step began with.
        moved: log-probs of a later pass over a rollout: the policy has moved since, as it should.
        samples: what was sampled for training, with tokens, texts, rewards and all else that is known of each.
        trained: what the loss saw of each micro-batch.
        corrected: of each rollout, the differences and the weights of TRL's correction, where it is on; two arrays, fp32.
        seconds: wall time of each of PARTS.
        failures: how many failures of reward functions were survived, by kind.
        prompts: how many `requests` were drawn, and of their prompts how many tokens were computed and how many came from the
            cache, `prefill` and `cached`; the same of turns after a sample's first, `later_prefill` and `later_cached`.
        masked: how many of the compared tokens are trained on by nobody: the limit cut their completions.
        first_mismatch: where the first two compared log-probs that differ stand, on the rank that saw them.
        weights_equal: whether the sampler's parameters had the bits that they should have, after the last sync.
        merged_share: how much of its adapters a stock sampler's weights have, see `lora.share_merged`; None: none were merged.
        router_flips: of each micro-batch of a mixture, the compared tokens that sampler and trainer send to other experts, in
            each layer with experts and, last, in any; none where the sampler does not say.
        stop: the signal that asks the run to end after this step, 0 if none does.
        began: `time.perf_counter()` when the step began, on this rank.
    """

    compared: list[Pair] = field(default_factory=list)
    moved: list[Pair] = field(default_factory=list)
    samples: Samples = field(default_factory=Samples)
    trained: list[Trained] = field(default_factory=list)
    corrected: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    failures: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)
    masked: int = 0
    first_mismatch: metrics.FirstMismatch | None = None
    weights_equal: bool = True
    merged_share: float | None = None
    router_flips: list[list[int]] = field(default_factory=list)
    stop: int = 0
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def merge(cls, ranks: Sequence[Self]) -> Self:
        """Return the record of the whole step: tokens of all ranks in order, the seconds of the slowest in each part."""
        return cls(
            compared=[pair for rank in ranks for pair in rank.compared],
            moved=[pair for rank in ranks for pair in rank.moved],
            samples=Samples.merge([rank.samples for rank in ranks]),
            trained=[batch for rank in ranks for batch in rank.trained],
            corrected=[arrays for rank in ranks for arrays in rank.corrected],
            seconds={part: max(rank.seconds[part] for rank in ranks) for part in PARTS},
            masked=sum(rank.masked for rank in ranks),
            failures=sum((rank.failures for rank in ranks), Counter()),
            prompts=sum((rank.prompts for rank in ranks), Counter()),
            first_mismatch=next((rank.first_mismatch for rank in ranks if rank.first_mismatch is not None), None),
            weights_equal=all(rank.weights_equal for rank in ranks),
            merged_share=ranks[0].merged_share,
            router_flips=[flips for rank in ranks for flips in rank.router_flips],
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

    def count_prompt(self, tokens: int, cached: int, later: bool) -> None:
        """Count a request whose prompt has so many tokens, some of them from the cache; `later`: of no first turn."""
        self.prompts += Counter(requests=1, prefill=tokens - cached, cached=cached)
        if later:
            self.prompts += Counter(later_prefill=tokens - cached, later_cached=cached)

    @property
    def sampled(self) -> int:
        """Return how many tokens were sampled."""
        return sum(row["length"] for row in self.samples.rows)

    def onpolicy(self, clip_max: float) -> dict[str, float | int]:
        """Return `metrics.onpolicy` of the tokens compared, out of all that were sampled."""
        return metrics.onpolicy(*Pair.join(self.compared), self.sampled, clip_max)

    def approx_kl(self, clip_max: float) -> float:
        """Estimate KL(sampler || trainer) on the tokens of later passes, in nats (k3); NaN if there are none."""
        moved = Pair.join(self.moved)
        return metrics.onpolicy(*moved, len(moved.sampler), clip_max)["onpolicy/kl_k3"]

    def policy_row(self) -> dict[str, float]:
        """Compute what is said of the tokens trained on, and of TRL's correction."""
        row = metrics.policy_stats(self.trained)
        if not self.corrected:
            return row
        apart, weights = (np.concatenate(arrays) for arrays in zip(*self.corrected, strict=True))
        apart = apart[~np.isnan(apart)]
        name, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
        row |= {f"{name}/mean": metrics.mean(apart), f"{name}/max": float(apart.max(initial=0.0))}
        mean, least, most = (
            metrics.mean(weights),
            *((float(weights.min()), float(weights.max())) if len(weights) else (0.0, 0.0)),
        )
        return row | {f"{ratio}/min": least, f"{ratio}/mean": mean, f"{ratio}/max": most}

    def row(self, *, group_size: int, clip_max: float, step_s: float) -> dict[str, float | int]:
        """Compute what a step's row of metrics.jsonl has from the record itself.

        Args:
            group_size: completions per prompt.
            clip_max: the largest importance ratio that a correction would let pass.
            step_s: wall time of the whole step, in seconds.

        Returns:
            The keys of `keys.KEYS` that are ours, but for those that a run counts over its steps.
        """
        trained = sum(len(pair.sampler) for pair in (*self.compared, *self.moved))
        drawn = [row["token_ids"].tolist() for row in self.samples.rows]  # merged: group after group
        return {
            **self.onpolicy(clip_max),
            "onpolicy/group_unique_frac": metrics.group_unique_frac(drawn, group_size),
            "onpolicy/masked_tokens": self.masked,
            "onpolicy/weights_equal": int(self.weights_equal),
            **{f"reward/{name}": self.failures[kind] for kind, name in FAILURES.items()},
            "policy/approx_kl": self.approx_kl(clip_max),
            "rollout/turns": self.prompts["requests"] / len(drawn) if drawn else float("nan"),
            **{f"perf/{kind}_tokens": self.prompts[kind] for kind in ("prefill", "cached", "later_prefill", "later_cached")},
            **{f"time/{part}": self.seconds[part] for part in PARTS},
            "perf/sampler_tok_s": _per_second(self.sampled, self.seconds["rollout"]),
            "perf/trainer_tok_s": _per_second(trained, self.seconds["train"]),
            "step_time": step_s,
            **({} if self.merged_share is None else {"lora/merged_share": self.merged_share}),
            **self._flips(),
        }

    def _flips(self) -> dict[str, int]:
        """Return how many compared tokens went to other experts, in any layer and in each; nothing where none was looked at."""
        if not self.router_flips:
            return {}
        *layers, anywhere = (sum(column) for column in zip(*self.router_flips, strict=True))
        return {"onpolicy/router_flips": anywhere, **{f"onpolicy/router_flips/{i}": n for i, n in enumerate(layers)}}


@dataclass
class PPORecord(StepRecord):
    """Holds what a step of PPO leaves behind besides.

    Args:
        log_ratios: log(policy / policy that sampled) of the tokens trained on, one [n] float64 for each micro-batch, on the
            CPU.
        value_losses: the critic's loss of each token, one [n] fp32 for each micro-batch, on the CPU.
        values_clipped: for how many tokens of each micro-batch its clipped error was the larger.
        value_grad_norm: norm of the critic's gradient, the same on all ranks; NaN where no step was taken.
    """

    log_ratios: list[Tensor] = field(default_factory=list)
    value_losses: list[Tensor] = field(default_factory=list)
    values_clipped: list[int] = field(default_factory=list)
    value_grad_norm: float = float("nan")

    @classmethod
    def merge(cls, ranks: Sequence[Self]) -> Self:
        """Return the record of the whole step; see `StepRecord.merge`."""
        whole = super().merge(ranks)
        whole.log_ratios = [x for rank in ranks for x in rank.log_ratios]
        whole.value_losses = [x for rank in ranks for x in rank.value_losses]
        whole.values_clipped = [count for rank in ranks for count in rank.values_clipped]
        whole.value_grad_norm = ranks[0].value_grad_norm
        return whole

    def kl_of_tokens(self) -> float:
        """Return the k3 estimate of KL(policy that sampled || policy), in nats, a mean over tokens; NaN if there are none."""
        log_ratio = self._log_ratio()
        return metrics.mean((torch.expm1(log_ratio) - log_ratio).numpy())

    def _log_ratio(self) -> Tensor:
        """Return those of all tokens, [n] float64, the same however ranks and micro-batches have divided them."""
        return torch.cat([torch.zeros(0, dtype=torch.float64), *self.log_ratios]).sort().values

    def ppo_row(self) -> dict[str, float | int]:
        """Compute PPO's part of a row from the record itself; NaN for what the step did not compute."""
        losses = torch.cat([torch.zeros(0), *self.value_losses]).numpy()
        ratio, none = self._log_ratio().exp(), float("nan")
        seen = bool(len(ratio))
        return {
            "value/loss": metrics.mean(losses),
            "value/clip_frac": sum(self.values_clipped) / len(losses) if len(losses) else none,
            "value/grad_norm": self.value_grad_norm,
            "policy/approx_kl": self.kl_of_tokens(),
            "policy/ratio_mean": metrics.mean(ratio.numpy()),
            "policy/ratio_min": ratio.min().item() if seen else none,
            "policy/ratio_max": ratio.max().item() if seen else none,
        }


def _per_second(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds else float("nan")

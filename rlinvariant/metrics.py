"""Sampler-vs-trainer numbers, as pure functions of what one step gathered from all ranks.

Give these functions the values of every rank together: a mean of the means of ranks is another number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlinvariant import bits

ONPOLICY_KEYS = (
    "onpolicy/mismatched_tokens",
    "onpolicy/compared_tokens",
    "onpolicy/unscored_tokens",
    "onpolicy/coverage",
    "onpolicy/logprob_absdiff/mean",
    "onpolicy/logprob_absdiff/p99",
    "onpolicy/logprob_absdiff/max",
    "onpolicy/ulp/max",
    "onpolicy/kl_k1",
    "onpolicy/kl_k3",
    "onpolicy/is_ratio/min",
    "onpolicy/is_ratio/mean",
    "onpolicy/is_ratio/max",
    "onpolicy/is_ess",
    "onpolicy/is_clipped_frac",
)
"""The keys that `onpolicy` returns."""

ROLLOUT_KEYS = ("rollout/len_mean", "rollout/len_max", "rollout/truncated_frac", "rollout/empty_frac")
"""The keys that `rollout_stats` returns."""

KEYS = (
    *ONPOLICY_KEYS,
    "onpolicy/group_unique_frac",
    "onpolicy/weights_equal",
    "onpolicy/weight_version_lag",
    "onpolicy/exact_streak_tokens",
    "reward/mean",
    "reward/errors",
    "reward/timeouts",
    "reward/crashes",
    *ROLLOUT_KEYS,
    "policy/entropy",
    "policy/clip_frac",
    "policy/approx_kl",
    "optim/loss",
    "optim/grad_norm",
    "optim/lr",
    "time/rollout",
    "time/score",
    "time/train",
    "time/sync",
    "time/save",
    "perf/sampler_tok_s",
    "perf/trainer_tok_s",
    "perf/step_s",
)
"""Every key that a row of metrics.jsonl has, whether invariance is on or off."""

PPO_KEYS = (
    "value/loss",
    "value/explained_variance",
    "value/mean",
    "value/clip_frac",
    "value/grad_norm",
    "value/lr",
    "policy/ratio_mean",
    "policy/ratio_min",
    "policy/ratio_max",
    "policy/early_stopped",
    "reward/kl_penalty",
)
"""The keys that a row has besides with algorithm=ppo.

`value/mean`, `value/explained_variance` and `reward/kl_penalty` are of the rollout that the step trains on; ratios, to the
policy that sampled, and `value/loss` are of the step itself, before it moves anything. A step that is skipped, the policy
having moved too far, is 1 in `policy/early_stopped`; what it did not compute is NaN."""


def onpolicy(
    sampler_logprobs: np.ndarray | Tensor, trainer_logprobs: np.ndarray | Tensor, sampled_tokens: int, clip_max: float
) -> dict[str, float | int]:
    """Compare the log-probs that sampler and trainer gave to the same sampled tokens.

        r = trainer - sampler (float64; exactly 0 where the two words are the same),  w = exp(r)
        kl_k1 = mean(-r),  kl_k3 = mean(expm1(r) - r): estimates of KL(sampler || trainer) on the sampler's tokens
        is_ess = (sum w)^2 / (N sum w^2),  is_clipped_frac = fraction of w > clip_max

    Args:
        sampler_logprobs, trainer_logprobs: [N] fp32, the tokens scored by both, of all ranks.
        sampled_tokens: how many tokens were sampled in all, N or more.
        clip_max: the largest importance ratio that a correction would let pass.

    Returns:
        One value for each of ONPOLICY_KEYS. p99 is a difference that occurred (no interpolation). A NaN log-prob is
        compared and mismatched, and makes every number derived from values NaN. With N = 0 those numbers are NaN and
        coverage is 0, since nothing was shown to be equal.

    Raises:
        TypeError: a log-prob array is not fp32.
        ValueError: the arrays are not of one length, or longer than sampled_tokens.

    Bits: equal means the same 32 bits, and NaN equals nothing. With no mismatch every number is exact: 0, ratio and
        ESS 1.
    """
    sampler, trainer = _fp32(sampler_logprobs, "sampler_logprobs"), _fp32(trainer_logprobs, "trainer_logprobs")
    if sampler.ndim != 1 or sampler.shape != trainer.shape:
        raise ValueError(f"expected two arrays [N], got sampler {sampler.shape} and trainer {trainer.shape}")
    compared = len(sampler)
    if sampled_tokens < compared:
        raise ValueError(f"{compared} tokens compared, but only {sampled_tokens} sampled")
    mismatched = mismatches(sampler, trainer)
    numbers = _from_values(sampler, trainer, mismatched, clip_max) if compared else {}
    return {key: float("nan") for key in ONPOLICY_KEYS} | {
        "onpolicy/mismatched_tokens": int(mismatched.sum()),
        "onpolicy/compared_tokens": compared,
        "onpolicy/unscored_tokens": int(sampled_tokens) - compared,
        "onpolicy/coverage": compared / sampled_tokens if sampled_tokens else 0.0,
        **numbers,
    }


def _from_values(sampler: np.ndarray, trainer: np.ndarray, mismatched: np.ndarray, clip_max: float) -> dict[str, float | int]:
    # Infinities are results here (an impossible token, an overflowing ratio), to be reported and not warned about.
    with np.errstate(over="ignore", invalid="ignore"):
        # Equal words are exactly 0 apart, which -inf minus -inf would not be.
        log_ratio = np.where(mismatched, trainer.astype(np.float64) - sampler.astype(np.float64), 0.0)
        absdiff, ratio = np.abs(log_ratio), np.exp(log_ratio)
        weight = np.exp(log_ratio - log_ratio.max())  # ESS does not change with scale, and this scale cannot overflow
        has_nan = bool(np.isnan(log_ratio).any())
        max_ulps = int(bits.ulps(torch.tensor(sampler), torch.tensor(trainer)).max())
        return {
            "onpolicy/logprob_absdiff/mean": float(absdiff.mean()),
            "onpolicy/logprob_absdiff/p99": float(np.quantile(absdiff, 0.99, method="higher")),
            "onpolicy/logprob_absdiff/max": float(absdiff.max()),
            "onpolicy/ulp/max": float("nan") if has_nan else max_ulps,
            "onpolicy/kl_k1": float(-log_ratio.mean()) + 0.0,  # + 0.0 turns -0.0 into 0.0
            "onpolicy/kl_k3": float((np.expm1(log_ratio) - log_ratio).mean()),
            "onpolicy/is_ratio/min": float(ratio.min()),
            "onpolicy/is_ratio/mean": float(ratio.mean()),
            "onpolicy/is_ratio/max": float(ratio.max()),
            "onpolicy/is_ess": float(weight.sum() ** 2 / (len(weight) * (weight**2).sum())),
            "onpolicy/is_clipped_frac": float("nan") if has_nan else float((ratio > clip_max).mean()),
        }


@dataclass(frozen=True)
class FirstMismatch:
    """Describes where, in row-major order, the first two log-probs that are not the same bits stand."""

    sequence: int
    position: int
    sampler_logprob: float
    trainer_logprob: float
    sampler_hex: str
    trainer_hex: str

    def __str__(self) -> str:
        return (
            f"sequence {self.sequence}, position {self.position}: "
            f"sampler {self.sampler_logprob:.9g} {self.sampler_hex}, "
            f"trainer {self.trainer_logprob:.9g} {self.trainer_hex}"
        )


def first_mismatch(
    sampler_logprobs: np.ndarray | Tensor, trainer_logprobs: np.ndarray | Tensor, mask: np.ndarray | Tensor
) -> FirstMismatch | None:
    """Find the first token whose two log-probs are not the same bits; None if there is none.

    Args:
        sampler_logprobs, trainer_logprobs: [B, T] fp32, padded.
        mask: [B, T], true or nonzero where a token was sampled; padding is not looked at.

    Returns:
        `sequence` is the row and `position` the column.

    Raises:
        TypeError: a log-prob array is not fp32.
        ValueError: the three shapes are not one [B, T].

    Bits: as `onpolicy`; NaN equals nothing.
    """
    sampler, trainer = _fp32(sampler_logprobs, "sampler_logprobs"), _fp32(trainer_logprobs, "trainer_logprobs")
    chosen = _numpy(mask).astype(bool)
    if sampler.ndim != 2 or not sampler.shape == trainer.shape == chosen.shape:
        raise ValueError(
            f"expected three arrays [B, T], got sampler {sampler.shape}, trainer {trainer.shape}, mask {chosen.shape}"
        )
    places = np.argwhere(mismatches(sampler, trainer) & chosen)
    if not len(places):
        return None
    row, column = (int(i) for i in places[0])
    words = [f"0x{int(x[row, column].view(np.uint32)):08X}" for x in (sampler, trainer)]
    return FirstMismatch(row, column, float(sampler[row, column]), float(trainer[row, column]), *words)


def group_unique_frac(token_id_lists: Sequence[Sequence[int]], group_size: int) -> float:
    """Give the fraction of completions distinct within their group: 1 if all differ, 1 / group_size if none do.

    Args:
        token_id_lists: the completions, group after group.
        group_size: completions per prompt.

    Raises:
        ValueError: the completions do not fill whole groups.
    """
    if group_size < 1 or len(token_id_lists) % group_size:
        raise ValueError(f"{len(token_id_lists)} completions do not fill groups of {group_size}")
    if not token_id_lists:
        return float("nan")
    groups = [token_id_lists[i : i + group_size] for i in range(0, len(token_id_lists), group_size)]
    return sum(len({tuple(ids) for ids in group}) for group in groups) / len(token_id_lists)


def rollout_stats(lengths: Sequence[int], truncated: Sequence[bool]) -> dict[str, float | int]:
    """Summarise the completions of a step; one value for each of ROLLOUT_KEYS, NaN if there are none.

    Args:
        lengths: tokens of each completion.
        truncated: whether it was cut by the length limit.

    Raises:
        ValueError: the two differ in length.
    """
    if len(lengths) != len(truncated):
        raise ValueError(f"{len(lengths)} lengths, but {len(truncated)} truncation flags")
    if not lengths:
        return {key: float("nan") for key in ROLLOUT_KEYS}
    return {
        "rollout/len_mean": float(sum(lengths) / len(lengths)),
        "rollout/len_max": int(max(lengths)),
        "rollout/truncated_frac": sum(map(bool, truncated)) / len(lengths),
        "rollout/empty_frac": sum(length == 0 for length in lengths) / len(lengths),
    }


def mean(values: Sequence[float] | np.ndarray) -> float:
    """Return the mean, correctly rounded: it does not depend on the order of the values. NaN if there are none."""
    numbers = values.tolist() if isinstance(values, np.ndarray) else values
    try:
        return math.fsum(numbers) / len(numbers) if numbers else float("nan")
    except (OverflowError, ValueError):  # a sum that no float64 holds; infinities of both signs
        return float("nan")


def mismatches(sampler: np.ndarray, trainer: np.ndarray) -> np.ndarray:
    """Return where two fp32 arrays of one shape are not the same bits, or one of them is NaN: bool of that shape."""
    return (sampler.view(np.int32) != trainer.view(np.int32)) | np.isnan(sampler) | np.isnan(trainer)


def _numpy(x: np.ndarray | Tensor) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _fp32(x: np.ndarray | Tensor, name: str) -> np.ndarray:
    if x.dtype not in (torch.float32, np.float32):
        raise TypeError(f"{name} is {x.dtype}: expected float32, whose words are compared")
    return _numpy(x)

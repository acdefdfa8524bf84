"""Sampler-vs-trainer numbers, as pure functions of what one step gathered from all ranks.

Give these functions the values of every rank and micro-batch together: a mean of means is another number. None of them depends
on the order of what it is given, not in its last bit: sums are correctly rounded, or are taken over sorted values. `keys` says
what each number is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlinvariant import bits, keys

ONPOLICY_KEYS = keys.keys(keys.ONPOLICY)[:15]
"""The keys that `onpolicy` returns."""


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
        log_ratio.sort()  # so that no sum below depends on the order of micro-batches
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
    """Describes where, in row-major order, the first two log-probs that are not the same bits stand.

    Args:
        sequence, position: row and column, from 0.
        turn: of a row that was sampled in several turns, which of them, from 1; None: there is one.
    """

    sequence: int
    position: int
    sampler_logprob: float
    trainer_logprob: float
    sampler_hex: str
    trainer_hex: str
    turn: int | None = None

    def __str__(self) -> str:
        return (
            f"sequence {self.sequence}, {'' if self.turn is None else f'turn {self.turn}, '}position {self.position}: "
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
        `sequence` is the row and `position` the column; `turn` counts runs of 1 in the row's mask, if it has several.

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
    begins = np.diff(chosen[row].astype(np.int8), prepend=np.int8(0)) == 1
    turn = int(begins[: column + 1].sum()) if begins.sum() > 1 else None
    return FirstMismatch(row, column, float(sampler[row, column]), float(trainer[row, column]), words[0], words[1], turn)


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


def completion_stats(lengths: Sequence[int], cut: Sequence[bool]) -> dict[str, float | int]:
    """Summarise completions; one value for each of keys.COMPLETIONS, NaN if there are none.

    Args:
        lengths: tokens of each completion.
        cut: whether it does not end in a token that ends it.

    Raises:
        ValueError: the two differ in length.
    """
    if len(lengths) != len(cut):
        raise ValueError(f"{len(lengths)} lengths, but {len(cut)} flags of what was cut")
    if not lengths:
        return dict.fromkeys(keys.keys(keys.COMPLETIONS), float("nan"))
    ended = [length for length, was_cut in zip(lengths, cut, strict=True) if not was_cut] or [0]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(map(bool, cut)) / len(lengths),
        "completions/mean_terminated_length": sum(ended) / len(ended),
        "completions/min_terminated_length": min(ended),
        "completions/max_terminated_length": max(ended),
        "rollout/empty_frac": sum(length == 0 for length in lengths) / len(lengths),
    }


def reward_stats(rewards: Sequence[float], by_function: Mapping[str, Sequence[float]], group_size: int) -> dict[str, float]:
    """Summarise the rewards of completions, NaN where no function applies to one.

    Args:
        rewards: of each completion, the one that trains; group after group.
        by_function: of each function, by its name, what it gave each completion; NaN where it does not apply.
        group_size: completions per prompt.

    Returns:
        `reward`, `reward_std`, `frac_reward_zero_std`, and mean and standard deviation of each function.
    """
    groups = [_known(rewards[i : i + group_size]) for i in range(0, len(rewards), group_size)]
    equal = [bool(len(group)) and min(group) == max(group) for group in groups]
    row = {
        "reward": mean(_known(rewards)),
        "reward_std": std(_known(rewards)),
        "frac_reward_zero_std": sum(equal) / len(equal) if equal else float("nan"),
    }
    for name, given in by_function.items():
        row |= {f"rewards/{name}/mean": mean(_known(given)), f"rewards/{name}/std": std(_known(given))}
    return row


class Trained(NamedTuple):
    """Holds what a loss saw of a micro-batch of n tokens in B sequences.

    Args:
        lengths: [B] int64, tokens of each sequence.
        entropies: [n] fp32, of the policy, in nats.
        kl: [n] fp32, the estimate of KL to the reference, in nats; [0] without one.
        clipped: three arrays [B]: how many ratios were clipped at the lower end, at the upper end, and how many there are.
        clips: where the loss clips ratios.
    """

    lengths: np.ndarray
    entropies: np.ndarray
    kl: np.ndarray
    clipped: tuple[np.ndarray, np.ndarray, np.ndarray]
    clips: Literal["both", "above"] | None

    @classmethod
    def first(cls, batches: "Sequence[Trained]", sequences: int) -> "list[Trained]":
        """Return the micro-batches without the sequences that come after so many."""
        kept: list[Trained] = []
        for batch in batches:
            lengths = batch.lengths[:sequences]
            tokens, counts = int(lengths.sum()), [x[:sequences] for x in batch.clipped]
            kept.append(
                cls(lengths, batch.entropies[:tokens], batch.kl[:tokens], (counts[0], counts[1], counts[2]), batch.clips)
            )
            sequences -= len(lengths)
        return kept


def policy_stats(batches: Sequence["Trained"]) -> dict[str, float]:
    """Summarise the tokens that a step trains on: entropy, KL to the reference, what is clipped; NaN where there is none."""
    entropies, kl = (np.concatenate([np.zeros(0), *(getattr(x, name) for x in batches)]) for name in ("entropies", "kl"))
    low, high, terms = (np.concatenate([np.zeros(0, int), *(x.clipped[i] for x in batches)]) for i in range(3))
    row = {"entropy": mean(entropies), **({"kl": mean(kl)} if len(kl) else {})}
    seen, none = int(terms.sum()), float("nan")
    if any(x.clips == "above" for x in batches):
        row["cispo_clip_ratio"] = int(high.sum()) / seen if seen else none
    if not all(x.clips == "both" for x in batches):
        return row | {"clip_ratio/region_mean": none}
    there = terms > 0
    shares = [low[there] / terms[there], high[there] / terms[there]]
    return row | {
        "clip_ratio/low_mean": int(low.sum()) / seen if seen else none,
        "clip_ratio/low_min": float(shares[0].min()) if seen else none,
        "clip_ratio/high_mean": int(high.sum()) / seen if seen else none,
        "clip_ratio/high_max": float(shares[1].max()) if seen else none,
        "clip_ratio/region_mean": int(low.sum() + high.sum()) / seen if seen else none,
    }


def mean(values: Sequence[float] | np.ndarray) -> float:
    """Return the mean, correctly rounded: it does not depend on the order of the values. NaN if there are none."""
    numbers = values.tolist() if isinstance(values, np.ndarray) else values
    try:
        return math.fsum(numbers) / len(numbers) if numbers else float("nan")
    except (OverflowError, ValueError):  # a sum that no float64 holds; infinities of both signs
        return float("nan")


def std(values: Sequence[float] | np.ndarray) -> float:
    """Return the standard deviation, with N - 1, independent of the order of the values; NaN for fewer than two."""
    if len(values) < 2:
        return float("nan")
    centre = mean(values)
    return math.sqrt(mean([(x - centre) ** 2 for x in values]) * len(values) / (len(values) - 1))


def _known(values: Sequence[float]) -> list[float]:
    return [x for x in values if not math.isnan(x)]


def mismatches(sampler: np.ndarray, trainer: np.ndarray) -> np.ndarray:
    """Return where two fp32 arrays of one shape are not the same bits, or one of them is NaN: bool of that shape."""
    return (sampler.view(np.int32) != trainer.view(np.int32)) | np.isnan(sampler) | np.isnan(trainer)


def _numpy(x: np.ndarray | Tensor) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _fp32(x: np.ndarray | Tensor, name: str) -> np.ndarray:
    if x.dtype not in (torch.float32, np.float32):
        raise TypeError(f"{name} is {x.dtype}: expected float32, whose words are compared")
    return _numpy(x)

"""Count log-probs that are not the same 32 bits: of one engine's completions, and of a sampler's against a trainer's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlinvariant import bits
from rlinvariant.rollout import Completion
from rlinvariant.trainer.score import Layout, score, stock_score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Parity:
    """Holds one comparison of log-probs: how many tokens, how many of them not equal, and the same with stock kernels."""

    bench: str
    model: str
    dtype: str
    compared: str
    tokens: int
    mismatched: int
    control: str
    control_mismatched: int


def differing(a: Completion, b: Completion) -> int:
    """Count the tokens whose log-prob differs, or that come after the place where the completions part."""
    words = [bits.words(torch.tensor(c.sampler_logprobs)).tolist() for c in (a, b)]
    same = [x == y and p == q for x, y, p, q in zip(a.token_ids, b.token_ids, *words, strict=True)]
    parted = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y), len(same))
    return sum(not s for s in same[:parted]) + len(same) - parted


def against_trainer(
    model: "PreTrainedModel", prompts: Sequence[list[int]], drawn: Sequence[Completion], temperature: float, rows: int
) -> int:
    """Count the tokens whose log-prob a patched model computes otherwise, given `rows` of TRL's padded rows at a time."""
    found = score(model, prompts, drawn, temperature, Layout(rows))
    return _unequal(torch.cat(found), [x for c in drawn for x in c.sampler_logprobs])


def against_stock_trainer(
    model: "PreTrainedModel", prompts: Sequence[list[int]], drawn: Sequence[Completion], temperature: float
) -> int:
    """Count the same with a stock transformers model, one completion at a time: the control."""
    found = stock_score(model, prompts, drawn, temperature)
    return _unequal(torch.cat(found), [x for c in drawn for x in c.sampler_logprobs])


def _unequal(logprobs: Tensor, sampled: list[float]) -> int:
    if len(logprobs) != len(sampled):
        raise ValueError(f"{len(logprobs)} log-probs were computed for {len(sampled)} sampled tokens")
    found = bits.compare(logprobs, torch.tensor(sampled))
    return found.count if found else 0

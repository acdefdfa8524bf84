"""The types of what a trainer is given: a sampler, TRL's own arguments, and functions that are called as it trains."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, Required, TypeAlias, TypedDict

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rlinvariant.conflicts import Invariance
from rlinvariant.metrics import FirstMismatch
from rlinvariant.rollout import Completion, Rollout

Row: TypeAlias = dict[str, float]
"""The metrics of one optimizer step, `step` among them."""
OnRow: TypeAlias = Callable[[Row, FirstMismatch | None], object]
OnSamples: TypeAlias = Callable[[list[dict[str, Any]]], object]
OnRollout: TypeAlias = Callable[[int, Rollout], object]
RewardFunction: TypeAlias = str | PreTrainedModel | Callable[..., Any]
"""As in TRL: a reward model or its name, or a function of completions, plain or async, that returns one number for each."""


class SamplerLike(Protocol):
    """What the trainer needs of a sampler; `rlinvariant.sampler.engine.Sampler` has it."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_tokens: int,
        stop_token_ids: Sequence[int] = (),
    ) -> list[Completion]: ...

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def differing_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[str]: ...


class TRLArguments(TypedDict, total=False):
    """The further arguments of `trl.GRPOTrainer` that our trainers take, with TRL's meaning."""

    train_dataset: Dataset | IterableDataset | None
    eval_dataset: Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, Dataset | IterableDataset] | None
    processing_class: PreTrainedTokenizerBase | None
    reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None
    callbacks: list[TrainerCallback] | None
    optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]
    peft_config: object  # peft.PeftConfig, where the trainer is stock


class InvariantOptions(TRLArguments, total=False):
    """TRL's further arguments, and those of `InvariantGRPOTrainer`, which says what they mean."""

    sampler: Required[Callable[[], SamplerLike]]
    invariance: Invariance
    dtype: torch.dtype
    staleness: int
    on_row: OnRow | None
    on_samples: OnSamples | None
    on_rollout: OnRollout | None
    samples_every: int

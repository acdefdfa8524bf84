"""The types of what a trainer is given: a sampler, TRL's own arguments, and functions that are called as it trains."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Required, TypeAlias, TypedDict

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rlinvariant.checksums import Checksum
from rlinvariant.conflicts import Gradients, Invariance
from rlinvariant.metrics import FirstMismatch
from rlinvariant.rewards.limits import OnError
from rlinvariant.rollout import Completion, Rollout
from rlinvariant.tools.limits import OnToolError
from rlinvariant.types import EnvironmentFactory, RolloutCall, ToolCall

Row: TypeAlias = dict[str, float]
"""The metrics of one optimizer step, `step` among them."""
OnRow: TypeAlias = Callable[[Row, FirstMismatch | None], object]
OnEvaluation: TypeAlias = Callable[[dict[str, Any]], object]
OnSamples: TypeAlias = Callable[[list[dict[str, Any]]], object]
OnRollout: TypeAlias = Callable[[int, Rollout], object]
RewardFunction: TypeAlias = str | PreTrainedModel | Callable[..., Any]
"""A reward as TRL takes it: a model or its name, or a function of completions, plain or async, with one number for each."""


class SamplerLike(Protocol):
    """Describes what the trainer needs of a sampler; `rlinvariant.sampler.engine.Sampler` has it."""

    llm: Any  # the engine, of which TRL reads max_model_len

    @property
    def max_model_len(self) -> int: ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_tokens: int | Sequence[int],
        stop_token_ids: Sequence[int] = (),
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> list[Completion]: ...

    def finish(self) -> None: ...

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def differing_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[str]: ...

    def memory_of(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def differing_checksums(self, weights: Mapping[str, Checksum]) -> list[str]: ...

    def close(self) -> None: ...


class TRLArguments(TypedDict, total=False):
    """Lists the further arguments of `trl.GRPOTrainer` that our trainers take, with TRL's meaning."""

    eval_dataset: Dataset | dict[str, Dataset] | None
    processing_class: PreTrainedTokenizerBase | None
    reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None
    callbacks: list[TrainerCallback] | None
    optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]
    tools: list[ToolCall] | None
    rollout_func: RolloutCall | None
    environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None
    peft_config: object  # peft.LoraConfig, where both sides are exact


class TrainerArguments(TRLArguments, total=False):
    """Lists TRL's further arguments, and how rewards and tools are called: the fields of `RewardLimits` and `ToolLimits`."""

    reward_timeout: float
    reward_cage: int
    reward_errors: OnError
    tool_timeout: float
    tool_cage: bool
    tool_errors: OnToolError


class TrainerOptions(TrainerArguments, total=False):
    """Lists the further arguments of a trainer, and those of `InvariantGRPOTrainer` that say what it hands on, and when."""

    staleness: int
    gradients: Gradients
    tokens_per_microbatch: int | None
    recompute: bool | None
    on_row: OnRow | None
    on_evaluation: OnEvaluation | None
    on_samples: OnSamples | None
    on_rollout: OnRollout | None


class InvariantOptions(TrainerOptions, total=False):
    """Lists all keyword arguments of `InvariantGRPOTrainer`, which says what they mean."""

    sampler: Required[Callable[[], SamplerLike]]
    invariance: Invariance
    dtype: torch.dtype
    checked: bool


class SamplerOptions(TypedDict, total=False):
    """Lists the settings of `rlinvariant.Sampler` that a trainer leaves to the user."""

    max_model_len: int | None
    kv_cache_gib: float | None
    options: dict[str, Any]  # keyword arguments of vllm.LLM
    servers: list[str]  # addresses of `rlinvariant serve`s, in place of an engine in the trainer's process
    trainer_token_file: str | None  # which holds the token that they were started with


class ScriptOptions(TypedDict, total=False):
    """Lists the keyword arguments of `rlinvariant.GRPOTrainer` that TRL's trainer has not; that class says what they mean."""

    invariance: Invariance
    dtype: str
    sampler_model: str | Path | None
    sampler_options: SamplerOptions | None
    save_dtype: str
    reward_timeout: float
    reward_cage: int
    reward_errors: OnError
    tool_timeout: float
    tool_cage: bool
    tool_errors: OnToolError
    staleness: int
    gradients: Gradients
    tokens_per_microbatch: int | None
    recompute: bool | None
    on_row: OnRow | None
    on_evaluation: OnEvaluation | None
    on_samples: OnSamples | None
    on_rollout: OnRollout | None


class StartOptions(TRLArguments, ScriptOptions, total=False):
    """Lists the further keyword arguments of `rlinvariant.grpo_trainer`; `rlinvariant.GRPOTrainer` says what they mean."""

    run: str | None
    resume: bool | str

"""The calls that a TRL script changes: an exact GRPO or PPO trainer from TRL's own arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

from rlinvariant import runtime
from rlinvariant.conflicts import INVARIANCE, SIDES, Invariance
from rlinvariant.errors import ConfigErrors
from rlinvariant.model_source import local_model, model_problems
from rlinvariant.report.console import Console
from rlinvariant.rewards import RewardLimits, reward_problems

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel
    from trl.trainer.grpo_config import GRPOConfig

    from rlinvariant.config import PPOConfig
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer
    from rlinvariant.trainer.interface import RewardFunction, SamplerOptions, StartOptions, TrainerOptions
    from rlinvariant.trainer.ppo import InvariantPPOTrainer

DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class TrainerPlan:
    """Describes a trainer that can be made: every setting and the model's configuration were checked. No weights are loaded.

    Args:
        model: directory or hub id, or a loaded model.
        config: the configuration of `model`, as it was loaded.
        source: directory or hub id that the engine loads.
        source_config: the configuration of `source`; the same object where the two are one model.
        args, ppo, invariance, dtype, sampler_options: as for `grpo_trainer`.
    """

    model: str | PreTrainedModel
    config: PreTrainedConfig
    source: str
    source_config: PreTrainedConfig
    args: GRPOConfig
    ppo: PPOConfig | None
    invariance: Invariance
    dtype: str
    sampler_options: Mapping[str, Any]


@overload
def grpo_trainer(
    model: str | Path | PreTrainedModel,
    reward_funcs: RewardFunction | list[RewardFunction],
    args: GRPOConfig,
    train_dataset: Dataset | None = None,
    *,
    ppo: PPOConfig,
    **options: Unpack[StartOptions],
) -> InvariantPPOTrainer: ...


@overload
def grpo_trainer(
    model: str | Path | PreTrainedModel,
    reward_funcs: RewardFunction | list[RewardFunction],
    args: GRPOConfig,
    train_dataset: Dataset | None = None,
    *,
    ppo: PPOConfig | None = None,
    **options: Unpack[StartOptions],
) -> InvariantGRPOTrainer: ...


def grpo_trainer(
    model: str | Path | PreTrainedModel,
    reward_funcs: RewardFunction | list[RewardFunction],
    args: GRPOConfig,
    train_dataset: Dataset | None = None,
    *,
    ppo: PPOConfig | None = None,
    invariance: Invariance = "exact",
    dtype: str = "bfloat16",
    sampler_model: str | Path | None = None,
    sampler_options: SamplerOptions | None = None,
    **options: Unpack[TrainerOptions],
) -> InvariantGRPOTrainer:
    """Make an exact GRPO trainer from TRL's own arguments: load the model, start the engine, compare the two.

    Args:
        model: directory or hub id of a Hugging Face causal LM, or a loaded one with fp32 parameters, which is patched in place.
        reward_funcs, args, train_dataset: as for `trl.GRPOTrainer`; `args` with use_vllm=False and bf16=False.
        ppo: settings of PPO, for a PPO trainer in place of a GRPO one.
        invariance: which sides run the invariant ops: "exact" both, "off" none, "sampler" or "trainer" that one only.
        dtype: "bfloat16" or "float32", of both sides' activations; parameters are trained in fp32.
        sampler_model: what vLLM loads; by default the model's own directory or id.
        sampler_options: max_model_len (tokens), kv_cache_gib (GiB), and options: keyword arguments of `vllm.LLM`.
        options: further arguments of `trl.GRPOTrainer` (eval_dataset, processing_class, callbacks, ...) and of
            `InvariantGRPOTrainer` (staleness, reward_timeout, reward_cage, reward_errors, on_row, on_samples, on_rollout).
            Without on_row, each step prints its line.

    Returns:
        The trainer, ready for `train`; `proof` says what was compared, or which certificate was found.

    Raises:
        ConfigErrors: everything that would break exactness, in one list, before weights are loaded.
        UserError: the model or a dataset cannot be used.
        UnsupportedModel: the model computes something that no op owns.
        ParityError: with invariance="exact", a log-prob differs before the first step.

    Example:
        >>> args = GRPOConfig("out", bf16=False, logging_steps=1, max_completion_length=256)
        >>> trainer = rlinvariant.grpo_trainer("Qwen/Qwen3-0.6B", reward, args, prompts)
        >>> trainer.train()
    """
    runtime.quiet()
    loaded = None if isinstance(model, (str, Path)) else model
    source = sampler_model or (str(model) if loaded is None else loaded.config._name_or_path)
    problems = [] if invariance in INVARIANCE else [f"invariance={invariance}: expected one of {', '.join(INVARIANCE)}"]
    problems += [] if dtype in DTYPES else [f"dtype={dtype}: expected {' or '.join(DTYPES)}"]
    problems += model_problems("model", str(model)) if loaded is None else []
    problems += reward_problems(reward_funcs)
    if not source:
        problems.append("sampler_model: missing; save the model and name its directory, for vLLM to load")
    elif str(source) != str(model):
        problems += model_problems("sampler_model" if sampler_model else "model", str(source))
    from rlinvariant.trainer.preflight import Start, check_start, load_tokenizer
    from rlinvariant.trainer.refusals import settings_problems

    if not problems:
        import torch

        problems = settings_problems(args, invariance, getattr(torch, dtype), options, ppo, loaded)
    if problems:
        raise ConfigErrors(problems)
    runtime.configure()
    model, source = local_model(str(model)) if loaded is None else model, local_model(str(source))
    plan = plan_trainer(model, args, ppo, invariance, dtype, str(source), sampler_options or {})
    tokenizer = options["processing_class"] = options.get("processing_class") or load_tokenizer(str(source), plan.config)
    longest = (sampler_options or {}).get("max_model_len")
    parts = (args, str(source), plan.config, tokenizer, reward_funcs, train_dataset, options.get("eval_dataset"), longest)
    for note in check_start(Start(*parts, models=1 if ppo is None else 2)):
        Console(args.process_index == 0).print(f"note: {note}")
    return build_trainer(plan, reward_funcs, train_dataset, **options)


def ppo_trainer(
    model: str | Path | PreTrainedModel,
    reward_funcs: RewardFunction | list[RewardFunction],
    args: GRPOConfig,
    train_dataset: Dataset | None = None,
    *,
    ppo: PPOConfig | None = None,
    **options: Unpack[StartOptions],
) -> InvariantPPOTrainer:
    """Make an exact PPO trainer from TRL's own arguments.

    Args:
        ppo: settings of PPO; None: the defaults of `PPOConfig`.
        model, reward_funcs, ...: as for `grpo_trainer`, which also says what is raised.

    Example:
        >>> trainer = rlinvariant.ppo_trainer("Qwen/Qwen3-0.6B", reward, args, prompts, ppo=rlinvariant.PPOConfig(kl_coef=0.05))
        >>> trainer.train()
    """
    from rlinvariant.config import PPOConfig

    return grpo_trainer(model, reward_funcs, args, train_dataset, ppo=ppo or PPOConfig(), **options)


def plan_trainer(
    model: str | Path | PreTrainedModel,
    args: GRPOConfig,
    ppo: PPOConfig | None,
    invariance: Invariance,
    dtype: str,
    source: str,
    sampler_options: Mapping[str, Any],
) -> TrainerPlan:
    """Load the configurations of the models, each once, and refuse what cannot run exactly; the settings were checked before.

    Raises:
        ConfigErrors: every option of the engine and every property of a model that would change the bits, one line each.
        UserError: a configuration cannot be loaded, or is not a causal language model's.
    """
    from rlinvariant.models import unsupported
    from rlinvariant.sampler.refusals import engine_problems, load_config

    sampler_is_invariant, trainer_is_invariant = SIDES[invariance]
    loaded = None if isinstance(model, (str, Path)) else model
    name = str(model) if loaded is None else loaded.config._name_or_path
    config = load_config(name) if loaded is None else loaded.config
    source_config = config if loaded is None and source == name else load_config(source)
    problems: list[str] = []
    if sampler_is_invariant:
        given = sampler_options.get("options") or {}
        limit = sampler_options.get("max_model_len")
        problems += engine_problems(given, source, source_config, limit, "use invariance=off", args.device.type)
    if trainer_is_invariant and not (sampler_is_invariant and source_config is config):
        problems += [f"model={name}: {reason}; use invariance=off" for reason in unsupported(config, args.device.type)]
    if problems:
        raise ConfigErrors(problems)
    return TrainerPlan(
        name if loaded is None else loaded, config, source, source_config, args, ppo, invariance, dtype, sampler_options
    )


def build_trainer(
    plan: TrainerPlan,
    reward_funcs: RewardFunction | list[RewardFunction],
    train_dataset: Dataset | None,
    **options: Unpack[TrainerOptions],
) -> InvariantGRPOTrainer:
    """Load weights, start the engine, make the trainer, and compare its two sides where both are invariant."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from rlinvariant.models import UnsupportedModel
    from rlinvariant.models.load import load
    from rlinvariant.sampler.engine import Sampler

    transformers_logging.disable_progress_bar()
    model: Any = plan.model
    if isinstance(model, str):
        model = load(AutoModelForCausalLM, model, dtype=torch.float32, config=copy.deepcopy(plan.config))
    console = Console(plan.args.process_index == 0)
    console.print(str(RewardLimits.taken({**options})))
    options.setdefault("on_row", lambda row, first_mismatch: console.step(row, plan.args.max_steps, first_mismatch))
    invariant = SIDES[plan.invariance][0]
    positions = getattr(plan.source_config.get_text_config(), "max_position_embeddings", None)  # a stock engine needs none
    engine: Callable[[], Sampler] = lambda: Sampler(  # noqa: E731
        plan.source, invariant=invariant, dtype=plan.dtype, positions=positions, **plan.sampler_options
    )
    arguments: dict[str, Any] = {"sampler": engine, "invariance": plan.invariance, "dtype": getattr(torch, plan.dtype)}
    arguments |= {"checked": True, **options}
    try:
        if plan.ppo is not None:
            from rlinvariant.trainer.ppo import InvariantPPOTrainer

            trainer = InvariantPPOTrainer(model, reward_funcs, plan.args, train_dataset, ppo=plan.ppo, **arguments)
        else:
            from rlinvariant.trainer.grpo import InvariantGRPOTrainer

            trainer = InvariantGRPOTrainer(model, reward_funcs, plan.args, train_dataset, **arguments)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"model={plan.source}: {error}; use invariance=off") from error
    if plan.invariance == "exact":
        from rlinvariant.verification.start import prove

        trainer.sync()
        policy = trainer.accelerator.unwrap_model(trainer.model)
        line, trainer.proof = prove(policy, trainer.sampler, plan.source_config, plan.source, plan.dtype)
        console.print(line)
    return trainer

"""Plan a trainer before weights are loaded, and make it."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

from rlinvariant.conflicts import OF_SERVERS, SIDES, Invariance, server_problems, spread_problems
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.launch import is_launched, main_process_fetches, on_main_process, require_same
from rlinvariant.models.shards import unwrapped
from rlinvariant.report.console import Console
from rlinvariant.rewards import RewardLimits
from rlinvariant.tools import ToolLimits
from rlinvariant.types import JsonRow, Untyped

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl.trainer.grpo_config import GRPOConfig

    from rlinvariant.config import PPOConfig
    from rlinvariant.sampler.engine import Sampler
    from rlinvariant.sampler.served import ServedSampler
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer
    from rlinvariant.trainer.interface import RewardFunction, TrainerOptions
    from rlinvariant.trainer.preflight import Start, Tooling
    from rlinvariant.verification.servers import Servers


@dataclass(frozen=True)
class TrainerPlan:
    """Describes a trainer that can be made: every setting and the model's configuration were checked. No weights are loaded.

    Args:
        model: directory or hub id, or a loaded model.
        config: the configuration of `model`, as it was loaded.
        source: directory or hub id that the engine loads.
        source_config: the configuration of `source`; the same object where the two are one model.
        generation: the generation settings of `model`.
        args, ppo, invariance, dtype, sampler_options, save_dtype: as for `rlinvariant.grpo_trainer`.
        servers: those that draw; None: an engine in this process does.
        adapter: the `peft.LoraConfig` of the adapters that are trained; None: there are none.
    """

    model: str | PreTrainedModel
    config: PreTrainedConfig
    source: str
    source_config: PreTrainedConfig
    generation: GenerationConfig
    args: GRPOConfig
    ppo: PPOConfig | None
    invariance: Invariance
    dtype: str
    sampler_options: Mapping[str, Any]
    save_dtype: str = "model"
    servers: Servers | None = None
    adapter: Untyped = None

    def start(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rewards: object,
        train: Dataset | None,
        evaluation: Dataset | dict[str, Dataset] | None,
        tooling: Tooling,
        *,
        published: Path | None,
        tokens_per_microbatch: int | None,
        prefix: str = "",
    ) -> Start:
        """Return what is looked at before weights are loaded; the arguments are those of `Start`."""
        from rlinvariant.trainer.preflight import Start

        name = self.model if isinstance(self.model, str) else self.source
        return Start(
            *(self.args, name, self.config, self.generation, tokenizer, rewards, train, evaluation),
            max_model_len=self.sampler_options.get("max_model_len"),
            models=1 if self.ppo is None else 2,
            adapter=self.adapter,
            prefix=prefix,
            published=published,
            tokens_per_microbatch=tokens_per_microbatch,
            tooling=tooling,
        )


def plan_trainer(
    model: str | Path | PreTrainedModel,
    args: GRPOConfig,
    ppo: PPOConfig | None,
    invariance: Invariance,
    dtype: str,
    source: str,
    sampler_options: JsonRow,
    save_dtype: str = "model",
    adapter: Untyped = None,
    said: str = "lora.",
) -> TrainerPlan:
    """Load what says how the models are made, each once, and refuse what cannot run exactly; the settings were checked before.

    `adapter` is the `peft.LoraConfig` of the adapters that are trained, None for none; its settings' names start with `said`.

    Raises:
        ConfigErrors: every option of the engine and every property of a model that would change the bits, one line each.
        UserError: a configuration cannot be loaded, or is not a causal language model's; processes of a launch have other
            software than the main one.
    """
    from rlinvariant.models import lora, unsupported
    from rlinvariant.models.limits import flash_problems
    from rlinvariant.sampler.refusals import engine_problems, load_config, require_causal_lm
    from rlinvariant.trainer.preflight import load_generation
    from rlinvariant.trainer.refusals import auxiliary_problems
    from rlinvariant.verification import servers

    if is_launched():
        require_same(_software())
    sampler_is_invariant, trainer_is_invariant = SIDES[invariance]
    loaded = None if isinstance(model, (str, Path)) else model
    name = str(model) if loaded is None else loaded.config._name_or_path
    with main_process_fetches(name), main_process_fetches(source):
        config = load_config(name) if loaded is None else loaded.config
        source_config = config if loaded is None and source == name else load_config(source)
        generation: Any = load_generation(name, config) if loaded is None else loaded.generation_config
    if loaded is None:
        require_causal_lm(config, name)
    problems: list[str] = []
    if sampler_is_invariant:
        given = sampler_options.get("options") or {}
        limit = sampler_options.get("max_model_len")
        problems += engine_problems(given, source, source_config, limit, "use invariance=off", args.device.type)
    if trainer_is_invariant and not (sampler_is_invariant and source_config is config):
        reasons = list(unsupported(config, args.device.type))
        problems += [f"model={name}: {reason}; use invariance=off" for reason in reasons]
        problems += [] if reasons else flash_problems(name, config, args.device.type)
    problems += [] if adapter is None else lora.fit_problems(said, adapter, config)
    problems += spread_problems(_spread(sampler_options), invariance)
    urls, token_file = sampler_options.get("servers") or (), sampler_options.get("trainer_token_file")
    given = [] if not urls else [f"{key}={value}" for key, value in sampler_options.items() if key not in OF_SERVERS]
    problems += server_problems(urls, token_file, invariance, given)
    problems += auxiliary_problems(args, config, invariance) if loaded is None else []  # else `settings_problems` has looked
    if problems:
        raise ConfigErrors(problems)
    served: Servers | None = None
    if urls and token_file is not None:
        limit = sampler_options.get("max_model_len")
        served = servers.found(urls, token_file, source_config, source, dtype, limit, adapted=adapter is not None)
        sampler_options = {"max_model_len": served.max_model_len}
    parts = (name if loaded is None else loaded, config, source, source_config, generation)
    return TrainerPlan(*parts, args, ppo, invariance, dtype, sampler_options, save_dtype, served, adapter)


def _spread(sampler_options: JsonRow) -> int:
    """Return over how many processes a sampler is spread."""
    return (sampler_options.get("options") or {}).get("tensor_parallel_size", 1)


def build_trainer(
    plan: TrainerPlan,
    reward_funcs: RewardFunction | list[RewardFunction],
    train_dataset: Dataset | None,
    **options: Unpack[TrainerOptions],
) -> InvariantGRPOTrainer:
    """Load weights, start the engine, make the trainer, and compare its two sides where both are invariant."""
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer
    from rlinvariant.trainer.ppo import InvariantPPOTrainer

    kind = InvariantGRPOTrainer if plan.ppo is None else InvariantPPOTrainer
    with named(plan):
        trainer = kind(**arguments(plan, reward_funcs, train_dataset, **options))
    prove(plan, trainer)
    return trainer


def _software() -> dict[str, Any]:
    """Return what all hosts of a run must have alike: packages, our own sources, what chooses kernels."""
    from rlinvariant.verification.certificate import machine_subject

    about = machine_subject()
    packages = {f"package {name}": version for name, version in about["packages"].items()}
    return {"attention": about["attention"], **packages, **about["variables"], "rlinvariant's sources": about["sources"]}


def arguments(
    plan: TrainerPlan,
    reward_funcs: RewardFunction | list[RewardFunction],
    train_dataset: Dataset | None,
    **options: Unpack[TrainerOptions],
) -> dict[str, Any]:
    """Load the weights, and return the arguments of a trainer, which starts the engine when it has made its models."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from rlinvariant.models.limits import attention_of
    from rlinvariant.models.load import load
    from rlinvariant.support import unproven_here

    transformers_logging.disable_progress_bar()
    if plan.invariance == "exact" and (unproven := unproven_here()) is not None:
        on_main_process(lambda: prove_first(plan, unproven))
    model: Any = plan.model
    given: dict[str, Any] = {**options}
    if isinstance(model, str):
        adapted = given.get("peft_config") is not None  # then it is frozen, and needs no fp32
        dtype = getattr(torch, plan.dtype) if adapted else torch.float32
        settings = {"config": copy.deepcopy(plan.config), "generation_config": plan.generation}
        with main_process_fetches(model):
            model = load(AutoModelForCausalLM, model, dtype=dtype, **settings)
    console = Console(plan.args.process_index == 0)
    if plan.invariance != "off" and plan.args.device.type == "cuda":
        console.print(f"attention   {attention_of(plan.source_config)}")
    console.print(str(RewardLimits.taken({**options})))
    if options.get("tools") or options.get("environment_factory"):
        console.print(str(ToolLimits.taken({**options})))
    parts = {"model": model, "reward_funcs": reward_funcs, "args": plan.args, "train_dataset": train_dataset}
    sides = {
        "sampler": lambda: _sampler(plan, model),
        "invariance": plan.invariance,
        "dtype": getattr(torch, plan.dtype),
        "checked": True,
    }
    return parts | sides | ({} if plan.ppo is None else {"ppo": plan.ppo}) | given


def _sampler(plan: TrainerPlan, model: PreTrainedModel) -> Sampler | ServedSampler:
    """Start the engine, or join the servers, that will draw for a model."""
    from rlinvariant.models import lora
    from rlinvariant.sampler.engine import Sampler
    from rlinvariant.sampler.group import GroupSampler
    from rlinvariant.sampler.served import ServedSampler
    from rlinvariant.trainer.preflight.tokens import load_generation, model_ends

    if plan.servers is not None:
        same = plan.source_config is plan.config
        generation: Any = plan.generation if same else load_generation(plan.source, plan.source_config)
        own = {"dtype": plan.dtype, "max_model_len": plan.servers.max_model_len, "eager": plan.servers.eager}
        return ServedSampler(plan.servers.servers, ends=model_ends(generation), ranks=lora.ranks(model), **own)
    invariant = SIDES[plan.invariance][0]
    positions = getattr(plan.source_config.get_text_config(), "max_position_embeddings", None)  # a stock engine needs none
    ranks = lora.ranks(model) if invariant else None
    own = {"invariant": invariant, "dtype": plan.dtype, "positions": positions, "ranks": ranks}
    kind = GroupSampler if _spread(plan.sampler_options) > 1 else Sampler
    return kind(plan.source, **own, **plan.sampler_options)


def prove_first(plan: TrainerPlan, unproven: str) -> None:
    """Look for a certificate of what is not proven, a GPU or a release; without one, verify writes one.

    It is another process, and ends before this one loads weights: every tile of every kernel that the model needs is compared
    when the kernel is first used, then sampler with trainer.

    Raises:
        UserError: `verify` found a difference, or could not run.
    """
    from rlinvariant.verification import certificate

    eager = bool((plan.sampler_options.get("options") or {}).get("enforce_eager", False))
    if certificate.find(certificate.subject(plan.source_config, plan.dtype, eager or None)) is not None:
        return
    command = [sys.executable, "-m", "rlinvariant", "verify", plan.source, "--short", "--dtype", plan.dtype]
    Console().print(f"{unproven} is unproven: {' '.join(['rlinvariant', *command[3:]])}")
    code = subprocess.run([*command, *["--eager"] * eager], check=False).returncode
    if code:
        raise UserError(f"unproven_gpu=true: verify ended with {code} on {unproven}, see above; use invariance=off")
    Console().print(f"proven for this model on this machine: please send in what lies in {certificate.directory()}")


@contextmanager
def named(plan: TrainerPlan) -> Iterator[None]:
    """Put the model's name, and the way out, before what a block says of a model that cannot run exactly."""
    from rlinvariant.models import UnsupportedModel

    try:
        yield
    except UnsupportedModel as error:
        raise UnsupportedModel(f"model={plan.source}: {error}; use invariance=off") from error


def prove(plan: TrainerPlan, trainer: InvariantGRPOTrainer) -> None:
    """Compare a new trainer's two sides, where both are invariant, or find a certificate; say what came of it.

    What the trainer publishes gets its dtype here, too.

    Raises:
        ParityError: a log-prob differs.
    """
    import torch

    came: Any = plan.source_config.dtype or torch.float32  # as loaded, `plan.config` may say what it was loaded as
    trainer.save_dtype = came if plan.save_dtype == "model" else getattr(torch, plan.save_dtype)
    if SIDES[plan.invariance][1]:
        trainer.settle()
    adapted = hasattr(unwrapped(trainer.model), "peft_config")
    parameters = "LoRA adapters in float32 on a frozen base" if adapted else "float32 parameters"
    trainer.computed = f"{plan.dtype} activations, {parameters}, invariance={plan.invariance}"
    if plan.invariance != "exact":
        return
    from rlinvariant.verification.start import prove

    trainer.sync()
    policy = unwrapped(trainer.model)
    sampler = cast("Sampler | ServedSampler", trainer.sampler)  # as `_sampler` made it
    line, trainer.proof = prove(*(policy, sampler, plan.source_config, plan.source, plan.dtype), trainer.truncation)
    Console(plan.args.process_index == 0).print(line)

"""The lines that tell a user what a trainer cannot be given: settings, TRL's own arguments, a model, data."""

import os
from typing import TYPE_CHECKING, Any, get_args

import torch

from rlinvariant.conflicts import (
    SIDES,
    Gradients,
    Invariance,
    adapter_training_conflicts,
    conflicts,
    microbatch_problems,
    ppo_conflicts,
    sharding_problems,
    truncation_problems,
)
from rlinvariant.gradients import gradients_problems
from rlinvariant.launch import is_sharded
from rlinvariant.models import lora
from rlinvariant.rewards.limits import RewardLimits
from rlinvariant.support import device_problems
from rlinvariant.types import JsonRow, Untyped

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl.trainer.grpo_config import GRPOConfig

    from rlinvariant.config import PPOConfig


def auxiliary_problems(args: "GRPOConfig", config: Untyped, invariance: Invariance) -> list[str]:
    """Refuse the auxiliary loss that TRL adds for a mixture of experts, where the trainer is exact.

    Args:
        args: TRL's configuration, whose coefficient None means the model's own.
        config: transformers' configuration of the model.
    """
    config = config.get_text_config()
    if not SIDES[invariance][1] or not hasattr(config, "output_router_logits"):
        return []
    own = args.router_aux_loss_coef is None
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if own else args.router_aux_loss_coef
    found = []
    if coefficient:
        whose = ", the model's own" if own else ""
        fix = "set router_aux_loss_coef=0 (trainer.router_aux_loss_coef=0 on the command line)"
        found.append(f"router_aux_loss_coef={coefficient}{whose}: expected 0: no op has the auxiliary loss of a router; {fix}")
    if config.output_router_logits:
        found.append("output_router_logits=True: expected False: nothing reads them in exact mode; set it so in config.json")
    return found


def settings_problems(
    args: "GRPOConfig",
    invariance: Invariance,
    dtype: torch.dtype,
    options: JsonRow,
    ppo: "PPOConfig | None" = None,
    model: "PreTrainedModel | None" = None,
) -> list[str]:
    """List everything that would break exactness, or that is not supported, one line each.

    Args:
        args: TRL's configuration, as the user gave it.
        invariance, dtype: as for `InvariantGRPOTrainer`.
        options: further arguments of the trainer, TRL's and ours.
        ppo: settings of PPO; None: GRPO.
        model: the model, where it is loaded already.
    """
    found = device_problems(args, invariance, dtype) + conflicts(args, invariance, os.environ)
    found += ppo_conflicts(args, ppo) if ppo is not None else []
    if (staleness := options.get("staleness", 0)) < 0:
        found.append(f"staleness={staleness}: expected 0 or more optimizer steps")
    if (gradients := options.get("gradients", "stock")) not in get_args(Gradients):
        found.append(f"gradients={gradients}: expected {' or '.join(get_args(Gradients))}")
    truncated = truncation_problems(args, invariance, staleness, 0.0 if ppo is None else ppo.kl_coef)
    found += truncated
    if is_sharded():
        found += sharding_problems(args, invariance)
    tokens = options.get("tokens_per_microbatch")
    found += microbatch_problems(tokens, options.get("recompute"), args, invariance)
    layout = (args.world_size, invariance, staleness, tokens)
    found += gradients_problems(args, gradients, *layout)
    found += RewardLimits.taken(dict(options)).problems()
    if options.get("environment_factory") is not None and (cage := options.get("reward_cage", 0)):
        found.append(
            f"reward_cage={cage}: expected 0 with environment_factory: an environment's state is in the trainer's process"
        )
    if args.use_vllm:
        found.append("use_vllm=True: expected False; the sampler is attached by rlinvariant")
    if options.get("rollout_func") and (given := [x for x in ("tools", "environment_factory") if options.get(x)]):
        found.append(
            f"rollout_func: expected None with {given[0]}: TRL would call the tools after it, on the rollout it returned"
        )
    invariant = SIDES[invariance][1]
    found += [] if model is None else auxiliary_problems(args, model.config, invariance)
    adapted = options.get("peft_config") is not None or hasattr(model, "peft_config")
    if invariant and model is not None and not adapted and model.dtype != torch.float32:
        found.append(f"model.dtype={model.dtype}: expected torch.float32 masters; load with dtype=torch.float32")
    if ppo is not None and ppo.kl_coef and model is not None and not model.config._name_or_path:
        missing = "a model with a directory or hub id, from which the reference is loaded; save it and load it from there"
        found.append(f"ppo.kl_coef={ppo.kl_coef}: expected {missing}, or use 0")
    if adapted:
        own: Any = getattr(model, "peft_config", None) or {}
        found += adapter_training_conflicts("peft_config", "None", invariance, args, ppo and ppo.critic)
        given = options.get("peft_config")
        configs = [given] if given is not None else [*own.values()]
        found += lora.problems(configs[0])
        if given is not None and own:
            found.append(
                "peft_config: expected None with a model that has an adapter; or merge that (model.merge_and_unload())"
            )
        elif own and not hasattr(model, "get_base_model"):
            found.append(f"model={type(model).__name__}: expected PEFT's; use get_peft_model in place of add_adapter")
        if own and model is not None and (others := lora.outside(model)):
            found.append(f"model: has an adapter of {others[0]}: expected projections of the decoder alone")
        if own and model is not None and (moved := [name for name, weight in lora.base(model) if weight.requires_grad]):
            found.append(f"model: {moved[0]}.requires_grad=True: expected a frozen base, of which nothing is synced; freeze it")
        if len(own) > 1:
            found.append(f"model: expected one adapter, found {len(own)}; delete the others (model.delete_adapter)")
        elif own and "default" not in own:
            found.append(f"model: expected an adapter named default, which is PEFT's name for one, found {next(iter(own))}")
    return found

"""Settings under which sampler and trainer could not be one function, listed for our configuration and for TRL scripts."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlinvariant.rollout import RANGES, Truncation
from rlinvariant.text import shown

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

Invariance = Literal["exact", "off", "sampler", "trainer"]
"""The sides that run the invariant ops: both, none, or that one only."""
SIDES: dict[Invariance, tuple[bool, bool]] = {
    "exact": (True, True),
    "off": (False, False),
    "sampler": (True, False),
    "trainer": (False, True),
}
"""invariance -> which of (sampler, trainer) runs the invariant ops."""
INVARIANCE = tuple(SIDES)
Gradients = Literal["stock", "ordered", "invariant"]
"""The ways in which gradients are added: over processes as the library does, over them in a fixed order of the ranks, or sample
by sample in a tree that knows of no processes and no micro-batches."""


@dataclass(frozen=True)
class Rule:
    """Says which values a field of `trl.GRPOConfig` may have.

    Args:
        allows: whether a value is one of them.
        expected: what is expected, and the fix; "MODE" stands for "with invariance=...".
        sides: the values of `invariance` for which the rule holds.
    """

    allows: Callable[[Any], bool]
    expected: str
    sides: tuple[str, ...] = INVARIANCE


_TRAINED = "the sampler must draw from the distribution that is trained, which knows of no penalty; remove it"
_EXACT = ("exact", "trainer")  # where the trainer runs the invariant ops
_MASTERS = "False MODE: masters stay float32 and the modules cast; use dtype=bfloat16"
_REPLACED = "False MODE: it replaces operations that the invariant ops own; remove it"
RULES = {
    "temperature": Rule(
        lambda value: 0.01 <= value <= 2,
        "0.01 to 2, as vLLM raises what is less and takes no more; 1.0 samples from the model itself",
    ),
    **{name: Rule(*RANGES[name]) for name in ("top_p", "top_k", "min_p")},
    "repetition_penalty": Rule(lambda value: value == 1.0, f"1.0: {_TRAINED}"),
    "generation_kwargs": Rule(operator.not_, "None: what it has is in no part of the policy that is trained; remove it"),
    "trust_remote_code": Rule(operator.not_, "False: no code of a model's repository is run; remove it"),
    "logging_steps": Rule(lambda value: value == 1, "1: every step is counted and written; remove it"),
    "save_only_model": Rule(operator.not_, "False: a run could not go on from such a checkpoint; remove it"),
    "ignore_data_skip": Rule(operator.not_, "False: a resumed run would be given the first prompts again; remove it"),
    "save_total_limit": Rule(
        lambda value: value is None or value >= 2,
        "at least 2, or None for all: if the newest is damaged, a run goes on from the one before",
    ),
    "ref_model_sync_steps": Rule(lambda value: value >= 1, "at least 1"),
    "top_entropy_quantile": Rule(lambda value: 0 <= value <= 1, "0 to 1, the share of the tokens that are trained on"),
    "beta": Rule(lambda value: value >= 0, "0 or more: below 0 it rewards leaving the reference"),
    "logging_strategy": Rule(lambda value: value == "steps", "steps: every step is counted and written; remove it"),
    "bf16": Rule(lambda value: value is False, _MASTERS, _EXACT),  # None means True to TRL
    "fp16": Rule(operator.not_, _MASTERS, _EXACT),
    "bf16_full_eval": Rule(operator.not_, _MASTERS, _EXACT),
    "fp16_full_eval": Rule(operator.not_, _MASTERS, _EXACT),
    "use_liger_kernel": Rule(operator.not_, _REPLACED, _EXACT),
    "cast_lm_head_to_fp32": Rule(operator.not_, _REPLACED, _EXACT),
    "torch_compile": Rule(operator.not_, _REPLACED, _EXACT),
    "neftune_noise_alpha": Rule(operator.not_, "None MODE: the noise is in the trainer's forward alone; remove it", _EXACT),
}
"""Field -> its rule, for our configuration and for TRL scripts."""


def conflicts(trainer: "GRPOConfig", invariance: str, env: Mapping[str, str], prefix: str = "") -> list[str]:
    """List what in `trl.GRPOConfig`'s fields and the environment contradicts `invariance`, one line each.

    A line says the key, its value, what is expected, and the fix.

    Args:
        trainer: anything that has GRPOConfig's fields.
        invariance: "exact", "off", "sampler" or "trainer".
        env: environment variables.
        prefix: what the user writes before a field's name.
    """
    found = broken(RULES, trainer, invariance, prefix)
    return found + environment_conflicts(env, invariance, bool(trainer.bf16 or trainer.fp16))


def broken(rules: Mapping[str, Rule], trainer: "GRPOConfig", invariance: str, prefix: str = "") -> list[str]:
    """List the rules that a trainer's fields break, one line each; arguments as for `conflicts`."""
    found = []
    for name, rule in rules.items():
        value = getattr(trainer, name)
        value = getattr(value, "value", value)
        if invariance in rule.sides and not rule.allows(value):
            expected = rule.expected.replace("MODE", f"with invariance={invariance}")
            found.append(f"{prefix}{name}={shown(value)}: expected {expected}")
    return found


def ppo_conflicts(trainer: "GRPOConfig", ppo: Any, prefix: str = "") -> list[str]:
    """List PPO's settings that are out of range, and TRL's settings that have no part in PPO, one line each.

    Args:
        trainer: anything that has GRPOConfig's fields.
        ppo: a `config.PPOConfig`.
        prefix: what the user writes before a field's name of `trainer`.
    """
    found: list[str] = []

    def require(ok: bool, name: str, expected: str) -> None:
        if not ok:
            found.append(f"ppo.{name}={shown(getattr(ppo, name))}: expected {expected}")

    def leave(name: str, *values: Any, why: str) -> None:
        value = getattr(trainer, name)
        if value not in values:
            found.append(
                f"{prefix}{name}={shown(getattr(value, 'value', value))}: expected {values[0]} with algorithm=ppo: {why}"
            )

    require(0 <= ppo.gamma <= 1, "gamma", "0 to 1")
    require(0 <= ppo.lam <= 1, "lam", "0 to 1")
    require(0 <= ppo.kl_coef < float("inf"), "kl_coef", "0 or more")
    require(ppo.value_clip is None or ppo.value_clip > 0, "value_clip", "more than 0, or None for no clipping")
    rate = ppo.critic_learning_rate
    require(rate is None or rate >= 0, "critic_learning_rate", "0 or more, or None for trainer.learning_rate")
    require(ppo.value_warmup_steps >= 0, "value_warmup_steps", "0 or more optimizer steps")
    require(ppo.target_kl is None or ppo.target_kl > 0, "target_kl", "more than 0, or None for no limit")
    leave("loss_type", "dapo", why="the losses are means over the tokens of a step; remove it")
    leave("beta", 0.0, why="the penalty is in the rewards; use ppo.kl_coef")
    if not ppo.kl_coef:
        leave("sync_ref_model", False, why="without ppo.kl_coef there is no reference; set that, or remove it")
    leave("scale_rewards", "group", True, why="advantages come from the critic, not from groups; remove it")
    leave(
        "multi_objective_aggregation", "sum_then_normalize", why="rewards are summed, and never compared in groups; remove it"
    )
    leave("importance_sampling_level", "token", why="each token has a ratio and an advantage of its own; remove it")
    leave("off_policy_mask_threshold", None, why="it judges whole completions by one advantage; use ppo.target_kl")
    leave("mask_truncated_completions", False, why="a masked completion has no token to carry its reward; remove it")
    leave("load_best_model_at_end", False, why="the critic would stay the last one; remove it")
    leave("fp16", False, why="the critic's gradients are not scaled; remove it")
    return found


def truncation_problems(
    trainer: "GRPOConfig", invariance: Invariance, staleness: int, kl_coef: float = 0.0, prefix: str = "", processes: int = 1
) -> list[str]:
    """List the settings that cannot stand beside top-k, top-p or min-p, one line each.

    A stock sampler and trainer do what TRL does: the sampler truncates and the trainer does not.

    Args:
        trainer: anything that has GRPOConfig's fields.
        invariance: which sides are exact.
        staleness: by how many optimizer steps the sampler lags.
        kl_coef: PPO's weight of the reference; 0 with GRPO.
        prefix: what the user writes before a field's name of `trainer`.
        processes: how many train; for a `trainer` whose `steps_per_generation` is not derived yet.
    """
    names = [name for name, (allows, _) in RANGES.items() if allows(getattr(trainer, name))]
    if len(names) < len(RANGES) or not (truncation := Truncation.of(trainer)) or invariance == "off":
        return []
    with_ = "with " + ", ".join(truncation.settings(prefix))
    if invariance != "exact":
        why = "of one stock side, the kept tokens are others than the exact side's; use exact or off, or keep all tokens"
        return [f"invariance={invariance}: expected exact {with_}: {why}"]
    moved = "after an optimizer step other tokens are kept, and those that were drawn need not be among them"
    reference = "the reference's share outside of the kept tokens has no meaning yet"
    parts, rows = trainer.gradient_accumulation_steps, trainer.per_device_train_batch_size * processes
    batch, steps = trainer.generation_batch_size, trainer.steps_per_generation
    if steps is None and batch is not None:
        whole = rows > 0 and rows * parts % batch == 0
        size = f"{prefix}generation_batch_size={batch}", f"{rows * parts}, a step's completions,"
    else:
        whole = not steps or parts % steps == 0
        size = f"{prefix}steps_per_generation={steps}", f"{prefix}gradient_accumulation_steps={parts}"
    rules = (
        (trainer.num_iterations == 1, f"{prefix}num_iterations={trainer.num_iterations}", "1", moved),
        (whole, *size, moved),
        (staleness <= 0, f"staleness={staleness}", "0", moved),
        (trainer.beta == 0, f"{prefix}beta={trainer.beta}", "0.0", reference),
        (kl_coef == 0, f"ppo.kl_coef={kl_coef}", "0", reference),
    )
    return [f"{key}: expected {right} {with_}: {why}; set it, or keep all tokens" for ok, key, right, why in rules if not ok]


def environment_conflicts(env: Mapping[str, str], invariance: str, autocast_asked: bool = False) -> list[str]:
    """List the conflicts that are in the environment, one line each.

    Args:
        env: environment variables.
        invariance: "exact", "off", "sampler" or "trainer".
        autocast_asked: bf16 or fp16 is set in GRPOConfig, for which TRL sets the variable itself.
    """
    found: list[str] = []
    autocast = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if invariance in ("exact", "trainer") and autocast != "no" and not autocast_asked:
        fix = "set mixed_precision: 'no' in the accelerate config, drop --mixed_precision, and use dtype=bfloat16"
        found.append(f"ACCELERATE_MIXED_PRECISION={shown(autocast)}: expected no with invariance={invariance}; {fix}")
    if env.get("VLLM_BATCH_INVARIANT", "0") != "0":
        value = shown(env["VLLM_BATCH_INVARIANT"])
        found.append(f"VLLM_BATCH_INVARIANT={value}: expected unset; invariance= decides; run `unset VLLM_BATCH_INVARIANT`")
    return found + launcher_problems(env)


SHARDS = {
    "FSDP_VERSION": ("2", "fsdp_version: 2"),
    "FSDP_AUTO_WRAP_POLICY": (
        "NO_WRAP",
        "fsdp_auto_wrap_policy: NO_WRAP: each decoder layer becomes a unit without accelerate's",
    ),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "fsdp_cpu_ram_efficient_loading: false: each process reads its own rows"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "false",
        "fsdp_activation_checkpointing: false: it renames weights; layers recompute as memory needs",
    ),
    "FSDP_OFFLOAD_PARAMS": ("false", "fsdp_offload_params: false: offloading has not been tried"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "fsdp_reshard_after_forward: true: each unit is freed after its forward"),
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "fsdp_state_dict_type: FULL_STATE_DICT: a checkpoint is a model's directory"),
    "FSDP_IGNORED_MODULES": ("None", "no fsdp_ignored_modules: every weight is in a unit"),
}
"""Variable by which accelerate hands on a setting of shards -> the one value that is taken, and how its file says it."""
OPTIMS = ("adamw_torch_fused", "adamw_torch", "sgd")  # which have been tried with weights in shards
OTHERS = {"DEEPSPEED": "DEEPSPEED", "MEGATRON_LM": "MEGATRON_LM", "PARALLELISM_CONFIG": "FSDP with parallelism_config"}


def launcher_problems(env: Mapping[str, str]) -> list[str]:
    """List what an accelerate file asks for, by the variables that it becomes, that is not supported, one line each."""
    on = lambda name: env.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"  # noqa: E731
    fix = "choose configs/8gpu_fsdp2.yaml, or one without shards"
    found = [
        f"distributed_type={said}: expected one process, data parallel or FSDP 2; {fix}"
        for name, said in OTHERS.items()
        if on(name)
    ]
    if (backend := env.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        why = "accelerate would compile the model, whose ops are to stay as they are"
        found.append(
            f"ACCELERATE_DYNAMO_BACKEND={shown(backend)}: expected no dynamo_config in the accelerate file: {why}; remove it"
        )
    if on("FSDP"):
        for name, (expected, said) in SHARDS.items():
            unset = "1" if name == "FSDP_VERSION" else expected  # to accelerate
            if (value := env.get(name, unset)).lower() != expected.lower():
                found.append(f"{name}={shown(value)}: expected {said}; set it so in the accelerate file, or {fix}")
        if env.get("ACCELERATE_USE_CPU", "false").lower() == "true" and env.get("WORLD_SIZE", "1") == "1":
            found.append("num_processes=1: expected 2 or more with weights in shards on a CPU; choose configs/cpu2_fsdp2.yaml")
    return found


def sharding_problems(trainer: "GRPOConfig", invariance: str, prefix: str = "") -> list[str]:
    """List the settings that cannot stand beside weights in shards, one line each.

    Args:
        trainer: anything that has GRPOConfig's fields.
        invariance: which sides are exact.
        prefix: what the user writes before a field's name of `trainer`.
    """
    way = "with weights in shards (distributed_type: FSDP)"
    masked, synced = f"{prefix}mask_truncated_completions", f"{prefix}sync_ref_model"
    optim = getattr(trainer.optim, "value", trainer.optim)
    rules = (
        (invariance == "exact", f"invariance={invariance}", "exact", "a stock side has not been tried"),
        (not trainer.mask_truncated_completions, f"{masked}=True", "False", "processes mask other numbers of rows"),
        (not trainer.sync_ref_model, f"{synced}=True", "False", "the reference stays as it was loaded"),
        (optim in OPTIMS, f"{prefix}optim={optim}", " or ".join(OPTIMS), "a state is saved in its weight's rows"),
    )
    return [
        f"{key}: expected {right} {way}: {why}; set it, or use a file without shards" for ok, key, right, why in rules if not ok
    ]


def divisor(processes: int) -> str:
    """Say which numbers of processes a sampler may be spread over, where a host has so many."""
    return (
        f"a divisor of the {processes} process{'es' if processes > 1 else ''} of a host; start more by machine=, or choose one"
    )


def spread_problems(processes: int, invariance: Invariance) -> list[str]:
    """List what cannot stand beside a sampler that is spread over so many processes, a line at most.

    Args:
        processes: vLLM's tensor_parallel_size.
        invariance: which sides are exact.
    """
    said = f"sampler.tensor_parallel_size={processes}"
    if processes == 1 or SIDES[invariance][0]:
        return []
    return [f"{said}: expected 1 with invariance={invariance}: a stock sampler adds over processes; use invariance=exact"]


ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[^/@:\s\[\]]+)(:\d{1,5})?/?")
OF_SERVERS = ("servers", "trainer_token_file", "max_model_len")
"""Settings of the sampler that hold with servers; all others are the servers' own."""


def server_problems(servers: Sequence[str], token_file: str | None, invariance: Invariance, others: Sequence[str]) -> list[str]:
    """List what is wrong with the servers that a trainer is to draw from, one line each.

    Args:
        servers: their addresses; none: the trainer has an engine of its own.
        token_file: which holds the token that they want.
        invariance: which sides are exact.
        others: settings of the engine that were given, as the user writes them.
    """
    if not servers:
        said = f"sampler.trainer_token_file={shown(token_file)}"
        return [] if token_file is None else [f"{said}: expected sampler.servers too, or it does nothing; remove it"]
    said = f"sampler.servers={shown(','.join(servers))}"
    found = [
        f"sampler.servers={shown(one)}: expected http://HOST:PORT or https://HOST:PORT, without user, path or query"
        for one in servers
        if not ADDRESS.fullmatch(one)
    ]
    if len({one.rstrip("/") for one in servers}) < len(servers):
        found.append(f"{said}: the same address twice; name each server once")
    if token_file is None:
        found.append(f"{said}: expected sampler.trainer_token_file=FILE too, the one that the servers were started with")
    if invariance != "exact":
        found.append(f"invariance={invariance}: expected exact with sampler.servers, which run the invariant ops; remove one")
    own = "the server decides it, by the options of its start; remove it"
    return found + [f"{other}: expected none with sampler.servers: {own}" for other in others]


def microbatch_problems(
    tokens: int | None, recompute: bool | None, args: "GRPOConfig", invariance: Invariance, prefix: str = ""
) -> list[str]:
    """List what is wrong with the settings of micro-batches; `prefix` is what the user writes before a field of `args`."""
    name, stock = f"{prefix}tokens_per_microbatch={tokens}", not SIDES[invariance][1]
    least = (args.max_completion_length or 0) + 1
    if tokens is not None and stock:
        return [f"{name}: expected None with invariance={invariance}: a stock trainer counts rows; remove it"]
    if tokens is not None and (isinstance(tokens, bool) or tokens < least):
        return [f"{name}: expected at least {least:,}, a prompt and {prefix}max_completion_length; or None: as many as fit"]
    own = {"every_n_layers", "offload"} & set(args.gradient_checkpointing_kwargs or {})
    if own and not stock:
        name = f"{prefix}gradient_checkpointing_kwargs={shown(args.gradient_checkpointing_kwargs)}"
        return [f"{name}: expected no {min(own)}: which layers recompute is decided by the free memory; remove it"]
    if recompute is not None and stock:
        return [f"recompute={recompute}: expected None with invariance={invariance}; use args.gradient_checkpointing"]
    return []


def adapter_conflicts(said: str, none: str, invariance: str, allowed: tuple[str, ...] = ("exact",)) -> list[str]:
    """Say why a model cannot have LoRA adapters with a value of `invariance`, in a line at most.

    Args:
        said: the setting that asks for adapters, as it is written.
        none: its value that asks for none.
        invariance: as for `InvariantGRPOTrainer`.
        allowed: its values that are taken: with "off" a trainer merges adapters into what it syncs.
    """
    if invariance in allowed:
        return []
    fix = f"use {' or '.join(allowed)}"
    return [f"{said}: expected {none} with invariance={invariance}: a stock engine takes whole weights; {fix}"]


def adapter_training_conflicts(
    said: str, none: str, invariance: str, args: "GRPOConfig", critic: str | None, prefix: str = ""
) -> list[str]:
    """List the settings with which LoRA adapters cannot be trained, one line each.

    Args:
        said, none, invariance: as for `adapter_conflicts`.
        args: TRL's configuration.
        critic: the model that PPO's critic is asked to start from; None: the policy's, or there is no critic.
        prefix: what the user writes before a field of `args`.
    """
    found = adapter_conflicts(said, none, invariance, ("exact", "off"))
    if args.sync_ref_model:
        why = "the reference is the model as its adapters began, and has no weights of its own to move; remove it"
        found.append(f"{prefix}sync_ref_model=True: expected False with {said}: {why}")
    if critic is not None:
        why = "the critic has adapters of its own on the policy's base; remove it"
        found.append(f"ppo.critic={critic}: expected None with {said}: {why}")
    return found

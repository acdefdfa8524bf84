"""The fields of `trl.GRPOConfig` in a script that was written for TRL: each is kept, set, or refused.

A field in none of the tables, as a new release of TRL may bring, is refused where it does not have its default.
"""

import copy
import dataclasses
import operator
import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from transformers.trainer_utils import IntervalStrategy
from trl.trainer.grpo_config import GRPOConfig as TRLConfig

from rlinvariant.conflicts import RULES, SIDES, Invariance, Rule, broken
from rlinvariant.files import RUNS
from rlinvariant.text import shown

_KEPT = """
    output_dir run_name report_to project trackio_space_id trackio_bucket_id trackio_static_space_id log_level
    log_level_replica log_on_each_node logging_first_step include_num_input_tokens_seen
    per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps seed data_seed full_determinism use_cpu
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay
    adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor average_tokens_across_devices tf32
    gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs use_cache
    torch_empty_cache_steps debug skip_memory_metrics local_rank accelerator_config
    eval_strategy eval_steps eval_delay eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    per_device_eval_batch_size num_generations_eval prediction_loss_only include_for_metrics batch_eval_metrics
    do_train do_eval do_predict label_names
    save_strategy save_steps save_on_each_node load_best_model_at_end metric_for_best_model greater_is_better
    restore_callback_states_from_checkpoint resume_from_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns train_sampling_strategy length_column_name
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    router_aux_loss_coef disable_dropout shuffle_dataset pad_to_multiple_of chat_template_kwargs
    num_generations max_completion_length generation_batch_size steps_per_generation num_iterations
    mask_truncated_completions max_tool_calling_iterations
    epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg
    vespo_lambda_neg importance_sampling_level reward_weights multi_objective_aggregation scale_rewards loss_type
    sync_ref_model ref_model_mixup_alpha entropy_coef use_adaptive_entropy
    entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target off_policy_mask_threshold use_bias_correction_kl
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min vllm_importance_sampling_cap
    log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
"""
KEPT = frozenset(_KEPT.split())
"""Fields that mean here what they mean to TRL.

But an exact trainer takes `gradient_checkpointing` as what memory may need, and of `per_device_train_batch_size` and
`gradient_accumulation_steps` the rows of a step alone.
"""

SET: Mapping[str, tuple[Any, str]] = {
    "bf16": (False, "the modules cast to dtype=, in place of autocast"),
    "logging_steps": (1, "every step is counted"),
    "logging_strategy": (IntervalStrategy.STEPS, "every step is counted"),
    "logging_nan_inf_filter": (False, "a loss that is not finite stops the run"),
    "disable_tqdm": (True, "each step has its line"),
    "save_total_limit": (2, "if the newest checkpoint is damaged, a run goes on from the one before"),
    "use_vllm": (False, "the vLLM is rlinvariant's, in this process"),
    "vllm_max_model_length": (None, "it is sampler_options' max_model_len"),
    "vllm_gpu_memory_utilization": (0.3, "the cache has sampler_options' kv_cache_gib"),
    "vllm_model_impl": ("vllm", "vLLM runs transformers' modules through the invariant ops"),
}
"""Field -> the value that it gets, and why."""

_ATTACHED = "the sampler is a vLLM that rlinvariant attaches; remove it"
_PARALLEL = "one process or data parallel: each has the whole model; remove it"
_LOADS = {"dtype", "torch_dtype", "attn_implementation", "device_map", "use_cache", "low_cpu_mem_usage"}
REFUSED: Mapping[str, Rule] = {
    "vllm_mode": Rule(lambda value: value == "colocate", f"colocate: {_ATTACHED}"),
    "vllm_enable_sleep_mode": Rule(operator.not_, "False: the engine keeps its cache; use sampler_options' kv_cache_gib"),
    "vllm_tensor_parallel_size": Rule(lambda value: value == 1, f"1: {_PARALLEL}"),
    "vllm_structured_outputs_regex": Rule(operator.not_, "None: constrained decoding is not supported; remove it"),
    "use_transformers_continuous_batching": Rule(operator.not_, f"False: {_ATTACHED}"),
    "use_transformers_paged": Rule(operator.not_, f"False: {_ATTACHED}"),
    "cache_implementation": Rule(lambda value: value is None, f"None: {_ATTACHED}"),
    "deepspeed": Rule(operator.not_, f"None: {_PARALLEL}"),
    "fsdp": Rule(operator.not_, f"None: {_PARALLEL}"),
    "parallelism_config": Rule(lambda value: value is None, f"None: {_PARALLEL}"),
    "auto_find_batch_size": Rule(operator.not_, "False: a step would be taken twice; lower per_device_train_batch_size"),
    "enable_jit_checkpoint": Rule(operator.not_, "False: SIGTERM saves the step in progress without it; remove it"),
    "model_init_kwargs": Rule(
        lambda value: set(value or {}) <= _LOADS,
        f"no keys but {', '.join(sorted(_LOADS))}, whose part rlinvariant takes: weights are float32 masters; load the model "
        "in another way and give it to the trainer",
    ),
}
"""Fields that are refused at other values than these, beside `conflicts.RULES`, which the command line has too."""

DEPENDENT = {
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), "torch_compile"),
    "liger_kernel_config": "use_liger_kernel",
    "fsdp_config": "fsdp",
    "ds3_gather_for_generation": "deepspeed",
    "transformers_continuous_batching_config": "use_transformers_continuous_batching",
    **dict.fromkeys(("vllm_server_base_url", "vllm_server_host", "vllm_server_port"), "vllm_mode"),
    **dict.fromkeys(("vllm_server_timeout", "vllm_group_port"), "vllm_mode"),
}
"""Field that says nothing without another -> that other, which is refused."""

AUTOCAST = "ACCELERATE_MIXED_PRECISION"


class GRPOConfig(TRLConfig):
    """Holds TRL's settings, with TRL's defaults. Where there is no GPU, `use_cpu` is set, which TRL leaves to the user."""

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        super().__post_init__()


def script_problems(args: TRLConfig, invariance: Invariance) -> list[str]:
    """List the fields of a script's `args` that cannot have their values, one line each, beside `conflicts.conflicts`."""
    rules = {name: rule for name, rule in REFUSED.items() if args.use_vllm or not name.startswith("vllm_")}
    found = broken(rules, args, invariance)
    known = KEPT | SET.keys() | REFUSED.keys() | RULES.keys() | DEPENDENT.keys()
    for field in dataclasses.fields(args):
        if field.name in known or not field.init:
            continue
        missing = field.default is dataclasses.MISSING
        default = field.default_factory() if callable(field.default_factory) and missing else field.default
        if (value := getattr(args, field.name)) != default:
            new = f"a field of TRL {version('trl')}, transformers {version('transformers')} that rlinvariant does not know"
            found.append(f"{field.name}={shown(value)}: expected {shown(default)}: {new}; remove it")
    return found


def settled(args: Any, invariance: Invariance, run: str | None = None) -> tuple[Any, list[str]]:
    """Return a copy of a script's `args` in which the fields of `SET` have their values, and what was set, a phrase each.

    Autocast to bfloat16 is taken out of the environment, too, where TRL or `accelerate launch` has put it. With `run`, the
    checkpoints go to its directory.
    """
    new, said = copy.copy(args), []
    for name, (value, why) in SET.items():
        given = getattr(args, name)
        if _stays(name, given, value, invariance):
            continue
        setattr(new, name, value)
        if name == "use_vllm":
            said.append(f"use_vllm: {why}")
        elif args.use_vllm or not name.startswith("vllm_"):
            said.append(f"{name}={shown(getattr(value, 'value', value))} ({why})")
    if run is not None:
        new.output_dir, new.run_name = str(RUNS / run / "checkpoints"), args.run_name or run
        said.append(f"output_dir={new.output_dir} (run={run})")
        if "wandb" in args.report_to:
            new.report_to = [name for name in args.report_to if name != "wandb"]
            said.append("report_to=wandb: W&B gets the run's own keys")
    if args.bf16 and not new.bf16:
        os.environ[AUTOCAST] = "no"
        new.mixed_precision = "no"
    return new, said


def _stays(name: str, given: Any, value: Any, invariance: Invariance) -> bool:
    if name == "bf16":
        return not SIDES[invariance][1] or given is False
    if name == "save_total_limit":
        return given is None or given >= value
    return given == value

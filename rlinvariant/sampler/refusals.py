"""Refuse, before weights are loaded, what an exact engine cannot be given: options, a machine, a model."""

import os
from typing import TYPE_CHECKING

import torch

from rlinvariant import runtime
from rlinvariant.conflicts import divisor
from rlinvariant.errors import ConfigErrors, UserError, one_line
from rlinvariant.kernels import choice, cpu
from rlinvariant.launch import is_launched
from rlinvariant.model_source import source_problems
from rlinvariant.models import unsupported
from rlinvariant.models.limits import flash_problems, uncuttable
from rlinvariant.support import cuda_problems
from rlinvariant.types import JsonObject, JsonRow, Untyped

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FUSED = "fuse_allreduce_rms"  # of vLLM's pass_config
UNTOUCHED_OPTIONS = {  # keep vllm.LLM's default: an exact sampler runs whole, on one device, the model that is trained
    "attention_backend": None,
    "attention_config": None,
    "cpu_offload_gb": 0,
    "data_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "enable_dbo": False,
    "enable_eplb": False,
    "enable_expert_parallel": False,
    "enable_lora": False,
    "kv_cache_dtype": "auto",
    "kv_offloading_size": None,
    "kv_transfer_config": None,
    "logits_processors": None,
    "model_impl": "auto",
    "pipeline_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "speculative_config": None,
}


def refuse(
    options: JsonObject,
    model: str,
    dtype: str,
    max_model_len: int | None = None,
    otherwise: str = "use invariance=off",
    config: "PreTrainedConfig | None" = None,
) -> int:
    """Refuse what would give an exact engine other kernels or another model, before any weights are loaded.

    Args:
        options: keyword arguments of `vllm.LLM` that the user chose.
        model: directory or hub id of a Hugging Face checkpoint.
        dtype: "bfloat16" or "float32".
        max_model_len: longest prompt plus completion, in tokens; None: not limited by the user.
        otherwise: how to run it all the same, for the messages.
        config: the model's configuration, where the caller has loaded it; None: it is loaded here.

    Returns:
        How many positions the model has. `Sampler` takes this number as the proof that nothing was refused.

    Raises:
        ConfigErrors: every option, variable, device and property of the model that would change the bits, one line each.
        UserError: the configuration cannot be loaded, or is not a causal language model's.
    """
    if problems := source_problems("model", model):
        raise ConfigErrors(problems)
    runtime.quiet()
    found: list[str] = []
    if (value := os.environ.get("VLLM_BATCH_INVARIANT", "0")) != "0":
        fix = f"remove it, or {otherwise}"
        found.append(f"VLLM_BATCH_INVARIANT={value}: expected unset: it puts vLLM's own kernels in place of ours; {fix}")
    cuda = torch.cuda.is_available()
    found += choice.misplaced(choice.asked(), "exact", "cuda" if cuda else "cpu")
    found += cuda_problems(getattr(torch, dtype)) if cuda else cpu.compiler_problems()
    config = load_config(model) if config is None else config
    if found := found + engine_problems(options, model, config, max_model_len, otherwise, "cuda" if cuda else "cpu"):
        raise ConfigErrors(found)
    return config.get_text_config().max_position_embeddings


def engine_problems(
    options: JsonRow,
    model: str,
    config: "PreTrainedConfig",
    max_model_len: int | None,
    otherwise: str,
    device: str,
) -> list[str]:
    """List what `refuse` finds wrong with a model and with the options of its engine, one line each.

    Args:
        options, model, config, max_model_len, otherwise: as for `refuse`.
        device: "cpu" or "cuda".

    Raises:
        UserError: the configuration is not a causal language model's.
    """
    require_causal_lm(config, model)
    touched = {k: v for k, v in options.items() if k in UNTOUCHED_OPTIONS and v != UNTOUCHED_OPTIONS[k]}
    fix = f"remove it, or {otherwise}"
    found = [f"sampler option {k}={v}: expected {UNTOUCHED_OPTIONS[k]}; {fix}" for k, v in touched.items()]
    reasons = list(unsupported(config, device))
    found += [f"model={model}: {reason}; {otherwise}" for reason in reasons]
    found += [] if reasons else flash_problems(model, config, device)
    found += [] if reasons else process_problems(options.get("tensor_parallel_size", 1), model, config)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)  # a model without it is refused above
    if max_model_len is not None and positions is not None and max_model_len > positions:
        found.append(f"sampler.max_model_len={max_model_len}: expected at most {positions}, the model's positions")
    return found


def without_fused_sums(given: Untyped) -> Untyped:
    """Return a `compilation_config` of vLLM that fuses no sum over processes with a norm, beside whatever else it says.

    An exact engine adds nothing over processes. vLLM would make a workspace of NVLink multicast for that sum all the same.

    Args:
        given: the user's: None, a number, a dict or vLLM's own class, which is changed in place.

    Raises:
        UserError: it asks for the fusion.
    """
    found = {"mode": given} if isinstance(given, int) else {} if given is None else given
    passes = found.get("pass_config") or {} if isinstance(found, dict) else found.pass_config
    asked = passes.get(FUSED) if isinstance(passes, dict) else getattr(passes, FUSED)
    if asked:
        raise UserError(f"sampler option compilation_config: {FUSED}={asked}: expected False; nothing is added over processes")
    if not isinstance(passes, dict):
        setattr(passes, FUSED, False)
        return found
    return found | {"pass_config": passes | {FUSED: False}}


def process_problems(count: int, model: str, config: "PreTrainedConfig", started: int | None = None) -> list[str]:
    """List why an engine cannot be spread over so many processes by columns, one line each.

    Args:
        count: vLLM's tensor_parallel_size.
        model, config: as for `refuse`.
        started: how many processes this host has; None: as many as were launched.
    """
    if count == 1:
        return []
    said = f"sampler.tensor_parallel_size={count}"
    if started is None:
        started = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1
    if count < 1:
        return [f"{said}: expected {divisor(started)}"]
    found = [f"{said}: model={model}: {reason}; choose another number, or 1" for reason in uncuttable(config, count)]
    if started % count:
        found.append(f"{said}: expected {divisor(started)}")
    return found


def load_config(model: str) -> "PreTrainedConfig":
    """Load the configuration of a checkpoint, a directory or a hub id; UserError if it cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model={model}: cannot be loaded: {one_line(error, 400)}") from error


def require_causal_lm(config: "PreTrainedConfig", model: str) -> None:
    """Raise UserError where transformers has no causal language model of a configuration."""
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        kind = ", ".join(config.architectures or [type(config).__name__])
        raise UserError(f"model={model}: {kind} is not a transformers causal language model; name a directory or id of one")

"""Load the parts that are verified, each as a run has it: the trainer's model, the engines, and the stock model."""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from rlinvariant import runtime
from rlinvariant.conflicts import environment_conflicts
from rlinvariant.errors import ConfigErrors, UserError, one_line
from rlinvariant.kernels.routes import ATTENTION_ROUTES
from rlinvariant.models import UnsupportedModel, lora, make_trainable, require_exact
from rlinvariant.models.load import load
from rlinvariant.models.random import save_random
from rlinvariant.ops.linear import routes
from rlinvariant.sampler.engine import Sampler, refuse
from rlinvariant.types import JsonObject, Untyped
from rlinvariant.verification.adapters import Adapt
from rlinvariant.verification.certificate import weights_sha256
from rlinvariant.verification.compositions import ENGINE_REQUESTS
from rlinvariant.verification.pair import Sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from rlinvariant.config import LoraConfig

PAGE_TOKENS = {"cuda": 16, "cpu": 32}  # a page of the engine's cache: the least that vLLM takes, so that requests have many
WITHOUT_PROOF = "invariance=off trains it without the proof"
SPARE_CACHE_TOKENS = 20_000  # room in the engine's cache beyond the longest request
live_engines: list[Sampler] = []  # engines of a process share process groups: none may be collected while another is used


def device() -> str:
    """Return where exact mode runs here: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def configuration(model: str, dtype: str, processes: int = 1) -> "PreTrainedConfig":
    """Return transformers' configuration of a model that can run exactly here. Raises UserError for any other model.

    `processes` are those that the engine is spread over.
    """
    runtime.configure()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if found := environment_conflicts(os.environ, "exact"):
        raise ConfigErrors(found)
    refuse({"tensor_parallel_size": processes}, model, dtype, otherwise=WITHOUT_PROOF)
    return AutoConfig.from_pretrained(model, trust_remote_code=False)


def random_weights(config: "PreTrainedConfig", directory: str, seed: int) -> str:
    """Write a checkpoint with random weights in bf16, the dtype of most checkpoints, and return its directory."""
    config.dtype = torch.bfloat16
    return save_random(config, directory, seed)


def trained(directory: str, dtype: str, adapt: Adapt | None = None) -> Untyped:
    """Load what `InvariantGRPOTrainer` trains: fp32 masters on the device, patched and audited.

    With `adapt`, PEFT's model around one with parameters of `dtype`, which are frozen.
    """
    model = masters(directory) if adapt is None else adapt(stock(directory, dtype)).eval()
    try:
        require_exact(make_trainable(model, getattr(torch, dtype)))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error}; {WITHOUT_PROOF}") from error
    return model


def masters(directory: str) -> "PreTrainedModel":
    """Load transformers' own model with fp32 parameters on the device."""
    return _loaded(directory, torch.float32)


def _loaded(directory: str, dtype: torch.dtype) -> "PreTrainedModel":
    logging.disable_progress_bar()
    try:
        return load(AutoModelForCausalLM, directory, dtype=dtype, device_map=device()).eval()
    except UserError as error:
        fix = "; --random needs the configuration alone" if isinstance(error.__cause__, OSError) else ""
        raise UserError(f"{error}{fix}") from error


def stock(directory: str, dtype: str) -> "PreTrainedModel":
    """Load transformers' own model with parameters of `dtype` on the device."""
    return _loaded(directory, getattr(torch, dtype))


def options(sizes: Sizes, eager: bool, processes: int = 1) -> JsonObject:
    """Return the engine's options: small steps, so that prompts are cut, and small pages of its cache."""
    more: JsonObject = {"enforce_eager": True} if eager else {}
    more |= {"tensor_parallel_size": processes} if processes > 1 else {}
    steps = {"max_num_seqs": ENGINE_REQUESTS, "max_num_batched_tokens": sizes.in_step}
    return {**steps, "block_size": PAGE_TOKENS[device()], **more}


def engine(
    directory: str, invariant: bool, dtype: str, options: JsonObject, sizes: Sizes, ranks: Mapping[str, int] | None = None
) -> Sampler:
    """Start an engine with room in its cache for these sizes, and for adapters, and keep it alive in `live_engines`."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head * getattr(torch, dtype).itemsize
    cache_gib = (SPARE_CACHE_TOKENS + sizes.positions) * token_bytes / 2**30
    room = {"max_model_len": sizes.positions, "kv_cache_gib": cache_gib}
    live_engines.append(Sampler(directory, invariant=invariant, dtype=dtype, **room, options=options, ranks=ranks))
    return live_engines[-1]


def or_reason(make: Callable[[], Any]) -> Any:
    """Return what `make` returns, or in words why it failed.

    It makes a stock model or engine for a control. vLLM's own refuses some models that ours runs, and no proof needs it.
    """
    try:
        return make()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, MemoryError, UserError) as error:
        return f"not run: {one_line(error, 160)}"


def description(model: str, random: bool, directory: str, trained: Untyped, asked: "LoraConfig | None") -> dict[str, object]:
    """Return what a certificate says of its model."""
    ranks = lora.ranks(trained)
    return {
        "name": model,
        "class": type(trained.get_base_model() if ranks else trained).__name__,
        "adapters": lora.in_words(ranks) if ranks else None,
        "lora": None if asked is None else asked.settings(),
        "parameters": sum(p.numel() for p in trained.parameters()),
        "random_weights": random,
        "weights_sha256": weights_sha256(directory),
        "config": trained.config.to_diff_dict(),
    }


def kernels() -> dict[str, object]:
    """Return which kernel took which weight, as the self-checks of this process decided."""
    return {"linear": routes(), "attention": dict(ATTENTION_ROUTES) if device() == "cuda" else "kernels/attention.c"}

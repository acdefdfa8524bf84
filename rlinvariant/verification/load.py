"""The parts that are verified: the trainer's model, the engines, and the stock model, each as a run has them."""

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from rlinvariant import runtime
from rlinvariant.conflicts import environment_conflicts
from rlinvariant.errors import ConfigErrors, UserError, one_line
from rlinvariant.models import UnsupportedModel, make_trainable, require_exact
from rlinvariant.models.load import load
from rlinvariant.models.random import save_random
from rlinvariant.ops.linear import routes
from rlinvariant.sampler.engine import Sampler, refuse
from rlinvariant.verification.certificate import weights_sha256
from rlinvariant.verification.relations import MOST, Sizes

PAGE = {"cuda": 16, "cpu": 32}  # tokens of a page of the cache: the least that vLLM takes, so that requests have many
OTHERWISE = "invariance=off trains it without the proof"
KEPT = 20_000  # tokens that the cache has room for, beyond the longest request
engines: list[Sampler] = []  # of one process share process groups: none may be collected while another is used


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def configuration(model: str, dtype: str) -> Any:
    """transformers' configuration of a model that can run exactly here; UserError or ConfigErrors for any other."""
    runtime.configure()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if found := environment_conflicts(os.environ, "exact"):
        raise ConfigErrors(found)
    refuse({}, model, dtype, otherwise=OTHERWISE)
    return AutoConfig.from_pretrained(model)


def random_weights(config: Any, directory: str, seed: int) -> str:
    """A checkpoint in bf16, as most are."""
    config.dtype = torch.bfloat16
    return save_random(config, directory, seed)


def trained(directory: str, dtype: str) -> Any:
    """What `InvariantGRPOTrainer` trains: fp32 masters on the device, patched and audited."""
    model = masters(directory)
    try:
        require_exact(make_trainable(model, getattr(torch, dtype)))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error}; {OTHERWISE}") from error
    return model


def masters(directory: str) -> Any:
    """transformers' model with fp32 parameters, on the device."""
    logging.disable_progress_bar()
    try:
        return load(AutoModelForCausalLM, directory, dtype=torch.float32, device_map=device()).eval()
    except UserError as error:
        fix = "; --random needs the configuration alone" if isinstance(error.__cause__, OSError) else ""
        raise UserError(f"{error}{fix}") from error


def stock(directory: str, dtype: str) -> Any:
    """transformers as it is."""
    return load(AutoModelForCausalLM, directory, dtype=getattr(torch, dtype), device_map=device()).eval()


def options(sizes: Sizes, eager: bool) -> dict[str, Any]:
    """Of the engine: small steps, so that prompts are cut, and small pages."""
    more = {"enforce_eager": True} if eager else {}
    return {"max_num_seqs": MOST, "max_num_batched_tokens": sizes.in_step, "block_size": PAGE[device()], **more}


def engine(directory: str, invariant: bool, dtype: str, options: dict[str, Any], sizes: Sizes) -> Sampler:
    config = AutoConfig.from_pretrained(directory).get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * getattr(torch, dtype).itemsize
    gib = (KEPT + sizes.positions) * token / 2**30
    made = Sampler(
        directory, invariant=invariant, dtype=dtype, max_model_len=sizes.positions, kv_cache_gib=gib, options=options
    )
    engines.append(made)
    return made


def or_reason(make: Callable[[], Any]) -> Any:
    """What `make` returns, or why a stock model or engine cannot be had: vLLM refuses some models that ours runs, and what
    was verified needs neither."""
    try:
        return make()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, MemoryError, UserError) as error:
        return f"not run: {one_line(error, 160)}"


def description(model: str, random: bool, directory: str, trained: Any) -> dict[str, Any]:
    return {
        "name": model,
        "class": type(trained).__name__,
        "parameters": sum(p.numel() for p in trained.parameters()),
        "random_weights": random,
        "weights_sha256": weights_sha256(directory),
        "config": trained.config.to_diff_dict(),
    }


def kernels() -> dict[str, Any]:
    """Which kernel took which weight, as the self-checks of this process decided."""
    return {"linear": routes(), "attention": "FlashAttention-3, one split" if device() == "cuda" else "kernels/cpu.c"}

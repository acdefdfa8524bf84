"""The limits of the ops, by a model's configuration alone: sizes, windows, caps, ropes and activations that can be exact."""

from collections.abc import Iterator, Mapping
from typing import Any

from rlinvariant.kernels import attention, choice
from rlinvariant.types import Untyped

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # those of vLLM's key-value cache on a CPU
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # angles depend on the position alone, not on the sequence length
VOCABULARY_STEP = 64  # vLLM pads a vocabulary to a multiple of it, and cuts that
ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
ROUTERS: dict[
    str, str
] = {  # setting of a mixture that no op computes -> what it is, where it is neither absent, 0, None nor False
    "n_group": "experts in groups",
    "topk_group": "experts in groups",
    "scoring_func": "a router with another function than the softmax over all experts",
    "routed_scaling_factor": "weights of experts times a factor",
    "n_shared_experts": "experts that every token goes to",
    "num_shared_experts": "experts that every token goes to",
    "shared_expert_intermediate_size": "an expert that every token goes to, behind a gate (a sigmoid)",
    "router_jitter_noise": "noise in the router's input",
    "input_jitter_noise": "noise in the router's input",
    "expert_capacity": "a capacity, which lets a token's experts depend on other tokens",
    "capacity_factor": "a capacity, which lets a token's experts depend on other tokens",
    "swiglu_limit": "experts with bounds and biases",
}
"""Settings of mixtures for which there is no op yet: as DeepSeek, GLM, Qwen2-MoE, GPT-OSS and PhiMoE have them."""
PLAIN_ROUTER = {"scoring_func": "softmax", "routed_scaling_factor": 1.0}


def unsupported(config, device: str = "cpu") -> Iterator[str]:
    """Yield each reason, in words, why a model of this configuration cannot run exactly on a device type, "cpu" or "cuda"."""
    if config.get_text_config() is not config:
        yield f"model_type={config.model_type} has a text model inside; only models of text alone are supported"
        return
    if not getattr(config, "num_attention_heads", None):
        yield f"model_type={config.model_type} has no attention heads; only transformers are supported"
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if device == "cuda":
        yield from attention.refusals(head)
    elif head not in HEAD_SIZES:
        yield f"head_dim={head} is not one of {', '.join(map(str, HEAD_SIZES))}"
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # those of each type of layer
        if each.get("rope_type", "default") not in ROPE_TYPES:
            yield f"rope_type={each['rope_type']} changes with the sequence length; supported: {', '.join(ROPE_TYPES)}"
    if others := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        yield f"layer_types has {', '.join(sorted(others))}; supported: full_attention, sliding_attention"
    for name in ("hidden_act", "hidden_activation"):
        if getattr(config, name, "silu") not in ACTIVATIONS:
            yield f"{name}={getattr(config, name)}; supported: {', '.join(ACTIVATIONS)}"
    if getattr(config, "attention_dropout", 0.0):
        yield f"attention_dropout={config.attention_dropout}; set it to 0"
    if getattr(config, "use_bidirectional_attention", False):
        yield f"use_bidirectional_attention={config.use_bidirectional_attention}; only causal attention is supported"
    if mixture_of(config):
        yield from _mixture(config)
    if getattr(config, "clip_qkv", None):
        yield f"clip_qkv={config.clip_qkv}: no op bounds queries, keys and values; only null is supported"
    if getattr(config, "quantization_config", None):
        yield "the checkpoint is quantised"


def attention_forms(config: Untyped) -> Mapping[tuple[int, int | None, float | None], str]:
    """Return the forms that a model's layers have, (head size, window, cap), each with words for those layers."""
    config = config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cap, window = getattr(config, "attn_logit_softcapping", None), getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if window is None or kinds == {"full_attention"}:
        return {(head, None, cap): "all layers"}
    slides = f"sliding_window={window}"
    if kinds <= {"sliding_attention"}:  # a configuration without types of layers means all
        return {(head, window, cap): f"all layers, {slides}"}
    return {(head, None, cap): "full layers", (head, window, cap): f"layers with {slides}"}


def attention_of(config: Untyped) -> str:
    """Say which attention the layers of a model take on this GPU, and why."""
    chosen, said = choice.chosen(), []
    for form, layers in attention_forms(config).items():
        why = "" if chosen == "chunked" else ", ".join(attention.not_flash(*form))
        said.append(f"{attention.OWN if attention.own(*form) else attention.FLASH} for {layers}{f' ({why})' if why else ''}")
    return f"{'; '.join(said)}; attention={chosen}"


def flash_problems(model: str, config: Untyped, device: str) -> list[str]:
    """Refuse, in one line, a model for whose layers attention=flash has no kernel, where that is chosen."""
    if choice.asked() != "flash" or device != "cuda":
        return []
    reasons = [reason for form in attention_forms(config) for reason in attention.not_flash(*form)]
    return [f"model={model}: {attention.without_flash(reason)}" for reason in reasons[:1]]


def mixture_of(config: Untyped) -> str | None:
    """Return the setting that makes a model a mixture of experts, as `num_experts=8`; None if it is none."""
    return next((f"{name}={value}" for name in EXPERTS if (value := getattr(config, name, None))), None)


def _mixture(config: Any) -> Iterator[str]:
    """Yield the settings of a mixture of experts for which there is no op."""
    if config.model_type == "gpt_oss":
        yield "model_type=gpt_oss: no op has its experts (biases, bounds), sinks and softmax over the chosen experts alone"
        return
    for name, what in ROUTERS.items():
        value = getattr(config, name, None)
        if value and value != PLAIN_ROUTER.get(name):
            yield f"{name}={value}: no op has {what}"


def uncuttable(config: Untyped, processes: int) -> Iterator[str]:
    """Yield each reason, in words, why a model's weights cannot be cut by columns for so many processes of a sampler."""
    if mixture := mixture_of(config):
        yield f"{mixture}: a mixture's experts are not cut so far"
        return
    plan = getattr(config, "base_model_tp_plan", None) or {}
    merged = [name for name, way in plan.items() if way in ("colwise_gather_output", "rowwise_split_input")]
    if merged or not plan:
        what = f"{merged[0].split('.')[-1]} is not one of whole heads" if merged else "transformers has no plan for it"
        yield f"model_type={config.model_type}: {what}, as the processes must have them"
    for name in ("num_attention_heads", "hidden_size", "intermediate_size"):
        if (size := getattr(config, name, 0)) % processes:
            yield f"{name}={size} is no multiple of {processes}"
    vocabulary = getattr(config, "vocab_size", 0)
    if (padded := -(-vocabulary // VOCABULARY_STEP) * VOCABULARY_STEP) % processes:
        yield f"vocab_size={vocabulary}, of which vLLM makes {padded}, is no multiple of {processes}"
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if keys % processes and processes % keys:
        yield f"num_key_value_heads={keys} is neither a multiple nor a divisor of {processes}"

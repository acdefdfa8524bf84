"""The limits of the ops, by a model's configuration alone: sizes, windows, caps, ropes and activations that can be exact."""

from collections.abc import Iterator
from typing import Any

from rlinvariant.kernels import attention
from rlinvariant.types import Untyped

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # those of vLLM's key-value cache on a CPU
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # angles depend on the position alone, not on the sequence length
ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def unsupported(config, device: str = "cpu") -> Iterator[str]:
    """Yield each reason, in words, why a model of this configuration cannot run exactly on a device type, "cpu" or "cuda"."""
    if config.get_text_config() is not config:
        yield f"model_type={config.model_type} has a text model inside; only models of text alone are supported"
        return
    if not getattr(config, "num_attention_heads", None):
        yield f"model_type={config.model_type} has no attention heads; only transformers are supported"
        return
    head, *_ = form = attention_form(config)
    if device == "cuda":
        yield from attention.refusals(*form)
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
    if name := next((name for name in EXPERTS if vars(config).get(name)), None):
        yield f"{name}={vars(config)[name]}: no op has the products of a mixture of experts"
    if getattr(config, "quantization_config", None):
        yield "the checkpoint is quantised"


def attention_form(config: Untyped) -> tuple[int, int | None, float | None]:
    """Return the head size of a model, the window of those layers that have one, and the cap of its scores."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None) if _slides(config) else None
    return head, window, getattr(config, "attn_logit_softcapping", None) or None


def _slides(config: Any) -> bool:
    """Return whether some layer has a window: `layer_types` says which layers do, and without `layer_types` all of them do."""
    if types := getattr(config, "layer_types", None):
        return "sliding_attention" in types
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)

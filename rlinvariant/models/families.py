"""A tiny configuration of every model family that is run from end to end: what the families differ in, and no more.

`FAMILIES["phi3"]()` gives transformers' configuration; `models.random.save_random` a checkpoint of it. All have heads of 64,
which a GPU has too.
"""

from collections.abc import Callable
from typing import Any

VOCABULARY = 101  # prime: no multiple of any tile, and vLLM pads the head
WINDOW = 40  # of keys that a sliding layer reads: more than a page of 32, less than most prompts


def _config(kind: str, **more: Any) -> Any:
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return getattr(transformers, f"{kind}Config")(**sizes | more)


def _headed(kind: str, **more: Any) -> Any:
    """Return the configuration of a family whose head size is not hidden_size / heads, and must not be taken for it."""
    return _config(kind, **{"head_dim": 64, "hidden_size": 128} | more)


def _plain(kind: str, **sizes: Any) -> Any:
    import transformers

    return getattr(transformers, f"{kind}Config")(**sizes)


def _alternating(layers: int) -> list[str]:
    return [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]


def _gemma(kind: str, **more: Any) -> Any:
    """Return Gemma's configuration. `query_pre_attn_scalar` is not the head size: the scores' scale must come from it."""
    shared = {
        "query_pre_attn_scalar": 48,
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,
        "sliding_window": WINDOW,
        "layer_types": _alternating(4),
    }
    return _headed(kind, **shared | more)


FAMILIES: dict[str, Callable[[], Any]] = {
    # 3,072 columns: from about there a vendor's product splits its sum for a single row
    "llama": lambda: _headed("Llama", intermediate_size=3072),
    "qwen2": lambda: _config("Qwen2"),
    "qwen2-window": lambda: _config(
        "Qwen2", num_hidden_layers=4, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3": lambda: _headed("Qwen3", tie_word_embeddings=True),
    "qwen3-window": lambda: _headed("Qwen3", use_sliding_window=True, sliding_window=WINDOW, layer_types=_alternating(2)),
    "mistral": lambda: _headed("Mistral", sliding_window=None),
    "mistral-window": lambda: _headed("Mistral", sliding_window=WINDOW),
    "phi3": lambda: _config("Phi3", sliding_window=None),
    "phi3-window": lambda: _config("Phi3", sliding_window=WINDOW, num_key_value_heads=4),
    "olmo2": lambda: _config("Olmo2"),
    "granite": lambda: _config(
        "Granite", embedding_multiplier=12.0, attention_multiplier=0.03, residual_multiplier=0.22, logits_scaling=0.7
    ),
    "smollm3": lambda: _config("SmolLM3", num_hidden_layers=4, no_rope_layer_interval=2, use_sliding_window=False),
    "gemma2": lambda: _gemma("Gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": lambda: _gemma(
        "Gemma3Text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    # 3,072 columns inside an expert: an expert of one row must not have a product of its own
    "qwen3-moe": lambda: _headed(
        "Qwen3Moe", num_experts=8, num_experts_per_tok=3, moe_intermediate_size=3072, norm_topk_prob=True
    ),
    "olmoe": lambda: _config("Olmoe", num_experts=16, num_experts_per_tok=4, norm_topk_prob=False),
    "mixtral": lambda: _headed("Mixtral", num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
}

REFUSED: dict[str, Callable[[], Any]] = {
    "gpt-oss": lambda: _headed("GptOss", num_local_experts=4, num_experts_per_tok=2),
    "deepseek": lambda: _config("DeepseekV3", n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1),
    "glm-moe": lambda: _headed("Glm4Moe", n_routed_experts=8, num_experts_per_tok=2),
    "qwen2-moe": lambda: _config("Qwen2Moe", num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=64),
    "mixtral, jitter": lambda: _headed("Mixtral", num_local_experts=4, sliding_window=None, router_jitter_noise=0.1),
    "gpt2": lambda: _plain("GPT2", n_embd=128, n_layer=2, n_head=2, n_positions=256, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "cohere": lambda: _config("Cohere"),
    "qwen3, dynamic rope": lambda: _headed("Qwen3", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    "llama, dropout": lambda: _headed("Llama", attention_dropout=0.1),
}
"""Models that have to be refused by name: some form of each kind that no op owns."""

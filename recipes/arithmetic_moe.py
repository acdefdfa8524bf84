"""arithmetic with a mixture of experts: a two-layer Qwen3-MoE, of whose 8 experts a token goes to 2.

The experts that a token goes to are as wide together as the MLP of `arithmetic`. Routers have no auxiliary loss.
"""

from dataclasses import replace
from typing import Any

from rlinvariant.config import Config
from rlinvariant.recipes import _tiny, arithmetic

BASE = "arithmetic"


def build_model() -> tuple[Any, Any]:
    """Build an untrained two-layer Qwen3-MoE, 128 wide, float32, and its tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    dense, tokenizer = _tiny.build_model()
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    shared += ("max_position_embeddings", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    config = Qwen3MoeConfig(
        **{name: getattr(dense.config, name) for name in shared},
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=dense.config.intermediate_size // 2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
    )
    return Qwen3MoeForCausalLM(config), tokenizer


def task(config: Config) -> _tiny.Task:
    """Describe the sums of `arithmetic`, for another model."""
    return replace(arithmetic.task(config), name="arithmetic_moe", build=build_model)


_, _, prepare_model, untrained = _tiny.functions(task)

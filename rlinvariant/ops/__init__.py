"""The ops of which sampler and trainer are both made. Each file gives one op's contract: formula, order of summation, bits;
and beside it `X_ref`, the same formula in plain PyTorch, for tests and benchmarks to measure it by.

Nothing else in a model may sum, and nothing else may call a transcendental function: `models.audit` fails if it does.
"""

from rlinvariant.ops.attention import attention, attention_ref, paged_attention, paged_attention_ref
from rlinvariant.ops.embedding import embedding, embedding_ref
from rlinvariant.ops.linear import linear, linear_ref
from rlinvariant.ops.lora import (
    joined_lora_linear as joined_lora_linear,  # of several projections, as a trainer on a GPU has it
)
from rlinvariant.ops.lora import lora_linear, lora_linear_ref
from rlinvariant.ops.lora import wide_linear as wide_linear  # the sampler's form of it, which `bisect` watches
from rlinvariant.ops.moe_experts import moe_experts, moe_experts_ref
from rlinvariant.ops.moe_route import moe_route, moe_route_ref
from rlinvariant.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from rlinvariant.ops.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from rlinvariant.ops.rope import rope, rope_ref
from rlinvariant.ops.scale_logits import scale_logits, scale_logits_ref
from rlinvariant.ops.swiglu import swiglu, swiglu_merged, swiglu_merged_ref, swiglu_ref
from rlinvariant.ops.threshold import threshold, threshold_ref
from rlinvariant.ops.token_logprobs import (
    log_softmax,
    log_softmax_ref,
    sample,
    sample_ref,
    token_logprobs,
    token_logprobs_ref,
)

__all__ = [
    "add_rms_norm",
    "add_rms_norm_ref",
    "attention",
    "attention_ref",
    "embedding",
    "embedding_ref",
    "linear",
    "linear_ref",
    "lora_linear",
    "lora_linear_ref",
    "log_softmax",
    "log_softmax_ref",
    "moe_experts",
    "moe_experts_ref",
    "moe_route",
    "moe_route_ref",
    "paged_attention",
    "paged_attention_ref",
    "qk_norm_rope",
    "qk_norm_rope_ref",
    "rms_norm",
    "rms_norm_ref",
    "rope",
    "rope_ref",
    "sample",
    "sample_ref",
    "scale_logits",
    "scale_logits_ref",
    "swiglu",
    "swiglu_merged",
    "swiglu_merged_ref",
    "swiglu_ref",
    "threshold",
    "threshold_ref",
    "token_logprobs",
    "token_logprobs_ref",
]

"""The ops of which sampler and trainer are both made. Each file gives one op's contract: formula, order of summation, bits.

Nothing else in a model may sum, and nothing else may call a transcendental function: `models.audit` fails if it does.
"""

from rlinvariant.ops.attention import attention, paged_attention
from rlinvariant.ops.linear import linear
from rlinvariant.ops.qk_norm_rope import qk_norm_rope
from rlinvariant.ops.rms_norm import add_rms_norm, rms_norm
from rlinvariant.ops.rope import rope
from rlinvariant.ops.scale_logits import scale_logits
from rlinvariant.ops.swiglu import swiglu, swiglu_merged
from rlinvariant.ops.token_logprobs import log_softmax, sample, token_logprobs

__all__ = [
    "add_rms_norm",
    "attention",
    "linear",
    "log_softmax",
    "paged_attention",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "sample",
    "scale_logits",
    "swiglu",
    "swiglu_merged",
    "token_logprobs",
]

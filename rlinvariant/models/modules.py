"""The forms that modules of a Hugging Face model take: the same names and parameters, with a forward that computes by `ops`.

models/patch.py says which module becomes which, and sets the attributes declared here that the stock module does not have.

B: sequences (1 if packed), T: tokens of one, H: heads, D: width of a head; R: columns of a head that are rotated; P: positions.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlinvariant import ops
from rlinvariant.errors import UserError
from rlinvariant.models.graphs import hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ATTENTION = "rlinvariant"  # name of the attention implementation, in transformers' registry


class UnsupportedModel(UserError):
    """Tells that the model computes something that no op owns."""


def become(module: Any, form: type, **attributes: object) -> None:
    """Give the module the forward of `form`, in a class of the same name, so that saved configurations and messages keep it."""
    module.__class__ = _with_forward_of(form, type(module))
    for name, value in attributes.items():
        setattr(module, name, value)


@functools.cache  # one class for all layers of a model: torch.compile compiles anew for each class
def _with_forward_of(form: type, cls: Any) -> type:
    body = dict[str, Any]()
    for base in reversed(form.__mro__):
        if issubclass(base, nn.Module) and base is not nn.Module:
            body |= vars(base)
    if form is Rotated:
        body["forward"] = _rebind(cls.forward, apply_rotary_pos_emb=apply_rotary)
    body = {k: v for k, v in body.items() if k not in ("__dict__", "__weakref__", "__doc__", "__qualname__", "__module__")}
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "stock": cls, "form": form}
    return type(cls.__name__, (cls,), body | own)


def _rebind(function: Callable, **names: Callable) -> Callable:
    """Return `function` with other meanings for some of the global names it uses."""
    f = inspect.unwrap(function)
    new = types.FunctionType(f.__code__, {**f.__globals__, **names}, f.__name__, f.__defaults__, f.__closure__)
    new.__kwdefaults__ = f.__kwdefaults__
    return new


def epsilon(norm: nn.Module) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


class Linear(nn.Module):
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Gives rows of a table, cast to the dtype, times `scale`, which is rounded to the dtype first, as Gemma has it."""

    weight: Tensor
    padding_idx: int | None
    compute_dtype: torch.dtype
    scale: float | None

    def forward(self, ids: Tensor) -> Tensor:
        x = ops.embedding(ids, self.weight, self.padding_idx).to(self.compute_dtype)
        return x if self.scale is None else x * self.scale


class RMSNorm(nn.Module):
    weight: Tensor
    offset: float | None  # added to the weight, as in Gemma; None: rounded before the weight, as in Llama

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, epsilon(self), self.offset)


class MLP(nn.Module):
    """Computes gate and up, joins them by `ops.swiglu`, and computes down. Who merges the first two replaces `gate_and_up`."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    activation_name: str

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        return self.down_proj(ops.swiglu(*self.gate_and_up(x), self.activation_name))


class MergedMLP(nn.Module):
    """Computes gate and up in one projection, as Phi-3 has them."""

    gate_up_proj: Callable[[Tensor], Tensor]
    down_proj: nn.Module
    activation_name: str

    def forward(self, hidden_states):
        return self.down_proj(ops.swiglu_merged(self.gate_up_proj(hidden_states), self.activation_name))


class DecoderLayer(nn.Module):
    """Runs Llama's layer with the sum and the norm after attention in one launch. Another layer's sums stay where they are."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: Any

    def forward(self, hidden_states, **kwargs):
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        norm = self.post_attention_layernorm
        hidden_states, residual = ops.add_rms_norm(hidden_states, residual, norm.weight, epsilon(norm), norm.offset)
        return residual + self.mlp(hidden_states)


class Rotary(nn.Module):
    """Gives cos and sin by position from a table, one for each type of layer if their angles differ."""

    config: Any
    rope_type: Any
    compute_default_rope_parameters: Callable

    def build_tables(self) -> None:
        """Compute fp32 cos and sin of every position, [P, R/2], from fp64 angles.

        The frequencies are transformers' own, but made on the CPU: a power differs by an ulp between CPU and GPU, and vLLM
        makes them on the GPU.
        """
        kinds = self.rope_type if isinstance(self.rope_type, dict) else {None: self.rope_type}
        for kind, rope_type in kinds.items():
            prefix, layer = ("", {}) if kind is None else (f"{kind}_", {"layer_type": kind})
            with torch.device("cpu"):
                init = ROPE_INIT_FUNCTIONS.get(rope_type) or self.compute_default_rope_parameters
                inv_freq, scaling = init(self.config, **layer)
                angles = torch.arange(self.config.max_position_embeddings).double()[:, None] * inv_freq.double()  # [P, R/2]
                tables = (angles.cos() * scaling).float(), (angles.sin() * scaling).float()
            device = getattr(self, f"{prefix}inv_freq").device
            for name, table in zip(("cos_table", "sin_table"), tables, strict=True):
                self.register_buffer(prefix + name, table.to("cpu" if device.type == "meta" else device), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [B, T, R/2] fp32: half as wide as transformers', for `ops.rope`."""
        prefix = "" if layer_type is None else f"{layer_type}_"
        cos, sin = getattr(self, f"{prefix}cos_table"), getattr(self, f"{prefix}sin_table")
        return F.embedding(position_ids, cos), F.embedding(position_ids, sin)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate q, k [B, H, T, D] by cos, sin [B or 1, T, R/2], with the arguments of transformers' apply_rotary_pos_emb."""

    def turn(x_BHTD: Tensor) -> Tensor:
        x_BTHD = x_BHTD.transpose(1, 2)
        shape = x_BTHD.shape
        wide = (shape[0], shape[1], cos.shape[-1])
        flat = ops.rope(x_BTHD.flatten(0, 1), cos.expand(wide).flatten(0, 1), sin.expand(wide).flatten(0, 1))
        return flat.view(shape).transpose(1, 2)

    return turn(q), turn(k)


class Attention(nn.Module):
    """Computes the attention of Llama, Qwen3, OLMo-2 and Gemma.

    vLLM reads the source of `forward`: the projections, to merge them, and the interface's call.
    """

    config: Any
    head_dim: int
    scaling: float
    layer_idx: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    window: int | None  # of keys that a query sees, its own included
    softcap: float | None  # of scores
    rotated: bool  # or the layer has no positions

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, cache=None, **kwargs):
        q = self.q_proj(hidden_states)
        k = self.k_proj(hidden_states)
        v = self.v_proj(hidden_states)
        q, k, v = self.heads(q, k, v, *position_embeddings)
        if (cache := cache if past_key_values is None else past_key_values) is not None:  # named cache since transformers 5.24
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(
            self, q, k, v, attention_mask, scaling=self.scaling, sliding_window=self.window, softcap=self.softcap, **kwargs
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights

    def heads(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return projections [B, T, H D], maybe slices of one, as heads [B, H, T, D]; q and k are normalised and rotated."""
        (b, t, _), half = q.shape, cos.shape[-1]
        norms: Any = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
        if norms[0] is not None and norms[0].weight.shape[0] != self.head_dim:  # of all heads at once
            q, k, norms = norms[0](q), norms[1](k), (None, None)
        q_BTHD, k_BTHD, v_BTHD = (x.view(b, t, -1, self.head_dim) for x in (q, k, v))
        if self.rotated:
            cos, sin = (x.expand(b, t, half).flatten(0, 1) for x in (cos, sin))  # [B T, R/2]
            q_weight, k_weight = (norm.weight if norm is not None else None for norm in norms)
            eps, offset = (0.0, None) if norms[0] is None else (epsilon(norms[0]), norms[0].offset)
            flat = q_BTHD.flatten(0, 1), k_BTHD.flatten(0, 1)
            turned = ops.qk_norm_rope(*flat, q_weight, k_weight, cos, sin, eps, offset)
            q_BTHD, k_BTHD = (x.view(b, t, *x.shape[1:]) for x in turned)
        elif norms[0] is not None:
            q_BTHD, k_BTHD = norms[0](q_BTHD), norms[1](k_BTHD)
        return q_BTHD.transpose(1, 2), k_BTHD.transpose(1, 2), v_BTHD.transpose(1, 2)


class MergedAttention(Attention):
    """Computes queries, keys and values in one projection, as Phi-3 has them."""

    qkv_proj: Callable[[Tensor], Tensor]

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, cache=None, **kwargs):
        q, k, v = self.heads(*self.parts(self.qkv_proj(hidden_states)), *position_embeddings)
        if (cache := cache if past_key_values is None else past_key_values) is not None:  # named cache since transformers 5.24
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(
            self, q, k, v, attention_mask, scaling=self.scaling, sliding_window=self.window, softcap=self.softcap, **kwargs
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        q, kv = (n * self.head_dim for n in (self.config.num_attention_heads, self.config.num_key_value_heads))
        return qkv[..., :q], qkv[..., q : q + kv], qkv[..., q + kv :]


class Rotated(nn.Module):
    """Runs the class's own forward, with `apply_rotary_pos_emb` meaning `apply_rotary`; see `become`."""


def logits_scaling(config: "PreTrainedConfig") -> tuple[float | None, float | None]:
    """Return the arguments of `ops.scale_logits`: what multiplies the logits (Granite divides them), and what bounds them."""
    by = getattr(config, "logits_scaling", None)
    return getattr(config, "logit_scale", None) if by is None else 1 / by, getattr(config, "final_logit_softcapping", None)


class CausalLM(nn.Module):
    stock: Any
    config: Any
    base_model: nn.Module
    lm_head: nn.Linear

    def forward(self, *args, token_ids=None, predicted_from=None, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, **kwargs):
        """Run the stock forward; given `token_ids` [N], return their log-probs and entropies, each [N] fp32, without logits.

        `predicted_from` [N] are indices into the packed row (batch of one): the position whose hidden state predicts the
        token. The other arguments are those of `ops.token_logprobs`. It is a forward so that DistributedDataParallel and FSDP
        see it.
        """
        if token_ids is None:
            return self.stock.forward(self, *args, **kwargs)
        hidden = hidden_states(self.base_model, *args, **kwargs)
        scaling = logits_scaling(self.config)
        of = hidden[0, predicted_from], self.lm_head.weight, token_ids, temperature, *scaling
        return ops.token_logprobs(*of, top_k, top_p, min_p)


def attention_forward(
    module, q, k, v, attention_mask, scaling=None, cu_seq_lens_q=None, dropout=0.0, sliding_window=None, softcap=None, **kwargs
):
    """Attend for q, k, v [B, H, T, D], as transformers asks: packed if `cu_seq_lens_q` is given, else B sequences of T."""
    if dropout:
        raise UnsupportedModel(f"{type(module).__name__}: attention dropout is not supported")
    b, _, t, d = q.shape
    cu = torch.arange(0, b * t + 1, t, dtype=torch.int32, device=q.device) if cu_seq_lens_q is None else cu_seq_lens_q
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B T, H, D]
    longest = t if cu_seq_lens_q is None else kwargs.get("max_length_q")
    out = ops.attention(q, k, v, cu, d**-0.5 if scaling is None else scaling, longest, sliding_window, softcap)
    return out.view(b, t, *out.shape[1:]), None


def _mask(attention_mask: Tensor | None = None, **kwargs) -> None:
    """Build no mask, ever. A padded batch needs one, so it is refused: pack it instead."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UserError("attention_mask has zeros: exact attention takes packed sequences (cu_seq_lens_q), not padded ones")


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, _mask)

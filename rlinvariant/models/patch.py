"""Make a Hugging Face causal LM compute through `rlinvariant.ops`.

One model definition serves both sides: the trainer patches the model it loaded, vLLM's transformers backend patches the one
that it built from the same modelling code. Modules keep their names, parameters and state_dict; an instance only changes its
class, to a subclass with another forward. No global is patched, so an unpatched model of the same class is untouched.

| module, recognised by | becomes |
|---|---|
| `nn.Linear` | `ops.linear`, weight cast at use |
| `nn.Embedding` | gather, then cast |
| `*RMSNorm` with a weight and an epsilon | `ops.rms_norm` |
| MLP with gate_proj, up_proj, down_proj and SiLU | `ops.swiglu` between the projections |
| decoder layer with the two Llama norms | `ops.add_rms_norm` after attention |
| `*RotaryEmbedding` | cos and sin from a table made once, on the CPU, in float64 |
| attention of Llama's or Qwen3's form | `ops.qk_norm_rope` between the projections and `ops.attention` |
| other attention that calls `apply_rotary_pos_emb` | the same forward with `ops.rope` in its place |
| the causal LM | the same, and `ops.token_logprobs` when called with `token_ids` |

What is swapped is compared with what it replaces on random input, and `models.require_exact` then runs the whole model and
refuses what no rule has caught: a model is exact because it is checked, not because its name is on a list.
"""

import copy
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlinvariant import ops
from rlinvariant.errors import UserError
from rlinvariant.kernels import attention, cpu

ATTENTION = "rlinvariant"  # name of the attention implementation, in transformers' registry
HEAD_SIZES = {
    "cpu": (32, 64, 80, 96, 112, 128, 160, 192, 224, 256),  # those of vLLM's CPU key-value cache
    "cuda": attention.HEAD_SIZES,  # those where FlashAttention-3 gives a paged and a packed call the same bits
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # angles depend on the position alone, not on the sequence length
SCALINGS = ("final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


class UnsupportedModel(UserError):
    """The model computes something that no op owns."""


def make_invariant(model: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Swap, in place, every module that sums or calls a transcendental function for one that does so through `ops`.

    Args:
        model: a Hugging Face causal LM, or the decoder inside it. Parameters may be fp32 masters.
        dtype: what activations are computed in, bf16 or fp32; weights are cast to it at use.

    Raises:
        UnsupportedModel: with every reason found, before anything is changed.

    Bits: with fp32 masters, the forward has the bits of the model cast to `dtype`. Run `audit` after it.
    """
    device = next(model.parameters()).device.type
    if device == "meta":  # vLLM's, which goes to its GPU
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if reasons := list(unsupported(model.config, device)):
        raise UnsupportedModel(f"{type(model).__name__} cannot run exactly: " + "; ".join(reasons))
    if getattr(getattr(model, "lm_head", None), "bias", None) is not None:
        raise UnsupportedModel(f"{type(model).__name__} cannot run exactly: its lm_head has a bias")
    if noisy := [name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]:
        raise UnsupportedModel(f"{type(model).__name__} cannot run exactly: dropout in {noisy[0]}; set its probability to 0")
    swaps = [(module, rule) for module in model.modules() if (rule := _rule(module)) is not None]
    for module, rule in {type(m): (m, rule) for m, rule in swaps if rule in _CHECKS}.values():
        _require_same_function(module, rule)
    for module, rule in swaps:
        module.__class__ = _subclass(type(module), rule)
        if rule is _Embedding:
            module.compute_dtype = dtype
        elif rule is _Rotary:
            module.build_tables()
    model.set_attn_implementation(ATTENTION)
    return model


def unsupported(config, device: str = "cpu") -> Iterator[str]:
    """Each reason, in words, why a model of this configuration cannot run exactly on a device type, "cpu" or "cuda"."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head not in HEAD_SIZES[device]:
        yield f"head_dim={head} is not one of {', '.join(map(str, HEAD_SIZES[device]))}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        yield f"rope_type={rope['rope_type']} changes with the sequence length; supported: {', '.join(ROPE_TYPES)}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        yield "some layers use sliding-window attention (config.layer_types)"
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act={config.hidden_act}; only silu is supported"
    if getattr(config, "attention_dropout", 0.0):
        yield f"attention_dropout={config.attention_dropout}; set it to 0"
    for name in SCALINGS:
        if getattr(config, name, None) not in (None, 1.0):
            yield f"{name}={getattr(config, name)} scales logits or scores outside ops"
    if getattr(config, "quantization_config", None):
        yield "the checkpoint is quantised"


def _subclass(cls: type, rule: type) -> type:
    """`cls` with the forward of `rule`, under the same name, so that saved configurations and messages keep it."""
    body = dict(vars(rule))
    if rule is _Rotated:
        body["forward"] = _rebind(cls.forward, apply_rotary_pos_emb=_apply_rotary)
    body = {k: v for k, v in body.items() if k not in ("__dict__", "__weakref__", "__doc__", "__qualname__", "__module__")}
    return type(cls.__name__, (cls,), {**body, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "stock": cls})


def _rebind(function: Callable, **names: Callable) -> Callable:
    """`function` with other meanings for some of the global names it uses."""
    f = inspect.unwrap(function)
    new = types.FunctionType(f.__code__, {**f.__globals__, **names}, f.__name__, f.__defaults__, f.__closure__)
    new.__kwdefaults__ = f.__kwdefaults__
    return new


def _rule(module: nn.Module) -> type | None:
    cls, children = type(module), dict(module.named_children())
    if hasattr(cls, "stock"):
        return None  # swapped already
    if cls is nn.Linear:
        return _Linear
    if cls is nn.Embedding:
        return _Embedding
    if cls.__name__.endswith("RMSNorm") and hasattr(module, "weight") and _epsilon(module) is not None:
        return _RMSNorm
    if cls.__name__.endswith("RotaryEmbedding") and hasattr(module, "inv_freq"):
        return _Rotary
    if {"gate_proj", "up_proj", "down_proj"} <= children.keys():
        return _MLP
    if set(children) == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return _DecoderLayer
    if "apply_rotary_pos_emb" in getattr(inspect.unwrap(cls.forward), "__code__", _rule.__code__).co_names:
        return _Attention if _has_plain_heads(module, children) else _Rotated
    if isinstance(module, PreTrainedModel) and "lm_head" in children:
        return _CausalLM
    return None


def _has_plain_heads(attention: Any, children: dict[str, nn.Module]) -> bool:
    """Whether norms, if any, are of each head of queries and keys, and no module does anything else."""
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
    if set(children) == projections:
        return True
    norms = [children.get(name) for name in ("q_norm", "k_norm")]
    of_a_head = all(n is not None and getattr(n, "weight", torch.empty(0)).shape == (attention.head_dim,) for n in norms)
    return set(children) == projections | {"q_norm", "k_norm"} and of_a_head and _epsilon(norms[0]) == _epsilon(norms[1])


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _require_same_function(module: nn.Module, rule: type) -> None:
    """Raise unless the swapped module computes what the original does, on random weights and input, in fp32."""
    name, what = type(module).__name__, rule.__name__[1:]
    cpu.library()  # a missing compiler is no property of the module
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            expected, got = _CHECKS[rule](module)
        except Exception as error:  # whatever a foreign module raises on a plain input says that it is no such module
            raise UnsupportedModel(f"{name} looks like {what} but cannot be called like one ({error})") from error
        error = ((got - expected).abs().max() / expected.abs().max()).item()
    if not error < 1e-5:
        raise UnsupportedModel(
            f"{name} looks like {what} but differs from it by {error:.1e} (relative) on random input: it is another function, "
            "and needs a rule of its own in models/patch.py"
        )


def _module_pair(module: Any) -> tuple[Tensor, Tensor]:
    """The output of a copy of the module with random weights, before and after the swap.

    A decoder layer gets a stand-in for its attention, since only its residual stream is rewritten.
    """
    original = copy.deepcopy(module).to_empty(device="cpu").to(torch.float32)
    for p in original.parameters():
        p.normal_(0.5, 0.5)
    if _rule(original) is _DecoderLayer:
        original.self_attn = _StandIn()
    x = torch.randn(5, next(original.parameters()).shape[-1], dtype=torch.float32)
    expected = original(x)
    for child in reversed(list(original.modules())):
        if rule := _rule(child):
            child.__class__ = _subclass(type(child), rule)
    return expected, original(x)


def _attention_pair(attention: Any) -> tuple[Tensor, Tensor]:
    """The class's own forward, with transformers' attention, and ours, on one sequence with random weights."""
    original = copy.deepcopy(attention).to_empty(device="cpu").to(torch.float32)
    original.config = copy.deepcopy(attention.config)
    for p in original.parameters():
        p.normal_(0.5, 0.5) if p.dim() == 1 else p.normal_(0, p.shape[-1] ** -0.5)
    t, half = 5, original.head_dim // 2
    x = torch.randn(1, t, original.q_proj.in_features, dtype=torch.float32)
    cos, sin = torch.randn(2, 1, t, half, dtype=torch.float32)
    mask = torch.full((1, 1, t, t), float("-inf"), dtype=torch.float32).triu(1)
    original.config._attn_implementation = "eager"
    expected = original(x, position_embeddings=(cos.repeat(1, 1, 2), sin.repeat(1, 1, 2)), attention_mask=mask)[0]
    original.config._attn_implementation = ATTENTION
    for child in reversed(list(original.modules())):
        if rule := _rule(child):
            child.__class__ = _subclass(type(child), rule)
    return expected, original(x, position_embeddings=(cos, sin), attention_mask=None)[0]


def _rotary_pair(attention: Any) -> tuple[Tensor, Tensor]:
    """The class's own apply_rotary_pos_emb, which may pair columns otherwise (Ernie interleaves them), and ours."""
    half = attention.head_dim // 2
    q, k = torch.randn(1, 2, 5, 2 * half, dtype=torch.float32), torch.randn(1, 1, 5, 2 * half, dtype=torch.float32)
    cos, sin = torch.randn(2, 1, 5, half, dtype=torch.float32)
    theirs = inspect.unwrap(type(attention).forward).__globals__["apply_rotary_pos_emb"]
    expected = theirs(q, k, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))
    return torch.cat(expected, 1), torch.cat(_apply_rotary(q, k, cos, sin), 1)


class _StandIn(nn.Module):
    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
        return hidden_states * 0.5, None


class _Linear(nn.Module):
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class _Embedding(nn.Module):
    weight: Tensor
    padding_idx: int | None
    compute_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight, self.padding_idx).to(self.compute_dtype)


class _RMSNorm(nn.Module):
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, _epsilon(self))


class _MLP(nn.Module):
    """Gate and up projections, joined by `ops.swiglu`, and down. Whoever merges the first two replaces `gate_and_up`."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        return self.down_proj(ops.swiglu(*self.gate_and_up(x)))


class _DecoderLayer(nn.Module):
    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: Any

    def forward(self, hidden_states, **kwargs):
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        norm = self.post_attention_layernorm
        hidden_states, residual = ops.add_rms_norm(hidden_states, residual, norm.weight, _epsilon(norm))
        return residual + self.mlp(hidden_states)


class _Rotary(nn.Module):
    cos_table: Tensor
    sin_table: Tensor
    inv_freq: Tensor
    config: Any
    rope_type: str
    compute_default_rope_parameters: Callable

    def build_tables(self) -> None:
        """fp32 cos and sin of every position, [max_position_embeddings, rotary_dim / 2], from fp64 angles.

        The frequencies are transformers' own, but made on the CPU: a power differs by an ulp between CPU and GPU, and vLLM
        makes them on the GPU.
        """
        with torch.device("cpu"):
            init = ROPE_INIT_FUNCTIONS.get(self.rope_type) or self.compute_default_rope_parameters
            inv_freq, scaling = init(self.config)
            angles = torch.arange(self.config.max_position_embeddings).double()[:, None] * inv_freq.double()
            tables = (angles.cos() * scaling).float(), (angles.sin() * scaling).float()
        device = self.inv_freq.device if self.inv_freq.device.type != "meta" else "cpu"
        self.register_buffer("cos_table", tables[0].to(device), persistent=False)
        self.register_buffer("sin_table", tables[1].to(device), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [batch, T, rotary_dim / 2] fp32: half as wide as transformers', for `ops.rope`."""
        return F.embedding(position_ids, self.cos_table), F.embedding(position_ids, self.sin_table)


def _apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb for q, k [B, H, T, D] and cos, sin [B or 1, T, R/2]."""

    def turn(x: Tensor) -> Tensor:
        tokens = x.transpose(1, 2)
        shape = tokens.shape
        wide = (shape[0], shape[1], cos.shape[-1])
        flat = ops.rope(tokens.flatten(0, 1), cos.expand(wide).flatten(0, 1), sin.expand(wide).flatten(0, 1))
        return flat.view(shape).transpose(1, 2)

    return turn(q), turn(k)


class _Attention(nn.Module):
    """Llama's and Qwen3's. vLLM reads the source of `forward`: the projections, to merge them, and the interface's call."""

    config: Any
    head_dim: int
    scaling: float
    layer_idx: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        q = self.q_proj(hidden_states)
        k = self.k_proj(hidden_states)
        v = self.v_proj(hidden_states)
        q, k, v = self.heads(q, k, v, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, sliding_window=window(self), **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights

    def heads(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projections [B, T, H D], possibly slices of one, as heads [B, H, T, D], queries and keys normalised and rotated."""
        (b, t, _), half = q.shape, cos.shape[-1]
        cos, sin = (x.expand(b, t, half).flatten(0, 1) for x in (cos, sin))
        norms = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
        q_weight, k_weight = (norm.weight if norm is not None else None for norm in norms)
        eps = 0.0 if norms[0] is None else _epsilon(norms[0])
        q, k, v = (x.view(b, t, -1, self.head_dim) for x in (q, k, v))
        turned = ops.qk_norm_rope(q.flatten(0, 1), k.flatten(0, 1), q_weight, k_weight, cos, sin, eps)
        q, k = (x.view(b, t, *x.shape[1:]) for x in turned)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def window(attention: Any) -> int | None:
    """Of a sliding window: what `attention_forward` refuses, if set."""
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


class _Rotated(nn.Module):
    """The class's own forward, with `apply_rotary_pos_emb` meaning `_apply_rotary`; see `_subclass`."""


class _CausalLM(nn.Module):
    stock: Any
    base_model: nn.Module
    lm_head: nn.Linear

    def forward(self, *args, token_ids=None, predicted_from=None, temperature=1.0, **kwargs):
        """As the stock model, or, given `token_ids` [N], their log-probs and entropies, each [N] fp32, without logits.

        `predicted_from` [N] are indices into the packed row (batch of one): the position whose hidden state predicts the
        token. It is a forward so that DistributedDataParallel and FSDP see it.
        """
        if token_ids is None:
            return self.stock.forward(self, *args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        return ops.token_logprobs(hidden[0, predicted_from], self.lm_head.weight, token_ids, temperature)


_CHECKS: dict[type, Callable[[nn.Module], tuple[Tensor, Tensor]]] = {
    _RMSNorm: _module_pair,
    _MLP: _module_pair,
    _DecoderLayer: _module_pair,
    _Attention: _attention_pair,
    _Rotated: _rotary_pair,
}


def attention_forward(module, q, k, v, attention_mask, scaling=None, cu_seq_lens_q=None, dropout=0.0, **kwargs):
    """transformers' attention interface for q [B, H, T, D]: packed if `cu_seq_lens_q` is given, else B sequences of T."""
    if kwargs.get("sliding_window") is not None or dropout:
        raise UnsupportedModel(f"{type(module).__name__}: sliding windows and attention dropout are not supported")
    b, _, t, d = q.shape
    cu = torch.arange(0, b * t + 1, t, dtype=torch.int32, device=q.device) if cu_seq_lens_q is None else cu_seq_lens_q
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    longest = t if cu_seq_lens_q is None else kwargs.get("max_length_q")
    out = ops.attention(q, k, v, cu, d**-0.5 if scaling is None else scaling, longest)
    return out.view(b, t, *out.shape[1:]), None


def _mask(attention_mask: Tensor | None = None, **kwargs) -> None:
    """No mask is ever built. A padded batch needs one, so it is refused: pack it instead."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UserError("attention_mask has zeros: exact attention takes packed sequences (cu_seq_lens_q), not padded ones")


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, _mask)

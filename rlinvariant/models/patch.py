"""Make a Hugging Face causal LM compute through `rlinvariant.ops`.

One model definition serves both sides: the trainer patches the model it loaded, vLLM's transformers backend patches the one
that it built from the same modelling code. Modules keep their names, parameters and state_dict; an instance only changes its
class, to a subclass with another forward. No global is patched, so an unpatched model of the same class is untouched.

| module, recognised by | becomes |
|---|---|
| `nn.Linear` | `ops.linear`, weight cast at use |
| `nn.Embedding`, with an `embed_scale` or without | gather, cast, scale |
| `*RMSNorm` with a weight and an epsilon | `ops.rms_norm` |
| MLP with gate_proj, up_proj, down_proj, or the first two in one | `ops.swiglu` between the projections |
| router of a mixture: `top_k`, `num_experts`, and one matrix | `ops.linear`, `ops.moe_route` |
| experts: gate_up_proj and down_proj with three dimensions | `ops.moe_experts` |
| decoder layer that is Llama's | `ops.add_rms_norm` after attention |
| `*RotaryEmbedding` | cos and sin from a table made once, on the CPU, in float64 |
| attention with q_proj, k_proj, v_proj, or the three in one | `ops.qk_norm_rope` between the projections and `ops.attention` |
| other attention that calls `apply_rotary_pos_emb` | the same forward with `ops.rope` in its place |
| the causal LM | the same, and `ops.token_logprobs` when called with `token_ids` |

What is swapped is compared with what it replaces on random input, which also finds the variant that it is (`VARIANTS`), and
`models.require_exact` then runs the whole model and refuses what no rule has caught: a model is exact because it is checked,
not because its name is on a list. Window, cap and scale of an attention are those that its own forward hands to the interface.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from rlinvariant import ops
from rlinvariant.kernels import cpu
from rlinvariant.models import experts
from rlinvariant.models import modules as forms
from rlinvariant.models.compared import difference, random_copy
from rlinvariant.models.limits import unsupported
from rlinvariant.models.lora import LoraLinear, is_lora
from rlinvariant.models.modules import ATTENTION, UnsupportedModel, become, epsilon

# What a form needs to know beyond what the module has, to be found by comparing, in this order
GATES = ({"activation_name": "silu"}, {"activation_name": "gelu_tanh"})
VARIANTS: dict[type, tuple[dict[str, Any], ...]] = {
    forms.RMSNorm: ({"offset": None}, {"offset": 0.0}, {"offset": 1.0}),
    forms.MLP: GATES,
    forms.MergedMLP: GATES,
    forms.Attention: ({"rotated": True}, {"rotated": False}),
    forms.MergedAttention: ({"rotated": True}, {"rotated": False}),
    experts.Router: experts.ROUTERS,
    experts.Experts: GATES,
}


def make_invariant(model: "PreTrainedModel", dtype: torch.dtype = torch.bfloat16) -> "PreTrainedModel":
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
    try:
        plan = list(_plan(model.modules(), {}))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{type(model).__name__} cannot run exactly: {error}") from error
    for module, form, attributes in plan:
        if form is forms.Embedding:
            scale = scale_of(module)
            rounded = None if scale is None else torch.tensor(scale).to(dtype).item()
            attributes = {"compute_dtype": dtype, "scale": rounded}
        become(module, form, **attributes)
        if form is forms.Rotary:
            module.build_tables()
    model.set_attn_implementation(ATTENTION)
    return model


def _plan(modules: Any, known: dict[Any, Any]) -> Iterator[tuple[Any, type, dict[str, Any]]]:
    """Decide what becomes what, with which attributes. Modules alike but for their weights are compared once: `known`."""
    for module in modules:
        form = _form(module)
        if form is None:
            continue
        given = _handed(module) if form in (forms.Attention, forms.MergedAttention, forms.Rotated) else {}
        inside = ((name, type(m)) for name, m in module.named_modules())
        key = form, *inside, *given.items(), *_plain(module)
        if key not in known:
            known[key] = _variant(module, form, given, known)
        if known[key] is not None:
            yield module, form, known[key]


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    values = vars(module).items()
    return sorted((k, v) for k, v in values if k != "layer_idx" and isinstance(v, (bool, int, float, str)))


def _form(module: nn.Module) -> type | None:
    cls, children = type(module), dict(module.named_children())
    if hasattr(cls, "stock"):
        return None  # swapped already
    if is_lora(module):
        return LoraLinear
    if cls is nn.Linear:
        return forms.Linear
    if cls is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")):
        return forms.Embedding
    if cls.__name__.endswith("RMSNorm") and hasattr(module, "weight") and epsilon(module) is not None:
        return forms.RMSNorm
    if cls.__name__.endswith("RotaryEmbedding") and hasattr(module, "rope_type"):
        return forms.Rotary
    if (of_mixture := experts.form_of(module)) is not None:
        return of_mixture
    if {"gate_proj", "up_proj", "down_proj"} <= children.keys():
        return forms.MLP
    if {"gate_up_proj", "down_proj"} <= children.keys():
        return forms.MergedMLP
    busy = {name for name, child in children.items() if not isinstance(child, nn.Dropout)}  # with p > 0 it is refused
    if busy == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return forms.DecoderLayer
    if "apply_rotary_pos_emb" in getattr(inspect.unwrap(cls.forward), "__code__", _form.__code__).co_names:
        return _attention_form(module, children)
    if isinstance(module, PreTrainedModel) and "lm_head" in children:
        return forms.CausalLM
    return None


def _attention_form(attention: Any, children: dict[str, nn.Module]) -> type:
    """Return the form with the projections that there are. Norms, if any, are of each head of queries and keys or of all."""
    norms: Any = [children.get(name) for name in ("q_norm", "k_norm")]
    if any(n is not None for n in norms) and not (
        all(n is not None and hasattr(n, "weight") for n in norms) and epsilon(norms[0]) == epsilon(norms[1])
    ):
        return forms.Rotated
    projections = set(children) - {"q_norm", "k_norm"}
    if projections == {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return forms.Attention
    return forms.MergedAttention if projections == {"qkv_proj", "o_proj"} else forms.Rotated


def _handed(attention: Any) -> dict[str, Any]:
    """Return the scale, window and cap that the module's own forward hands to the attention interface, computing nothing."""
    name, seen = type(attention).__name__, []
    if not getattr(attention, "is_causal", True):
        raise UnsupportedModel(f"{name}: is_causal=False; only causal attention is supported")

    def record(module, q, k, v, mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **others):
        scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        given = {"scaling": scaling, "window": sliding_window, "softcap": softcap}
        seen.append((given, [key for key, value in others.items() if value is not None]))
        return q.transpose(1, 2), None

    AttentionInterface.register("rlinvariant-record", record)
    width = next(m for m in attention.modules() if isinstance(m, nn.Linear)).in_features
    meta = {n: t.to("meta") for n, t in (*attention.named_parameters(), *attention.named_buffers())}
    x, cos = (torch.empty(1, 3, n, device="meta") for n in (width, _rotary_width(attention)))
    inputs = {"hidden_states": x, "position_embeddings": (cos, cos), "attention_mask": None}
    config, attention.config = attention.config, copy.copy(attention.config)
    attention.config._attn_implementation = "rlinvariant-record"
    try:
        with torch.no_grad():
            functional_call(attention, meta, (), inputs)
        ((given, others),) = seen
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise UnsupportedModel(f"{name} does not call transformers' attention interface as others do") from error
    finally:
        attention.config = config
    if others:
        raise UnsupportedModel(f"{name} hands {', '.join(others)} to its attention, which ops.attention does not have")
    return given


def _rotary_width(attention: Any) -> int:
    rope = getattr(attention.config, "rope_parameters", None) or {}
    return int(attention.head_dim * rope.get("partial_rotary_factor", 1.0))


def _variant(module: nn.Module, form: type, given: dict[str, Any], known: dict[Any, Any]) -> dict[str, Any] | None:
    """Return the attributes with which `form` computes what the module does, on random weights and input.

    None: a decoder layer may keep its own forward. Raises UnsupportedModel if anything else is none of the variants.
    """
    if form not in _CHECKS:
        return given
    name, what, errors = type(module).__name__, form.__name__, []
    cpu.library()  # a missing compiler is no property of the module
    for attributes in VARIANTS.get(form, ({},)):
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            try:
                errors.append(_CHECKS[form](module, form, given | attributes, known))
            except UnsupportedModel:
                raise
            except Exception as error:  # whatever a foreign module raises on a plain input says that it is no such module
                if form is forms.DecoderLayer:
                    return None
                unknown = ", ".join(_unknown(module))
                why = f"no rule in models/patch.py has its {unknown}" if unknown else f"{name} is not called as a {what} is"
                raise UnsupportedModel(why) from error
        if errors[-1] < 1e-5:
            return given | attributes
    if form is forms.DecoderLayer:
        return None
    raise UnsupportedModel(
        f"{name} looks like {what} but differs from it by {min(errors):.1e} (relative) on random input: it is another "
        "function, and needs a rule of its own in models/patch.py"
    )


def _unknown(module: nn.Module) -> list[str]:
    """Return the classes of the parts that have parameters and no rule."""
    parts = (m for m in module.modules() if m is not module and any(p is not None for p in m._parameters.values()))
    return sorted({type(m).__name__ for m in parts if _form(m) is None})


def _swap(module: Any, form: type, attributes: dict[str, Any], known: dict[Any, Any]) -> None:
    for child, of_child, its in list(_plan(list(module.modules())[1:], known)):
        become(child, of_child, **its)
    become(module, form, **attributes)


def _norm(module: Any, form: type, attributes: dict[str, Any], known: dict[Any, Any]) -> float:
    """Compare norms in fp32, and in bf16, where another order of rounding and weight changes a quarter of the elements."""
    original = random_copy(module)
    ours, (width,) = copy.deepcopy(original), original.weight.shape
    become(ours, form, **attributes)
    x = torch.randn(5 + 4096 // width, width, dtype=torch.float32)
    error = difference(ours(x), original(x))
    differ = (ours.bfloat16()(x.bfloat16()) != original.bfloat16()(x.bfloat16())).float().mean().item()
    return error if differ < 0.02 else max(error, differ)


def _module(module: Any, form: type, attributes: dict[str, Any], known: dict[Any, Any]) -> float:
    """Compare an MLP or a layer. A layer gets a stand-in for its attention, since only its residual stream is rewritten."""
    original = random_copy(module)
    if form is forms.DecoderLayer:
        original.self_attn = _StandIn()
    x = torch.randn(1, 5, next(original.parameters()).shape[-1], dtype=torch.float32)  # a mixture wants three dimensions
    expected = original(x)
    _swap(original, form, attributes, known)
    return difference(original(x), expected)


def _attention(module: Any, form: type, attributes: dict[str, Any], known: dict[Any, Any]) -> float:
    """Compare the class's own forward, with transformers' attention, with ours, on one sequence."""
    original = random_copy(module)
    original.config = copy.deepcopy(module.config)
    t, half = 5, _rotary_width(module) // 2
    width = next(m for m in original.modules() if isinstance(m, nn.Linear)).in_features
    x = torch.randn(1, t, width, dtype=torch.float32)
    cos, sin = torch.randn(2, 1, t, half, dtype=torch.float32)
    seen = torch.ones(t, t, dtype=torch.bool).tril().triu(1 - (attributes["window"] or t))
    mask = torch.zeros(1, 1, t, t, dtype=torch.float32).masked_fill(~seen, float("-inf"))
    original.config._attn_implementation = "eager"
    expected = original(x, position_embeddings=(cos.repeat(1, 1, 2), sin.repeat(1, 1, 2)), attention_mask=mask)[0]
    original.config._attn_implementation = ATTENTION
    _swap(original, form, attributes, known)
    return difference(original(x, position_embeddings=(cos, sin), attention_mask=None)[0], expected)


def _rotation(module: Any, form: type, attributes: dict[str, Any], known: dict[Any, Any]) -> float:
    """Compare the class's own apply_rotary_pos_emb, which may pair columns otherwise (Ernie interleaves them), with ours."""
    half = _rotary_width(module) // 2
    q, k = (torch.randn(1, heads, 5, module.head_dim, dtype=torch.float32) for heads in (2, 1))
    cos, sin = torch.randn(2, 1, 5, half, dtype=torch.float32)
    theirs = inspect.unwrap(type(module).forward).__globals__["apply_rotary_pos_emb"]
    expected = theirs(q, k, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))
    return difference(torch.cat(forms.apply_rotary(q, k, cos, sin), 1), torch.cat(expected, 1))


def _tables(module: Any, form: type, attributes: dict[str, Any], known: dict[Any, Any]) -> float:
    """Compare cos and sin of the first positions, for every type of layer."""
    ours, x = type(module)(module.config), torch.zeros(1, dtype=torch.float32)  # its own frequencies may be cast by now
    positions = torch.arange(min(16, module.config.max_position_embeddings))[None]
    kinds = [(kind,) for kind in module.rope_type] if isinstance(module.rope_type, dict) else [()]
    expected = [torch.stack(ours(x, positions, *kind)) for kind in kinds]
    become(ours, form)
    ours.build_tables()
    got = [torch.stack(ours(x, positions, *kind)).repeat(1, 1, 1, 2) for kind in kinds]
    return max(difference(a, b) for a, b in zip(got, expected, strict=True))


def _logits(module: Any, form: type, attributes: dict[str, Any], known: dict[Any, Any]) -> float:
    """Compare what the model makes of its decoder's output, with an lm_head that changes nothing."""
    lm, x = copy.copy(module), torch.randn(1, 5, 64, dtype=torch.float32) * 20
    lm._modules = module._modules | {module.base_model_prefix: _Decoder(x), "lm_head": nn.Identity()}
    expected = lm(input_ids=torch.zeros(1, 5, dtype=torch.int64)).logits
    return difference(ops.scale_logits(x, *forms.logits_scaling(module.config)), expected)


def _embedding(module: Any, form: type, attributes: dict[str, Any], known: dict[Any, Any]) -> float:
    """Compare the first rows of an embedding: a vocabulary is large."""
    original, ids = copy.copy(module), torch.arange(8)
    original._parameters = {"weight": torch.randn(8, module.weight.shape[1], dtype=torch.float32)}
    original._buffers = {name: None if buffer is None else buffer.cpu() for name, buffer in module._buffers.items()}
    expected = original(ids)
    become(original, form, compute_dtype=torch.float32, scale=scale_of(module))
    return difference(original(ids), expected)


def scale_of(embedding: nn.Module) -> float | None:
    scale = getattr(embedding, "embed_scale", None)
    return None if scale is None else float(scale)


class _Decoder(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args, **kwargs) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.output)  # type: ignore[arg-type]


class _StandIn(nn.Module):
    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
        return hidden_states * 0.5, None


_CHECKS: dict[type, Callable[[Any, type, dict[str, Any], dict[Any, Any]], float]] = {
    LoraLinear: _module,
    forms.RMSNorm: _norm,
    forms.MLP: _module,
    forms.MergedMLP: _module,
    forms.DecoderLayer: _module,
    forms.Attention: _attention,
    forms.MergedAttention: _attention,
    forms.Rotated: _rotation,
    forms.Rotary: _tables,
    forms.Embedding: _embedding,
    forms.CausalLM: _logits,
    experts.Router: experts.compare_router,
    experts.Experts: experts.compare_experts,
}

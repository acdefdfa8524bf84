"""A patch takes what the ops compute and finds the variant of each layer; it refuses everything else by name."""

from typing import Any

import pytest
import transformers
from torch import Tensor, nn

from rlinvariant.models import UnsupportedModel, make_invariant, modules, patch, unsupported
from rlinvariant.models.shapes import SHAPES, config
from tests.models.small import GROUPED, build
from tests.parity.device import DEVICE


@pytest.mark.parametrize(
    ("model", "overrides", "reason"),
    [
        ("llama", dict(hidden_act="gelu"), "hidden_act=gelu"),
        ("llama", dict(head_dim=16), "head_dim=16"),
        ("llama", dict(head_dim=48), "head_dim=48"),
        ("llama", dict(attention_dropout=0.1), "attention_dropout=0.1"),
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "rope_type=dynamic"),
        ("Gemma2", dict(**GROUPED, use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        ("llama", dict(layer_types=["full_attention", "chunked_attention"]), "layer_types has chunked_attention"),
        ("Ernie4_5", dict(num_attention_heads=2, num_key_value_heads=1), "Ernie4_5Attention"),  # interleaved rotary columns
        ("Mixtral", dict(num_attention_heads=2, num_key_value_heads=1, router_jitter_noise=0.1), "router_jitter_noise=0.1"),
        ("GptOss", dict(**GROUPED, num_local_experts=2), "model_type=gpt_oss"),
        ("Phimoe", dict(num_attention_heads=2, num_key_value_heads=1), "jitter"),
        ("Olmoe", dict(num_attention_heads=2, num_key_value_heads=1, clip_qkv=3.0), "clip_qkv=3.0"),
    ],
)
def test_what_no_op_owns_is_refused_before_anything_changes(model, overrides, reason):
    broken = build(model, **overrides)
    classes = [type(m) for m in broken.modules()]
    with pytest.raises(UnsupportedModel, match=reason):
        make_invariant(broken)
    assert [type(m) for m in broken.modules()] == classes
    assert broken.config._attn_implementation != "rlinvariant"


def test_a_model_of_more_than_text_is_refused():
    (reason,) = unsupported(transformers.Gemma3Config())
    assert reason.startswith("model_type=gemma3 has a text model inside")


@pytest.mark.parametrize("name", SHAPES)
def test_a_gpu_takes_every_model_that_is_benchmarked(name):
    assert list(unsupported(config(name), "cuda")) == []


def test_an_embedding_is_compared_where_its_scale_is(monkeypatch):
    """The model is as vLLM builds it: parameters on "meta", buffers where they will be used."""
    embedding: Any = build("gemma3").get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight.to("meta"))
    ((_, form, _),) = patch._plan([embedding], {})
    assert form is modules.Embedding and embedding.embed_scale.device.type == DEVICE
    monkeypatch.setattr(patch, "scale_of", lambda _: 11.3)  # control: it is the root of 128
    with pytest.raises(UnsupportedModel, match="looks like Embedding but differs"):
        list(patch._plan([embedding], {}))


def test_every_reason_is_given():
    with pytest.raises(UnsupportedModel, match=r"head_dim=16 .*; hidden_act=gelu.*; attention_dropout=0.5"):
        make_invariant(build("llama", head_dim=16, hidden_act="gelu", attention_dropout=0.5))


def test_the_window_that_an_attention_hands_on_is_found_for_each_layer():
    """Mistral has no layer_types: its window is seen where its own forward hands it to the interface."""
    model = make_invariant(build("Mistral", num_attention_heads=2, num_key_value_heads=1, sliding_window=8))
    assert [layer.self_attn.window for layer in model.model.layers] == [8, 8]
    model = make_invariant(build("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1))
    assert [layer.self_attn.window for layer in model.model.layers] == [None, 8]


def test_what_an_attention_hands_on_is_found_for_each_layer():
    model = make_invariant(build("SmolLM3", **GROUPED, no_rope_layers=[0, 1], pad_token_id=0))
    assert [layer.self_attn.rotated for layer in model.model.layers] == [False, True]
    model = make_invariant(build("Granite", **GROUPED, attention_multiplier=0.3))
    assert [layer.self_attn.scaling for layer in model.model.layers] == [0.3, 0.3]


@pytest.mark.parametrize(("family", "offset"), [("llama", None), ("olmo2", 0.0), ("gemma3", 1.0)])
def test_the_rounding_of_a_norm_is_found(family, offset):
    """Llama rounds before it multiplies by the weight, OLMo-2 after, Gemma after and by one more."""
    model = make_invariant(build(family, layer_types=["full_attention"] * 2))
    assert {m.offset for m in model.modules() if "offset" in vars(m)} == {offset}


def test_an_attention_that_hands_on_more_is_refused():
    """Sinks, say: `ops.attention` would leave them out."""
    model, attention = build("llama"), type(build("llama").model.layers[0].self_attn)

    class LlamaAttention(attention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, s_aux=self.o_proj.weight[0], **kwargs)

    model.model.layers[1].self_attn.__class__ = LlamaAttention
    LlamaAttention.forward.__wrapped__ = attention.forward  # where apply_rotary_pos_emb is looked for
    with pytest.raises(UnsupportedModel, match="LlamaAttention hands s_aux to its attention"):
        make_invariant(model)


def test_another_norm_or_mlp_of_a_familiar_name_is_refused():
    class LlamaRMSNorm(type(build("llama").model.norm)):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self.weight)

    class LlamaMLP(type(build("llama").model.layers[0].mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.001

    norm, mlp = build("llama"), build("llama")
    norm.model.norm.__class__ = LlamaRMSNorm
    with pytest.raises(UnsupportedModel, match="LlamaRMSNorm"):
        make_invariant(norm)
    mlp.model.layers[1].mlp.__class__ = LlamaMLP
    with pytest.raises(UnsupportedModel, match="LlamaMLP|LlamaDecoderLayer"):
        make_invariant(mlp)


def test_one_layer_of_another_activation_is_compared_like_the_first():
    """Modules of one class are compared once only where what is inside them is of one class too."""
    model = build("llama")
    model.model.layers[1].mlp.act_fn = transformers.activations.ACT2FN["gelu_pytorch_tanh"]
    assert [layer.mlp.activation_name for layer in make_invariant(model).model.layers] == ["silu", "gelu_tanh"]
    model = build("llama")
    model.model.layers[1].mlp.act_fn = nn.GELU()
    with pytest.raises(UnsupportedModel, match="LlamaMLP looks like MLP but differs"):
        make_invariant(model)


def test_an_lm_head_with_a_bias_is_refused():
    model = build("llama")
    model.lm_head = nn.Linear(128, 97, device=DEVICE)
    with pytest.raises(UnsupportedModel, match="lm_head has a bias"):
        make_invariant(model)

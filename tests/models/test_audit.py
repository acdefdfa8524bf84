import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from rlinvariant import ops
from rlinvariant.models import Finding, UnsupportedModel, audit, make_invariant, require_exact, watch
from tests.models.small import SUPPORTED, build
from tests.parity.device import DEVICE


class Inside(nn.Module):
    """A module that computes one function."""

    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x, *args, **kwargs):
        return self.f(x)


def findings(f) -> set[str]:
    """ATen names, without overloads, that the watch reports for f."""
    x = torch.linspace(-1, 1, 64).view(4, 16)
    with torch.no_grad(), watch() as found:
        Inside(f)(x)
    assert {finding.module for finding in found} <= {"Inside"}
    return {finding.op.split(".")[1] for finding in found}


@pytest.mark.parametrize("family", SUPPORTED)
def test_audit_passes_the_families(family):
    model = make_invariant(build(family))
    assert audit(model) == []
    require_exact(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_audit_finds_everything_in_the_stock_model(family):
    """Control: the same model unpatched, through the same watch."""
    with torch.no_grad(), watch() as found:
        build(family)(input_ids=torch.arange(9, device=DEVICE)[None])
    operators = {finding.op for finding in found}
    assert {"aten.mm.default", "aten.mean.dim", "aten.silu.default", "aten.cos.default"} <= operators
    assert {f.module for f in found} >= {"Linear", "SiLUActivation"}


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: torch.softmax(x, -1), "_softmax"),
        (lambda x: x.mean(-1), "mean"),
        (lambda x: x.sum(), "sum"),
        (lambda x: x @ x.t(), "mm"),
        (lambda x: torch.einsum("ij,kj->ik", x, x), "bmm"),
        (lambda x: F.linear(x, x, x[:, 0]), "addmm"),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]), "bmm"),
        (lambda x: x.exp(), "exp"),
        (lambda x: x.sigmoid_(), "sigmoid_"),
        (lambda x: x**2, "pow"),
        (lambda x: x.rsqrt(), "rsqrt"),
        (lambda x: x.cumsum(0), "cumsum"),
        (lambda x: x.norm(), "linalg_vector_norm"),
        (lambda x: F.layer_norm(x, (16,)), "native_layer_norm"),
        (lambda x: F.gelu(x), "gelu"),
        (lambda x: torch.addcmul(x, x, x), "addcmul"),
        (lambda x: torch.lerp(x, x, 0.3), "lerp"),
        (lambda x: torch.zeros(4, 16).index_add_(0, torch.zeros(4, dtype=torch.int64), x), "index_add_"),
        (lambda x: torch.zeros(4, 16).scatter_add_(0, torch.zeros(4, 16, dtype=torch.int64), x), "scatter_add_"),
        (lambda x: torch.zeros(4, 16).index_put_((torch.zeros(4, dtype=torch.int64),), x, accumulate=True), "index_put_"),
        (lambda x: torch.add(x, x, alpha=0.3), "add"),  # a fused multiply-add where ATen vectorises
        (lambda x: torch.sub(x, x, alpha=0.3), "sub"),
        (lambda x: F.dropout(x, 0.5), "bernoulli_"),
        (lambda x: x + torch.rand(16), "rand"),
        (lambda x: (x.sum() * 100).long(), "sum"),  # on its way to an integer
        (lambda x: x.topk(2)[1], "topk"),
    ],
)
def test_audit_finds_a_planted_operation(f, expected):
    assert expected in findings(f)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.t().reshape(8, 8)[1:, ::2].contiguous().bfloat16().float(),
        lambda x: torch.where(x > 0, x, -x) * 2 + x / 3 - 1,
        lambda x: torch.cat(x.chunk(2, -1)[::-1], -1).masked_fill(x.isnan(), 0).clamp(min=0),
        lambda x: F.embedding(torch.arange(3), x).sqrt().abs().neg(),
        lambda x: (x > 0).sum(),  # integers add exactly
        lambda x: x.argmax(-1),
        lambda x: ops.rms_norm(ops.linear(x, torch.ones(8, 16)), torch.ones(8), 1e-6),
    ],
)
def test_audit_passes_what_ieee_754_fixes(f):
    assert findings(f) == set()


@pytest.mark.parametrize("place", ["model.layers.1.self_attn.o_proj", "model.norm"])
def test_audit_names_the_class_of_a_planted_module(place):
    model = make_invariant(build("llama"))
    original = model.get_submodule(place)

    class Planted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = original

        def forward(self, x):
            return self.inner(x) * torch.softmax(x, -1).mean()

    model.set_submodule(place, Planted())
    assert set(audit(model)) == {Finding("aten._softmax.default", "Planted"), Finding("aten.mean.default", "Planted")}
    with pytest.raises(UnsupportedModel, match=r"aten\._softmax\.default in Planted.*aten\.mean\.default in Planted"):
        require_exact(model)


def test_audit_finds_a_module_that_make_invariant_did_not_know():
    class Unknown(nn.Linear):
        pass

    model = build("llama").bfloat16()
    model.model.layers[0].mlp.up_proj.__class__ = Unknown
    make_invariant(model)
    assert audit(model) == [Finding("aten.mm.default", "Unknown")] or audit(model)[0].module == "Unknown"


def test_a_norm_of_no_form_is_refused_by_class_and_operation():
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    model = make_invariant(build("Starcoder2", **heads).bfloat16())  # some LayerNorms refuse fp32 weights of a bf16 input
    with pytest.raises(
        UnsupportedModel, match=r"aten\.gelu\.default in GELUTanh, aten\.native_layer_norm\.default in LayerNorm"
    ):
        require_exact(model)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_forward_that_scales_its_logits_is_refused(factor):
    """Scaling is IEEE arithmetic, which audit lets pass, but scoring by token_ids would skip it. Control: a factor of 1."""

    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * factor
            return out

    torch.manual_seed(0)
    model = Scaled(build("llama").config).to(DEVICE)
    if factor == 1.0:
        require_exact(make_invariant(model))
    else:
        with pytest.raises(UnsupportedModel, match="Scaled looks like CausalLM but differs"):
            make_invariant(model)


def test_audit_leaves_the_model_as_it_was():
    model = make_invariant(build("qwen3")).train()
    hooks = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    audit(model)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert (len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)) == hooks
    broken = make_invariant(build("llama")).train()
    broken.model.layers[1].self_attn.num_key_value_groups = broken.model.layers[1].self_attn.head_dim = 48  # divides nothing
    with pytest.raises(RuntimeError):
        audit(broken)
    assert broken.training
    assert (len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)) == hooks


def test_watch_allows_a_named_namespace():
    x = torch.ones(3)
    with watch("aten") as found:
        x.exp()
    assert not found
    with watch() as found:
        x.exp()
    assert list(found) == [Finding("aten.exp.default", "outside any module")]

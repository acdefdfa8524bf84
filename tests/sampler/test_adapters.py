"""An engine with adapters in its layers has the bits of a trainer with them in its own; and what is noticed when it has not."""

from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlinvariant import bits, ops
from rlinvariant.bits import assert_bits_equal
from rlinvariant.models import lora, make_trainable
from rlinvariant.models.families import FAMILIES
from rlinvariant.models.random import save_random
from rlinvariant.ops.lora import RANK_STEP
from rlinvariant.sampler import adapters
from rlinvariant.sampler.engine import Sampler
from rlinvariant.verification.adapters import merged, without, without_padding
from rlinvariant.verification.controls import stale_weights
from rlinvariant.verification.relations import alone, checkpointed, one_by_one, sampler_and_trainer, weight_sync
from rlinvariant.verification.start import pair_of
from tests.ladders import randn
from tests.parity.device import DEVICE

ADAPTERS = {  # family, projections, rank: all of a layer that vLLM merges, some of it, and layers that are merged in the model
    "all": ("qwen3", "all-linear", 8),
    "queries and values": ("llama", ["q_proj", "v_proj"], 5),
    "one of gate and up": ("qwen2", ["o_proj", "down_proj", "up_proj"], 20),
    "merged in the model": ("phi3", "all-linear", 16),
}


QUICK = ("all", "queries and values")


@pytest.fixture(scope="module", params=[x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in ADAPTERS])
def sides(request, tmp_path_factory) -> Iterator[Any]:
    """A trainer's model and an engine, in sync."""
    family, targets, rank = ADAPTERS[request.param]
    path = str(save_random(FAMILIES[family](), tmp_path_factory.mktemp("models") / family))
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(DEVICE)
    model = lora.applied(model, LoraConfig(r=rank, lora_alpha=32, target_modules=targets), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # with zeros, an engine that ignores adapters would pass
                weight.normal_(0, 0.05)
    make_trainable(model).eval()
    sampler = Sampler(path, invariant=True, max_model_len=128, kv_cache_gib=0.1, ranks=lora.ranks(model))
    sampler.sync(lora.pairs(model))
    yield SimpleNamespace(model=model, sampler=sampler, pair=pair_of(model, sampler, model.config.vocab_size))
    sampler.close()


@pytest.mark.parametrize("relation", [sampler_and_trainer, alone, one_by_one, checkpointed])
def test_both_sides_have_the_same_bits(sides, relation):
    found = relation(sides.pair)
    assert found.mismatched == 0 and found.compared > 50 and found.holds


def test_each_weight_is_compared(sides):
    weights = list(lora.pairs(sides.model))
    assert sides.sampler.differing_weights(weights) == []
    adapters = [name for name, _ in weights if name.endswith((lora.A, lora.B))]
    for name in adapters[:4]:
        changed = [(n, one_ulp(w) if n == name else w) for n, w in weights]
        assert sides.sampler.differing_weights(changed) == [name]
    left_out = [pair for pair in weights if pair[0] != adapters[0]]
    assert sides.sampler.differing_weights(left_out) == ["1 adapter weights, which were not given"]


def test_a_copy_that_is_multiplied_by_is_compared(sides):
    """The engine multiplies by packed copies, and by copies of projections without adapters; one left behind is named."""
    engine, weights = sides.sampler.model, list(lora.pairs(sides.model))
    every = adapters.layers(engine).values()
    copied = [held for held in every if held.alone or any(x is not None for x in sum(held.packed.values(), []))]
    if not copied:
        pytest.skip("needs a layer that multiplies by a copy")
    holder = copied[0]
    part = next(iter(holder.alone), 0)
    at, own = sum(holder.sizes[:part]), holder.wide.clone()
    holder.wide[at, 0] += 1
    found = sides.sampler.differing_weights(weights)
    holder.wide.copy_(own)
    assert any(name.endswith(".weight (copy)") for name in found)
    assert sides.sampler.differing_weights(weights) == []


def test_compiled_code_follows_a_sync():
    """vLLM compiles the layers on a GPU, whole and without guards: they may neither make a copy nor ask for threads there.

    Control: before the refresh, the projection that has no adapter is multiplied by its old weight, and `stale` says so.
    """
    weight = torch.nn.Parameter(randn(48, 32, dtype=torch.bfloat16))
    layer = SimpleNamespace(weight=weight, parts=[16, 16, 16], cuts=[SimpleNamespace(whole=16, first=0, rows=16)] * 3)
    held, x = adapters.Adapters(layer, {0: 4, 2: 4}), randn(5, 32, dtype=torch.bfloat16, seed=1)
    compiled = torch.compile(lambda x: held(x, None), fullgraph=True, backend="eager")
    before = compiled(x)
    with torch.no_grad():
        layer.weight.copy_(randn(48, 32, seed=2))
        for part in (0, 2):
            held.slot(part, lora.A).kept.copy_(randn(4, 32, seed=3))
            held.slot(part, lora.B).kept.copy_(randn(16, 4, seed=4))
    with torch.compiler.set_stance("fail_on_recompile"):
        after = compiled(x)
        assert held.stale() and bits.same(after[:, 16:32], before[:, 16:32])
        held.refresh()
        assert not held.stale()
        first, middle, last = layer.weight.split(16)
        adapted = [
            ops.lora_linear(x, w, held.slot(i, lora.A).kept, held.slot(i, lora.B).kept) for i, w in ((0, first), (2, last))
        ]
        right = torch.cat([adapted[0], ops.linear(x, middle), adapted[1]], -1)
        assert_bits_equal(compiled(x), right, "compiled, after a sync")


@pytest.mark.parametrize("ranks", [{0: 8, 1: 20, 2: 16}, {0: 5, 2: 3}, {1: 40}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_projections_that_are_merged_have_in_one_product_the_bits_that_they_have_apart(ranks, dtype, monkeypatch):
    """A GPU joins them; here the written kernel does, whose columns do not depend on those beside them either.

    Control: one projection's B where another's A is multiplied.
    """
    monkeypatch.setattr(import_module("rlinvariant.ops.linear"), "is_exact", lambda *_: False)
    sizes = [48, 16, 32]
    weight, bias, x = (randn(*shape, dtype=dtype) for shape in ((sum(sizes), 64), (sum(sizes),), (9, 64)))
    made = []
    for joined in (False, True):
        cuts = [SimpleNamespace(whole=n, first=0, rows=n) for n in sizes]
        layer = SimpleNamespace(weight=torch.nn.Parameter(weight.clone()), parts=sizes, cuts=cuts)
        held = adapters.Adapters(layer, ranks, joined)
        for part, rank in ranks.items():
            held.slot(part, lora.A).kept.copy_(randn(rank, 64, seed=part))
            held.slot(part, lora.B).kept.copy_(randn(sizes[part], rank, seed=part + 3))
        held.refresh()
        assert_bits_equal(layer.weight.data, weight, "the weight, in its own place")
        made.append(held)
    apart, one = made
    assert one.a.shape[1] == sum(-(-rank // 16) * 16 for rank in ranks.values()) and not one.alone
    assert_bits_equal(one(x, bias), apart(x, bias), "one product")
    one.wide[:, 64:] = one.wide[:, 64:].roll(16, 1)
    assert not bits.same(one(x, bias), apart(x, bias))


def test_adapters_are_synced_alone(sides):
    """The base stays, and the prefix cache, which was computed with older adapters, is forgotten."""
    layers = [m for m in sides.model.modules() if lora.is_lora(m)]
    before = [layer.lora_B["default"].weight.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.lora_B["default"].weight.mul_(1.02)
        stale = sampler_and_trainer(sides.pair)
        assert stale.mismatched > 0.9 * stale.compared, "control: the engine's adapters are a sync old"
        sides.sampler.sync(lora.adapters(sides.model))
        assert sides.sampler.differing_weights(lora.pairs(sides.model)) == []
        assert sampler_and_trainer(sides.pair).holds
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.lora_B["default"].weight.copy_(weight)
        sides.sampler.sync(lora.adapters(sides.model))


@pytest.mark.parametrize("control", [without, merged], ids=["no adapters", "merged into the base"])
def test_another_function_is_found(sides, control):
    """Controls of `verify`: an engine that ignores adapters; and TRL's way, weights into which adapters are merged."""
    sampler_and_trainer(sides.pair)
    found = control(sides.pair)
    assert found.mismatched > 0.5 * found.compared > 0
    assert ("nats away" in found.how) is (control is merged)
    assert sides.sampler.differing_weights(lora.pairs(sides.model)) == [], "and the engine is as it was"


def test_the_controls_see_nothing_where_adapters_are_zero(sides):
    """Controls of the controls: with B = 0, an engine without adapters, or with merged ones, is the same function."""
    layers = [m for m in sides.model.modules() if lora.is_lora(m)]
    before = [layer.lora_B["default"].weight.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.lora_B["default"].weight.zero_()
        sides.sampler.sync(lora.adapters(sides.model))
        sampler_and_trainer(sides.pair)
        assert [control(sides.pair).mismatched for control in (without, merged)] == [0, 0]
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.lora_B["default"].weight.copy_(weight)
        sides.sampler.sync(lora.adapters(sides.model))


def test_the_rank_is_padded_where_that_is_called_for(sides):
    """The control says what it saw: on the CPUs that were tried, zeros beyond the rank change no bit."""
    sampler_and_trainer(sides.pair)
    found = without_padding(sides.pair)
    ranks = set(lora.ranks(sides.model).values())
    padded = any(rank % RANK_STEP["cpu"] for rank in ranks)
    assert found.name.startswith("stock") and found.shown is padded is (found.compared > 0)
    assert padded or found.how.startswith("not run: every rank is a multiple of 16")
    assert RANK_STEP == {"cpu": 16, "cuda": 64}, "and padding is on again"


def test_adapters_alone_are_moved_and_synced(sides):
    """`verify`'s sync: sampler and trainer stay equal, and what was drawn before is seen to be a sync old."""
    before = {name: p.detach().clone() for name, p in sides.model.named_parameters()}
    sampler_and_trainer(sides.pair)
    try:
        synced, stale = weight_sync(sides.pair), stale_weights(sides.pair)
        assert synced.holds and synced.compared > 50
        assert stale.mismatched > 0 and stale.name == "planted: the sampler's adapters one sync old"
        moved = {name for name, p in sides.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if "lora_" in name}
    finally:
        with torch.no_grad():
            for name, p in sides.model.named_parameters():
                p.copy_(before[name])
        sides.sampler.sync(lora.pairs(sides.model))


def one_ulp(weight: Tensor) -> Tensor:
    """The weight with one element moved by a bf16 ulp, as the engine keeps it."""
    moved = weight.detach().bfloat16().clone()
    flat = moved.view(torch.int16).flatten()
    flat[0] += 1
    return flat.view(torch.bfloat16).view_as(moved)

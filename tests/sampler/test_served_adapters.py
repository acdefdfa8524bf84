"""Servers with LoRA adapters draw what an engine in this process draws; what no server has room for is refused by name."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from rlinvariant.errors import UserError
from rlinvariant.models import lora
from rlinvariant.sampler import server, wire
from rlinvariant.sampler.engine import Sampler
from rlinvariant.sampler.served import ServedSampler
from rlinvariant.trainer_token import Token
from rlinvariant.verification import servers as ready
from tests.parity.device import cpu_only
from tests.sampler import test_served as plain
from tests.sampler.test_served import END, HOW, LONGEST, TOKEN, requests

pytestmark = [pytest.mark.slow, cpu_only("servers and an engine would share a GPU")]
servers, token_file = plain.servers, plain.token_file
ADAPTERS = {  # projections, rank, as tests/sampler/test_adapters.py: all that vLLM merges, some of it
    "all": ("all-linear", 8),
    "queries and values": (["q_proj", "v_proj"], 5),
    "one of gate and up": (["o_proj", "down_proj", "up_proj"], 20),
}


def adapted(directory: str, targets: Any, rank: int) -> Any:
    """Return a model with adapters whose A and B are random."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model = lora.applied(model, LoraConfig(r=rank, lora_alpha=32, target_modules=targets), seed=0)
    lora.randomise(model, seed=1)
    return model


@pytest.fixture(scope="module", params=ADAPTERS)
def side(request, arithmetic_dir) -> Iterator[Any]:
    """A model with adapters, and what an engine in this process draws with them."""
    model = adapted(arithmetic_dir, *ADAPTERS[request.param])
    engine = Sampler(arithmetic_dir, invariant=True, max_model_len=LONGEST, kv_cache_gib=0.05, ranks=lora.ranks(model))
    engine.sync(lora.pairs(model))
    drawn = {name: engine.generate(**requests(), **HOW[name]) for name in ("all tokens", "top-p")}
    engine.close()
    yield SimpleNamespace(model=model, drawn=drawn)


def joined(servers: list[Any], model: Any) -> ServedSampler:
    them = [server.Server(one.url, Token(TOKEN)) for one in servers]
    how = {"dtype": "bfloat16", "max_model_len": LONGEST, "eager": True, "ends": [END]}
    return ServedSampler(them, ranks=lora.ranks(model), **how)


def draws(sampler: ServedSampler, how: str = "all tokens") -> Any:
    return sampler.generate(**requests(), **HOW[how])


def test_servers_with_adapters_draw_what_an_engine_draws(side, servers, arithmetic_weights):
    """Controls: other adapters, as those of a sync before; none that count; and another base."""
    sampler = joined(servers, side.model)
    assert sampler.differing_weights(lora.pairs(side.model)), "adapters have not come yet"
    sampler.sync(lora.adapters(side.model))  # the base is the servers' own
    assert sampler.differing_weights(lora.pairs(side.model)) == []
    for how, expected in side.drawn.items():
        assert draws(sampler, how) == expected
    old = [(name, w * 1.1) for name, w in lora.adapters(side.model)]
    for control in (old, [*lora.without(lora.adapters(side.model))]):
        sampler.sync(control)
        assert sampler.differing_weights([*lora.base(side.model), *control]) == []
        assert draws(sampler) != side.drawn["all tokens"]
    sampler.sync(lora.adapters(side.model))
    for name, w in lora.base(side.model):
        if "layers.1.self_attn.k_proj.weight" in name:
            sampler.sync([(name, w * 1.1)])
    found = sampler.differing_weights(lora.pairs(side.model))
    assert len(found) == 2 and all(name.startswith("model.layers.1.self_attn.qkv_proj.weight (of ") for name in found), found
    with pytest.raises(UserError, match="the server holds none"):
        draws(sampler)
    sampler.sync(lora.pairs(side.model))
    assert sampler.differing_weights(lora.pairs(side.model)) == []
    assert draws(sampler) == side.drawn["all tokens"]
    whole = joined(servers, torch.nn.Module())
    whole.sync(arithmetic_weights)
    assert whole.differing_weights(arithmetic_weights) == [], "the next trainer has none, and packed copies are of its base"
    assert draws(whole) != side.drawn["all tokens"]


def test_a_word_of_an_adapter_that_flips_on_its_way_is_seen(side, servers):
    sampler = joined(servers, side.model)
    sampler.sync(lora.pairs(side.model))
    name = next(reversed([name for name, _ in lora.adapters(side.model)]))
    with plain.flipping(name, 3, 1):
        sampler.sync(lora.adapters(side.model))
    differing = sampler.differing_weights(lora.pairs(side.model))
    assert sorted(differing) == sorted(f"{name} (of {one.url})" for one in servers)
    with pytest.raises(UserError, match="the server holds none"):
        draws(sampler)


def test_what_no_server_has_room_for_is_refused_by_name(arithmetic_dir, servers):
    """A trainer that is refused takes the servers from nobody: whoever had them draws on."""
    model = adapted(arithmetic_dir, ["q_proj"], 4)
    sampler = joined(servers[:1], model)
    sampler.sync(lora.pairs(model))
    assert sampler.differing_weights(lora.pairs(model)) == []
    expected = draws(sampler)
    own, about = sampler._alive[0], {"trainer": "a test", "mark": ""}
    lacking = "model.layers.7.self_attn.q_proj"
    for ranks, said in (
        ({lacking: 4}, f"lora.target_modules has {lacking}, which this server's model has not"),
        ({"model.embed_tokens": 4}, "lora.target_modules has model.embed_tokens, which this server"),
        ({"model.layers.0.self_attn.q_proj": 129}, "lora.r=129: expected at most 128, the model's width"),
        ({"model.layers.0.self_attn.q_proj": 0}, "lora.r=0: expected a whole number"),
        ({"model.layers.0.self_attn.q_proj": "4"}, "lora.r=4: expected a whole number"),
    ):
        with pytest.raises(UserError, match=f"sampler.servers={own.url}: {said}"):
            own.asked("join", about | {"ranks": ranks})
    with pytest.raises(UserError, match="join: 'ranks'"):
        own.asked("join", about)
    assert draws(sampler) == expected
    for other, said in (
        (adapted(arithmetic_dir, ["v_proj"], 4), "v_proj.lora_[AB].weight: the engine has no room for this adapter"),
        (adapted(arithmetic_dir, ["q_proj"], 8), r"q_proj.lora_[AB].weight is \[.*8.*\]: the engine has room for \[.*4.*\]"),
    ):
        with pytest.raises(UserError, match=said):
            sampler.sync(lora.adapters(other))
        with pytest.raises(UserError, match="weights .* were asked for, and the server holds none"):
            draws(sampler)
        assert sampler.differing_weights(lora.pairs(other)), "and its sums are not those of a server"
    whole = joined(servers[:1], torch.nn.Module())
    with pytest.raises(UserError, match="q_proj.lora_[AB].weight: the engine has no room for this adapter"):
        whole.sync(lora.adapters(model))


def test_room_that_was_made_at_the_start_is_that_which_a_trainer_asks_for(side, arithmetic_dir, token_file, tmp_path):
    """A compiled server, which cannot make any later, needs it; for another trainer's adapters it is made anew here."""
    model = adapted(arithmetic_dir, "all-linear", 8)
    (one,) = plain.start(1, arithmetic_dir, token_file, tmp_path, "--lora", "r=8")
    try:
        for adapters in (model, side.model):
            sampler = joined([one], adapters)
            sampler.sync(lora.adapters(adapters))
            assert sampler.differing_weights(lora.pairs(adapters)) == []
        assert draws(sampler) == side.drawn["all tokens"]
    finally:
        one.stop()


def test_a_compiled_server_is_refused_before_weights_are_loaded(arithmetic_dir, servers, token_file, monkeypatch):
    """No server on a CPU compiles: one that says so stands for it. Controls: without adapters it is taken, and with room."""
    from rlinvariant.sampler.refusals import load_config

    proven = server.proven
    monkeypatch.setattr(ready, "proven", lambda one: (about := proven(one)) | {"subject": about["subject"] | {"eager": False}})
    asked = [servers[0].url], token_file, load_config(arithmetic_dir), arithmetic_dir, "bfloat16", LONGEST
    assert ready.found(*asked).eager is False
    with pytest.raises(UserError, match=f"{servers[0].url}: {wire.COMPILED}"):
        ready.found(*asked, adapted=True)
    said = ready.proven
    monkeypatch.setattr(ready, "proven", lambda one: said(one) | {"room": True})
    assert ready.found(*asked, adapted=True).eager is False


def test_a_server_that_dies_while_it_draws_with_adapters_is_replaced(
    arithmetic_dir, servers, token_file, tmp_path, monkeypatch, capfd
):
    model = adapted(arithmetic_dir, "all-linear", 8)
    (dying,) = plain.start(1, arithmetic_dir, token_file, tmp_path)
    try:
        sampler = joined([servers[0], dying], model)
        sampler.sync(lora.adapters(model))
        assert sampler.differing_weights(lora.pairs(model)) == []
        expected = draws(sampler)
        with dying.engine_stopped(), monkeypatch.context() as planted:
            plain.at_first_content(planted, dying.process.kill)
            assert draws(sampler) == expected
        said = capfd.readouterr().err
        assert f"note: sampler.servers={dying.url}: not reached" in said and "1 server left; others draw its 12 req" in said
        sampler.sync(lora.adapters(model))
        assert sampler.differing_weights(lora.pairs(model)) == [] and draws(sampler) == expected
    finally:
        dying.stop()

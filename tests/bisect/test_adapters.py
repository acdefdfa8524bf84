"""`rlinvariant bisect` with LoRA adapters: a fault of an adapter is located, and its cause is named."""

import copy
import importlib
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from rlinvariant import ops
from rlinvariant.bisect import both_sides, trials
from rlinvariant.bisect.record import Recorder
from rlinvariant.bits import assert_bits_equal
from rlinvariant.models import lora, make_trainable
from rlinvariant.models.random import save_random
from rlinvariant.models.working import join_adapted
from tests.bisect.pairs import CONFIG, LONGEST_REQUEST, STEP_TOKENS, TRIAL, Pair, replaced
from tests.parity.device import CUDA
from tests.parity.harness import start_engine

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Pair:
    path = save_random(CONFIG, tmp_path_factory.mktemp("models") / "qwen3", 1)
    model: Any = lora.applied(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), LoraConfig(r=8, target_modules="all-linear"), seed=0
    )
    lora.randomise(model, 0)
    make_trainable(model).eval()
    engine = start_engine(path, longest=LONGEST_REQUEST, max_num_batched_tokens=STEP_TOKENS, ranks=lora.ranks(model))
    engine.sync(lora.adapters(model))
    return Pair(path, engine, model)


def in_the_trainer(forward):
    def fault(pair: Pair):
        layer: Any = pair.model.base_model.get_submodule(f"model.{DOWN}")
        return replaced(layer, "forward", lambda x, *_: forward(x, layer.base_layer.weight, layer))

    return fault


def added_later(x, weight, layer):
    return ops.linear(x, weight) + ops.linear(ops.linear(x, layer.lora_A["default"].weight), lora.scaled(layer, "default"))


def merged(x, weight, layer):
    total = weight.float() + lora.scaled(layer, "default") @ layer.lora_A["default"].weight
    return ops.linear(x, total.bfloat16())


FAULTS = {  # what is synced, the role and the cause
    "a stale A": (lora.A, "down projection", f"in the engine {DOWN}.lora_A.weight differs"),
    "a stale B": (lora.B, "down projection", f"in the engine {DOWN}.lora_B.weight differs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_a_sync_missed_is_named(adapted, fault):
    which, role, cause = FAULTS[fault]
    own = dict(lora.adapters(adapted.model))
    name = f"{DOWN}.{which}"
    adapted.engine.sync((own | {name: own[name] * 1.02}).items())
    result, said = adapted.find()
    adapted.engine.sync(own.items())
    assert result.first is not None and result.first.place == (1, role), said
    text = "\n".join(said)
    assert re.search(cause, text) and re.search(rf"weights +differ: {DOWN}\.{which.removesuffix('.weight')}", text), text


@pytest.mark.parametrize(
    "forward, cause",
    [
        (added_later, "added to one that is rounded already, as PEFT does"),
        (merged, "the adapter is merged into the weight, which is rounded"),
        (lambda x, weight, layer: ops.linear(x, weight), "the adapter is left out"),
    ],
    ids=["added later", "merged", "left out"],
)
def test_another_function_of_the_trainer_is_named(adapted, forward, cause):
    with in_the_trainer(forward)(adapted):
        result, said = adapted.find()
    assert result.first is not None and result.first.place == (1, "down projection"), said
    assert re.search(f"cause .*{cause}", "\n".join(said)), said


def test_without_a_fault_there_is_nothing(adapted):
    result, said = adapted.find_any([replace(TRIAL)])
    assert result.first is None and result.compared == 144 and said[0].startswith("nothing to bisect: 0 of 144")


def test_joined_projections_are_recorded_as_the_modules_are(adapted, monkeypatch):
    """The trainer on a GPU calls no q_proj, k_proj, v_proj, gate_proj or up_proj, but one product for each group."""
    drawn = trials.draw(adapted.engine, TRIAL)[1]
    if not CUDA:
        monkeypatch.setattr(importlib.import_module("rlinvariant.ops.linear"), "is_exact", lambda *_: False)
    traces = []
    for model in (adapted.model, join_adapted(copy.deepcopy(adapted.model))):
        recorder = Recorder(model)
        with recorder.recording(), both_sides.expecting(model, TRIAL, drawn, 6, recorder, False):
            both_sides.score_rows(model, TRIAL, drawn, 5, False)
        traces.append(recorder.trace)
    apart, joined = traces
    assert joined.keys() == apart.keys()
    for place in apart:
        for block, right in zip(joined[place], apart[place], strict=True):
            assert_bits_equal(block.value, right.value, str(place))
            if right.call is not None and right.call.op == "lora_linear":
                assert block.call is not None and block.call.op == "lora_linear", place
                again = ops.lora_linear(**block.call.inputs, **block.call.weights)
                assert_bits_equal(again.detach(), block.value, f"{place}, from what was recorded")

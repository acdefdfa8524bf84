"""Weights in shards: sums and norm of gradients, the rows of a checkpoint, and one process's part of an optimizer."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig

from rlinvariant import bits
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.models import lora, make_invariant, shards, use_working_copies
from rlinvariant.models.families import FAMILIES
from rlinvariant.models.leaves import Branch, Leaves, _Unit, additions
from rlinvariant.models.random import save_random
from rlinvariant.models.working import join_adapted
from rlinvariant.trainer import InvariantGRPOTrainer
from rlinvariant.trainer.memory import decoder_layers
from tests.models.small import logprobs, sequences
from tests.parity.device import cpu_only
from tests.trainer.gradients import halves

pytestmark = cpu_only("one process of gloo")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def group():
    """A group of this process alone: the one that an engine has made here, or a new one."""
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def model(tied: bool = True):
    return make_invariant(plain(tied), torch.bfloat16)


def plain(tied: bool = True, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied), dtype=dtype)


@pytest.mark.parametrize("tied", [True, False])
def test_every_layer_is_a_unit_and_every_weight_in_shards(group, tied):
    cut = model(tied)
    assert shards.shard(cut, decoder_layers(cut)) == 4
    assert all(isinstance(p, DTensor) for p in cut.parameters()) and shards.is_sharded(cut)
    missed = model(tied)
    with pytest.raises(RuntimeError, match="1 units of 0 layers"):  # as a model whose layers nobody finds
        shards.shard(missed, [])


def test_projections_are_joined_in_shards_as_in_a_whole_model_s_copies(group, monkeypatch):
    """Both are what trains on a GPU: every weight has the same gradient. The control computes each projection apart."""
    monkeypatch.setattr(importlib.import_module("rlinvariant.ops.linear"), "is_exact", lambda *_: False)  # one route for all
    apart, joined = model(), use_working_copies(model(), torch.bfloat16)
    cut = use_working_copies(model(), torch.bfloat16, kept=False)
    shards.shard(cut, decoder_layers(cut))
    for each in (apart, joined, cut):
        logprobs(each, sequences())[0].sum().backward()
    gradients = {name: p.grad for name, p in joined.named_parameters()}
    for name, p in cut.named_parameters():
        assert p.grad is not None and bits.same(shards.whole(p.grad), gradients[name]), name
    assert not all(bits.same(p.grad, gradients[name]) for name, p in apart.named_parameters()), "control"


def test_adapted_projections_are_joined_in_shards_as_in_a_whole_model(group, monkeypatch):
    """A whole model on a GPU joins what LoRA adapts, too. The control computes each projection apart."""
    monkeypatch.setattr(importlib.import_module("rlinvariant.ops.linear"), "is_exact", lambda *_: False)
    apart, joined, cut = (
        lora.applied(plain(dtype=torch.bfloat16), LoraConfig(r=8, target_modules="all-linear"), 0) for _ in range(3)
    )
    for each in (apart, joined, cut):
        make_invariant(each)
        lora.randomise(each, 0)
    for each in (joined, cut):
        join_adapted(each)
    shards.shard(cut, decoder_layers(cut))
    for each in (apart, joined, cut):
        logprobs(each, sequences())[0].sum().backward()
    gradients = {name: p.grad for name, p in lora.trained(joined)}
    for name, p in lora.trained(cut):
        assert p.grad is not None and bits.same(shards.whole(p.grad), gradients[name]), name
    assert not all(bits.same(p.grad, gradients[name]) for name, p in lora.trained(apart)), "control"


def test_the_norm_has_the_bits_of_torch_s_for_whole_gradients():
    generator, apart = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        gradients = [torch.randn(shape, generator=generator) for shape in [(97, 64), (64,)] * 5]
        expected = torch.nn.utils.get_total_norm(gradients)
        assert bits.compare(shards.total_norm(gradients), expected) is None
        halves = [torch.nn.utils.get_total_norm([x.chunk(2)[i] for x in gradients]) for i in (0, 1)]
        apart += bits.compare(torch.linalg.vector_norm(torch.stack(halves)), expected) is not None
    assert apart > 5, "control: a sum over shards"
    parameters = [torch.nn.Parameter(torch.zeros_like(x)) for x in gradients]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.clone()
    torch.nn.utils.clip_grads_with_norm_(parameters, 0.5, expected)
    shards.scale_gradients(gradients, expected, 0.5)
    assert all(bits.compare(p.grad, x) is None for p, x in zip(parameters, gradients, strict=True))


def test_a_norm_may_overflow_where_no_rank_s_share_does():
    """The trainer looks at the norm of whole gradients for this: a sum of the ranks' norms does not show it."""
    halves = [torch.full((2, 1), 1.5e19 / 2**0.5), torch.full((2, 1), 1.5e19 / 2**0.5)]
    assert all(torch.nn.utils.get_total_norm([half]).isfinite() for half in halves)
    assert not shards.total_norm([torch.cat(halves)]).isfinite()


def test_rows_are_found_where_they_are():
    x = torch.arange(12.0).view(4, 3)
    assert shards.row(x, 2).tolist() == [[6, 7, 8]] and shards.first_row(x) == 0 and shards.row(x, 9).shape == (0, 3)
    shards.row(x, 1).zero_()
    assert x[1].tolist() == [0, 0, 0], "a view"


def test_a_checkpoint_is_read_into_shards_and_another_model_s_is_refused(group, tmp_path):
    cut, saved = model(), dict(model().named_parameters())
    shards.shard(cut, decoder_layers(cut))
    weights = {name: p.detach() + 1 for name, p in saved.items()}
    save_file(weights, tmp_path / "model.safetensors")
    shards.load(cut, tmp_path)
    read = shards.state(cut.named_parameters(), keep=True)
    assert read.keys() == weights.keys() and all(bits.compare(read[name], w) is None for name, w in weights.items())
    assert shards.state(cut.named_parameters(), keep=False) == {}
    name = next(iter(weights))
    for others, why in (
        ({k: v for k, v in weights.items() if k != name}, f"1 weights are missing and 0 unknown, {name} first"),
        (weights | {"other": torch.ones(1)}, "0 weights are missing and 1 unknown, other first"),
        (weights | {name: torch.ones(3, 3)}, rf"{name} has shape \[3, 3\], expected \[97, 64\]"),
    ):
        save_file(others, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=why):
            shards.load(cut, tmp_path)


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_the_experts_of_a_checkpoint_are_read_into_shards(group, tmp_path, family):
    """The file has a matrix for each expert, and Mixtral's others names."""
    config = FAMILIES[family]()
    config.moe_intermediate_size = config.intermediate_size = 32
    plain = AutoModelForCausalLM.from_pretrained(save_random(config, tmp_path), dtype=torch.float32)
    cut = make_invariant(AutoModelForCausalLM.from_config(config, dtype=torch.float32), torch.bfloat16)
    shards.shard(cut, decoder_layers(cut))
    shards.load(cut, tmp_path)
    read = shards.state(cut.named_parameters(), keep=True)
    assert all(bits.same(read[name], weight) for name, weight in plain.named_parameters())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if ".experts.7." in name)
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"1 weights are missing and 0 unknown, {name} first"):
        shards.load(cut, tmp_path)


@pytest.mark.parametrize("optim", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_s_state_is_saved_as_rows_and_comes_back_as_shards(group, optim):
    def stepped(state=None):
        cut = model()
        shards.shard(cut, decoder_layers(cut))
        optimizer = optim(cut.parameters(), lr=0.1)
        for p in cut.parameters():
            p.grad = torch.zeros_like(p) + 0.5
        if state is None:
            optimizer.step()
        else:
            optimizer.load_state_dict(shards.as_shards(state, optimizer))
        return optimizer

    first = shards.optimizer_state(stepped())
    assert not any(isinstance(x, DTensor) for of_one in first["state"].values() for x in of_one.values())
    again = shards.optimizer_state(stepped(first))
    for at, of_one in first["state"].items():
        for key, x in of_one.items():
            assert not isinstance(x, torch.Tensor) or bits.compare(x, again["state"][at][key]) is None


def test_a_state_of_another_shape_is_refused(group):
    mesh = init_device_mesh("cpu", (1,))
    weight = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"rows": DTensor.from_local(torch.ones(4), mesh, [Shard(0)])}
    with pytest.raises(UserError, match=r"^trainer.optim: has rows, a state of another shape"):
        shards.optimizer_state(optimizer)


def test_a_cut_within_a_vector_of_a_cpu_is_named():
    """torch's fused Adam trains halves as it trains the whole where the cut is at a vector's end; elsewhere it may not."""
    weight = lambda *shape, trained=True: torch.nn.Parameter(torch.zeros(shape), requires_grad=trained)  # noqa: E731
    frozen = {"frozen": weight(3, trained=False), "in one process": weight(1, 5)}
    for shape, processes, cut in (
        ((128, 3), 2, False),
        ((128, 3), 3, True),
        ((64,), 2, False),
        ((64,), 3, True),
        ((5, 128), 3, False),
    ):
        named = frozen | {"w": weight(*shape)}
        assert shards.cut_within_a_vector(named.items(), processes) == ("w" if cut else None), (shape, processes)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        start, gradients = torch.randn(128, generator=generator) / 100, torch.randn(3, 128, generator=generator) / 1000
        whole = fused([start], [[x] for x in gradients])
        halves = fused([start[:64], start[64:]], [[x[:64], x[64:]] for x in gradients])
        assert bits.compare(torch.cat(halves), torch.cat(whole)) is None


def fused(start: list[torch.Tensor], steps: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Return weights after some steps of torch's fused Adam."""
    weights = [torch.nn.Parameter(x.clone()) for x in start]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    for gradients in steps:
        for p, gradient in zip(weights, gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in weights]


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_unit_gives_its_part_of_the_tree_s_sum_after_the_last_sample(group, count):
    """FSDP adds what it gets to the gradient: until then that is -0, with which no number changes, nor the sign of a zero."""
    x, w = bits.cancelling(1, 64, count, torch.float32, seed=count)
    terms = [torch.cat([term, torch.tensor([-0.0, 0.0])]) for term in (x * w).T]
    unit: Any = SimpleNamespace(set_custom_reduce_scatter=lambda comm: None)
    reduced, mean = _Unit(Branch("unit"), unit, 66), torch.distributed.ReduceOp.AVG

    def given(term, op=mean):
        output = torch.empty_like(term)
        reduced(output, term.clone(), group, op)
        return output

    outside = given(terms[0])
    reduced.branch.begin(additions(count))
    outputs = [given(term) for term in terms]
    expected = halves(terms)
    assert bits.compare(sum(outputs[1:], outputs[0]), expected) is None and bits.compare(outside, terms[0]) is None
    if count > 3:
        assert bits.compare(sum(terms[1:], terms[0]), expected) is not None, "control: one after the other"
    with pytest.raises(RuntimeError, match=f"unit: a backward more than the {count} samples"):
        given(terms[0])
    with pytest.raises(RuntimeError, match="FSDP asks for .*, expected a mean"):
        given(terms[0], torch.distributed.ReduceOp.SUM)
    reduced.branch.begin(additions(count))
    with pytest.raises(RuntimeError, match="unit has gradients of 65 of 66 numbers in sample 0"):
        given(terms[0][1:])


def test_leaves_of_one_process_s_shards_are_those_of_the_whole_model(group):
    """FSDP reduces nothing there, and hands on the gradients of each backward."""

    def gradients(cut: bool, leaves: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        run = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.float32)
        if cut:
            shards.shard(run, decoder_layers(run))
        added = Leaves(run.named_parameters(), [run])
        if leaves:
            added.begin(6)
        for ids in torch.randint(97, (6, 1, 20), generator=torch.Generator().manual_seed(0)):
            run(input_ids=ids, labels=ids).loss.backward()
        if leaves:
            added.finish()
        return [shards.local(p.grad) for p in run.parameters() if p.grad is not None]

    whole, cut, control = gradients(False, True), gradients(True, True), gradients(True, False)
    assert len(whole) == len(cut) > 10 and all(bits.compare(a, b) is None for a, b in zip(whole, cut, strict=True))
    assert any(bits.compare(a, b) is not None for a, b in zip(whole, control, strict=True)), "one after the other"


def test_an_optimizer_that_shards_change_is_a_note_and_with_invariant_gradients_refused(capsys):
    cut = torch.nn.Linear(3, 3, bias=False)
    look: Any = InvariantGRPOTrainer._look_at_cuts
    args = SimpleNamespace(device=torch.device("cpu"), optim="adamw_torch_fused", world_size=2, process_index=0)
    look(SimpleNamespace(gradients="ordered"), cut, args)
    assert "note: optim=adamw_torch_fused: on a CPU it rounds" in capsys.readouterr().out
    with pytest.raises(ConfigErrors, match="gradients=invariant and weights in shards: .* as of weight; set optim=adamw_torch"):
        look(SimpleNamespace(gradients="invariant"), cut, args)
    look(SimpleNamespace(gradients="invariant"), cut, SimpleNamespace(**(vars(args) | {"optim": "adamw_torch"})))
    assert capsys.readouterr().out == ""

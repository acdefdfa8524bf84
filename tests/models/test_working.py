"""Working copies of the trainer's weights: the same bits as the masters cast at use, the masters' gradients, never stale."""

import copy
import gc
import importlib
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rlinvariant.bits import assert_bits_equal, compare
from rlinvariant.models import make_invariant, require_exact, use_working_copies
from rlinvariant.trainer.packing import pack
from tests.models.small import SUPPORTED, build, logprobs, sequences
from tests.parity.device import CUDA, DEVICE


@pytest.fixture(autouse=True)
def one_route(monkeypatch):
    """Take one route for all products: on a CPU bits depend on a shape's route, which is why only a GPU's trainer merges."""
    if not CUDA:
        monkeypatch.setattr(importlib.import_module("rlinvariant.ops.linear"), "is_exact", lambda *_: False)


FAMILIES = ("llama tied", "qwen2", "qwen3", "phi3", "gemma3")  # the first two with biases, the last with windows


@pytest.fixture(params=[family for family in FAMILIES if family in SUPPORTED])
def pair(request) -> tuple[Any, Any]:
    """The same patched model, casting its weights at use, and with working copies."""
    plain = make_invariant(build(request.param))
    return plain, use_working_copies(copy.deepcopy(plain), torch.bfloat16)


def step(model: Any, only: str = "") -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name:
                p.mul_(1.01)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bits_and_gradients_are_those_of_the_masters(pair, checkpointing):
    found = []
    for model in pair:
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        values, _ = logprobs(model, sequences())
        values.sum().backward()
        found.append(values.detach())
    assert_bits_equal(found[1], found[0], "log-probs")
    for (name, p), q in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and q.grad.dtype == torch.float32, name
        assert (p.grad - q.grad).norm() < 0.02 * p.grad.norm(), name  # bf16 on the way, in another order
        if name.endswith("_proj.bias"):
            assert not torch.equal(q.grad, q.grad.bfloat16().float()), f"{name}: the gradient was rounded to bf16"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_copies_made_at_each_use_give_the_gradients_bit_for_bit(pair, checkpointing):
    """This is how weights in shards are joined. Control: projections that compute dx apart have other gradients."""
    plain, working = pair
    anew = use_working_copies(copy.deepcopy(plain), torch.bfloat16, kept=False)
    assert not anew.base_model._forward_pre_hooks, "nothing is kept that a step could leave behind"
    for model in (plain, working, anew):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        logprobs(model, sequences())[0].sum().backward()
    of_plain, of_working, of_anew = ([p.grad for p in model.parameters()] for model in (plain, working, anew))
    for (name, _), expected, got in zip(plain.named_parameters(), of_working, of_anew, strict=True):
        assert_bits_equal(got, expected, name)
    if "Phi3" not in type(plain).__name__:  # which has its projections in one already
        assert any(compare(got, x) is not None for got, x in zip(of_anew, of_plain, strict=True)), "control"


def test_an_optimizer_step_is_seen(pair):
    plain, working = pair
    with torch.no_grad():
        before, _ = logprobs(working, sequences())
        for model in pair:
            step(model)
        after, _ = logprobs(working, sequences())
        assert_bits_equal(after, logprobs(plain, sequences())[0], "log-probs after a step")
    assert compare(after, before) is not None


def test_copies_that_nobody_refreshes_are_seen(pair):
    """Control of the test above."""
    plain, working = pair
    with torch.no_grad():
        assert_bits_equal(logprobs(working, sequences())[0], logprobs(plain, sequences())[0], "log-probs before a step")
    working.base_model._forward_pre_hooks.clear()
    for model in pair:
        step(model)
    with torch.no_grad():
        assert compare(logprobs(working, sequences())[0], logprobs(plain, sequences())[0]) is not None


def test_weights_that_move_before_the_backward_are_refused(pair):
    values, _ = logprobs(pair[1], sequences())
    step(pair[1], only="o_proj")  # that of a norm or of the lm_head would be refused by its own op
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


def test_two_forwards_before_one_backward_give_the_gradients_of_both(pair):
    def gradients(forwards: int) -> list[Tensor]:
        pair[1].zero_grad()
        values = [logprobs(pair[1], sequences())[0].sum() for _ in range(forwards)]
        torch.stack(values).sum().backward()
        return [p.grad.clone() for p in pair[1].parameters()]

    for (name, _), one, both in zip(pair[1].named_parameters(), gradients(1), gradients(2), strict=True):
        assert one.norm() > 0 and (both - 2 * one).norm() <= 1e-6 * both.norm(), name  # a tied weight adds four in any order


def test_a_frozen_weight_gets_no_gradient_and_its_neighbours_theirs(pair):
    found = []
    for model in pair:
        attention = model.model.layers[0].self_attn
        merged = "qkv_proj" in attention._modules
        frozen, *others = ("o_proj", "qkv_proj") if merged else ("k_proj", "q_proj", "v_proj")
        attention.get_parameter(f"{frozen}.weight").requires_grad_(False)
        logprobs(model, sequences())[0].sum().backward()
        assert attention.get_parameter(f"{frozen}.weight").grad is None
        found.append([attention.get_parameter(f"{name}.weight").grad for name in others])
    for expected, got in zip(*found, strict=True):
        assert (expected - got).norm() < 0.02 * expected.norm()


def test_a_deep_copy_has_copies_of_its_own(pair):
    """A deep copy, say an average of weights, must neither keep the original's working copies nor refresh them."""
    plain, working = pair
    other = copy.deepcopy(working)
    for model in (plain, other):
        step(model)
    with torch.no_grad():
        before, _ = logprobs(working, sequences())
        assert_bits_equal(logprobs(other, sequences())[0], logprobs(plain, sequences())[0], "log-probs of the copy")
        assert_bits_equal(logprobs(working, sequences())[0], before, "log-probs of the original")


def test_replaced_parameters_are_seen(pair):
    plain, working = pair
    step(plain)
    working.load_state_dict(copy.deepcopy(plain.state_dict()), assign=True)
    with torch.no_grad():
        assert_bits_equal(logprobs(working, sequences())[0], logprobs(plain, sequences())[0], "log-probs")


def test_a_second_time_changes_nothing(pair):
    hooks = dict(pair[1].base_model._forward_pre_hooks)
    assert use_working_copies(make_invariant(pair[1]), torch.bfloat16) is pair[1]
    assert dict(pair[1].base_model._forward_pre_hooks) == hooks


def test_a_model_that_is_let_go_is_gone():
    """The model is freed by its reference count alone: no cycle keeps its memory until a collection."""
    model = use_working_copies(make_invariant(build("qwen3")), torch.bfloat16)
    seen = weakref.ref(model.model.layers[0].self_attn.o_proj)
    gc.collect()
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


def test_names_stay_and_the_audit_passes(pair, tmp_path):
    plain, working = pair
    require_exact(working)
    assert list(working.state_dict()) == list(plain.state_dict())
    working.save_pretrained(tmp_path)
    loaded = getattr(transformers, type(plain).__name__).from_pretrained(tmp_path)
    for name, value in plain.state_dict().items():
        assert_bits_equal(loaded.state_dict()[name].to(DEVICE), value, name)


def padded() -> tuple[Tensor, Tensor, int]:
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], device=DEVICE)
    return torch.arange(1, 19, device=DEVICE).view(3, 6) * mask, mask, 4


@pytest.mark.parametrize("multiple", [13, 64])
def test_rows_are_filled_up_by_a_sequence_that_changes_nothing(pair, multiple):
    batch = pack(*padded(), multiple)
    ids, cu = batch.inputs["input_ids"], batch.inputs["cu_seq_lens_q"]
    assert isinstance(ids, Tensor) and isinstance(cu, Tensor)
    assert ids.shape[1] % multiple == 0 and int(cu[-1]) == ids.shape[1] and len(batch.token_ids) == 3 + 4 + 1
    found = []
    for b in (batch, pack(*padded(), 1)):
        with torch.no_grad():
            values, _ = pair[1](**b.inputs, token_ids=b.token_ids, predicted_from=b.predicted_from, temperature=0.7)
        found.append(b.unpack(values))
    assert_bits_equal(found[0], found[1], f"log-probs, rows a multiple of {multiple}")

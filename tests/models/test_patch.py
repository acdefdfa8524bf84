"""A patched model is the stock model: its names and classes, and its numbers up to rounding."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from rlinvariant.bits import assert_bits_equal
from rlinvariant.errors import UserError
from rlinvariant.models import make_invariant, require_exact
from tests.models.small import (
    GROUPED,
    ROPES,
    SUPPORTED,
    build,
    logprobs,
    packed,
    sequences,
    stock_logprobs,
)
from tests.parity.device import DEVICE, fp32_only_on_cpu


@pytest.mark.parametrize("family", SUPPORTED)
def test_names_values_and_classes_stay(family):
    model = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = {name: type(module).__qualname__ for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    assert make_invariant(model) is model
    assert list(model.state_dict()) == list(before)
    for name, value in model.state_dict().items():
        assert_bits_equal(value, before[name], name)
    assert {name: type(module).__qualname__ for name, module in model.named_modules()} == classes
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert isinstance(model, getattr(transformers, type(model).__name__))
    make_invariant(model)  # a second time changes nothing
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("family", ["llama", "qwen2 tied", "qwen3"])
def test_a_saved_model_loads_as_the_stock_class(family, tmp_path):
    model = make_invariant(build(family))
    model.save_pretrained(tmp_path)
    loaded = type(build(family)).from_pretrained(tmp_path).to(DEVICE)
    assert type(loaded) is getattr(transformers, type(model).__name__) and loaded.config._attn_implementation != "rlinvariant"
    assert loaded.config.architectures == [type(model).__name__]
    for name, value in model.state_dict().items():
        assert_bits_equal(loaded.state_dict()[name], value, name)
    with torch.no_grad():
        ours, again = logprobs(model, sequences()), logprobs(make_invariant(loaded), sequences())
    assert_bits_equal(ours[0], again[0], "log-probs of the loaded model")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_unpatched_model_of_the_same_class_is_untouched(family):
    ids = sequences()[2][None]
    bystander = build(family)
    with torch.no_grad():
        before = bystander(input_ids=ids).logits
        make_invariant(build(family))
        assert_bits_equal(bystander(input_ids=ids).logits, before, "a model made before")
        assert_bits_equal(build(family)(input_ids=ids).logits, before, "a model made after")
    assert type(bystander) is getattr(transformers, type(bystander).__name__)


@fp32_only_on_cpu
@pytest.mark.parametrize("family", SUPPORTED)
def test_patched_model_matches_the_stock_model(family):
    """Log-probs, entropies and logits in fp32, of packed sequences against each alone in the stock model."""
    stock, rows = build(family), sequences()
    ours = make_invariant(copy.deepcopy(stock), torch.float32)
    with torch.no_grad():
        for a, b in zip(logprobs(ours, rows), stock_logprobs(stock, rows), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        logits = ours(**packed(rows)).logits[0].split([len(r) for r in rows])
        for row, ours_of_row in zip(rows, logits, strict=True):
            torch.testing.assert_close(ours_of_row, stock(input_ids=row[None]).logits[0], rtol=1e-4, atol=1e-4)
        batch = torch.stack([rows[1], rows[2][:9]])  # unpacked: two rows of one length
        torch.testing.assert_close(ours(input_ids=batch).logits, stock(input_ids=batch).logits, rtol=1e-4, atol=1e-4)


@fp32_only_on_cpu
@pytest.mark.parametrize("scaling", ["attention_multiplier", "embedding_multiplier"])
def test_scalings_inside_the_model_match_the_stock_model(scaling):
    stock, rows = build("Granite", **GROUPED, **{scaling: 0.3}), sequences()
    ours = make_invariant(copy.deepcopy(stock), torch.float32)
    require_exact(ours)
    with torch.no_grad():
        torch.testing.assert_close(logprobs(ours, rows)[0], stock_logprobs(stock, rows)[0], rtol=2e-5, atol=2e-5)


@fp32_only_on_cpu
@pytest.mark.parametrize("rope", ROPES)
def test_rope_types_match_the_stock_model(rope):
    stock, rows = build("llama", rope_parameters=ROPES[rope]), [torch.arange(60) % 97]
    ours = make_invariant(copy.deepcopy(stock), torch.float32)
    with torch.no_grad():
        expected = stock_logprobs(stock, rows)[0]
        torch.testing.assert_close(logprobs(ours, rows)[0], expected, rtol=2e-5, atol=2e-5)
        plain = make_invariant(build("llama"), torch.float32)
        assert (logprobs(plain, rows)[0] - expected).abs().max() > 1e-2  # control: the scaling matters


@fp32_only_on_cpu
@pytest.mark.parametrize("family", SUPPORTED)
def test_gradients_match_the_stock_model(family):
    stock, rows = build(family), sequences()
    ours = make_invariant(copy.deepcopy(stock), torch.float32)
    for model, score in ((stock, stock_logprobs), (ours, logprobs)):
        found, entropies = score(model, rows)
        (found.square().mean() + entropies.mean()).backward()
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert a.grad.dtype is torch.float32 and b.grad.abs().max() > 0, name
        assert (a.grad - b.grad).norm() < 1e-4 * b.grad.norm(), name


class Rounded(torch.autograd.Function):
    """x rounded to bf16 and back, and its gradient likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.bfloat16().float()


def round_every_output(model: nn.Module) -> nn.Module:
    """fp32 arithmetic, in which the weights and what each module hands on, with its gradient, are rounded to bf16."""

    def rounded(_: nn.Module, __: Any, output: Any) -> Any:
        parts = output if isinstance(output, tuple) else (output,)
        parts = tuple(Rounded.apply(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in parts)
        return parts if isinstance(output, tuple) else parts[0]

    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    for module in model.modules():
        if not isinstance(module, transformers.PreTrainedModel):  # which hand on what a module inside them has rounded
            module.register_forward_hook(rounded)
    return model


def gradients_and_logprobs(model: nn.Module, score: Callable) -> list[Tensor]:
    values = score(model, sequences())[0]
    values.sum().backward()
    return [values.detach(), *(p.grad.float() for p in model.parameters())]


def assert_errors_of_one_rounding_a_module(found: list[Tensor], family: str) -> None:
    """Log-probs, and gradients of all weights, are no further from fp32's than four times what those roundings cost.

    The fp32 model that rounds what each module hands on, and nothing else, measures how this model multiplies errors of 2^-8,
    with no bf16 kernel of any machine. Between two of those roundings a patched model has at most four (of a sum of the
    residual stream, heads, an angle, a gate): all together they cost at most four times as much.
    """
    truth = gradients_and_logprobs(build(family), stock_logprobs)
    rounded = gradients_and_logprobs(round_every_output(build(family)), stock_logprobs)
    for i, (a, b, t) in enumerate(zip(found, rounded, truth, strict=True)):
        assert (b - t).norm() > 0 and (a - t).norm() <= 4 * (b - t).norm(), f"log-probs or gradient {i} beyond its bound"


@pytest.mark.parametrize("family", SUPPORTED)
def test_bf16_costs_what_its_roundings_cost(family):
    assert_errors_of_one_rounding_a_module(gradients_and_logprobs(make_invariant(build(family)), logprobs), family)


@pytest.mark.parametrize("fault", ["norm", "lm_head", "gradient"])
def test_the_bound_of_roundings_finds_a_fault(fault):
    """Control: 4 % in one norm; rows of the lm_head in the place of others; gradients 6 % too large."""
    model = make_invariant(build("llama"))
    with torch.no_grad():
        if fault == "norm":
            model.model.norm.weight *= 1.04
        if fault == "lm_head":
            model.lm_head.weight[:2] = model.lm_head.weight[:2].flip(0)
    values, *gradients = gradients_and_logprobs(model, logprobs)
    gradients = [1.06 * g if fault == "gradient" else g for g in gradients]
    with pytest.raises(AssertionError, match="beyond its bound"):
        assert_errors_of_one_rounding_a_module([values, *gradients], "llama")


def test_a_padded_batch_is_refused():
    model, mask = make_invariant(build("llama")), torch.ones(2, 9, dtype=torch.int64, device=DEVICE)
    ids = torch.stack([sequences()[1]] * 2)
    model(input_ids=ids, attention_mask=mask)
    mask[0, :3] = 0
    with pytest.raises(UserError, match="packed"):
        model(input_ids=ids, attention_mask=mask)

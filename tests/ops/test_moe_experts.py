import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from rlinvariant.ops.moe_route import moe_route
from rlinvariant.verification.mixtures import cancelling_experts
from tests import bounds, ladders
from tests.bounded import assert_accurate, assert_found
from tests.ladders import DTYPES, cpu_only, differs, dtype_name, randn

module = importlib.import_module("rlinvariant.ops.moe_experts")
SIZES = (  # slots, experts, D, I
    (3, 7, 96, 80),  # no powers of two
    (8, 20, 64, 32),
    (2, 4, 64, 3072),  # a vendor's product splits so many columns for a single row
    (1, 3, 40, 24),
)
ROWS = 65
pytestmark = cpu_only  # on a GPU: tests/kernels


def mixture(weights: tuple[Tensor, Tensor], activation: str = "silu"):
    return lambda x, ids, w: ops.moe_experts(x, ids, w, *weights, activation)


def slots_backwards(x: Tensor, ids: Tensor, w: Tensor, *weights: Tensor) -> Tensor:
    """Planted fault: beyond four rows, slots are summed from the last to the first."""
    return ops.moe_experts(x, *((t.flip(-1) for t in (ids, w)) if len(x) > 4 else (ids, w)), *weights)


def split_for_one_row(x: Tensor, weight: Tensor) -> Tensor:
    """Planted fault: a product by an expert of one row sums K in two parts, as split-K products do."""
    if len(x) > 1:
        return ops.linear(x, weight)
    half = x.shape[1] // 2
    parts = (ops.linear(x[:, at].float(), weight[:, at].float()) for at in (slice(half), slice(half, None)))
    return sum(parts, torch.zeros(1)).to(x.dtype)


def by_library(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("size", SIZES)
def test_experts_are_batch_invariant(size, dtype):
    """A row alone is an expert's only one, and most experts have none."""
    x, ids, w, *weights = cancelling_experts(ROWS, *size, dtype)
    ladders.assert_batch_invariant(mixture((weights[0], weights[1])), x, ids, w)
    ladders.assert_needle(mixture((weights[0], weights[1])), x, ids, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_all_rows_on_one_expert_have_the_bits_that_they_have_on_many(dtype):
    """The same functions under other numbers: a row's result may not depend on where its expert stands, or how full it is."""
    x, ids, w, up, down = cancelling_experts(ROWS, 2, 6, 64, 48, dtype)
    one = ops.moe_experts(x, ids.clone().fill_(3)[:, :1], w[:, :1], up, down)
    spread = ops.moe_experts(x, torch.arange(ROWS)[:, None] % 5, w[:, :1], up[3].expand(5, -1, -1), down[3].expand(5, -1, -1))
    assert_bits_equal(spread, one, "one expert under five numbers")
    for expert in (0, 4):
        other = ops.moe_experts(x, ids.clone().fill_(expert)[:, :1], w[:, :1], up, down)
        assert differs(other, one), "control: another expert is another function"


@pytest.mark.parametrize("fault", ["slots", "split", "stock"])
def test_cancelling_operands_find_a_fault_that_ordinary_ones_hide(fault, monkeypatch):
    """The faults that `verify` once called exact: the operands of the ladder must show each of them."""

    def finds(x: Tensor, ids: Tensor, w: Tensor, *weights: Tensor) -> bool:
        f = slots_backwards if fault == "slots" else ops.moe_experts
        try:
            ladders.assert_batch_invariant(lambda *rows: f(*rows, *weights), x, ids, w)
        except AssertionError:
            return True
        return False

    if fault != "slots":
        monkeypatch.setattr(module, "linear", split_for_one_row if fault == "split" else by_library)
    found = finds(*cancelling_experts(ROWS, 3, 8, 64, 3072, torch.bfloat16))
    if fault == "stock" and not found:
        pytest.xfail("blind: this machine's product has a row's bits alone too")
    assert found
    x = randn(ROWS, 64, dtype=torch.bfloat16)
    w, ids = moe_route(randn(ROWS, 8, seed=1), 3, True)
    plain = finds(x, ids, w, randn(8, 96, 64, seed=2).bfloat16() / 8, randn(8, 64, 48, seed=3).bfloat16() / 8)
    assert fault == "slots" or not plain, "control: small ordinary operands hide it"


def test_slots_backwards_differ_in_many_elements():
    x, ids, w, *weights = cancelling_experts(ROWS, 4, 8, 64, 48, torch.bfloat16)
    ours, other = (ops.moe_experts(x, *(t.flip(-1) if turn else t for t in (ids, w)), *weights) for turn in (False, True))
    assert (ours != other).float().mean() > 0.15


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_experts_match_float64(dtype, activation):
    assert_experts_accurate(lambda *a: ops.moe_experts(*a, activation), dtype, activation)


def assert_experts_accurate(f, dtype: torch.dtype, activation: str = "silu") -> None:
    w, ids = moe_route(randn(40, 6, seed=1), 3, True)
    operands = randn(40, 64, dtype=dtype), w, randn(6, 96, 64, seed=2).to(dtype) / 8, randn(6, 64, 48, seed=3).to(dtype) / 8
    ours, ref = (lambda x, w, *both, g=g: g(x, ids, w, *both) for g in (f, lambda *a: ops.moe_experts_ref(*a, activation)))
    assert_accurate(ours, ref, lambda a, *t: bounds.moe_experts(a, ids, *t, activation=activation), *operands)


FAULTS = {
    "the next expert": lambda x, ids, w, up, down: ops.moe_experts_ref(x, (ids + 1) % 6, w, up, down),
    "a slot left out": lambda x, ids, w, up, down: ops.moe_experts_ref(x, ids[:, 1:], w[:, 1:], up, down),
    "weights in bf16": lambda x, ids, w, up, down: ops.moe_experts_ref(x, ids, w.bfloat16(), up, down),
    "up for gate": lambda x, ids, w, up, down: ops.moe_experts_ref(x, ids, w, up.roll(48, 1), down),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_finds_a_fault(fault):
    assert_found(lambda f: assert_experts_accurate(f, torch.float32), ops.moe_experts_ref, FAULTS[fault])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gradients_are_those_of_the_reference(activation):
    """Gradients in fp32 against fp64: a row's weight, and experts that no row went to, among them."""
    w, ids = moe_route(randn(40, 6, seed=1) + torch.tensor([0, 0, 0, 0, 0, -99.0]), 3, True)
    operands = randn(40, 64), w, randn(6, 96, 64, seed=2) / 8, randn(6, 64, 48, seed=3) / 8
    ours = ladders.gradients(lambda x, w, *both: ops.moe_experts(x, ids, w, *both, activation), operands)
    expected = ladders.gradients(
        lambda x, w, *both: ops.moe_experts_ref(x, ids, w, *both, activation), tuple(t.double() for t in operands)
    )
    for found, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
        with pytest.raises(AssertionError):  # control
            torch.testing.assert_close(1.01 * found.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
    assert not ours[2][5].any() and not ours[3][5].any()


def test_masters_get_gradients_of_their_own_dtype_and_the_bits_of_a_cast():
    x, ids, w, up, down = cancelling_experts(20, 2, 5, 64, 48, torch.bfloat16)
    masters = [t.float().requires_grad_() for t in (up, down)]
    out = ops.moe_experts(x, ids, w, *masters)
    assert_bits_equal(out, ops.moe_experts(x, ids, w, up, down), "fp32 masters")
    grads = torch.autograd.grad(out.float().sum(), masters)
    assert [g.dtype for g in grads] == [torch.float32] * 2
    again = torch.autograd.grad(ops.moe_experts(x, ids, w, *masters).float().sum(), masters)
    ladders.assert_same(again, grads, "gradients, again")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_experts_are_thread_invariant(dtype):
    x, ids, w, *weights = cancelling_experts(ROWS, *SIZES[1], dtype)
    ladders.assert_thread_invariant(lambda x: ops.moe_experts(x, ids, w, *weights), x)


def test_what_does_not_fit_is_refused():
    x, ids, w, up, down = cancelling_experts(5, 2, 4, 64, 48, torch.float32)
    for wrong in (
        (x, ids.int(), w, up, down),
        (x[:, :-1], ids, w, up, down),
        (x, ids, w[:, :1], up, down),
        (x, ids, w, up[:3], down),
        (x, ids, w, up[0], down),
        (x, ids[:3], w[:3], up, down),
    ):
        with pytest.raises(ValueError, match="moe_experts: x .* expected x .R, D., ids"):
            ops.moe_experts(*wrong)
    with pytest.raises(ValueError, match="ids from 0 to 9: expected 0 to 3"):
        ops.moe_experts(x, ids.clone().fill_(0).index_fill(0, torch.tensor([2]), 9), w, up, down)
    with pytest.raises(ValueError, match="activation='relu': expected silu or gelu_tanh"):
        ops.moe_experts(x, ids, w, up, down, "relu")
    with pytest.raises(TypeError, match="moe_experts: expected bfloat16 or float32"):
        ops.moe_experts(x.double(), ids, w, up, down)


def test_experts_are_opaque_and_take_no_rows():
    x, ids, w, up, down = cancelling_experts(5, 2, 4, 64, 48, torch.bfloat16)
    ladders.assert_registered(torch.ops.rlinvariant.moe_experts.default, x, ids, w, up, down, "silu")
    ladders.assert_opaque(lambda x: ops.moe_experts(x, ids, w, up, down), x)
    assert ops.moe_experts(x[:0], ids[:0], w[:0], up, down).shape == (0, 64)

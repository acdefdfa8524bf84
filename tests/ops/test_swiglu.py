from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from tests import bounds, ladders
from tests.bounded import assert_accurate, assert_found, slope_scaled
from tests.ladders import DTYPES, cpu_only, dtype_name, randn

WIDTHS = (3072, 100, 7, 1)  # ATen vectorises over all elements at once: tails fall anywhere


stock = ops.swiglu_ref


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return ops.swiglu(gate, up, "gelu_tanh")


def stock_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return ops.swiglu_ref(gate, up, "gelu_tanh")


both = pytest.mark.parametrize("f, reference", [(ops.swiglu, stock), (geglu, stock_geglu)], ids=["silu", "gelu_tanh"])


def scalar_tail(gate: Tensor, up: Tensor) -> Tensor:
    """Planted fault: the last numel % 16 elements take another exp, as a vector loop with a scalar tail does."""
    y, tail = ops.swiglu(gate, up), gate.numel() % 16
    if tail:
        other = torch.nextafter(y.float(), torch.tensor(9e9)).to(y.dtype) if y.dtype is torch.float32 else y * 1.01
        y.view(-1)[-tail:] = other.view(-1)[-tail:]
    return y


def operands(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return 4 * randn(rows, width, dtype=dtype), randn(rows, width, dtype=dtype, seed=1)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_is_batch_invariant(width, dtype, f, reference):
    gate, up = operands(1024, width, dtype)
    ladders.assert_batch_invariant(f, gate, up)
    ladders.assert_needle(f, gate, up)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_swiglu_gradient_is_batch_invariant(dtype, f, reference):
    gate, up = operands(1024, 100, dtype)

    def gradient(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
        return torch.autograd.grad(f(*leaves), leaves, dy)

    ladders.assert_batch_invariant(gradient, gate, up, randn(1024, 100, dtype=dtype, seed=2))
    ladders.assert_needle(gradient, gate, up, randn(1024, 100, dtype=dtype, seed=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("width", WIDTHS)
def test_halves_of_one_tensor_give_the_bits_of_two(width, dtype):
    gate, up = operands(37, width, dtype)
    dy = randn(37, width, dtype=dtype, seed=2)
    two, one = (gate.requires_grad_(), up.requires_grad_()), torch.cat([gate, up], -1).detach().requires_grad_()
    for activation in ("silu", "gelu_tanh"):
        y, merged = ops.swiglu(*two, activation), ops.swiglu_merged(one, activation)
        assert_bits_equal(merged, y, activation)
        torch.testing.assert_close(merged.float(), ops.swiglu_merged_ref(one, activation).float(), rtol=0.02, atol=1e-4)
        (gradient,) = torch.autograd.grad(merged, one, dy)
        assert_bits_equal(gradient, torch.cat(torch.autograd.grad(y, two, dy), -1), "its gradient")


def test_other_activations_are_refused_by_name():
    with pytest.raises(ValueError, match="activation='gelu': expected silu or gelu_tanh"):
        ops.swiglu(*operands(2, 8, torch.float32), "gelu")


def test_batch_size_control():
    inputs = [operands(1024, width, torch.float32) for width in (100, 3072, 7)]
    ladders.assert_control(ladders.assert_batch_invariant, scalar_tail, [(stock, x) for x in inputs])


@cpu_only
@both
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_swiglu_is_thread_invariant(dtype, f, reference):
    gate, up = operands(301, 333, dtype)
    ladders.assert_thread_invariant(f, gate, up)
    ladders.assert_thread_invariant(lambda *x: ladders.gradients(f, x), gate, up)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_swiglu_matches_float64(dtype, f, reference):
    for grad in (False, True):
        assert_swiglu_accurate(f, reference, dtype, grad)


def assert_swiglu_accurate(f: Callable, reference: Callable, dtype: torch.dtype, grad: bool) -> None:
    bound, activation = bounds.swiglu_backward if grad else bounds.swiglu, "silu" if reference is stock else "gelu_tanh"
    assert_accurate(f, reference, partial(bound, activation=activation), *operands(64, 333, dtype), grad=grad)


FAULTS = {  # planted in a reference f; whether of gradients
    "operands in bf16": (lambda f: lambda gate, up: f(gate.bfloat16(), up.bfloat16()).to(gate.dtype), False),
    "the other half": (lambda f: lambda gate, up: f(up, gate), False),
    "a hundredth of an ulp of bf16": (lambda f: lambda gate, up: f(gate, up) * (1 + 2e-5), False),
    "3 % too large": (lambda f: lambda gate, up: f(gate, up) * 1.03, False),
    "slope of 3 % too much": (lambda f: slope_scaled(f, 1.03), True),
    "slope without its second term": (lambda f: lambda gate, up: gate * f(gate.detach(), up) / gate.detach(), True),
}
HIDDEN_BY_BF16 = {"operands in bf16", "a hundredth of an ulp of bf16"}


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_finds_a_fault(fault, dtype, f, reference):
    plant, grad = FAULTS[fault]
    if dtype is torch.float32 or fault not in HIDDEN_BY_BF16:
        assert_found(lambda f: assert_swiglu_accurate(f, reference, dtype, grad), f, plant(reference))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_extreme_gates_give_the_limits(dtype, f, reference):
    """Everything finite stays finite, inf stays inf, and NaN stays NaN."""
    gate = torch.tensor([-3e38, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 3e38, float("inf"), float("nan")], dtype=dtype)
    ours, theirs = f(gate, torch.ones_like(gate)).double(), reference(gate.double(), torch.ones_like(gate).double())
    assert torch.equal(ours.isnan(), theirs.isnan())
    torch.testing.assert_close(ours, theirs, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-30, equal_nan=True)
    dgate, dup = ladders.gradients(f, (gate[:-2], torch.ones_like(gate[:-2])))
    assert dgate.isfinite().all() and dup.isfinite().all()


@both
def test_rounding_is_that_of_transformers(f, reference):
    """The activation is rounded to bf16 before the product: a fused one that rounds once differs in many elements."""
    gate, up = operands(64, 128, torch.bfloat16)
    rounded = reference(gate.double(), torch.ones_like(gate).double()).bfloat16() * up
    assert (f(gate, up) != rounded).float().mean() < 1e-3
    assert (f(gate, up) != reference(gate.float(), up.float()).bfloat16()).float().mean() > 0.05  # control


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_strides_change_no_bits(dtype):
    both = torch.cat(operands(24, 100, dtype), 1)  # one GEMM for gate and up leaves two strided halves
    gate, up = both.chunk(2, -1)
    y = ops.swiglu(gate.clone(), up.clone())
    assert_bits_equal(ops.swiglu(gate, up), y, "strided halves")
    assert_bits_equal(ops.swiglu(gate.t().contiguous().t(), up), y, "column major")
    odd = torch.cat([both, both[:, :5]], 1)
    assert_bits_equal(ops.swiglu(odd[:, :100], odd[:, 100:200]), y, "rows off the alignment")
    assert_bits_equal(ops.swiglu(gate.unflatten(0, (4, 6)), up.unflatten(0, (4, 6))), y.view(4, 6, 100), "[4, 6, D]")
    leaf = both.clone().requires_grad_()
    strided = torch.autograd.grad(ops.swiglu(*leaf.chunk(2, -1)).sum(), leaf)[0]
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    whole = torch.autograd.grad(ops.swiglu(*leaves), leaves, torch.ones_like(y))
    assert_bits_equal(strided, torch.cat(whole, 1), "gradients of strided halves")


def test_a_second_derivative_is_an_error():
    """The derivative of swiglu, as of every op, is not itself an operator, and must not be taken for a constant."""
    gate, up = (x.requires_grad_() for x in operands(2, 8, torch.float32))
    (first,) = torch.autograd.grad(ops.swiglu(gate, up).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_no_rows_give_no_rows():
    x = randn(0, 64)
    assert ops.swiglu(x, x).shape == (0, 64)
    assert all(g.shape == (0, 64) for g in ladders.gradients(ops.swiglu, (x, x)))


@pytest.mark.parametrize(
    ("shape", "dtypes", "error"),
    [
        ((4, 5), (torch.float32, torch.float32), ValueError),
        ((6,), (torch.float32, torch.float32), ValueError),
        ((4, 6), (torch.float32, torch.bfloat16), ValueError),
        ((4, 6), (torch.float64, torch.float64), (TypeError, ValueError)),
        ((4, 6), (torch.float16, torch.float16), (TypeError, ValueError)),
    ],
)
def test_other_shapes_and_dtypes_are_refused(shape, dtypes, error):
    with pytest.raises(error):
        ops.swiglu(randn(4, 6, dtype=dtypes[0]), randn(*shape, dtype=dtypes[1]))


def test_swiglu_is_opaque():
    gate, up = operands(4, 64, torch.bfloat16)
    ladders.assert_registered(torch.ops.rlinvariant.swiglu.default, gate, up, "silu")
    ladders.assert_registered(torch.ops.rlinvariant.swiglu_backward.default, up, gate, up, "gelu_tanh")
    ladders.assert_opaque(ops.swiglu, gate, up)


def test_inductor_keeps_the_bits():
    """Neighbours that Inductor would fuse with silu stay outside: it drops the rounding in between."""
    gate, up = operands(5, 100, torch.bfloat16)
    ladders.assert_opaque(lambda gate, up: ops.swiglu(gate + 1, up) * 2, gate, up, backend="inductor")

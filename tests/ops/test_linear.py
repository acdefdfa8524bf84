import importlib
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from tests import bounds, ladders
from tests.bounded import Arithmetic, Bounded, assert_accurate, assert_found, coarse_sum, slope_scaled
from tests.ladders import DTYPES, LADDER, cancelling, cpu_only, dtype_name, matrix_dtypes, per_device, randn, threads

module = importlib.import_module("rlinvariant.ops.linear")  # the package attribute of this name is the function

# 3072: oneDNN splits K from about there. 3083: 3072 + 11, no multiple of 16. 100: K short and no multiple of 16.
# N = 66: two columns beyond a tile of 64, in the last tile of 4. (Model shapes on a GPU: tests/kernels/test_linear.py.)
WEIGHTS = ((66, 3072), (64, 3083), (5, 100), (64, 64))
CHECKS = {"linear.c": ("rlinvariant.ops.linear", "is_exact"), "Triton": ("rlinvariant.kernels.linear", "check")}
ROUTES = ("chosen", "linear.c"), ("chosen", "Triton")  # of a CPU, of a GPU

routes = per_device("route", *ROUTES, indirect=("route",))
route_dtypes = per_device("route, dtype", product(ROUTES[0], DTYPES), product(ROUTES[1], [torch.bfloat16]), indirect=("route",))


@pytest.fixture
def route(request, monkeypatch):
    """The route that this machine takes (the vendor's GEMM where a check allows it), and the other one forced."""
    if request.param in CHECKS:
        where, name = CHECKS[request.param]
        monkeypatch.setattr(importlib.import_module(where), name, lambda *_: False)


def split_by_batch(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Planted fault: K is summed in two parts when the batch has fewer than 32 rows, as split-K GEMMs do."""
    if len(x) >= 32:
        return reference(x, w, b)
    half = x.shape[-1] // 2
    y = reference(x[:, half:], w[:, half:]) + reference(x[:, :half], w[:, :half], b)
    return y.to(x.dtype)


def reverse_odd_rows(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Planted fault: every other row sums K descending, whatever the batch size."""
    y = reference(x, w, b)
    y[1::2] = reference(x.flip(-1), w.flip(-1), b)[1::2]
    return y


def leak(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Planted fault: a row adds zero times its neighbour, which only Inf and NaN show."""
    return reference(x + 0 * x.roll(1, 0), w, b)


def reference(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """The product of linear.c, whose order depends on nothing."""
    return module._written(x.contiguous(), w.contiguous(), b)


@route_dtypes
@pytest.mark.parametrize("shape", WEIGHTS)
def test_linear_is_batch_invariant(shape, dtype, route):
    x, w = cancelling(1024, *shape, dtype)
    ladders.assert_batch_invariant(lambda x: ops.linear(x, w), x)


@route_dtypes
@pytest.mark.parametrize("shape", WEIGHTS)
def test_linear_is_position_invariant(shape, dtype, route):
    x, w = cancelling(1, *shape, dtype)
    bias = randn(shape[0], dtype=dtype)
    ladders.assert_needle(lambda x: ops.linear(x, w, bias), x)


@cpu_only
def test_batch_size_control():
    x, w = cancelling(1024, 66, 3072, torch.bfloat16)
    others = [cancelling(1024, n, k, d) for n, k, d in ((512, 3072, torch.float32), (128, 512, torch.bfloat16))]
    stock = [((lambda x, w=w: F.linear(x, w)), (x,)) for x, w in ((x, w), *others)]
    ladders.assert_control(ladders.assert_batch_invariant, lambda x: split_by_batch(x, w), stock)


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("fault", [split_by_batch, reverse_odd_rows, leak])
def test_is_exact_refuses_a_gemm_that_breaks_rows(fault, dtype, monkeypatch):
    probe = module.is_exact.__wrapped__  # uncached
    monkeypatch.setattr(module.F, "linear", reference)
    assert probe(10, 300, dtype, False, 1) and probe(10, 300, dtype, True, 1)
    monkeypatch.setattr(module.F, "linear", fault)
    assert not probe(10, 300, dtype, False, 1) and not probe(10, 300, dtype, True, 1)


LADDER_AND_NEEDLE = {  # each check, and the faults that it must find by itself (finite rows do not leak)
    ladders.assert_batch_invariant: (split_by_batch, reverse_odd_rows),
    ladders.assert_needle: (split_by_batch, reverse_odd_rows, leak),
}


@cpu_only
@pytest.mark.parametrize(("check", "fault"), [(check, f) for check, faults in LADDER_AND_NEEDLE.items() for f in faults])
def test_needle_and_ladder_find_a_gemm_that_breaks_rows(check, fault):
    x, w = cancelling(64, 66, 3072, torch.bfloat16)
    check(lambda x: reference(x, w), x)
    with pytest.raises(AssertionError):
        check(lambda x: fault(x, w), x)


@cpu_only
def test_a_gemm_that_is_not_exact_takes_the_written_route(monkeypatch):
    x, w = cancelling(8, 7, 72, torch.float32)
    monkeypatch.setattr(module, "is_exact", lambda *_: False)
    assert_bits_equal(ops.linear(x, w), reference(x, w), "not exact")
    assert "linear.c" in module.routes()["7x72 float32"]
    monkeypatch.setattr(module, "is_exact", lambda *_: True)
    ops.linear(x, w)
    assert "vendor" in module.routes()["7x72 float32"]


@cpu_only
def test_the_vendor_is_called_with_proven_row_counts_alone(monkeypatch):
    x, w = cancelling(1024, 8, 72, torch.float32)
    vendor, called = F.linear, set()
    monkeypatch.setattr(module, "is_exact", lambda *_: True)
    monkeypatch.setattr(module.F, "linear", lambda x, w, b: called.add(len(x)) or vendor(x, w, b))
    for m in LADDER:
        assert ops.linear(x[:m], w).shape == (m, 8)
    assert called <= set(range(module.ROW_STEP, module.CALL_ROWS + 1, module.ROW_STEP))


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("count", [1, 2])
def test_is_exact_is_true_only_of_what_the_ladder_confirms(count, dtype):
    """The vendor route itself, for every weight that is_exact admits, on operands that is_exact has not seen."""
    with threads(count):
        for n, k in (*WEIGHTS, (128, 512), (48, 4096)):
            if module.is_exact(n, k, dtype, False, count):
                x, w = cancelling(300, n, k, dtype)
                ladders.assert_batch_invariant(lambda x, w=w: module._vendor(x, w, None), x)


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_packed_weight_has_the_bits_of_its_parts(bias, dtype):
    """Wherever this machine packs, on operands that `is_packable` has not seen; elsewhere there is no copy to take."""
    for parts, k in (((64, 48, 16), 100), ((66,), 128), ((96, 96), 576), ((48,), 3072)):
        x, w = (t.to(dtype) for t in cancelling(700, sum(parts), k, torch.float32))
        b = randn(sum(parts), dtype=dtype) if bias else None
        packed = module.pack_weight(w, parts, bias)
        assert (packed is not None) == module.is_packable(parts, k, dtype, bias, torch.get_num_threads())
        biases = [None] * len(parts) if b is None else b.split(parts)
        expected = torch.cat([ops.linear(x, p, q) for p, q in zip(w.split(parts), biases, strict=True)], -1)
        for rows in (*LADDER, 700):
            assert_bits_equal(
                ops.linear(x[:rows], w, b, packed) if packed is not None else expected[:rows], expected[:rows], ""
            )
        if packed is not None:
            assert_bits_equal(packed.to_dense(), w, "packed, and read back")
            assert_bits_equal(ops.linear(x[:8].view(2, 4, k), w, b, packed), expected[:8].view(2, 4, -1), "more dimensions")


@cpu_only
@pytest.mark.parametrize("fault", [split_by_batch, reverse_odd_rows, leak])
def test_a_packed_weight_that_breaks_rows_is_not_used(fault, monkeypatch):
    probe, own = module.is_packable.__wrapped__, module._by_packed
    monkeypatch.setattr(module, "is_exact", lambda *_: True)
    monkeypatch.setattr(module.F, "linear", reference)
    monkeypatch.setattr(module, "_by_packed", lambda x, packed, b: reference(x, packed.to_dense(), b))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert probe((10, 6), 300, torch.bfloat16, True, 1)
    monkeypatch.setattr(module, "_by_packed", lambda x, packed, b: fault(x, packed.to_dense(), b))
    assert not probe((10, 6), 300, torch.bfloat16, True, 1)
    monkeypatch.setattr(module, "_by_packed", own)
    monkeypatch.setattr(module, "is_exact", lambda n, *_: n != 6)
    assert not probe((10, 6), 300, torch.bfloat16, True, 1), "one part is not exact"


@cpu_only
def test_written_linear_is_thread_invariant():
    for dtype in DTYPES:
        x, w = cancelling(200, 70, 3083, dtype)
        ladders.assert_thread_invariant(reference, x, w)


@route_dtypes
def test_linear_matches_float64(dtype, route):
    x, w, b = randn(40, 3083, dtype=dtype), randn(66, 3083, dtype=dtype, seed=1), randn(66, dtype=dtype, seed=2)
    assert_accurate(ops.linear, ops.linear_ref, bounds.linear, x, w, b)
    assert_accurate(ops.linear, ops.linear_ref, bounds.linear, x, w)


def gradient_operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return randn(3, 7, 200, dtype=dtype), randn(66, 200, dtype=dtype, seed=1), randn(66, dtype=dtype, seed=2)


def gradient_bounds(a: Arithmetic, x: Bounded, w: Bounded, b: Bounded, dy: Bounded) -> bounds.Bounds:
    return bounds.linear_backward(a, x, w, dy)


@matrix_dtypes
def test_linear_gradients_match_float64(dtype):
    x, w, b = gradient_operands(dtype)
    assert_accurate(ops.linear, ops.linear_ref, gradient_bounds, x, w, b, grad=True)
    without_bias = lambda a, x, w, dy: bounds.linear_backward(a, x, w, dy, bias=False)  # noqa: E731
    assert_accurate(ops.linear, ops.linear_ref, without_bias, x, w, grad=True)


FAULTS = {  # each in a function of x, w, b
    "sum in bf16": lambda x, w, b: (coarse_sum(x[:, None].float() * w.float(), -1) + b.float()).to(x.dtype),
    "last term dropped": lambda x, w, b: ops.linear_ref(x[:, :-1], w[:, :-1], b),
    "last row dropped": lambda x, w, b: F.pad(ops.linear_ref(x[:-1], w, b), (0, 0, 0, 1)),
    "no bias": lambda x, w, b: ops.linear_ref(x, w),
    "2 % too large": lambda x, w, b: 1.02 * ops.linear_ref(x, w, b),
}


@matrix_dtypes
@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_finds_a_fault(fault, dtype):
    x, w, b = randn(40, 3083, dtype=dtype), randn(66, 3083, dtype=dtype, seed=1), randn(66, dtype=dtype, seed=2)
    assert_found(lambda f: assert_accurate(f, ops.linear_ref, bounds.linear, x, w, b), ops.linear, FAULTS[fault])


GRADIENT_FAULTS = {
    "2 % too large": slope_scaled(ops.linear_ref, 1.02),
    "last term of dx dropped": lambda x, w, b: torch.cat(
        [ops.linear_ref(x, w[:-1], b[:-1]), ops.linear_ref(x.detach(), w[-1:], b[-1:])], -1
    ),
    "last row dropped": lambda x, w, b: torch.cat([ops.linear_ref(x[:2], w, b), ops.linear_ref(x, w, b)[2:].detach()]),
}


@matrix_dtypes
@pytest.mark.parametrize("fault", GRADIENT_FAULTS)
def test_the_bound_of_gradients_finds_a_fault(fault, dtype):
    operands = gradient_operands(dtype)
    check = lambda f: assert_accurate(f, ops.linear_ref, gradient_bounds, *operands, grad=True)  # noqa: E731
    assert_found(check, ops.linear, GRADIENT_FAULTS[fault])


@route_dtypes
def test_linear_gradients_are_deterministic(dtype, route):
    inputs = randn(300, 3072, dtype=dtype), randn(66, 3072, dtype=dtype, seed=1), randn(66, dtype=dtype, seed=2)
    ladders.assert_same(ladders.gradients(ops.linear, inputs), ladders.gradients(ops.linear, inputs), "gradients, again")


@routes
def test_float32_masters_have_the_bits_of_the_cast_weight(route):
    x, w, b = randn(9, 100, dtype=torch.bfloat16), randn(8, 100, seed=1), randn(8, seed=2)
    assert_bits_equal(ops.linear(x, w, b), ops.linear(x, w.bfloat16(), b.bfloat16()), "fp32 masters")
    dx, dw, db = ladders.gradients(ops.linear, (x, w, b))
    assert (dx.dtype, dw.dtype, db.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert ladders.differs(F.linear(x.float(), w, b).bfloat16(), ops.linear(x, w, b))  # control: the cast matters


@route_dtypes
@pytest.mark.parametrize("rows", [24, 300])  # on a GPU a Triton tile, and cuBLASLt
def test_strides_and_leading_dimensions_change_no_bits(rows, dtype, route):
    x, w = cancelling(rows, 12, 100, dtype)
    y, bias = ops.linear(x, w), randn(24, dtype=dtype)
    assert_bits_equal(ops.linear(x.view(2, 3, -1, 100), w), y.view(2, 3, -1, 12), "[2, 3, *, K]")
    assert_bits_equal(ops.linear(x[0], w), y[0], "[K]")
    assert_bits_equal(ops.linear(x.t().contiguous().t(), w), y, "x with stride 1 along rows")
    assert_bits_equal(ops.linear(x.repeat_interleave(2, 0)[::2], w), y, "every other row")
    assert_bits_equal(ops.linear(torch.cat([x, x], 1)[:, 100:], w), y, "half of a wider tensor")
    assert_bits_equal(ops.linear(x, w.t().contiguous().t()), y, "transposed weight")
    x_moved, w_moved = (torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, w))
    assert_bits_equal(ops.linear(x_moved, w_moved), y, "x and weight off the cache line")
    assert_bits_equal(ops.linear(x, w, bias[::2]), ops.linear(x, w, bias[::2].clone()), "strided bias")


@route_dtypes
def test_no_rows_give_no_rows(dtype, route):
    x, w, b = randn(0, 64, dtype=dtype), randn(8, 64, dtype=dtype), randn(8, dtype=dtype)
    assert ops.linear(x, w, b).shape == (0, 8) and ops.linear(x.view(0, 3, 64), w).shape == (0, 3, 8)
    dx, dw, db = ladders.gradients(ops.linear, (x, w, b))
    assert dx.shape == x.shape and not dw.any() and not db.any()


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        ((4, 6), (5, 3), None),  # K differs, but divides x
        ((4, 6), (2, 12), None),
        ((4, 6), (5, 6, 1), None),
        ((4, 6), (5, 6), (4,)),
    ],
)
@routes
def test_other_shapes_are_refused(x, weight, bias, route):
    x, weight, bias = (None if shape is None else randn(*shape, dtype=torch.bfloat16) for shape in (x, weight, bias))
    with pytest.raises(ValueError):
        ops.linear(x, weight, bias)


OTHERS = (torch.float64, torch.float16, torch.int64)


@per_device("dtype", OTHERS, (*OTHERS, torch.float32))
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match=f"bfloat16.*got x {dtype}"):
        ops.linear(randn(4, 6).to(dtype), randn(5, 6))


def test_linear_is_opaque():
    x, w, b = randn(4, 64, dtype=torch.bfloat16), randn(8, 64, seed=1, dtype=torch.bfloat16), randn(8, seed=2)
    ladders.assert_registered(torch.ops.rlinvariant.linear.default, x, w, b)
    ladders.assert_opaque(ops.linear, x, w, b)

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from tests import bounds, ladders
from tests.bounded import Arithmetic, Bounded, assert_accurate, assert_found, coarse_sum, slope_scaled
from tests.ladders import DTYPES, cpu_only, dtype_name, randn

EPS = 1e-6
WIDTHS = (3072, 3083, 100, 7)  # a long row; no multiple of 16; one vector and a tail; less than a vector


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm(x, weight, EPS)


def offset_norm(x: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm(x, weight, EPS, 1.0)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ops.add_rms_norm(x, residual, weight, EPS)


def stock(x: Tensor, weight: Tensor) -> Tensor:
    """transformers' LlamaRMSNorm."""
    return ops.rms_norm_ref(x, weight, EPS)


def gemma(x: Tensor, weight: Tensor, offset: float = 1.0) -> Tensor:
    """transformers' Gemma2RMSNorm; with an offset of 0, its Olmo2RMSNorm."""
    return ops.rms_norm_ref(x, weight, EPS, offset)


def changes_at_256_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Planted fault: the order of the sum changes with the number of rows, as in vLLM's kernel."""
    return norm(x, weight) if len(x) >= 256 else norm(x.flip(-1), weight.flip(-1)).flip(-1)


@pytest.mark.parametrize("f", [norm, offset_norm])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_is_batch_invariant(width, dtype, f):
    x, w = randn(1024, width, dtype=dtype, wide=True), randn(width, dtype=dtype, seed=1)
    ladders.assert_batch_invariant(lambda x: f(x, w), x)
    ladders.assert_needle(lambda x: f(x, w), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_rms_norm_gradient_is_batch_invariant(dtype):
    """dx; dweight is a sum over the batch."""
    x, dy, w = (
        randn(1024, 100, dtype=dtype, wide=True),
        randn(1024, 100, dtype=dtype, seed=1),
        randn(100, dtype=dtype, seed=2),
    )

    def dx(x: Tensor, dy: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(norm(leaf, w), leaf, dy)[0]

    ladders.assert_batch_invariant(dx, x, dy)
    ladders.assert_needle(dx, x, dy)


def test_batch_size_control():
    x = randn(1024, 3072, wide=True)
    shapes = [((lambda x: F.rms_norm(x, x.shape[1:])), (x[:, :d].contiguous(),)) for d in (3072, 3083, 100)]
    strided = [(lambda x: stock(x.t().contiguous().t(), torch.ones(x.shape[-1])), (x,))]  # sums down columns
    ladders.assert_control(
        ladders.assert_batch_invariant, lambda x: changes_at_256_rows(x, torch.ones(x.shape[-1])), strided + shapes
    )


def test_needle_control():
    with pytest.raises(AssertionError):
        ladders.assert_needle(lambda x: norm(x + 0 * x.roll(1, 0), torch.ones(64)), randn(1, 64))


@cpu_only
@pytest.mark.parametrize("f", [norm, offset_norm])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_rms_norm_is_thread_invariant(dtype, f):
    x, w = randn(301, 3083, dtype=dtype, wide=True), randn(3083, dtype=dtype, seed=1)
    ladders.assert_thread_invariant(f, x, w)
    ladders.assert_thread_invariant(lambda x, w: ladders.gradients(f, (x, w)), x, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_rms_norm_gradients_are_deterministic(dtype):
    x, w = randn(3001, 3083, dtype=dtype, wide=True), randn(3083, dtype=dtype, seed=1)
    ladders.assert_same(ladders.gradients(norm, (x, w)), ladders.gradients(norm, (x, w)), "gradients, again")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_is_addition_then_rms_norm(width, dtype):
    x, r, w = randn(9, width, dtype=dtype), randn(9, width, dtype=dtype, seed=1), randn(width, dtype=dtype, seed=2)
    y, total = ops.add_rms_norm(x, r, w, EPS)
    assert_bits_equal(total, x + r, "sum")
    assert_bits_equal(y, norm(x + r, w), "norm of the sum")
    if dtype is torch.bfloat16:  # control: vLLM's kernel normalises the sum before rounding it
        assert ladders.differs(y, norm(x.float() + r.float(), w.float()).bfloat16())


@cpu_only  # a GPU adds the two gradients before it rounds
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_gradients_are_those_of_addition_then_rms_norm(width, dtype):
    x, r, w = randn(9, width, dtype=dtype), randn(9, width, dtype=dtype, seed=1), randn(width, dtype=dtype, seed=2)
    ours = ladders.gradients(add_norm, (x, r, w))
    parts = ladders.gradients(lambda x, r, w: (norm(x + r, w), x + r), (x, r, w))
    for a, b in zip(ours, parts, strict=True):
        assert_bits_equal(a, b, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_heads_in_a_merged_projection_are_read_in_place(dtype):
    """The queries and keys of [T, (heads + 2 kv_heads) D], as the sampler and the trainer pass them to their norms."""
    qkv, w = randn(24, 8 * 64, dtype=dtype), randn(64, dtype=dtype, seed=1)
    for heads in (qkv[:, :256], qkv[:, 256:384]):
        heads = heads.unflatten(1, (-1, 64))
        assert_bits_equal(norm(heads, w), norm(heads.clone(), w), "heads of a slice")
        batched = heads.unflatten(0, (2, 12)).transpose(1, 2)  # [B, H, T, D]: no two strides reach it
        assert_bits_equal(norm(batched, w), norm(batched.clone(), w), "[B, H, T, D]")


def assert_norm_accurate(f: Callable, offset: float | None, *inputs: Tensor, grad: bool = False) -> None:
    """f(x, w, eps, offset), or f(x, r, w, eps, offset) of the sum of x and r."""
    ours, ref = (
        partial(g, eps=EPS, offset=offset) for g in (f, ops.rms_norm_ref if len(inputs) == 2 else ops.add_rms_norm_ref)
    )
    form = {"eps": EPS, "offset": offset}

    def bound(a: Arithmetic, *operands: Bounded) -> bounds.Bounds:
        if len(inputs) == 2:
            return (bounds.rms_norm_backward if grad else bounds.rms_norm)(a, *operands, **form)
        x, r, w, *gradients = operands
        total = (x + r).to(a.dtype)
        if not grad:
            return *bounds.rms_norm(a, total, w, **form), total
        dx, dw = bounds.rms_norm_backward(a, total, w, gradients[0], **form, dtotal=gradients[1])
        return dx, dx, dw

    assert_accurate(ours, ref, bound, *inputs, grad=grad)


@pytest.mark.parametrize("offset", [None, 1.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_matches_float64(width, dtype, offset):
    x, r, w = (randn(33, width, dtype=dtype, seed=i) for i in range(3))
    x[5] = 0  # only eps keeps this row finite
    r[5] = 0
    for grad in (False, True):
        assert_norm_accurate(ops.rms_norm, offset, x, w[0], grad=grad)
        assert_norm_accurate(ops.add_rms_norm, offset, x, r, w[0], grad=grad)


def test_weight_gradient_is_accurate_over_many_rows():
    """A sum over tokens in one fp32 accumulator would lose a bit per fourfold batch."""
    x, w = randn(4096, 65), randn(65, seed=1)
    assert_norm_accurate(ops.rms_norm, None, x, w, grad=True)


def by_hand(mean: Callable[[Tensor], Tensor]) -> Callable:
    """The norm with another mean of squares."""

    def planted(x: Tensor, weight: Tensor, eps: float, offset: float | None) -> Tensor:
        y = x.float() * torch.rsqrt(mean(x.float().square())[..., None] + eps)
        return y.to(x.dtype) * weight if offset is None else (y * (offset + weight.float())).to(x.dtype)

    return planted


def one_short(x: Tensor, weight: Tensor, eps: float, offset: float | None) -> Tensor:
    """Planted fault: the last row adds nothing to dweight."""
    return torch.cat([ops.rms_norm_ref(x[:-1], weight, eps, offset), ops.rms_norm_ref(x[-1:], weight.detach(), eps, offset)])


FAULTS = {  # whether of gradients
    "sum in bf16": (by_hand(lambda t: coarse_sum(t, -1) / t.shape[-1]), False),
    "last column dropped": (by_hand(lambda t: t[..., :-1].sum(-1) / t.shape[-1]), False),
    "1.02 times the mean": (by_hand(lambda t: t.mean(-1) * 1.02), False),
    "no eps": (lambda x, w, eps, offset: ops.rms_norm_ref(x, w, 0.0, offset), False),
    "mean held constant": (by_hand(lambda t: t.mean(-1).detach()), True),
    "2 % too large": (lambda *args, **form: slope_scaled(partial(ops.rms_norm_ref, **form), 1.02)(*args), True),
    "last row dropped": (one_short, True),
}


@pytest.mark.parametrize("offset", [None, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_finds_a_fault(fault, dtype, offset):
    planted, grad = FAULTS[fault]
    x, w = (
        randn(33, 333 if fault == "sum in bf16" else 20, dtype=dtype),
        randn(333, dtype=dtype, seed=2)[: 333 if fault == "sum in bf16" else 20],
    )
    x[5] = 0
    assert_found(lambda f: assert_norm_accurate(f, offset, x, w, grad=grad), ops.rms_norm, planted)


def test_rounding_is_that_of_transformers():
    """The normalised row is rounded to bf16 before the weight: a norm that rounds once differs, by an ulp, in some elements."""
    x, w = randn(200, 128, dtype=torch.bfloat16), randn(128, dtype=torch.bfloat16, seed=1)
    once = (stock(x.float(), torch.ones(128)) * w.float()).bfloat16()
    assert (norm(x, w) != stock(x, w)).float().mean() < 1e-3  # fp32 means differ in the last bit, bf16 results hardly ever
    assert (norm(x, w) != once).float().mean() > 0.05  # control


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_with_an_offset_is_the_norm_of_the_sum(width, dtype):
    x, r, w = (randn(33, width, dtype=dtype, seed=i) for i in range(3))
    for offset in (1.0, 0.0):
        y, total = ops.add_rms_norm(x, r, w[0], EPS, offset)
        assert_bits_equal(y, ops.rms_norm(total, w[0], EPS, offset), "norm of the sum")


@pytest.mark.parametrize("offset", [1.0, 0.0])
def test_a_norm_with_an_offset_rounds_once_as_transformers_does(offset):
    x, w = randn(200, 128, dtype=torch.bfloat16), randn(128, dtype=torch.bfloat16, seed=1)
    y = ops.rms_norm(x, w, EPS, offset)
    assert (y != gemma(x, w, offset)).float().mean() < 1e-3
    assert (y != norm(x, w + offset)).float().mean() > 0.05  # control: Llama's order, with the offset in the weight
    master = randn(128, seed=2)
    assert_bits_equal(ops.rms_norm(x, master, EPS, offset), ops.rms_norm(x, master.bfloat16(), EPS, offset), "fp32 masters")


def test_float32_masters_have_the_bits_of_the_cast_weight():
    x, w = randn(9, 100, dtype=torch.bfloat16), randn(100, seed=1)
    assert_bits_equal(norm(x, w), norm(x, w.bfloat16()), "fp32 masters")
    dx, dw = ladders.gradients(norm, (x, w))
    assert (dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("width", [100, 128])
def test_strides_and_leading_dimensions_change_no_bits(width, dtype):
    x, w = randn(24, width, dtype=dtype), randn(2 * width, dtype=dtype, seed=1)[::2]
    y = norm(x, w.clone())
    assert_bits_equal(norm(x, w), y, "strided weight")
    assert_bits_equal(norm(x.view(2, 3, 4, width), w), y.view(2, 3, 4, width), "[2, 3, 4, D]")
    assert_bits_equal(norm(x.t().contiguous().t(), w), y, "column major")
    for row, at in ((208, 0), (208, 80), (261, 3)):  # 208: rows aligned, whatever the width; 261: not even to 4 bytes
        wide = torch.zeros(24, row, dtype=dtype)
        wide[:, at : at + width] = x
        part = wide[:, at : at + width]
        assert_bits_equal(norm(part, w), y, f"columns from {at} of {row}")
        assert_bits_equal(add_norm(part, part, w)[0], norm(x + x, w), f"sum of columns from {at} of {row}")
    leaf = x.t().contiguous().requires_grad_()
    strided = torch.autograd.grad(norm(leaf.t(), w).sum(), leaf)[0].t()  # also a gradient of stride 0
    leaf = x.clone().requires_grad_()
    assert_bits_equal(strided, torch.autograd.grad(norm(leaf, w), leaf, torch.ones_like(x))[0], "dx, column major")


def test_no_rows_give_no_rows():
    x, w = randn(0, 64), randn(64)
    assert norm(x, w).shape == (0, 64) and ops.add_rms_norm(x, x, w, EPS)[0].shape == (0, 64)
    dx, dw = ladders.gradients(norm, (x, w))
    assert dx.shape == (0, 64) and not dw.any()


@pytest.mark.parametrize("weight", [(3,), (12,), (1, 6)])
def test_other_shapes_are_refused(weight):
    x, weight = randn(4, 6), randn(*weight)
    with pytest.raises(ValueError):
        norm(x, weight)
    with pytest.raises(ValueError):
        ops.add_rms_norm(x, x, weight, EPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=dtype_name)
def test_other_dtypes_are_refused_by_name(dtype):
    x, weight = randn(4, 6, dtype=dtype), randn(6)
    with pytest.raises((ValueError, TypeError), match=dtype_name(dtype)):
        norm(x, weight)
    with pytest.raises((ValueError, TypeError), match=dtype_name(dtype)):
        ops.add_rms_norm(x, x, weight, EPS)


@pytest.mark.parametrize(("shape", "dtype"), [((1, 6), torch.float32), ((4, 1), torch.float32), ((4, 6), torch.bfloat16)])
def test_a_residual_of_another_shape_or_dtype_is_refused(shape, dtype):
    with pytest.raises((ValueError, TypeError)):
        ops.add_rms_norm(randn(4, 6), randn(*shape, dtype=dtype), randn(6), EPS)


def test_rms_norm_is_opaque():
    x, r, w = randn(4, 64), randn(4, 64, seed=1), randn(64, seed=2)
    ladders.assert_registered(torch.ops.rlinvariant.rms_norm.default, x, w, EPS, None)
    ladders.assert_registered(torch.ops.rlinvariant.add_rms_norm.default, x, r, w, EPS, 1.0)
    ladders.assert_registered(torch.ops.rlinvariant.rms_norm_backward.default, r, x, w, None, EPS, None)
    ladders.assert_registered(torch.ops.rlinvariant.rms_norm_backward.default, r, x, w, r, EPS, 1.0)
    ladders.assert_opaque(ops.rms_norm, x, w, EPS)
    ladders.assert_opaque(ops.add_rms_norm, x, r, w, EPS)

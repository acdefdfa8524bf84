from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from tests import bounds, ladders
from tests.bounded import Arithmetic, Bounded, assert_accurate, assert_found, exact
from tests.ladders import DTYPES, dtype_name, randn

SHAPES = ((16, 8, 128, 64), (3, 1, 64, 32), (2, 2, 96, 20))  # query heads, key heads, dim, half of the rotary columns
EPS = 1e-6


def operands(tokens: int, shape: tuple[int, int, int, int], dtype: torch.dtype, norm: bool) -> tuple:
    heads, kv_heads, dim, half = shape
    q, k = randn(tokens, heads, dim, dtype=dtype, wide=True), randn(tokens, kv_heads, dim, dtype=dtype, wide=True, seed=1)
    cos, sin = randn(tokens, half, seed=2), randn(tokens, half, seed=3)
    weights = (randn(dim, seed=4) + 1, randn(dim, seed=5) + 1) if norm else (None, None)
    return q, k, weights, cos, sin


def separately(q: Tensor, k: Tensor, weights, cos: Tensor, sin: Tensor, offset: float | None = None) -> tuple[Tensor, ...]:
    normed = (x if w is None else ops.rms_norm(x, w, EPS, offset) for x, w in zip((q, k), weights, strict=True))
    return tuple(ops.rope(x, cos, sin) for x in normed)


def together(q: Tensor, k: Tensor, weights, cos: Tensor, sin: Tensor, offset: float | None = None) -> tuple[Tensor, ...]:
    return ops.qk_norm_rope(q, k, *weights, cos, sin, EPS, offset)


@pytest.mark.parametrize("norm, offset", [(True, None), (True, 1.0), (False, None)], ids=["norm", "offset", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_launch_gives_the_bits_of_four(shape, dtype, norm, offset):
    q, k, weights, cos, sin = operands(70, shape, dtype, norm)
    expected = separately(q, k, weights, cos, sin, offset)
    ladders.assert_same(together(q, k, weights, cos, sin, offset), expected, "forward")
    leaves = (q, k, *weights) if norm else (q, k)
    gradients = [
        ladders.gradients(lambda q, k, *w, f=f: f(q, k, w or (None, None), cos, sin, offset), leaves)
        for f in (together, separately)
    ]
    ladders.assert_same(*gradients, "gradients")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_heads_of_a_merged_projection_are_read_in_place(dtype):
    heads, kv_heads, dim, _ = SHAPES[0]
    q, k, weights, cos, sin = operands(33, SHAPES[0], dtype, True)
    merged = torch.cat([q.flatten(1), k.flatten(1), randn(33, 5 * dim, dtype=dtype)], 1)
    parts = merged.split([heads * dim, kv_heads * dim, 5 * dim], 1)
    q_slice, k_slice = parts[0].view(33, heads, dim), parts[1].view(33, kv_heads, dim)
    assert not k_slice.is_contiguous()
    ladders.assert_same(together(q_slice, k_slice, weights, cos, sin), together(q, k, weights, cos, sin), "slices")


@pytest.mark.parametrize("offset", [None, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_qk_norm_rope_matches_float64(dtype, offset):
    q, k, _, cos, sin = operands(33, SHAPES[2], dtype, True)
    w = randn(SHAPES[2][2], dtype=dtype, seed=4)

    def call(f: Callable) -> Callable:
        return lambda q, k, w: f(q, k, w, w, cos, sin, EPS, offset)

    def bound(a: Arithmetic, q: Bounded, k: Bounded, w: Bounded) -> bounds.Bounds:
        normed = (bounds.rms_norm(a, x, w, EPS, offset)[0] for x in (q, k))
        return tuple(bounds.rope(a, x, exact(cos), exact(sin))[0] for x in normed)

    check = lambda f: assert_accurate(call(f), call(ops.qk_norm_rope_ref), bound, q, k, w)  # noqa: E731
    assert_found(check, ops.qk_norm_rope, lambda q, k, *rest: ops.qk_norm_rope_ref(q, k.roll(1, 1), *rest))


@pytest.mark.parametrize("offset", [None, 1.0])
def test_qk_norm_rope_is_batch_invariant(offset):
    q, k, weights, cos, sin = operands(1024, SHAPES[0], torch.bfloat16, True)
    ladders.assert_batch_invariant(lambda q, k, cos, sin: together(q, k, weights, cos, sin, offset), q, k, cos, sin)


def test_qk_norm_rope_is_opaque():
    q, k, weights, cos, sin = operands(9, SHAPES[1], torch.bfloat16, True)
    inputs = (q, k, *weights, cos, sin, EPS)
    ladders.assert_registered(torch.ops.rlinvariant.qk_norm_rope.default, *inputs, 1.0)
    ladders.assert_opaque(ops.qk_norm_rope, *inputs)


def test_operands_that_do_not_fit_are_refused():
    q, k, weights, cos, sin = operands(9, SHAPES[1], torch.bfloat16, True)
    with pytest.raises(ValueError, match="qk_norm_rope"):
        together(q, k[:8], weights, cos, sin)
    with pytest.raises(ValueError, match="one weight is missing"):
        together(q, k, (weights[0], None), cos, sin)

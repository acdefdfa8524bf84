from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from tests import bounds, ladders
from tests.bounded import assert_accurate, assert_found, slope_scaled
from tests.ladders import DTYPES, cpu_only, dtype_name, matrix_dtypes, per_device, randint, randn
from tests.ops.test_token_logprobs_accuracy import assert_logprobs_accurate

FORMS = ((0.3, None), (None, 30.0), (0.0625, 5.0))  # Granite's and Cohere's, Gemma 2's, both
forms = pytest.mark.parametrize("form", FORMS)


stock = ops.scale_logits_ref  # transformers' lines, one rounding each


def operands(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return (20 * randn(rows, width, dtype=torch.float32)).to(dtype)


@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_scale_logits_is_batch_invariant(dtype, form):
    x, dy = operands(1024, 333, dtype), randn(1024, 333, dtype=dtype, seed=1)

    def both(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = ops.scale_logits(leaf, *form)
        return y.detach(), torch.autograd.grad(y, leaf, dy)[0]

    ladders.assert_batch_invariant(both, x, dy)
    ladders.assert_needle(both, x, dy)


def test_batch_size_control():
    """Planted: a scalar tail with another tanh."""

    def scalar_tail(x: Tensor) -> Tensor:
        y, tail = ops.scale_logits(x, None, 30.0), x.numel() % 16
        if tail:
            y.view(-1)[-tail:] *= 1 + 2**-20
        return y

    with pytest.raises(AssertionError):
        ladders.assert_batch_invariant(scalar_tail, operands(1024, 333, torch.float32))


@cpu_only
def test_scale_logits_is_thread_invariant():
    x = operands(301, 333, torch.bfloat16)
    for form in FORMS:
        ladders.assert_thread_invariant(lambda x, form=form: ops.scale_logits(x, *form), x)


@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_scale_logits_matches_float64(dtype, form):
    for grad in (False, True):
        assert_scaling_accurate(ops.scale_logits, form, dtype, grad)


def assert_scaling_accurate(f: Callable, form: tuple[float | None, float | None], dtype: torch.dtype, grad: bool) -> None:
    scaling = {"scale": form[0], "softcap": form[1]}
    bound = bounds.scale_logits_backward if grad else bounds.scale_logits
    ours, ref = (partial(g, **scaling) for g in (f, stock))
    assert_accurate(ours, ref, partial(bound, **scaling), operands(64, 333, dtype), grad=grad)


FAULTS = {  # whether of gradients, and in which dtypes it shows
    "tanh in bf16": (lambda x, scale, softcap: stock(x.bfloat16(), scale, softcap).float(), False, [torch.float32]),
    "not scaled": (lambda x, scale, softcap: stock(x, None, softcap), False, DTYPES),
    "capped and then scaled": (lambda x, scale, softcap: stock(stock(x, None, softcap), scale), False, DTYPES),
    "3 % too large": (lambda x, scale, softcap: stock(x, scale, softcap) * 1.03, False, DTYPES),
    "slope of 3 % too much": (
        lambda x, scale, softcap: slope_scaled(lambda x: stock(x, scale, softcap), 1.03)(x),
        True,
        DTYPES,
    ),
    "slope of the scale alone": (lambda x, scale, softcap: x * scale + (stock(x, scale, softcap) - x).detach(), True, DTYPES),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_finds_a_fault(fault):
    planted, grad, dtypes = FAULTS[fault]
    for dtype in dtypes:
        assert_found(lambda f, d=dtype: assert_scaling_accurate(f, (0.3, 5.0), d, grad), ops.scale_logits, planted)


def test_rounding_is_that_of_transformers():
    """Each step in bf16: one rounding at the end gives other logits."""
    x = operands(64, 333, torch.bfloat16)
    for form in FORMS:
        y = ops.scale_logits(x, *form)
        by_steps = stock(x.cpu(), *form).to(x.device)  # on a GPU, PyTorch would multiply by 1 / softcap
        assert (y != by_steps).float().mean() < 1e-3
        if form[1]:
            assert (y != stock(x.float(), *form).bfloat16()).float().mean() > 0.05  # control
    assert_bits_equal(ops.scale_logits(x, 1 / 16), (x.cpu() / 16).to(x.device), "Granite: a division by a power of two")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_extremes_stay_inside_the_cap(dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, -3e38, -1e4, -1e-30, 0.0, 1e4, 3e38, inf, nan], dtype=dtype)
    y = ops.scale_logits(x, None, 30.0).float()
    assert y[[0, 1, 2]].eq(-30).all() and y[[5, 6, 7]].eq(30).all() and y[8].isnan() and y[4] == 0
    torch.testing.assert_close(y[3], torch.tensor(-1e-30), rtol=1e-2, atol=0.0)
    (dx,) = ladders.gradients(lambda x: ops.scale_logits(x, None, 30.0), (x[1:7],))
    assert dx.isfinite().all()


@matrix_dtypes
@forms
def test_trainer_matches_sampler(dtype, form):
    """token_logprobs scales as the sampler's logits are scaled; and is seen to, by the same without."""
    hidden, weight = randn(20, 64, dtype=dtype), randn(4097, 64, dtype=dtype, seed=1)
    logits, t = ops.scale_logits(ops.linear(hidden, weight), *form), torch.full((20,), 0.7)
    tokens, sampled, _ = ops.sample(logits, t, torch.arange(20), torch.arange(20))
    trained = ops.token_logprobs(hidden, weight, tokens, 0.7, *form)[0]
    assert_bits_equal(trained, sampled, "token_logprobs, sample")
    assert_bits_equal(ops.log_softmax(logits, t).gather(1, tokens[:, None])[:, 0], sampled, "log_softmax, sample")
    assert ladders.differs(ops.token_logprobs(hidden, weight, tokens, 0.7)[0], sampled)


@forms
@per_device("dtype", [torch.float32, torch.bfloat16], [torch.bfloat16])
def test_gradients_of_token_logprobs_match_float64(dtype, form):
    hidden, weight, ids = randn(33, 64, dtype=dtype), randn(500, 64, dtype=dtype, seed=1), randint(500, 33, seed=2)

    for grad in (False, True):
        assert_logprobs_accurate(ops.token_logprobs, hidden, weight, ids, 0.7, *form, grad=grad)


def test_neither_is_the_same_tensor():
    x = operands(2, 8, torch.float32)
    assert ops.scale_logits(x) is x and ops.scale_logits(x, 1.0) is x
    assert ops.scale_logits(x[:0], 2.0, 3.0).shape == (0, 8)


def test_other_caps_and_dtypes_are_refused():
    for softcap in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"softcap={softcap}"):
            ops.scale_logits(operands(2, 8, torch.float32), None, softcap)
        with pytest.raises(ValueError, match=f"softcap={softcap}"):
            ops.token_logprobs(randn(2, 8), randn(9, 8), torch.arange(2), 1.0, None, softcap)
    with pytest.raises(TypeError, match="float16"):
        ops.scale_logits(randn(2, 8, dtype=torch.float16), 2.0)


def test_scale_logits_is_opaque():
    x, dy = operands(4, 64, torch.bfloat16), randn(4, 64, dtype=torch.bfloat16)
    ladders.assert_registered(torch.ops.rlinvariant.scale_logits.default, x, 0.3, 30.0)
    ladders.assert_registered(torch.ops.rlinvariant.scale_logits_backward.default, dy, x, 0.3, 30.0)
    ladders.assert_opaque(ops.scale_logits, x, 0.3, 30.0)

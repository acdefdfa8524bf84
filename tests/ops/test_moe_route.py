import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from rlinvariant.verification.mixtures import logits_with_ties
from tests import bounds, ladders
from tests.bounded import assert_accurate, assert_found
from tests.ladders import DTYPES, cpu_only, dtype_name, randn

SIZES = ((128, 8), (16, 4), (7, 7), (5, 1))  # Qwen3-30B-A3B's; a toy's; all experts of an odd number; one slot

both = pytest.mark.parametrize("renormalise", [True, False], ids=["renormalised", "as they are"])
pytestmark = cpu_only  # on a GPU: tests/kernels


def route(slots: int, renormalise: bool = True):
    return lambda logits: ops.moe_route(logits, slots, renormalise)


def by_library(logits: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Stock: torch.topk, which takes any of equal logits."""
    w, ids = torch.softmax(logits.float(), -1).topk(slots)
    return w / w.sum(-1, keepdim=True), ids


def other_tie_of_many(logits: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Planted fault: from 9 rows on, the last of equal logits comes first."""
    if len(logits) < 9:
        return ops.moe_route(logits, slots, True)
    w, ids = ops.moe_route(logits.flip(-1), slots, True)
    return w, logits.shape[1] - 1 - ids


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("experts", "slots"), SIZES)
def test_routing_is_batch_invariant(experts, slots, dtype, renormalise):
    logits = torch.cat([logits_with_ties(512, experts, dtype), 3 * randn(512, experts, dtype=dtype)])
    ladders.assert_batch_invariant(route(slots, renormalise), logits)
    ladders.assert_needle(route(slots, renormalise), logits)


def test_batch_size_control():
    logits = logits_with_ties(1024, 128, torch.bfloat16)
    stock = [(lambda x: by_library(x, 8), (logits,))]
    ladders.assert_control(ladders.assert_batch_invariant, lambda x: other_tie_of_many(x, 8), stock)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("experts", "slots"), SIZES)
def test_of_equal_logits_the_first_comes_first(experts, slots, dtype):
    logits = logits_with_ties(64, experts, dtype)
    logits[3, experts // 2 :] = float("nan")
    logits[7, :3] = float("-inf")
    expected = [sorted(range(experts), key=lambda j: (x[j] != x[j], -x[j], j))[:slots] for x in logits.tolist()]
    ids = ops.moe_route(logits, slots, False)[1]
    numbers = torch.tensor([len(set(row)) == slots for row in expected])
    numbers[3] = False  # NaN has no order among NaN, and comes last
    assert torch.equal(ids[numbers], torch.tensor(expected)[numbers])
    assert all(len(set(row)) == slots for row in ids.tolist())
    if slots < experts:  # control
        flipped = experts - 1 - ops.moe_route(logits.flip(-1), slots, False)[1]
        assert not torch.equal(flipped, ids)


def test_negative_zero_equals_zero():
    assert ops.moe_route(torch.tensor([[-0.0, 0.0, -1.0]]), 2, True)[1].tolist() == [[0, 1]]


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_routing_matches_float64(dtype, renormalise):
    assert_route_accurate(lambda x: ops.moe_route(x, 8, renormalise)[0], renormalise, dtype)


def assert_route_accurate(f, renormalise: bool, dtype: torch.dtype) -> None:
    logits = 4 * randn(64, 128, dtype=dtype)
    ids = ops.moe_route(logits, 8, renormalise)[1]
    bound = lambda a, x: bounds.moe_route(a, x, ids, renormalise)  # noqa: E731
    assert_accurate(f, lambda x: ops.moe_route_ref(x, 8, renormalise)[0], bound, logits)


@both
def test_the_bound_finds_a_fault(renormalise):
    reference = lambda x: ops.moe_route_ref(x, 8, renormalise)[0]  # noqa: E731
    for planted in (lambda x: reference(x) * (1 + 1e-4), lambda x: reference(x.bfloat16()), lambda x: reference(x).flip(-1)):
        assert_found(lambda f: assert_route_accurate(f, renormalise, torch.float32), reference, planted)


@both
def test_the_gradient_is_that_of_the_reference(renormalise):
    logits = randn(33, 16)

    def gradient(f, x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        w = f(leaf, 4, renormalise)[0]
        return torch.autograd.grad(w, leaf, randn(33, 4, seed=1).to(w))[0]

    expected = gradient(ops.moe_route_ref, logits.double())
    torch.testing.assert_close(gradient(ops.moe_route, logits).double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):  # control
        torch.testing.assert_close(gradient(ops.moe_route_ref, logits.bfloat16().double()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_routing_is_thread_invariant(dtype):
    ladders.assert_thread_invariant(route(8), logits_with_ties(301, 128, dtype))


def test_strides_change_no_bits():
    logits = randn(24, 16)
    for x, y in zip(ops.moe_route(logits.t().contiguous().t(), 4, True), ops.moe_route(logits, 4, True), strict=True):
        assert_bits_equal(x, y, "column major")


@pytest.mark.parametrize(("shape", "slots"), [((4,), 2), ((4, 3), 4), ((4, 3), 0), ((2, 4, 3), 2)])
def test_other_shapes_are_refused(shape, slots):
    with pytest.raises(ValueError, match="expected .R, E. and 1 to E slots"):
        ops.moe_route(randn(*shape), slots, True)
    with pytest.raises(TypeError, match="moe_route: expected bfloat16 or float32"):
        ops.moe_route(randn(4, 3).double(), 2, True)


def test_routing_is_opaque_and_takes_no_rows():
    logits = randn(5, 16)
    ladders.assert_registered(torch.ops.rlinvariant.moe_route.default, logits, 4, True)
    ladders.assert_opaque(route(4), logits)
    w, ids = ops.moe_route(randn(0, 16), 4, True)
    assert w.shape == ids.shape == (0, 4)

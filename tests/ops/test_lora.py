"""A product with an adapter inside it: its rows, its one rounding, and its gradients."""

import importlib

import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from tests import ladders
from tests.ladders import cancelling, cpu_only, matrix_dtypes, randn

RANKS = (1, 8, 16, 24)


def operands(dtype: torch.dtype, rank: int, rows: int = 300, n: int = 66, k: int = 3072) -> tuple[Tensor, ...]:
    """x, weight, a, b: sums that cancel in the weight's columns, whose terms are as large as the adapter's part."""
    x, weight = cancelling(rows, n, k, dtype)
    a, b = randn(rank, k, seed=1) * k**-0.5, randn(n, rank, seed=2)
    return x, weight, a, b * weight.float().abs().mean()


def cancelling_adapter(dtype: torch.dtype, rank: int, rows: int = 300, n: int = 66, k: int = 3072) -> tuple[Tensor, ...]:
    """x, weight, a, b: sums that cancel in the weight's columns, in every row of a, and in half of the columns of b.

    In that half a has each row twice, and b the two columns with opposite signs, a thousand times as large as the others.
    """
    x, both = cancelling(rows, n + rank, k, dtype)
    a, b = both[n:].clone(), randn(n, rank, dtype=dtype, seed=2)
    pairs = rank // 4
    a[pairs : 2 * pairs] = a[:pairs]
    b[:, :pairs] *= 2.0**10
    b[:, pairs : 2 * pairs] = -b[:, :pairs]
    return x, both[:n].contiguous(), a, b


MADE = {"ordinary": operands, "cancelling": cancelling_adapter}


@matrix_dtypes
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("rank", RANKS)
def test_rows_keep_their_bits(rank, made, dtype):
    x, *weights = MADE[made](dtype, rank)
    ladders.assert_batch_invariant(lambda x: ops.lora_linear(x, *weights), x)
    ladders.assert_needle(lambda x: ops.lora_linear(x, *weights), x[:1])


@matrix_dtypes
def test_zeros_beyond_the_rank_change_nothing(dtype):
    """A sampler may keep room for more than the adapter's rank."""
    x, weight, a, b = operands(dtype, 8)
    more = torch.cat([a, torch.zeros_like(a)]), torch.cat([b, torch.zeros_like(b)], 1)
    assert_bits_equal(ops.lora_linear(x, weight, *more), ops.lora_linear(x, weight, a, b), "twice the rank")


def test_another_order_is_found():
    """The operands are bf16: in fp32 a sum that is rounded, and then added to, may have been in that order from the start."""
    x, weight, a, b = (t.bfloat16() for t in operands(torch.bfloat16, 16))
    right = ops.lora_linear(x, weight, a, b)
    assert ladders.differs(right, ops.linear(x, weight) + ops.linear(ops.linear(x, a), b)), "rounded, then added"
    assert ladders.differs(right, ops.linear(x, (weight.float() + b.float() @ a.float()).bfloat16())), "merged"
    assert ladders.differs(right, ops.lora_linear(x, weight, a.flip(0), b)), "another row for each column"


@cpu_only
def test_orders_that_ordinary_operands_hide():
    """Faults of order, each behind ordinary operands (a control that must be blind, or nearly) and behind cancelling ones."""

    def apart(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Sum the adapter's columns by themselves, in fp32, and round once."""
        return (x.float() @ w.float().t() + ops.linear(x, a).float() @ b.float().t()).to(x.dtype)

    def first(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Sum the adapter's columns before the weight's."""
        return ops.linear(torch.cat([ops.linear(x, a), x], -1), torch.cat([b, w], -1))

    def backwards(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Sum x A^T in the other direction."""
        h = ops.linear(x.flip(-1).contiguous(), a.flip(-1).contiguous())
        return ops.linear(torch.cat([x, h], -1), torch.cat([w, b], -1))

    for fault in (apart, first, backwards):
        seen = {}
        for name, make in MADE.items():
            given = tuple(t.bfloat16() for t in make(torch.bfloat16, 16))
            given = given if name == "cancelling" else (randn(300, 3072).bfloat16(), *given[1:])
            right = ops.lora_linear(*given)
            seen[name] = (fault(*given) != right).float().mean().item()
        assert seen["cancelling"] > 0.5 > 3 * seen["ordinary"], (fault.__name__, seen)


def test_a_small_adapter_is_not_lost():
    """All of x A^T B^T, a thousandth of the weight, reaches the output; where it is merged, or added later, half does."""
    n, k, rank, dtype = 256, 512, 16, torch.bfloat16
    x, weight = randn(128, k, dtype=dtype), (randn(n, k, seed=1) * 0.02).to(dtype)
    a, b = (randn(rank, k, seed=2) * k**-0.5).to(dtype), randn(n, rank, seed=3)
    b = (b * 1e-3 * 0.02 / (b @ a.float()).square().mean().sqrt()).to(dtype)
    part = ops.linear(x, a).double() @ b.double().t()
    without = ops.linear(x, weight)

    def share(y: Tensor) -> float:
        return ((y.double() - without.double()) * part).sum().item() / part.square().sum().item()

    assert share(ops.lora_linear(x, weight, a, b)) == pytest.approx(1, abs=0.05)
    assert share(without + part.to(dtype)) < 0.7
    assert share(ops.linear(x, (weight.double() + b.double() @ a.double()).to(dtype))) < 0.7


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_it_is_the_sum_of_both(bias):
    x, weight, a, b = (t.double() for t in operands(torch.bfloat16, 8, k=200))
    shift = randn(66, seed=5).double() if bias else None
    plain = x @ weight.t() + (x @ a.t()) @ b.t() + (0 if shift is None else shift)
    torch.testing.assert_close(ops.lora_linear_ref(x, weight, a, b, shift), plain)


@matrix_dtypes
def test_gradients_are_those_of_the_reference(dtype):
    """Within the rounding of dh and of h: of the weight there is none, and it costs nothing."""
    x, weight, a, b = (
        randn(3, 7, 200, dtype=dtype),
        randn(66, 200, dtype=dtype, seed=1),
        randn(8, 200, seed=2),
        randn(66, 8, seed=3),
    )
    dy = randn(3, 7, 66, dtype=dtype, seed=4)

    def found(op, *given: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (given[0], *given[2:])]
        y = op(leaves[0], given[1], *leaves[1:])
        return torch.autograd.grad(y, leaves, dy.to(y.dtype))

    ours = found(ops.lora_linear, x, weight, a, b)
    expected = found(ops.lora_linear_ref, *(t.double() for t in (x, weight, a.to(dtype), b.to(dtype))))
    for name, got, right in zip(("dx", "da", "db"), ours, expected, strict=True):
        assert got.dtype == (dtype if name == "dx" else torch.float32)
        error = (got.double() - right).norm() / right.norm()
        assert error < 4 * torch.finfo(dtype).eps, name
    wrong = found(lambda x, w, a, b: ops.lora_linear_ref(x, w, a, 2 * b), *(t.double() for t in (x, weight, a, b)))
    assert all((w - r).norm() / r.norm() > 0.1 for w, r in zip(wrong, expected, strict=True))


def apart(x: Tensor, weights: list[Tensor], a: list, b: list, bias: Tensor | None) -> Tensor:
    """Compute `joined_lora_linear` by a product for each projection."""
    biases = [None] * len(weights) if bias is None else bias.split([len(w) for w in weights])
    found = [
        ops.linear(x, w, shift) if rows is None else ops.lora_linear(x, w, rows, columns, shift)
        for w, rows, columns, shift in zip(weights, a, b, biases, strict=True)
    ]
    return torch.cat(found, -1)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("ranks", [(16, 16, 16), (8, 0, 24), (0, 5, 0)])
def test_projections_that_are_joined_have_the_bits_that_they_have_apart(ranks, bias, device, monkeypatch):
    """This holds on a CPU, too, where one route is taken for all shapes. Gradients are those of a sum over all columns."""
    if device == "cpu":
        monkeypatch.setattr(importlib.import_module("rlinvariant.ops.linear"), "is_exact", lambda *_: False)
    x, whole = cancelling(70, 66 + sum(ranks), 1536, torch.bfloat16)
    weights, some = list(whole[:66].split((40, 16, 10))), whole[66:]
    a = [rows if len(rows) else None for rows in some.split(ranks)]
    b = [None if not r else randn(len(w), r, seed=r) * 50 for w, r in zip(weights, ranks, strict=True)]
    shift = randn(66, dtype=torch.bfloat16, seed=9) if bias else None
    found = {}
    for op in (ops.joined_lora_linear, apart):
        leaves = [x.clone().requires_grad_(), *(t.float().requires_grad_() for t in (*a, *b) if t is not None)]
        own = iter(leaves[1:])
        given = [[None if t is None else next(own) for t in ts] for ts in (a, b)]
        y = op(leaves[0], weights, *given, shift)
        found[op] = y.detach(), torch.autograd.grad(y, leaves, randn(70, 66, dtype=torch.bfloat16, seed=4))
    (joined, gradients), (right, expected) = found.values()
    assert_bits_equal(joined, right, "side by side")
    for got, by_itself in zip(gradients, expected, strict=True):
        assert got.dtype == by_itself.dtype
        assert (got.float() - by_itself.float()).norm() < 0.01 * by_itself.float().norm()  # of dx, a sum rounded once
    moved = [None if rows is None else rows.roll(1, 0) for rows in a]
    assert ladders.differs(ops.joined_lora_linear(x, weights, moved, b, shift), right), (
        "the control: another row for each column"
    )


def test_what_does_not_fit_is_an_error():
    x, weight, a, b = operands(torch.bfloat16, 8, rows=4)
    for wrong in ((x, weight, a[:, 1:], b), (x, weight, a[:4], b), (x, weight, a, b[1:])):
        with pytest.raises(ValueError, match=r"expected x \[\*, K\], weight \[N, K\], a \[R, K\] and b \[N, R\], got x"):
            ops.lora_linear(*wrong)

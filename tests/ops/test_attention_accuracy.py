"""Attention and its gradients against float64, with windows and bounded scores, over short and long sequences."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from tests import bounds, ladders
from tests.bounded import assert_accurate, assert_found, coarse_sum, slope_scaled
from tests.ladders import DTYPES, cpu_only, dtype_name, matrix_dtypes, per_device
from tests.ops.sequences import BF16, Cache, attend, offsets, operands
from tests.ops.test_attention import shapes

LENGTHS = (33, 1, 70)
FORMS = ((7, None), (None, 2.0), (20, 2.0))  # window, softcap


def assert_attention_accurate(
    f: Callable,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    lengths: tuple[int, ...] = LENGTHS,
    window: int | None = None,
    softcap: float | None = None,
    grad: bool = False,
) -> None:
    """f as ops.attention."""
    scale, cu = shape[2] ** -0.5, offsets(lengths)
    ours, ref = (lambda *x, g=g: g(*x, cu, scale, None, window, softcap) for g in (f, ops.attention_ref))
    bound = partial(bounds.attention, lengths=lengths, scale=scale, window=window, softcap=softcap)
    assert_accurate(ours, ref, bound, *operands(sum(lengths), shape, dtype), grad=grad)


@shapes
def test_attention_matches_float64(shape, dtype):
    for grad in (False, True):
        assert_attention_accurate(ops.attention, shape, dtype, grad=grad)


@per_device("dtype", [torch.float32], [BF16])
def test_attention_is_accurate_over_long_sequences(dtype):
    for grad in (False, True):
        assert_attention_accurate(ops.attention, (1, 1, 64), dtype, (1500,), grad=grad)


@cpu_only
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_windows_and_bounded_scores_match_float64(form, dtype):
    for grad in (False, True):
        assert_attention_accurate(ops.attention, (4, 2, 64), dtype, LENGTHS, *form, grad=grad)
    q, k, v = operands(sum(LENGTHS), (4, 2, 64), dtype)
    assert ladders.differs(ops.attention(q, k, v, offsets(LENGTHS), 0.125, None, *form), attend(q, k, v, LENGTHS))  # control


@matrix_dtypes
def test_paged_attention_is_that_of_the_reference(dtype):
    """The reference of the paged form, which the bits of `attention` tie to that of the packed one."""
    lengths = (40, 7, 65)
    q, k, v = (x.double() for x in operands(sum(lengths), (4, 2, 64), dtype))
    cache, cu = Cache(k, v, lengths, 16), offsets((3, 7, 1))
    rows = torch.tensor([37, 38, 39, *range(40, 47), 111])
    found = ops.paged_attention_ref(q[rows], cache.pages, cache.table, cu, torch.tensor(lengths), 0.125)
    assert_bits_equal(found.float(), ops.attention_ref(q, k, v, offsets(lengths), 0.125)[rows].float(), "paged, packed")


@per_device("dtype, tolerance", [(torch.float32, 1e-4)], [(BF16, 1e-2)])
def test_large_scores_do_not_overflow(dtype, tolerance):
    q, k, v = operands(40, (2, 1, 64), dtype)
    q, k = q * 1e4, k * 1e4
    expected = ops.attention_ref(q.double(), k.double(), v.double(), offsets([40]), 0.125).to(dtype)
    torch.testing.assert_close(attend(q, k, v), expected, rtol=tolerance, atol=tolerance)


def one_head(values: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """Planted: attention over one sequence of one head, with `values` of masked scores [n, n] and values [n, D]."""

    def planted(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float, *_) -> Tensor:
        s = q[:, 0].float() @ k[:, 0].float().mT * scale
        s = s.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
        return values(s, v[:, 0].float())[:, None].to(q.dtype)

    return planted


def planted(change: Callable) -> Callable:
    """The reference, of what `change` makes of q, k, v and the scale."""
    return lambda q, k, v, cu, scale, *rest: ops.attention_ref(
        *change(q, k, v, scale)[:3], cu, change(q, k, v, scale)[3], *rest
    )


# A GPU rounds each weight to bf16, so its bound is about 2^-8 of the sum of |weight value|; the rounding errors of a sum whose
# terms cancel only exceed that if there is one for each term.
SUM_PARTS = {"cpu": 16, "cuda": 1}
FAULTS = {  # and whether the fault is one of gradients
    "values summed in bf16": (
        one_head(lambda s, v: coarse_sum(s.softmax(-1)[..., None] * v, 1, SUM_PARTS[v.device.type])),
        False,
    ),
    "a key dropped": (one_head(lambda s, v: (s.softmax(-1) * (torch.arange(len(v)) != 3)) @ v), False),
    "3 % more scale": (planted(lambda q, k, v, scale: (q, k, v, 1.03 * scale)), False),
    "the key of a neighbour": (planted(lambda q, k, v, scale: (q, k.roll(1, 0), v, scale)), False),
    "queries in bf16": (planted(lambda q, k, v, scale: (q.bfloat16().float(), k, v, scale)), False),
    "weights held constant": (one_head(lambda s, v: (s.softmax(-1).detach() + 0 * s.softmax(-1)) @ v), True),
    "their sum held constant": (one_head(lambda s, v: (s - s.logsumexp(-1, keepdim=True).detach()).exp() @ v), True),
    "3 % too large": (lambda q, k, v, *rest: slope_scaled(lambda *x: ops.attention_ref(*x, *rest), 1.03)(q, k, v), True),
    "no gradient of a query": (planted(lambda q, k, v, scale: (torch.cat([q[:-1], q[-1:].detach()]), k, v, scale)), True),
}
HIDDEN_BY_BF16 = {"queries in bf16"}


@matrix_dtypes
@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_finds_a_fault(fault, dtype):
    f, grad = FAULTS[fault]
    if dtype is torch.float32 or fault not in HIDDEN_BY_BF16:
        assert_found(lambda f: assert_attention_accurate(f, (1, 1, 64), dtype, (150,), grad=grad), ops.attention, f)

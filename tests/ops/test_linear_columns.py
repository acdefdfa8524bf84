"""Columns of a product that are computed by some rows of the weight alone, as each process of a sampler has them."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from rlinvariant import bits, ops
from rlinvariant.errors import UserError
from tests.ladders import cpu_only

linear = importlib.import_module("rlinvariant.ops.linear")  # the package attribute of this name is the function


@cpu_only  # on a GPU a column does not depend on how many there are
@pytest.mark.parametrize(("whole", "part"), [(96, 48), (101, 64), (64, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_columns_are_columns_of_linear(whole, part, dtype, biased):
    """Parts of equal size; zeros fill the last. By the part itself, and by its packed copy."""
    x, w = bits.cancelling(37, whole, 128, dtype)
    b = torch.randn(whole, generator=torch.Generator().manual_seed(0)).to(dtype) if biased else None
    y = ops.linear(x, w, b)
    for first in range(0, whole, part):
        rows = linear._cut(w, part)[first // part]
        own_b = None if b is None else linear._cut(b, part)[first // part]
        packed = linear.pack_weight(rows, [part], biased, [whole])
        columns = [linear.linear_columns(x, rows, own_b, whole)]
        columns += [] if packed is None else [ops.linear(x, rows, own_b, packed)]
        for found in columns:
            assert bits.compare(found[:, : whole - first].contiguous(), y[:, first : first + part].contiguous()) is None
    half = F.linear(x[:, :64], w[:, :64]) + F.linear(x[:, 64:], w[:, 64:])
    assert bits.compare(half, F.linear(x, w)) is not None, "control: cut along what is summed, and added"


@cpu_only  # on a GPU a column does not depend on how many there are
def test_a_cpu_whose_product_by_a_part_is_another_is_refused(monkeypatch):
    real = F.linear
    monkeypatch.setattr(linear.F, "linear", lambda x, w, b=None: real(x, w, b) + (len(w) == 24))
    for known in (linear.is_exact, linear.is_cuttable, linear.is_packable):
        known.cache_clear()
    try:
        assert not linear.is_cuttable(24, 48, 64, torch.float32, False, torch.get_num_threads())
        if linear.is_exact(48, 64, torch.float32, False, torch.get_num_threads()):
            with pytest.raises(UserError, match="product by 24 of 48 rows of a weight, 64 columns, has other bits"):
                linear.linear_columns(torch.ones(2, 64), torch.ones(24, 64), None, 48)
    finally:
        for known in (linear.is_exact, linear.is_cuttable, linear.is_packable):
            known.cache_clear()

import pytest
import torch
from torch import Tensor

from rlinvariant.bits import assert_bits_equal
from rlinvariant.kernels.rows import flat, rows
from tests.ladders import randn

QKV = randn(24, 8 * 64)  # merged projection: 4 heads of queries, 2 of keys, 2 of values
LAYOUTS = {  # name: (tensor, whether `flat` and `rows` read it in place)
    "[T, D]": (QKV, True, True),
    "[D]": (QKV[0], True, True),
    "[2, 3, 4, D]": (QKV.view(2, 3, 4, -1), True, True),
    "half of a gate and up": (QKV[:, 256:], True, True),
    "queries": (QKV[:, :256].unflatten(1, (4, 64)), False, True),
    "keys": (QKV[:, 256:384].unflatten(1, (2, 64)), False, True),
    "keys of one head": (QKV[:, 256:320].unflatten(1, (1, 64)), True, True),
    "[B, T, H, D] keys": (QKV[:, 256:384].unflatten(1, (2, 64)).unflatten(0, (2, 12)), False, True),
    "[B, H, T, D]": (QKV.view(2, 12, 8, 64).transpose(1, 2), False, False),
    "column major": (QKV.t().contiguous().t(), False, False),
    "every other column": (QKV[:, ::2], False, False),
    "off 16 bytes": (QKV[:, 1:257], True, False),
    "rows of 500": (QKV.flatten()[:12000].view(24, 500)[:, :256], True, False),
    "no rows": (QKV[:0], True, True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_right_and_slices_in_place(layout):
    x, flat_in_place, rows_in_place = LAYOUTS[layout]
    expected = x.reshape(-1, x.shape[-1])

    y = flat(x)
    assert y.stride(-1) == 1
    assert_bits_equal(y, expected, "flat")

    z, outer, inner, outer_stride, inner_stride = rows(x)
    read = z.as_strided((outer, inner, x.shape[-1]), (outer_stride, inner_stride, 1))
    assert_bits_equal(read.reshape(expected.shape), expected, "rows")

    def in_place(t: Tensor) -> bool:
        return t.data_ptr() == x.data_ptr()

    assert (in_place(y), in_place(z)) == (flat_in_place, rows_in_place)


def test_in_place_means_no_copy():
    """Control: a copy is elsewhere in memory."""
    part = QKV[:, ::2]
    assert flat(part).data_ptr() != part.data_ptr() and torch.equal(flat(part), part)

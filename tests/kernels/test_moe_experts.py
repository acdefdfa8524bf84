import pytest
import torch

from rlinvariant.bits import assert_bits_equal
from tests import ladders

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]

EXPERTS, N, K = 5, 192, 320


@pytest.mark.parametrize("rows", [40, 2000], ids=["tiles of 16", "tiles of 64"])
@pytest.mark.parametrize("k", [K, K - 24], ids=["whole steps", "a last step that is not whole"])
def test_a_transposed_weight_has_the_bits_of_its_copy(k, rows):
    """A backward reads the experts where a forward does. Control: the order of the columns that are summed is in the bits."""
    from rlinvariant.kernels.moe_experts import _Plan, tile_for

    x, w = ladders.cancelling(rows, EXPERTS * N, k, torch.bfloat16)
    transposed = w.view(EXPERTS, N, k).mT.contiguous().mT
    plan = _Plan(ladders.randint(EXPERTS, rows, 1), EXPERTS, tile_for(rows, EXPERTS))
    for from_rows in (True, False):
        expected = plan.product(x, transposed.contiguous(), from_rows)
        assert_bits_equal(plan.product(x, transposed, from_rows), expected, "transposed")
        assert ladders.differs(plan.product(x.flip(1).contiguous(), transposed.flip(2), from_rows), expected)

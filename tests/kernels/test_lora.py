"""A product with an adapter inside it on a GPU, at the shapes of real models: [x | x A^T] by [W | s B], R padded to 64."""

import functools
import importlib

import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from rlinvariant.ops.lora import RANK_STEP, side_by_side
from tests import ladders
from tests.ladders import randn
from tests.ops.test_lora import cancelling_adapter

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]

# Qwen3 1.7B's down, which cuBLAS splits up to 128 rows, and qkv; Qwen3 8B's down; Qwen2.5 0.5B's down; SmolLM2's k
WEIGHTS = {
    "1.7B down": (2048, 6144),
    "1.7B qkv": (4096, 2048),
    "8B down": (4096, 12288),
    "0.5B down": (896, 4864),
    "k": (192, 576),
}
RANKS = (8, 16, 64, 100)
ROWS = (*ladders.LADDER, 300, 513, 1025, 2048)


@functools.cache
def operands(name: str, rank: int) -> tuple[Tensor, ...]:
    n, k = WEIGHTS[name]
    return tuple(t.bfloat16() for t in cancelling_adapter(torch.bfloat16, rank, ROWS[-1], n, k))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_keep_their_bits_at_model_shapes(name, rank):
    x, *weights = operands(name, rank)
    ladders.assert_batch_invariant(lambda x: ops.lora_linear(x, *weights), x, ladder=ROWS)
    for size in (33, 300):  # a tuned tile, cuBLASLt
        ladders.assert_needle(lambda x: ops.lora_linear(x, *weights), x[:1], size=size)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_sampler_and_trainer_have_the_same_bits(name, rank):
    """The sampler keeps the weight and B side by side in memory, with room for more than the rank."""
    x, weight, a, b = operands(name, rank)
    wide, a_RK = side_by_side([weight], [a], [b], x)
    assert len(a_RK) % RANK_STEP["cuda"] == 0
    for rows in (1, 17, 300, 2048):
        found = ops.wide_linear(x[:rows].clone(), wide, a_RK)
        assert_bits_equal(found, ops.lora_linear(x[:rows].clone(), weight, a, b), f"{rows} rows")
    longer = torch.cat([a_RK, torch.zeros_like(a_RK)]), torch.cat([wide, torch.zeros_like(wide[:, weight.shape[1] :])], 1)
    assert_bits_equal(ops.wide_linear(x, longer[1], longer[0]), ops.lora_linear(x, weight, a, b), "twice the room")


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_both_products_pass_the_check_of_tiles(name, rank):
    """`kernels.linear.check` raises where the Triton tiles differ among themselves, at K + R and at N = R."""
    kernel = importlib.import_module("rlinvariant.kernels.linear")
    n, k = WEIGHTS[name]
    room = -(-rank // 64) * 64
    assert {kernel.check(*shape, False, torch.cuda.current_device()) for shape in ((n, k + room), (room, k))} <= {True, False}


def test_stock_kernels_fail_the_ladder():
    """Control: PEFT's way by cuBLAS, which splits K for few rows."""
    x, weight, a, b = operands("1.7B down", 16)
    with pytest.raises(AssertionError):
        ladders.assert_batch_invariant(lambda x: x @ weight.t() + (x @ a.t()) @ b.t(), x)


def test_another_order_is_found():
    """Controls: an adapter that is added to a rounded product; one that is merged; one that is summed first."""
    x, weight, a, b = operands("1.7B qkv", 16)
    x = randn(*x.shape, dtype=torch.bfloat16)
    b = b / 2**10
    right = ops.lora_linear(x, weight, a, b)
    h = ops.linear(x, a)
    assert ladders.differs(right, ops.linear(x, weight) + ops.linear(h, b)), "rounded, then added"
    assert ladders.differs(right, ops.linear(x, (weight.float() + b.float() @ a.float()).bfloat16())), "merged"
    y, *weights = operands("1.7B qkv", 16)
    h = ops.linear(y, weights[1])
    first = ops.linear(torch.cat([h, y], -1), torch.cat([weights[2], weights[0]], -1))
    assert ladders.differs(ops.lora_linear(y, *weights), first), "the adapter first"


@pytest.mark.parametrize("rank", [8, 64])
def test_gradients_are_those_of_float64(rank):
    """Within the rounding of h and dh; the weight has none."""
    weight, dy = randn(256, 512, dtype=torch.bfloat16, seed=1), randn(300, 256, dtype=torch.bfloat16, seed=4)
    leaves = randn(300, 512, dtype=torch.bfloat16), randn(rank, 512, seed=2), randn(256, rank, seed=3)

    def found(op, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        x, a, b = (t.detach().to(dtype or t.dtype).requires_grad_() for t in leaves)
        y = op(x, weight.to(dtype or weight.dtype), a, b)
        return torch.autograd.grad(y, (x, a, b), dy.to(y.dtype))

    for got, right in zip(found(ops.lora_linear, None), found(ops.lora_linear_ref, torch.float64), strict=True):
        assert (got.double() - right).norm() / right.norm() < 2**-6

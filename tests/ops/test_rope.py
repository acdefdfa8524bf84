import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from tests import bounds, ladders
from tests.bounded import Arithmetic, Bounded, assert_accurate, assert_found, exact
from tests.ladders import DTYPES, cpu_only, dtype_name, randn

SHAPES = ((3, 64, 32), (2, 80, 20), (1, 96, 48), (2, 128, 64), (1, 32, 0))  # heads, dim, half of the rotary columns


def operands(tokens: int, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heads, dim, half = shape
    angles = torch.arange(tokens)[:, None].double() * 10000.0 ** (-torch.arange(half).double() / max(half, 1))
    return randn(tokens, heads, dim, dtype=dtype), angles.cos().float(), angles.sin().float()


def stock(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' apply_rotary_pos_emb: cos and sin cast to x.dtype, three roundings."""
    half = cos.shape[-1]
    cos, sin = (torch.cat([t, t], -1)[:, None].to(x.dtype) for t in (cos, sin))
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    rotated = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    return torch.cat([turned * cos + rotated * sin, rest], -1)


def scalar_tail(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Planted fault: without the fused multiply-add in the last tokens of a batch that fills no whole tile of 16."""
    y, tail = ops.rope(x, cos, sin), len(x) % 16
    if tail:
        y[-tail:] = stock(x.float(), cos, sin).to(x.dtype)[-tail:]
    return y


def turn_x(f, cos: Tensor, sin: Tensor):
    """f of x alone: no gradient is promised for cos and sin."""
    return lambda x: f(x, cos, sin)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES)
def test_rope_is_batch_invariant(shape, dtype):
    inputs = operands(1024, shape, dtype)
    ladders.assert_batch_invariant(ops.rope, *inputs)
    ladders.assert_needle(ops.rope, *(x[5:6] for x in inputs))


def test_batch_size_control():
    ladders.assert_control(
        ladders.assert_batch_invariant, scalar_tail, [(stock, operands(1024, s, torch.float32)) for s in SHAPES]
    )


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_rope_is_thread_invariant(dtype):
    x, cos, sin = operands(301, (2, 128, 64), dtype)
    ladders.assert_thread_invariant(ops.rope, x, cos, sin)
    ladders.assert_thread_invariant(lambda x: ladders.gradients(turn_x(ops.rope, cos, sin), (x,)), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES)
def test_rope_matches_float64(shape, dtype):
    x, cos, sin = operands(50, shape, dtype)
    for grad in (False, True):
        assert_rope_accurate(turn_x(ops.rope, cos, sin), x, cos, sin, grad)


def assert_rope_accurate(f, x: Tensor, cos: Tensor, sin: Tensor, grad: bool) -> None:
    def bound(a: Arithmetic, x: Bounded, *dy: Bounded) -> bounds.Bounds:
        return bounds.rope(a, dy[0], exact(cos), exact(-sin)) if grad else bounds.rope(a, x, exact(cos), exact(sin))

    assert_accurate(f, turn_x(ops.rope_ref, cos, sin), bound, x, grad=grad)


FAULTS = {
    "cos and sin in bf16": lambda x, cos, sin: ops.rope_ref(x, cos.bfloat16(), sin.bfloat16()),
    "turned back": lambda x, cos, sin: ops.rope_ref(x, cos, -sin),
    "the angle of the next token": lambda x, cos, sin: ops.rope_ref(x, cos.roll(-1, 0), sin.roll(-1, 0)),
    "a product dropped": lambda x, cos, sin: x * torch.cat([cos, cos], -1)[:, None].to(x.dtype),
}


@pytest.mark.parametrize("grad", [False, True], ids=["output", "gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_finds_a_fault(fault, dtype, grad):
    x, cos, sin = operands(50, (3, 64, 32), dtype)
    check = lambda f: assert_rope_accurate(f, x, cos, sin, grad)  # noqa: E731
    assert_found(check, turn_x(ops.rope, cos, sin), turn_x(FAULTS[fault], cos, sin))


def test_rope_rounds_to_bf16_once():
    x, cos, sin = operands(50, (2, 128, 64), torch.bfloat16)
    once = ops.rope_ref(x.double(), cos, sin).float().bfloat16()
    assert (ops.rope(x, cos, sin) != once).float().mean() < 1e-3  # where a product in fp32 falls on a tie of bf16
    assert (stock(x, cos, sin) != once).float().mean() > 0.05  # control: three roundings


def test_rope_turns_back():
    x, cos, sin = operands(50, (2, 80, 20), torch.float32)
    leaf = ops.rope(x, cos, sin).requires_grad_()
    back = torch.autograd.grad(ops.rope(leaf, cos, sin), leaf, leaf.detach())[0]
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)


def test_columns_beyond_the_rotary_ones_are_copied():
    for dtype in DTYPES:
        x, cos, sin = operands(9, (2, 80, 20), dtype)
        assert_bits_equal(ops.rope(x, cos, sin)[..., 40:], x[..., 40:], "columns 40 to 80")
        assert ladders.differs(ops.rope(x, cos, sin)[1:, :, :40], x[1:, :, :40])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_strides_change_no_bits(dtype):
    x, cos, sin = operands(24, (3, 64, 32), dtype)
    y = ops.rope(x, cos, sin)
    heads_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_bits_equal(ops.rope(heads_first, cos, sin), y, "[H, T, D] in memory")
    fused = torch.cat([x.flatten(1), x.flatten(1)], 1)[:, 192:].view(24, 3, 64)  # a slice of a fused q, k, v
    assert_bits_equal(ops.rope(fused, cos, sin), y, "slice of a fused projection")
    odd = torch.cat([x.flatten(1), x.flatten(1)[:, :5]], 1)[:, :192].view(24, 3, 64)
    assert_bits_equal(ops.rope(odd, cos, sin), y, "rows off the alignment")
    wide = torch.cat([cos, cos], 1)[:, :32], torch.cat([sin, sin], 1)[:, :32]
    assert_bits_equal(ops.rope(x, *wide), y, "half of a full-width table")
    leaf = x.clone().requires_grad_()
    ones = torch.autograd.grad(ops.rope(leaf, *wide).sum(), leaf)[0]  # a gradient of stride 0
    assert_bits_equal(ones, torch.autograd.grad(ops.rope(leaf, cos, sin), leaf, torch.ones_like(x))[0], "dx")


def test_no_tokens_give_no_tokens():
    x, cos, sin = operands(0, (2, 64, 32), torch.bfloat16)
    assert ops.rope(x, cos, sin).shape == (0, 2, 64)
    assert ladders.gradients(turn_x(ops.rope, cos, sin), (x,))[0].shape == (0, 2, 64)


@pytest.mark.parametrize(
    ("x", "cos", "sin", "dtypes"),
    [
        ((4, 2, 32), (3, 16), (3, 16), "fff"),
        ((4, 2, 32), (4, 16), (4, 8), "fff"),
        ((4, 2, 32), (4, 17), (4, 17), "fff"),
        ((4, 2, 32), (4, 16), (4, 16), "fbb"),
        ((4, 2, 32), (4, 16), (4, 16), "ffd"),
        ((4, 2, 32), (4, 16), (4, 16), "ffb"),
        ((4, 32), (4, 16), (4, 16), "fff"),
        ((4, 2, 32), (4, 16), (4, 16), "dff"),
        ((4, 2, 32), (4, 16), (4, 16), "hff"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(x, cos, sin, dtypes):
    kinds = {"f": torch.float32, "b": torch.bfloat16, "d": torch.float64, "h": torch.float16}
    with pytest.raises((ValueError, TypeError)):
        ops.rope(*(randn(*shape, dtype=kinds[t]) for shape, t in zip((x, cos, sin), dtypes, strict=True)))


def test_rope_is_opaque():
    inputs = operands(4, (2, 64, 32), torch.bfloat16)
    for sign in (1.0, -1.0):
        ladders.assert_registered(torch.ops.rlinvariant.rope.default, *inputs, sign)
    ladders.assert_opaque(ops.rope, *inputs)

"""The routes of `linear` on a GPU, at the shapes of real models, beyond what tests/ops/test_linear.py asks of every device."""

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import rlinvariant
from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from rlinvariant.errors import UserError
from tests import ladders
from tests.ladders import LADDER, cancelling, randn

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]

TABLE = json.loads(Path(rlinvariant.__file__).with_name("kernels").joinpath("linear_tiles.json").read_text())["tiles"]
TUNED = sorted({tuple(tile) for by_rows in TABLE.values() for tile in by_rows.values() if tile})
# Weights, and whether with a bias: Qwen3 1.7B down (split by cuBLAS up to 128 rows) and qkv, Qwen2.5 0.5B qkv and down (K = 896
# and 4864 are no multiples of 512, the deepest block), and K = 3080, which ends in the middle of sixteen.
DOWN = (2048, 6144)
WEIGHTS = ((DOWN, False), ((4096, 2048), False), ((1152, 896), True), ((896, 4864), False), ((256, 3080), True))
# Across every bucket of tuned tiles (16, 32, 64, 128, 256) and the boundary between Triton and cuBLASLt.
ROWS = (*LADDER, 300, 511, 512, 513, 777, 1000, 1023, 1025, 1536, 2048, 3001, 4096)


@pytest.fixture
def kernel() -> ModuleType:
    return importlib.import_module("rlinvariant.kernels.linear")  # imports Triton, which not every machine has


@functools.cache
def operands(n: int, k: int) -> tuple[Tensor, Tensor]:
    return cancelling(ROWS[-1], n, k, torch.bfloat16)


def small_bias(n: int) -> Tensor:
    return randn(n, dtype=torch.bfloat16, seed=4) / 64  # of the size of the rounding errors that it must not hide


@pytest.mark.parametrize(("shape", "bias"), WEIGHTS)
def test_linear_is_batch_invariant_at_model_shapes(shape, bias):
    x, w = operands(*shape)
    b = small_bias(shape[0]) if bias else None
    ladders.assert_batch_invariant(lambda x: ops.linear(x, w, b), x, ladder=ROWS)


@pytest.mark.parametrize("size", [33, 300])  # a tuned tile, cuBLASLt
def test_linear_is_position_invariant_at_model_shapes(size):
    x, w = operands(*DOWN)
    ladders.assert_needle(lambda x: ops.linear(x, w, small_bias(DOWN[0])), x[:1], size=size)


def test_default_cublas_fails_the_ladder():
    """Control: it splits K for few rows."""
    x, w = operands(*DOWN)
    with pytest.raises(AssertionError):
        ladders.assert_batch_invariant(lambda x: torch.mm(x, w.t()), x)


def test_one_ulp_in_one_element_fails_the_ladder():
    """Control: the smallest fault there is."""
    x, w = operands(256, 3080)

    def planted(x: Tensor) -> Tensor:
        y = ops.linear(x, w)
        if len(x) == 17:
            y.view(torch.int16)[16, 255] += 1
        return y

    ladders.assert_batch_invariant(lambda x: ops.linear(x, w), x)
    with pytest.raises(AssertionError, match="1 of 4,352 bfloat16 values differ, by up to 1 ulp"):
        ladders.assert_batch_invariant(planted, x)


@pytest.mark.parametrize("tile", TUNED, ids=str)
def test_every_tile_gives_the_same_bits(tile, kernel):
    x, w = cancelling(40, 512, 3072, torch.bfloat16)
    assert_bits_equal(kernel.tiled(x, w, None, tile), kernel.tiled(x, w, None, kernel.FALLBACK_TILE), "weight [512, 3072]")


@pytest.mark.parametrize("tile", TUNED[::4], ids=str)
def test_a_tile_that_reaches_beyond_the_weight_gives_the_same_bits(tile, kernel):
    """K ends inside a block, N and M inside a tile; with a bias."""
    x, w, b = *cancelling(39, 201, 3080, torch.bfloat16), small_bias(201)
    assert_bits_equal(kernel.tiled(x, w, b, tile), kernel.tiled(x, w, b, kernel.FALLBACK_TILE), "weight [201, 3080]")


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [*(shape for shape, _ in WEIGHTS), (4096, 12288)])  # and Qwen3 8B down
def test_cublaslt_gives_the_bits_of_the_tiles(shape, bias, kernel):
    """`check` has seen none of these operands, and has tried few of these row counts."""
    x, w = operands(*shape)
    b = small_bias(shape[0]) if bias else None
    assert kernel.check(*shape, bias, 0), "cuBLASLt is not used for this weight"
    expected = kernel.tiled(x, w, b, kernel.FALLBACK_TILE)
    for m in (258, 333, 400, 640, 1023, 1025, 1800, 2049, 3333, 4095):
        assert_bits_equal(kernel.cublaslt(x[:m], w, b), expected[:m], f"{m} rows")


def test_another_order_of_summation_shows(kernel):
    """Control of the two tests above: K descending, or in two parts, changes most elements."""
    x, w = cancelling(40, 512, 3072, torch.bfloat16)
    y = kernel.tiled(x, w, None, kernel.FALLBACK_TILE)
    backwards = kernel.tiled(x.flip(1).contiguous(), w.flip(1).contiguous(), None, kernel.FALLBACK_TILE)
    halves = [kernel.tiled(x[:, at], w[:, at], None, kernel.FALLBACK_TILE) for at in (slice(1536), slice(1536, None))]
    for other in (backwards, halves[0] + halves[1]):
        assert (other != y).float().mean() > 0.5


def test_columns_of_a_merged_projection_have_their_own_bits():
    """vLLM merges q, k and v, and gate and up, as does the trainer on a GPU; its reference model does not."""
    x, w = operands(4096, 2048)
    b, sizes = small_bias(4096), [2048, 1024, 1024]
    projections = list(zip(w.split(sizes), b.split(sizes), strict=True))
    for m in (1, 5, 17, 40, 100, 200, 300, 1000):
        parts = [ops.linear(x[:m], *weights) for weights in projections]
        assert_bits_equal(torch.cat(parts, 1), ops.linear(x[:m], w, b), f"{m} rows")


def test_check_finds_a_vendor_gemm_that_splits_k(kernel, monkeypatch):
    probe = kernel.check.__wrapped__  # uncached
    assert probe(*DOWN, False, 0) and probe(*DOWN, True, 0)

    def split(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        half = x.shape[1] // 2
        return torch.mm(x[:, :half], w[:, :half].t()) + torch.mm(x[:, half:], w[:, half:].t())

    monkeypatch.setattr(kernel, "cublaslt", split)
    assert not probe(*DOWN, False, 0)


def test_check_refuses_tiles_that_differ(kernel, monkeypatch):
    tiled = kernel.tiled

    def backwards(x: Tensor, w: Tensor, b: Tensor | None, tile: tuple[int, ...]) -> Tensor:
        return (
            tiled(x, w, b, tile)
            if tile == kernel.FALLBACK_TILE
            else tiled(x.flip(1).contiguous(), w.flip(1).contiguous(), b, tile)
        )

    monkeypatch.setattr(kernel, "tiled", backwards)
    with pytest.raises(UserError, match=r"weight \[256, 3080\] depends on the tile"):
        kernel.check.__wrapped__(256, 3080, False, 0)


def test_check_is_not_run_inside_a_cuda_graph(kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"weight \[48, 80\] was first met inside a CUDA graph"):
        kernel.check.__wrapped__(48, 80, False, 0)


def test_check_leaves_the_generators_alone(kernel):
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert kernel.check.__wrapped__(64, 96, False, 0) in (True, False)
    assert torch.equal(before[0], torch.get_rng_state()) and torch.equal(before[1], torch.cuda.get_rng_state())


def test_the_backward_gets_its_switches_back(kernel):
    """They are process-wide: without split-K some products of the backward would be several times slower."""
    matmul, cuda = torch.backends.cuda.matmul, torch.backends.cuda

    def switches() -> tuple:
        reduced = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k
        return *reduced, cuda.preferred_blas_library()

    before = switches()
    kernel.cublaslt(randn(300, 64, dtype=torch.bfloat16), randn(64, 64, dtype=torch.bfloat16), None)
    assert switches() == before
    with pytest.raises(RuntimeError):
        kernel.cublaslt(randn(300, 64, dtype=torch.bfloat16), randn(64, 65, dtype=torch.bfloat16), None)
    assert switches() == before

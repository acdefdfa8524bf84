"""FlashAttention-3 as `attention` calls it, beyond what tests/ops/test_attention.py asks of every device."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from rlinvariant.bits import assert_bits_equal
from rlinvariant.errors import UserError
from tests import ladders
from tests.ops.sequences import Cache, attend, offsets, operands

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]

SHAPES = ((32, 8, 64), (16, 8, 128), (4, 1, 256))  # heads, kv_heads, head_dim


@pytest.fixture
def kernel() -> ModuleType:
    return importlib.import_module("rlinvariant.kernels.attention")


@pytest.fixture
def flash() -> ModuleType:
    return importlib.import_module("rlinvariant.kernels.flash_attention")


@pytest.fixture
def splits(flash, monkeypatch) -> None:
    """Planted: FlashAttention-3 chooses its splits itself, as in stock vLLM."""
    stock = flash._fa3()

    def varlen(*args, **options):
        return stock.flash_attn_varlen_func(*args, **options | {"num_splits": 0, "scheduler_metadata": None})

    planted = SimpleNamespace(flash_attn_varlen_func=varlen, get_scheduler_metadata=stock.get_scheduler_metadata)
    monkeypatch.setattr(flash, "_fa3", lambda: planted)


@pytest.fixture
def no_floor(flash, monkeypatch) -> None:
    """Planted: FlashAttention-3 is told the length of the longest query as it is."""
    monkeypatch.setattr(flash, "FLOOR", {})


def assert_decode_matches_prefill(shape: tuple[int, int, int], lengths: tuple[int, ...], queries: tuple[int, ...]) -> None:
    q, k, v = operands(sum(lengths), shape)
    cache, out = Cache(k, v, lengths, 16), attend(q, k, v, lengths)
    for n in queries:
        asked = [(b, length - n, length) for b, length in enumerate(lengths)]
        assert_bits_equal(cache.attend(q, asked), cache.expected(out, asked), f"{n} queries of {lengths}")


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_at_8k_matches_prefill(shape):
    """One sequence: where a stock engine would split the keys most."""
    assert_decode_matches_prefill(shape, (8192,), (1, 2, 9, 10, 16, 17, 128, 8191))


@pytest.mark.parametrize("shape", SHAPES)
def test_splits_fail_the_ladder(shape, splits, kernel, monkeypatch):
    """Control."""
    monkeypatch.setattr(kernel, "check", lambda *_, **__: None)
    with pytest.raises(AssertionError):
        assert_decode_matches_prefill(shape, (8192,), (1,))


def test_head_size_64_without_the_floor_fails_the_ladder(no_floor, kernel, monkeypatch):
    """Control: a short longest query takes another tile."""
    monkeypatch.setattr(kernel, "check", lambda *_, **__: None)
    with pytest.raises(AssertionError):
        assert_decode_matches_prefill((32, 8, 64), (1025, 300), (1, 9, 10, 16, 17))


@pytest.mark.parametrize("shape", SHAPES)
def test_check_passes_what_the_ladder_confirms(shape, kernel):
    kernel.check.__wrapped__(*shape, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_check_finds_splits(shape, splits, kernel):
    with pytest.raises(UserError, match="do not have the bits"):
        kernel.check.__wrapped__(*shape, 0)


def test_check_finds_a_missing_floor(no_floor, kernel):
    with pytest.raises(UserError, match="with 32 heads of 64 .8 for keys.*do not have the bits"):
        kernel.check.__wrapped__(32, 8, 64, 0)


def test_check_leaves_the_generators_alone(kernel):
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    kernel.check.__wrapped__(4, 2, 64, 0)
    assert torch.equal(before[0], torch.get_rng_state()) and torch.equal(before[1], torch.cuda.get_rng_state())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last", [1, 17])
def test_a_schedule_made_once_per_step_changes_no_bits(last, shape, kernel):
    """Also with larger bounds and empty sequences at the end, as a CUDA graph has them."""
    lengths, (heads, kv_heads, dim) = (300, 20, 1025, 129), shape
    q, k, v = operands(sum(lengths), shape)
    cache = Cache(k, v, lengths, 16)
    for padding in (0, 4):
        asked = [(b, n - last, n) for b, n in enumerate(lengths)] + [(0, 0, 0)] * padding
        cu, lens = offsets([b - a for _, a, b in asked]), torch.tensor([b for _, _, b in asked], dtype=torch.int32)
        bound = 4096 if padding else max(lengths)
        plan = kernel.schedule(cu, lens, last, bound, heads, kv_heads, dim, 16)
        found = cache.attend(q, asked, max_seqlen_q=last, max_seqlen_k=bound, schedule=plan)
        assert_bits_equal(found, cache.expected(attend(q, k, v, lengths), asked), f"{padding} empty sequences")


def backward_twice(kernel: ModuleType, shape: tuple[int, int, int]) -> list[tuple[Tensor, ...]]:
    lengths = (2048, 700, 1300)
    inputs = operands(sum(lengths), shape)
    return [ladders.gradients(lambda *x: attend(*x, lengths), inputs) for _ in range(2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_long_sequences_are_deterministic(shape, kernel):
    ladders.assert_same(*backward_twice(kernel, shape), "gradients, again")


def test_the_default_backward_is_not_deterministic(kernel, monkeypatch):
    """Control: FlashAttention-2 adds dq atomically unless told otherwise."""
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    try:
        ladders.assert_same(*backward_twice(kernel, (16, 8, 128)), "gradients, again")
    except AssertionError:
        return
    pytest.xfail("blind: the atomic additions fell into the same order twice")


def test_the_backward_leaves_the_deterministic_mode_alone(kernel):
    def modes() -> tuple[bool, bool, bool]:
        fill = torch.utils.deterministic.fill_uninitialized_memory
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), fill

    before = modes()
    ladders.gradients(attend, operands(20, (4, 2, 64)))
    assert modes() == before


def test_a_missing_flash_attention_is_named(flash, monkeypatch):
    flash._fa3.cache_clear()
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn.flash_attn_interface", None)
    with pytest.raises(UserError, match="FlashAttention-3 not found.*install vllm"):
        flash._fa3()

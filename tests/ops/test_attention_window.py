"""Attention with a sliding window, and with bounded scores: the relations of test_attention.py, around the window's edges.

On a CPU; of a GPU: tests/kernels/test_chunked_gpu.py.
"""

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from tests import ladders
from tests.ladders import DTYPES, cpu_only, dtype_name, randn
from tests.ops.sequences import LENGTHS, UNUSED, Cache, offsets, operands

SHAPES = ((4, 2, 64), (3, 3, 80))  # heads, kv_heads, head_dim
# one key; around a vector of cpu.h (16) and multiples of its block of queries (32); all keys
WINDOWS = (1, 2, 16, 17, 64, 65, 127, 128, 4096)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
shapes = pytest.mark.parametrize("shape", SHAPES)
windows = pytest.mark.parametrize("window", WINDOWS)
FORMS = ((7, None), (None, 2.0), (20, 2.0))


def attend(q: Tensor, k: Tensor, v: Tensor, lengths=None, window: int | None = None, softcap: float | None = None) -> Tensor:
    cu = offsets([len(q)] if lengths is None else lengths)
    return ops.attention(q, k, v, cu, q.shape[-1] ** -0.5, None, window, softcap)


@cpu_only
@windows
@shapes
@dtypes
def test_windowed_attention_packed_is_attention_alone(shape, dtype, window):
    lengths = (*LENGTHS, 300)
    q, k, v = operands(sum(lengths), shape, dtype)
    packed = attend(q, k, v, lengths, window)
    for a, b in pairwise(offsets(lengths).tolist()):
        assert_bits_equal(packed[a:b], attend(q[a:b], k[a:b], v[a:b], None, window), f"sequence of {b - a}")
        assert_bits_equal(packed[a:b][:60], attend(q[a:b][:60], k[a:b][:60], v[a:b][:60], None, window), "its first 60")


@cpu_only
@dtypes
def test_a_window_that_covers_everything_gives_the_bits_of_none(dtype):
    q, k, v = operands(sum(LENGTHS), (4, 2, 64), dtype)
    for window in (max(LENGTHS), 4096):
        ours = attend(q, k, v, LENGTHS, window), *ladders.gradients(lambda *x, w=window: attend(*x, LENGTHS, w), (q, k, v))
        assert len(ours) == 4
        plain = attend(q, k, v, LENGTHS), *ladders.gradients(lambda *x: attend(*x, LENGTHS), (q, k, v))
        ladders.assert_same(ours, plain, f"window {window}")
    assert ladders.differs(attend(q, k, v, LENGTHS, max(LENGTHS) - 1), plain[0])


@cpu_only
def test_lanes_are_those_of_absolute_positions():
    """A row is plain attention over the keys of its window, as long as these stand in the same lanes of the sums."""
    window = 40
    q, k, v = operands(200, (4, 2, 64), torch.float32)
    out, moved = attend(q, k, v, None, window), 0
    for n in range(window, 200):
        lo = n - window
        alone = attend(q[lo:n], k[lo:n], v[lo:n])[-1]
        if lo % 16 == 0:
            assert_bits_equal(out[n - 1], alone, f"keys {lo} to {n}")
        else:
            moved += ladders.differs(out[n - 1], alone)
    assert moved > 50  # control: lanes counted from the window's first key would show


@cpu_only
@pytest.mark.parametrize("window", [1, 5, 16, 40, 65, 100])
@dtypes
def test_windowed_decode_matches_prefill(dtype, window):
    """Windows shorter than, as long as and longer than the sequences, at each of their lengths."""
    lengths = (40, 7, 65)
    q, k, v = operands(sum(lengths), SHAPES[0], dtype)
    cache, out = Cache(k, v, lengths, 16), attend(q, k, v, lengths, window)
    for i in range(max(lengths)):
        asked = [(b, i, i + 1) for b, n in enumerate(lengths) if i < n]
        assert_bits_equal(cache.attend(q, asked, window=window), cache.expected(out, asked), f"token {i} of each sequence")


@cpu_only
@pytest.mark.parametrize("window", [1, 128, 129, 1000, 1024])
@dtypes
def test_windowed_decode_matches_prefill_of_long_sequences(dtype, window):
    """Also while a prefill joins, and beside an empty sequence."""
    lengths = (1025, 130)
    q, k, v = operands(sum(lengths), SHAPES[0], dtype)
    cache, out = Cache(k, v, lengths, 32), attend(q, k, v, lengths, window)
    for n in (1, 16, 127, 128, 129, 130, 999, 1000, 1001, 1024, 1025):
        for asked in ([(0, n - 1, n)], [(1, 0, 130), (0, n - 1, n)], [(0, max(0, n - 17), n), (0, 0, 0)]):
            assert_bits_equal(cache.attend(q, asked, window=window), cache.expected(out, asked), f"key-value length {n}")


def chunks(rng: random.Random, lengths: list[int]):
    """Sequences prefilled in any chunks, in any order and company: what is asked of each call."""
    done = [0] * len(lengths)
    while pending := [b for b, n in enumerate(lengths) if done[b] < n]:
        chosen = rng.sample(pending, rng.randint(1, len(pending)))
        asked = [(b, done[b], rng.randint(done[b] + 1, lengths[b])) for b in chosen]
        yield asked
        for b, _, last in asked:
            done[b] = last


@cpu_only
@pytest.mark.parametrize("page", [1, 5, 16])
@shapes
@dtypes
def test_windowed_attention_is_chunk_invariant(page, shape, dtype):
    """Pages that every later query has left behind are freed: in the table is a page that holds what must not be read."""
    rng = random.Random(f"{page} {shape} {dtype}")
    for _ in range(3):
        lengths, window = [rng.randint(1, 90) for _ in range(rng.randint(1, 5))], rng.choice((1, 3, 16, 30, 64, 90))
        q, k, v = operands(sum(lengths), shape, dtype)
        cache, out = Cache(k, v, lengths, page), attend(q, k, v, lengths, window)
        null = int(cache.table[0, -1])
        assert (cache.pages[null] == UNUSED[k.device.type]).all() or cache.pages[null].isnan().all()
        for asked in chunks(rng, lengths):
            for b, first, _ in asked:
                cache.table[b, : max(0, first - window + 1) // page] = null
            found = cache.attend(q, asked, window=window)
            assert_bits_equal(found, cache.expected(out, asked), f"{asked} of {lengths}, window {window}")


@cpu_only
def test_pages_before_the_window_are_not_looked_up():
    """Their numbers lie outside the pool by terabytes: to read there would end the process."""
    q, k, v = operands(100, (2, 1, 64))
    cache, out = Cache(k, v, (100,), 16), attend(q, k, v, None, 20)
    for first, last in ((60, 100), (99, 100)):
        cache.table[0, : (first - 19) // 16] = 2**30
        assert_bits_equal(cache.attend(q, [(0, first, last)], window=20), out[first:last], f"queries {first} to {last}")


@cpu_only
def test_the_check_of_chunks_finds_a_window_off_by_one_and_a_page_freed_too_early():
    """Control."""
    q, k, v = operands(100, (2, 1, 64))
    cache, out = Cache(k, v, (100,), 16), attend(q, k, v, None, 20)
    asked = [(0, 60, 100)]
    assert_bits_equal(cache.attend(q, asked, window=20), out[60:], "the window")
    for wrong in (19, 21):
        assert ladders.differs(cache.attend(q, asked, window=wrong), out[60:])
    cache.table[0, :2] = cache.table[0, -1]  # keys 0 to 31: the first query attends to 41 on
    assert_bits_equal(cache.attend(q, asked, window=20), out[60:], "two pages freed")
    cache.table[0, 2] = cache.table[0, -1]
    assert ladders.differs(cache.attend(q, asked, window=20), out[60:])


@cpu_only
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@dtypes
def test_keys_before_the_window_do_not_leak(value, dtype):
    q, k, v = operands(150, (4, 2, 64), dtype)
    clean, dirty = attend(q, k, v, (100, 50), 20), [x.clone() for x in (k, v)]
    for x in dirty:
        x[30] = value
    out = attend(q, *dirty, (100, 50), 20)
    assert_bits_equal(out[:30], clean[:30], "before")
    assert_bits_equal(out[50:], clean[50:], "from the first row whose window has left it")
    assert all(ladders.differs(out[i], clean[i]) for i in range(30, 50))  # control


@cpu_only
@dtypes
def test_bounded_decode_matches_prefill(dtype):
    lengths = (40, 70)
    q, k, v = operands(sum(lengths), (4, 2, 80), dtype)
    for window in (None, 20):
        form = {"window": window, "softcap": 1.5}
        cache, out = Cache(k, v, lengths, 5), attend(q, k, v, lengths, **form)
        for i in range(max(lengths)):
            asked = [(b, i, i + 1) for b, n in enumerate(lengths) if i < n]
            assert_bits_equal(cache.attend(q, asked, **form), cache.expected(out, asked), f"token {i} of each sequence")
        assert ladders.differs(cache.attend(q, asked, window=window), cache.expected(out, asked))


@cpu_only
@pytest.mark.parametrize("form", FORMS)
@dtypes
def test_gradients_packed_are_gradients_alone_for_any_number_of_threads(dtype, form):
    lengths = (20, 1, 45)
    q, k, v = operands(sum(lengths), (4, 2, 80), dtype)
    dout = randn(*q.shape, dtype=dtype, seed=3)

    def gradients(part: slice, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        leaves = [x[part].clone().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves, lengths, *form), leaves, dout[part])

    packed = gradients(slice(None), lengths)
    for a, b in pairwise(offsets(lengths).tolist()):
        ladders.assert_same(gradients(slice(a, b), (b - a,)), tuple(g[a:b] for g in packed), f"gradients of rows {a} to {b}")
    ladders.assert_thread_invariant(lambda *x: ladders.gradients(lambda *y: attend(*y, lengths, *form), x), q, k, v)


@cpu_only
@dtypes
def test_windowed_gradients_are_deterministic(dtype):
    lengths = (*LENGTHS, 300)
    inputs = operands(sum(lengths), SHAPES[0], dtype)
    once, again = (ladders.gradients(lambda *x: attend(*x, lengths, 65), inputs) for _ in range(2))
    ladders.assert_same(once, again, "gradients, again")


@pytest.mark.parametrize("form", [{"window": 0}, {"window": -3}, {"softcap": 0.0}, {"softcap": float("nan")}])
def test_other_windows_and_caps_are_refused(form):
    q, k, v = operands(4, (2, 1, 64))
    with pytest.raises(ValueError, match="expected positive numbers"):
        attend(q, k, v, **form)
    with pytest.raises(ValueError, match="expected positive numbers"):
        Cache(k, v, (4,), 16).attend(q, [(0, 0, 4)], **form)


@cpu_only
def test_a_windowed_call_is_opaque():
    q, k, v = operands(9, (2, 1, 64))
    cu, lens = offsets([4, 5]), torch.tensor([4, 5], dtype=torch.int32)
    ladders.assert_opaque(ops.attention, q, k, v, cu, 0.2, 5, 3, None)
    cache = Cache(k, v, (4, 5), 16)
    paged = lambda *x: ops.paged_attention(*x, max_seqlen_q=5, max_seqlen_k=5, window=3)  # noqa: E731
    ladders.assert_opaque(paged, q, cache.pages, cache.table, cu, lens, 0.2)

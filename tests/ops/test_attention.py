from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from tests import ladders
from tests.ladders import DTYPES, LADDER, dtype_name, randn

SHAPES = ((2, 1, 32), (4, 2, 64), (3, 3, 80), (4, 1, 96), (2, 2, 128))  # heads, kv_heads, head_dim
LENGTHS = (3, 127, 1, 128, 33, 129)  # 127-129: FlashAttention's tile; 33: one query more than cpu.c's block
NAN = float("nan")


def offsets(lengths: tuple[int, ...] | list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def operands(tokens: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, dim = shape
    return (
        randn(tokens, heads, dim, dtype=dtype),
        randn(tokens, kv_heads, dim, dtype=dtype, seed=1),
        randn(tokens, kv_heads, dim, dtype=dtype, seed=2),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | list[int] | None = None) -> Tensor:
    return ops.attention(q, k, v, offsets([len(q)] if lengths is None else lengths), q.shape[-1] ** -0.5)


def stock(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | list[int] | None = None) -> Tensor:
    out = []
    for a, b in pairwise(offsets([len(q)] if lengths is None else lengths).tolist()):
        one = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


class Cache:
    """Keys and values of sequences in pages of a pool, in a random order; every slot that no token fills is NaN."""

    def __init__(self, k: Tensor, v: Tensor, lengths: tuple[int, ...] | list[int], page: int, seed: int = 0) -> None:
        widths = [-(-n // page) for n in lengths]
        order = torch.randperm(sum(widths) + 3, generator=torch.Generator().manual_seed(seed)).int()
        self.pages = k.new_full((len(order), k.shape[1], page, 2 * k.shape[2]), NAN)
        self.table = torch.full((len(lengths), max(widths, default=0) + 1), int(order[-1]), dtype=torch.int32)
        self.starts, used = offsets(lengths).tolist(), 0
        for b, (start, width, n) in enumerate(zip(self.starts, widths, lengths, strict=False)):
            self.table[b, :width] = order[used : used + width]
            used += width
            for j in range(n):
                self.pages[self.table[b, j // page], :, j % page] = torch.cat([k[start + j], v[start + j]], -1)

    def attend(self, q: Tensor, asked: list[tuple[int, int, int]]) -> Tensor:
        """Queries first..last of each (sequence, first, last), in one call; keys from last on have not been written yet."""
        rows = torch.cat([q[self.starts[b] + first : self.starts[b] + last] for b, first, last in asked])
        table = self.table[[b for b, _, _ in asked]]
        lens = torch.tensor([last for _, _, last in asked], dtype=torch.int32)
        cu = offsets([last - first for _, first, last in asked])
        return ops.paged_attention(rows, self.pages, table, cu, lens, q.shape[-1] ** -0.5)

    def expected(self, out: Tensor, asked: list[tuple[int, int, int]]) -> Tensor:
        return torch.cat([out[self.starts[b] + first : self.starts[b] + last] for b, first, last in asked])


def assert_prefix_invariant(f: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Later tokens of a sequence change nothing: f(x[:m]) = f(x)[:m]."""
    full = f(q, k, v)
    for m in (*LADDER, 1023, 1025):
        if m <= len(q):
            assert_bits_equal(f(q[:m], k[:m], v[:m]), full[:m], f"the first {m} tokens")


def keys_before_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Planted fault: the order of keys in a row's sums depends on how many tokens follow, as a split-KV kernel's does."""
    out = attend(q, k, v)
    if len(q) % 2:
        s = torch.einsum("hd,jhd->hj", q[-1], k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * q.shape[-1] ** -0.5
        p = torch.softmax(s.flip(1).float(), 1).flip(1)
        out[-1] = torch.einsum("hj,jhd->hd", p, v.repeat_interleave(q.shape[1] // v.shape[1], 1).float()).to(q.dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_packed_is_attention_alone(shape, dtype):
    q, k, v = operands(sum(LENGTHS), shape, dtype)
    packed = attend(q, k, v, LENGTHS)
    for a, b in pairwise(offsets(LENGTHS).tolist()):
        assert_bits_equal(packed[a:b], attend(q[a:b], k[a:b], v[a:b]), f"sequence of {b - a}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_attention_is_batch_invariant(dtype):
    """Every number of sequences of the ladder: 44 and more at once is where vllm #51187 changed."""
    q, k, v = operands(3 * 1024, (2, 1, 32), dtype)
    full = attend(q, k, v, [3] * 1024)
    for m in LADDER:
        assert_bits_equal(attend(q[: 3 * m], k[: 3 * m], v[: 3 * m], [3] * m), full[: 3 * m], f"{m} sequences")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_attention_is_prefix_invariant(dtype):
    assert_prefix_invariant(attend, *operands(1025, (2, 1, 32), dtype))


def test_prefix_control():
    inputs = [operands(257, shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]
    ladders.assert_control(assert_prefix_invariant, keys_before_queries, [(stock, x) for x in inputs])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("page", [16, 5])
def test_paged_attention_is_attention(page, shape, dtype):
    q, k, v = operands(sum(LENGTHS), shape, dtype)
    cache, everything = Cache(k, v, LENGTHS, page), [(b, 0, n) for b, n in enumerate(LENGTHS)]
    assert_bits_equal(cache.attend(q, everything), attend(q, k, v, LENGTHS), "prefill")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_attention_decode_matches_prefill(dtype):
    lengths = (40, 7, 65)
    q, k, v = operands(sum(lengths), (4, 2, 64), dtype)
    cache, out = Cache(k, v, lengths, 16), attend(q, k, v, lengths)
    for i in range(max(lengths)):
        asked = [(b, i, i + 1) for b, n in enumerate(lengths) if i < n]
        assert_bits_equal(cache.attend(q, asked), cache.expected(out, asked), f"token {i} of each sequence")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_attention_decode_matches_prefill_at_tile_edges(dtype):
    """Alone, and beside a whole prefill, whose threads and buffers it shares."""
    lengths = (1025, 130)
    q, k, v = operands(sum(lengths), (2, 1, 32), dtype)
    cache, out = Cache(k, v, lengths, 32), attend(q, k, v, lengths)
    for n in (1, 15, 16, 17, 127, 128, 129, 1023, 1024, 1025):
        for asked in ([(0, n - 1, n)], [(1, 0, 130), (0, n - 1, n)]):
            assert_bits_equal(cache.attend(q, asked), cache.expected(out, asked), f"key-value length {n}")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    page=st.sampled_from([1, 5, 16]),
    shape=st.sampled_from(SHAPES[:3]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_attention_is_chunk_invariant(lengths, page, shape, dtype, data):
    """Sequences prefilled in any chunks, in any order and company, give the rows of one packed call."""
    q, k, v = operands(sum(lengths), shape, dtype)
    cache, out, done = Cache(k, v, lengths, page), attend(q, k, v, lengths), [0] * len(lengths)
    while pending := [b for b, n in enumerate(lengths) if done[b] < n]:
        chosen = data.draw(st.lists(st.sampled_from(pending), min_size=1, unique=True))
        asked = [(b, done[b], data.draw(st.integers(done[b] + 1, lengths[b]))) for b in chosen]
        assert_bits_equal(cache.attend(q, asked), cache.expected(out, asked), f"{asked} of {lengths}")
        for b, _, last in asked:
            done[b] = last


def test_paging_check_finds_a_wrong_page_and_a_late_key():
    """Control: one page of the table swapped, or one key too many, is seen."""
    q, k, v = operands(40, (2, 1, 32))
    cache, out = Cache(k, v, (40,), 16), attend(q, k, v)
    cache.table[0, :2] = cache.table[0, :2].flip(0)
    assert ladders.differs(cache.attend(q, [(0, 0, 40)]), out)
    assert ladders.differs(Cache(k, v, (40,), 16).attend(q, [(0, 0, 20)]), out[1:21])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_later_keys_and_other_sequences_do_not_leak(dtype):
    lengths = (50, 70, 20)
    q, k, v = operands(sum(lengths), (4, 2, 64), dtype)
    clean = attend(q, k, v, lengths)
    for value in (NAN, float("inf"), 3e38):
        for poisoned in ((k,), (v,), (q, k, v)):
            for first, last in ((0, 50), (80, 120), (119, 140)):  # a sequence; the end of one; an end and all of the next
                dirty = [x.clone() for x in (q, k, v)]
                for x, original in zip(dirty, (q, k, v), strict=True):
                    if any(original is p for p in poisoned):
                        x[first:last] = value
                out = attend(*dirty, lengths)
                assert_bits_equal(out[:first], clean[:first], f"{value} in rows {first} to {last}: rows before")
                untouched = 50 if last == 50 else 120 if last == 120 else 140
                assert_bits_equal(out[untouched:], clean[untouched:], f"{value} in rows {first} to {last}: later sequences")
    k = k.clone()
    k[10] = NAN
    assert attend(q, k, v, lengths)[10:50].isnan().all()  # control: a NaN key reaches the rows that attend to it


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_grouped_queries_have_the_bits_of_repeated_keys(dtype):
    q, k, v = operands(60, (6, 2, 64), dtype)
    repeated = attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), (20, 40))
    assert_bits_equal(attend(q, k, v, (20, 40)), repeated, "groups of 3")
    assert ladders.differs(attend(q, k.flip(1), v.flip(1), (20, 40)), repeated)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_matches_float64(shape, dtype):
    lengths = (33, 1, 70)
    inputs = operands(sum(lengths), shape, dtype)
    for grad in (False, True):
        ladders.assert_as_accurate(*(lambda *x, f=f: f(*x, lengths) for f in (attend, stock, stock)), *inputs, grad=grad)


def test_attention_is_accurate_over_long_sequences():
    inputs = operands(1500, (1, 1, 32))
    ladders.assert_as_accurate(attend, stock, stock, *inputs)
    ladders.assert_as_accurate(attend, stock, stock, *inputs, grad=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_scale_multiplies_the_scores(dtype):
    q, k, v = operands(20, (2, 1, 32), dtype)
    half = ops.attention(q, k, v, offsets([20]), 0.5 * 32**-0.5)
    assert_bits_equal(ops.attention(q / 2, k, v, offsets([20]), 32**-0.5), half, "q / 2")  # a power of two is exact
    assert_bits_equal(attend(q, k, v)[:1], v[:1].expand(-1, 2, -1), "one key: its value")


def test_large_scores_do_not_overflow():
    q, k, v = operands(40, (2, 1, 32))
    out = attend(q * 1e4, k * 1e4, v)
    torch.testing.assert_close(out, stock(q.double() * 1e4, k.double() * 1e4, v.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_attention_gradients_packed_are_gradients_alone(dtype):
    lengths = (20, 1, 33)
    q, k, v = operands(sum(lengths), (4, 2, 80), dtype)
    dout = randn(*q.shape, dtype=dtype, seed=3)

    def gradients(part: slice, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        leaves = [x[part].clone().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves, lengths), leaves, dout[part])

    packed = gradients(slice(None), lengths)
    for a, b in pairwise(offsets(lengths).tolist()):
        ladders.assert_same(gradients(slice(a, b), (b - a,)), tuple(g[a:b] for g in packed), f"gradients of rows {a} to {b}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_attention_is_thread_invariant(dtype):
    inputs = operands(sum(LENGTHS), (4, 2, 64), dtype)

    def f(*x: Tensor) -> Tensor:
        return attend(*x, LENGTHS)

    ladders.assert_thread_invariant(f, *inputs)
    ladders.assert_thread_invariant(lambda *x: ladders.gradients(f, x), *inputs)
    ladders.assert_same(ladders.gradients(f, inputs), ladders.gradients(f, inputs), "gradients, again")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_strides_change_no_bits(dtype):
    q, k, v = operands(50, (4, 2, 64), dtype)
    lengths, out = (20, 30), attend(q, k, v, (20, 30))
    fused = torch.cat([x.flatten(1) for x in (q, k, v)], 1).split([256, 128, 128], 1)  # views of one projection
    assert_bits_equal(attend(*(x.unflatten(1, (-1, 64)) for x in fused), lengths), out, "fused q, k, v")
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert_bits_equal(attend(*heads_first, lengths), out, "[H, T, D] in memory")
    wide = ops.attention(q, k, v, offsets(lengths).long(), 0.125)
    assert_bits_equal(wide, out, "int64 offsets")
    cache, asked = Cache(k, v, lengths, 16), [(0, 0, 20), (1, 0, 30)]
    cache.pages = cache.pages.transpose(1, 2).contiguous().transpose(1, 2)  # vLLM's other layout: heads inside a slot
    assert_bits_equal(cache.attend(q, asked), out, "[pages, page, heads, 2 D] in memory")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_gradients_of_any_stride_have_the_same_bits(dtype):
    q, k, v = operands(30, (2, 1, 32), dtype)

    def gradients(dout: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves), leaves, dout)

    dout = randn(*q.shape, dtype=dtype, seed=3)
    transposed = dout.transpose(0, 1).contiguous().transpose(0, 1)
    ladders.assert_same(gradients(transposed), gradients(dout), "dout [H, T, D] in memory")
    ladders.assert_same(gradients(torch.ones((), dtype=dtype).expand(q.shape)), gradients(torch.ones_like(q)), "of a sum")


def test_empty_sequences_and_no_tokens():
    q, k, v = operands(5, (2, 1, 32))
    assert_bits_equal(attend(q, k, v, (0, 2, 0, 3, 0)), attend(q, k, v, (2, 3)), "empty sequences")
    assert attend(q[:0], k[:0], v[:0], ()).shape == (0, 2, 32)
    assert attend(q[:0], k[:0], v[:0], (0,)).shape == (0, 2, 32)
    assert Cache(k, v, (5,), 16).attend(q, [(0, 2, 2)]).shape == (0, 2, 32)
    assert all(not g.numel() for g in ladders.gradients(lambda *x: attend(*x, (0,)), (q[:0], k[:0], v[:0])))


@pytest.mark.parametrize(
    ("q", "k", "v", "offsets"),
    [
        (randn(4, 3, 32), randn(4, 2, 32), randn(4, 2, 32), [0, 4]),  # heads no multiple of kv_heads
        (randn(4, 2, 32), randn(4, 1, 32), randn(4, 2, 32), [0, 4]),
        (randn(4, 2, 32), randn(5, 1, 32), randn(5, 1, 32), [0, 4]),
        (randn(4, 2, 32), randn(4, 1, 64), randn(4, 1, 64), [0, 4]),
        (randn(4, 2, 32), randn(4, 1, 32).bfloat16(), randn(4, 1, 32), [0, 4]),
        (*(randn(4, 1, 32).double() for _ in range(3)), [0, 4]),
        (*(randn(4, 1, 32) for _ in range(3)), [0, 3]),
        (*(randn(4, 1, 32) for _ in range(3)), [0, 5]),
        (*(randn(4, 1, 32) for _ in range(3)), [2, 4]),
        (*(randn(4, 1, 32) for _ in range(3)), [0, 3, 2, 4]),
    ],
)
def test_other_shapes_and_dtypes_are_refused(q, k, v, offsets):
    with pytest.raises((ValueError, TypeError)):
        ops.attention(q, k, v, torch.tensor(offsets, dtype=torch.int32), 1.0)


@pytest.mark.parametrize(
    ("q", "cache"),
    [
        (randn(4, 2, 32), randn(3, 1, 16, 32)),
        (randn(4, 2, 32), randn(3, 1, 16, 64).bfloat16()),
        (randn(4, 3, 32), randn(3, 2, 16, 64)),  # heads no multiple of kv_heads
        (randn(4, 2, 32), randn(3, 1, 64, 16).transpose(2, 3)),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(q, cache):
    with pytest.raises((ValueError, TypeError)):
        ops.paged_attention(q, cache, torch.zeros(1, 1, dtype=torch.int32), offsets([4]), torch.tensor([4]), 1.0)


def test_attention_is_opaque():
    q, k, v = operands(9, (2, 1, 32))
    ladders.assert_opaque(ops.attention, torch.ops.rlinvariant.attention.default, q, k, v, offsets([4, 5]), 0.2)
    cache = Cache(k, v, (4, 5), 16)
    ladders.assert_opaque(
        ops.paged_attention, torch.ops.rlinvariant.paged_attention.default,
        q, cache.pages.nan_to_num(), cache.table, offsets([4, 5]), torch.tensor([4, 5], dtype=torch.int32), 0.2,
    )  # fmt: skip

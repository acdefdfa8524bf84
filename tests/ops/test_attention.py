import random
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from rlinvariant.errors import UserError
from tests import ladders
from tests.ladders import DTYPES, LADDER, cpu_only, gpu_only, matrix_dtypes, per_device, randn
from tests.ops.sequences import BF16, GPU_SHAPES, INF, LENGTHS, NAN, SHAPES, Cache, attend, offsets, operands

shapes = per_device("shape, dtype", product(SHAPES, DTYPES), product(GPU_SHAPES, [BF16]))
decode_shapes = per_device("shape, dtype", product([(4, 2, 64)], DTYPES), product(GPU_SHAPES, [BF16]))


def stock(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | list[int] | None = None) -> Tensor:
    out = []
    for a, b in pairwise(offsets([len(q)] if lengths is None else lengths).tolist()):
        one = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


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


@shapes
def test_attention_packed_is_attention_alone(shape, dtype):
    q, k, v = operands(sum(LENGTHS), shape, dtype)
    packed = attend(q, k, v, LENGTHS)
    for a, b in pairwise(offsets(LENGTHS).tolist()):
        assert_bits_equal(packed[a:b], attend(q[a:b], k[a:b], v[a:b]), f"sequence of {b - a}")


@decode_shapes
def test_attention_is_batch_invariant(shape, dtype):
    """Every number of sequences of the ladder: 44 and more at once is where vllm #51187 changed."""
    q, k, v = operands(3 * 1024, shape, dtype)
    full = attend(q, k, v, [3] * 1024)
    for m in (*LADDER, 44, 48, 56):
        assert_bits_equal(attend(q[: 3 * m], k[: 3 * m], v[: 3 * m], [3] * m), full[: 3 * m], f"{m} sequences")


@decode_shapes
def test_attention_is_prefix_invariant(shape, dtype):
    assert_prefix_invariant(attend, *operands(1025, shape, dtype))


@cpu_only  # of a GPU: tests/kernels/test_attention.py
def test_prefix_control():
    inputs = [operands(257, shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]
    ladders.assert_control(assert_prefix_invariant, keys_before_queries, [(stock, x) for x in inputs])


@per_device("page, shape, dtype", product((16, 5), SHAPES, DTYPES), product((16, 32, 128), GPU_SHAPES, [BF16]))
def test_paged_attention_is_attention(page, shape, dtype):
    q, k, v = operands(sum(LENGTHS), shape, dtype)
    cache, everything = Cache(k, v, LENGTHS, page), [(b, 0, n) for b, n in enumerate(LENGTHS)]
    assert_bits_equal(cache.attend(q, everything), attend(q, k, v, LENGTHS), "prefill")


@decode_shapes
def test_attention_decode_matches_prefill(shape, dtype):
    lengths = (40, 7, 65)
    q, k, v = operands(sum(lengths), shape, dtype)
    cache, out = Cache(k, v, lengths, 16), attend(q, k, v, lengths)
    for i in range(max(lengths)):
        asked = [(b, i, i + 1) for b, n in enumerate(lengths) if i < n]
        assert_bits_equal(cache.attend(q, asked), cache.expected(out, asked), f"token {i} of each sequence")


@decode_shapes
def test_attention_decode_matches_prefill_at_tile_edges(shape, dtype):
    """Alone, and while an unrelated prefill joins, whose threads, buffers and tiles it shares."""
    lengths = (1025, 130)
    q, k, v = operands(sum(lengths), shape, dtype)
    cache, out = Cache(k, v, lengths, 32), attend(q, k, v, lengths)
    for n in (1, 15, 16, 17, 127, 128, 129, 1023, 1024, 1025):
        for asked in ([(0, n - 1, n)], [(1, 0, 130), (0, n - 1, n)]):
            assert_bits_equal(cache.attend(q, asked), cache.expected(out, asked), f"key-value length {n}")


@decode_shapes
def test_attention_does_not_depend_on_the_number_of_queries(shape, dtype):
    """The last rows of a sequence, 1 to 129 at once: FlashAttention-3 takes another tile from 9 to 10 and from 16 to 17."""
    lengths = (1025, 300)
    q, k, v = operands(sum(lengths), shape, dtype)
    cache, out = Cache(k, v, lengths, 16), attend(q, k, v, lengths)
    for n in (*range(1, 19), 31, 32, 33, 63, 64, 65, 127, 128, 129):
        for asked in ([(0, 1025 - n, 1025)], [(1, 300 - n, 300), (0, 1024, 1025)]):
            assert_bits_equal(cache.attend(q, asked), cache.expected(out, asked), f"{n} queries")


@decode_shapes
def test_decode_does_not_depend_on_the_number_of_sequences(shape, dtype):
    """Bits of vLLM changed from 44 sequences at once (vllm #51187); 64 is a common size of a captured batch."""
    lengths = [1 + (37 * i) % 150 for i in range(65)]
    q, k, v = operands(sum(lengths), shape, dtype)
    cache, out = Cache(k, v, lengths, 16), attend(q, k, v, lengths)
    for m in (1, 2, 16, 43, 44, 45, 48, 63, 64, 65):
        asked = [(b, n - 1, n) for b, n in enumerate(lengths[:m])]
        assert_bits_equal(cache.attend(q, asked), cache.expected(out, asked), f"{m} sequences")


@decode_shapes
def test_bounds_and_empty_sequences_change_no_bits(shape, dtype):
    """A CUDA graph has such batches: the longest lengths are bounds, and sequences of no queries fill a batch up."""
    lengths = (300, 41)
    q, k, v = operands(sum(lengths), shape, dtype)
    cache, out, scale = Cache(k, v, lengths, 16), attend(q, k, v, lengths), shape[2] ** -0.5
    for bound in (300, 512, 4096):
        assert_bits_equal(ops.attention(q, k, v, offsets(lengths), scale, bound), out, f"at most {bound} tokens")
        for asked in ([(0, 299, 300), (1, 40, 41), (0, 0, 0), (1, 0, 0)], [(0, 0, 300), (1, 5, 5), (1, 30, 41)]):
            found = cache.attend(q, asked, max_seqlen_q=bound, max_seqlen_k=bound)
            assert_bits_equal(found, cache.expected(out, asked), f"{asked}, at most {bound} tokens")


@per_device(
    "page, longest, shape, dtype",
    product((1, 5, 16), [70], SHAPES[:3], DTYPES),
    product((16, 128), [300], GPU_SHAPES, [BF16]),
)
def test_attention_is_chunk_invariant(page, longest, shape, dtype):
    """Sequences prefilled in any chunks, in any order and company, give the rows of one packed call."""
    rng = random.Random(f"{page} {shape} {dtype}")
    for _ in range(3):
        lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, 5))]
        q, k, v = operands(sum(lengths), shape, dtype)
        cache, out, done = Cache(k, v, lengths, page), attend(q, k, v, lengths), [0] * len(lengths)
        while pending := [b for b, n in enumerate(lengths) if done[b] < n]:
            chosen = rng.sample(pending, rng.randint(1, len(pending)))
            asked = [(b, done[b], rng.randint(done[b] + 1, lengths[b])) for b in chosen]
            assert_bits_equal(cache.attend(q, asked), cache.expected(out, asked), f"{asked} of {lengths}")
            for b, _, last in asked:
                done[b] = last


def test_paging_check_finds_a_wrong_page_and_a_late_key():
    """Control: one page of the table swapped, or one key too many, is seen."""
    q, k, v = operands(40, (2, 1, 64))
    cache, out = Cache(k, v, (40,), 16), attend(q, k, v)
    cache.table[0, :2] = cache.table[0, :2].flip(0)
    assert ladders.differs(cache.attend(q, [(0, 0, 40)]), out)
    assert ladders.differs(Cache(k, v, (40,), 16).attend(q, [(0, 0, 20)]), out[1:21])


@per_device(
    "value, poisoned, dtype",
    product((NAN, INF, 3e38), ("k", "v", "qkv"), DTYPES),
    [(NAN, "k", BF16), (INF, "k", BF16), *product([3e38], ("k", "v", "qkv"), [BF16])],
)
def test_later_keys_and_other_sequences_do_not_leak(value, poisoned, dtype):
    lengths = (50, 70, 20)
    q, k, v = operands(sum(lengths), (4, 2, 64), dtype)
    clean = attend(q, k, v, lengths)
    for first, last in ((0, 50), (80, 120), (119, 140)):  # a sequence; the end of one; an end and all of the next
        dirty = [x.clone() for x in (q, k, v)]
        for name, x in zip("qkv", dirty, strict=True):
            if name in poisoned:
                x[first:last] = value
        out = attend(*dirty, lengths)
        assert_bits_equal(out[:first], clean[:first], f"{value} in rows {first} to {last}: rows before")
        untouched = 50 if last == 50 else 120 if last == 120 else 140
        assert_bits_equal(out[untouched:], clean[untouched:], f"{value} in rows {first} to {last}: later sequences")


@matrix_dtypes
def test_a_nan_key_reaches_the_rows_that_attend_to_it(dtype):
    """Control of the test above."""
    q, k, v = operands(70, (4, 2, 64), dtype)
    k[10] = NAN
    broken = attend(q, k, v, (50, 20)).isnan()
    assert broken[10:50].all() and not broken[:10].any() and not broken[50:].any()


@matrix_dtypes
def test_grouped_queries_have_the_bits_of_repeated_keys(dtype):
    q, k, v = operands(60, (6, 2, 64), dtype)
    repeated = attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), (20, 40))
    assert_bits_equal(attend(q, k, v, (20, 40)), repeated, "groups of 3")
    assert ladders.differs(attend(q, k.flip(1), v.flip(1), (20, 40)), repeated)


@matrix_dtypes
def test_the_scale_multiplies_the_scores(dtype):
    q, k, v = operands(20, (2, 1, 64), dtype)
    half = ops.attention(q, k, v, offsets([20]), 0.5 * 64**-0.5)
    assert_bits_equal(ops.attention(q / 2, k, v, offsets([20]), 64**-0.5), half, "q / 2")  # a power of two is exact
    assert_bits_equal(attend(q, k, v)[:1], v[:1].expand(-1, 2, -1), "one key: its value")


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=ladders.dtype_name)
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


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=ladders.dtype_name)
def test_attention_is_thread_invariant(dtype):
    inputs = operands(sum(LENGTHS), (4, 2, 64), dtype)

    def f(*x: Tensor) -> Tensor:
        return attend(*x, LENGTHS)

    ladders.assert_thread_invariant(f, *inputs)
    ladders.assert_thread_invariant(lambda *x: ladders.gradients(f, x), *inputs)


@decode_shapes
def test_attention_gradients_are_deterministic(shape, dtype):
    lengths = (*LENGTHS, 300)
    inputs = operands(sum(lengths), shape, dtype)
    once, again = (ladders.gradients(lambda *x: attend(*x, lengths), inputs) for _ in range(2))
    ladders.assert_same(once, again, "gradients, again")


@matrix_dtypes
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


@matrix_dtypes
def test_gradients_of_any_stride_have_the_same_bits(dtype):
    q, k, v = operands(30, (2, 1, 64), dtype)

    def gradients(dout: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*leaves), leaves, dout)

    dout = randn(*q.shape, dtype=dtype, seed=3)
    transposed = dout.transpose(0, 1).contiguous().transpose(0, 1)
    ladders.assert_same(gradients(transposed), gradients(dout), "dout [H, T, D] in memory")
    ladders.assert_same(gradients(torch.ones((), dtype=dtype).expand(q.shape)), gradients(torch.ones_like(q)), "of a sum")


def test_empty_sequences_and_no_tokens():
    q, k, v = operands(5, (2, 1, 64))
    assert_bits_equal(attend(q, k, v, (0, 2, 0, 3, 0)), attend(q, k, v, (2, 3)), "empty sequences")
    assert attend(q[:0], k[:0], v[:0], ()).shape == (0, 2, 64)
    assert attend(q[:0], k[:0], v[:0], (0,)).shape == (0, 2, 64)
    assert Cache(k, v, (5,), 16).attend(q, [(0, 2, 2)]).shape == (0, 2, 64)
    assert all(not g.numel() for g in ladders.gradients(lambda *x: attend(*x, (0,)), (q[:0], k[:0], v[:0])))


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((4, 3, 64), (4, 2, 64), (4, 2, 64)),  # heads no multiple of kv_heads
        ((4, 2, 64), (4, 1, 64), (4, 2, 64)),
        ((4, 2, 64), (5, 1, 64), (5, 1, 64)),
        ((4, 2, 64), (4, 1, 128), (4, 1, 128)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v):
    with pytest.raises(ValueError, match="do not fit"):
        ops.attention(*(randn(*shape, dtype=BF16) for shape in (q, k, v)), offsets([4]), 1.0)


@per_device("dtypes", [(torch.float64,) * 3], [(torch.float64,) * 3, (torch.float32,) * 3])
def test_other_dtypes_are_refused_by_name(dtypes):
    with pytest.raises((ValueError, TypeError), match=str(dtypes[0])[6:]):
        ops.attention(*(randn(4, 1, 64, dtype=dtype) for dtype in dtypes), offsets([4]), 1.0)


def test_mixed_dtypes_are_refused():
    q, k, v = operands(4, (2, 1, 64))
    with pytest.raises(ValueError):
        ops.attention(q, k.float(), v, offsets([4]), 1.0)


@gpu_only
@pytest.mark.parametrize("head_dim", [4, 100, 264])
def test_other_head_sizes_are_refused_by_name(head_dim):
    q, k, v = operands(4, (2, 1, head_dim))
    with pytest.raises(UserError, match=f"head_dim={head_dim}"):
        attend(q, k, v)
    with pytest.raises(UserError, match=f"head_dim={head_dim}"):
        Cache(k, v, (4,), 16).attend(q, [(0, 0, 4)])


@cpu_only  # reading them would make a GPU wait
@pytest.mark.parametrize("wrong", [[0, 3], [0, 5], [2, 4], [0, 3, 2, 4]])
def test_offsets_that_do_not_rise_to_the_rows_of_q_are_refused(wrong):
    with pytest.raises(ValueError):
        ops.attention(*operands(4, (1, 1, 64)), torch.tensor(wrong, dtype=torch.int32), 1.0)


@pytest.mark.parametrize(
    ("heads", "cache"),
    [
        (2, lambda: randn(3, 1, 16, 64, dtype=BF16)),
        (2, lambda: randn(3, 1, 16, 128)),
        (3, lambda: randn(3, 2, 16, 128, dtype=BF16)),  # heads no multiple of kv_heads
        (2, lambda: randn(3, 1, 128, 16, dtype=BF16).transpose(2, 3)),
    ],
    ids=["head_dim", "dtype", "heads", "stride"],
)
def test_a_cache_that_does_not_fit_is_refused(heads, cache):
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    with pytest.raises(ValueError, match="does not fit"):
        ops.paged_attention(randn(4, heads, 64, dtype=BF16), cache(), table, offsets([4]), lens, 1.0)


def test_attention_is_opaque():
    q, k, v = operands(9, (2, 1, 64))
    inputs = q, k, v, offsets([4, 5]), 0.2, 5
    window = None if q.is_cuda else 3  # refused there
    ladders.assert_registered(torch.ops.rlinvariant.attention.default, *inputs, window, None)
    ladders.assert_opaque(ops.attention, *inputs)
    out, lse = torch.ops.rlinvariant.attention(*inputs, window, None)
    saved = q, k, v, inputs[3], out, lse, 0.2, 5, window, None
    ladders.assert_registered(torch.ops.rlinvariant.attention_backward.default, q, *saved)


def test_paged_attention_is_opaque():
    q, k, v = operands(9, (2, 1, 64))
    cache = Cache(k, v, (4, 5), 16)
    inputs = q, cache.pages.nan_to_num(), cache.table, offsets([4, 5]), torch.tensor([4, 5], dtype=torch.int32), 0.2
    rest = 5, 5, None if q.is_cuda else 3, None, None, torch.zeros_like(q)
    ladders.assert_registered(torch.ops.rlinvariant.paged_attention.default, *inputs, *rest)
    ladders.assert_opaque(lambda *x: ops.paged_attention(*x, max_seqlen_q=5, max_seqlen_k=5), *inputs)


def test_paged_attention_writes_where_it_is_told():
    q, k, v = operands(9, (2, 1, 64))
    cache, expected = Cache(k, v, (4, 5), 16), attend(q, k, v, (4, 5))
    inputs = q, cache.pages, cache.table, offsets([4, 5]), torch.tensor([4, 5], dtype=torch.int32), 0.125
    for out in (torch.full_like(q, NAN), torch.full((9, 2, 128), NAN, dtype=BF16)[:, :, :64]):
        assert ops.paged_attention(*inputs, out=out) is out
        assert_bits_equal(out, expected, f"strides {out.stride()}")

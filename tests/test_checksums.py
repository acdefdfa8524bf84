"""Checksums of weights: the same for every cut, and another one for every change."""

import pytest
import torch

from rlinvariant import checksums

SHAPES = [(7, 5), (64, 3), (33, 8, 2), (129,), (1, 1), (3, 70_001)]


def random(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_is_the_same_however_rows_are_cut(shape, dtype):
    x = random(shape, dtype)
    expected = checksums.whole(x)
    for cut in {1, 2, 3, shape[0] // 2 + 1}:
        parts, at = x.split(cut), 0
        total = torch.zeros(2, dtype=torch.int64)
        for part in parts:
            total += checksums.partial(part, at)
            at += len(part)
        assert checksums.of(x.dtype, x.shape, total) == expected
        if len(parts) > 1:
            moved = sum(checksums.partial(part, 0) for part in parts)
            assert checksums.of(x.dtype, x.shape, moved) != expected, "control: parts in the wrong place"


@pytest.mark.parametrize("columns", [8, 4, 2, 1], ids="words of {} bytes".format)
@pytest.mark.parametrize("rows", [0, 1, 7, 8191, 70_001])
def test_the_kernel_has_the_sums_of_its_reference(rows, columns):
    """Tries words with and without a sign, one thread and several, and any first place."""
    x = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    for first in (0, 5, 2**40):
        expected = checksums.partial_ref(x, first)
        assert checksums.partial(x, first).equal(expected)
        assert rows == 0 or not checksums.partial(x, first + 1).equal(expected), "control: from another place on"
    later = torch.zeros(8 * rows * columns + 1, dtype=torch.uint8)[1 : rows * columns + 1].view(rows, columns).copy_(x)
    assert checksums.partial(later).equal(checksums.partial_ref(x)), "from an address that is no multiple of a word"
    alone = torch.from_dlpack(later)  # to PyTorch its storage begins there
    assert alone.storage_offset() == 0 and checksums._words(alone, 0)[0].data_ptr() % columns == 0
    assert checksums.partial(alone).equal(checksums.partial_ref(x))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [8, 4, 2, 1], ids="words of {} bytes".format)
def test_a_gpu_has_the_sums_of_a_cpu(columns):
    """Tries sizes that a program divides and does not, and more words than 32 bits number."""
    for rows in (0, 1, 7, 16_384, 1_000_003):
        x = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
        for first in (0, 2**40):
            assert checksums.partial(x.cuda(), first).cpu().equal(checksums.partial(x, first))
    many = torch.zeros(2**31 + 16, dtype=torch.uint8, device="cuda")[:, None]
    many[-3:] = 7
    expected = checksums.partial(many[:-9]) + checksums.partial(many[-9:], len(many) - 9)
    assert checksums.partial(many).equal(expected)


def test_many_tensors_have_the_sums_of_each():
    tensors = {str(shape): random(shape, torch.bfloat16) for shape in SHAPES} | {"one number": torch.tensor(3.5)}
    assert checksums.wholes(tensors.items()) == {name: checksums.whole(x) for name, x in tensors.items()}
    assert checksums.wholes(()) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_of_every_value_counts(shape, dtype):
    x = random(shape, dtype)
    words = x.view(-1).view({2: torch.int16, 4: torch.int32}[x.element_size()])
    before, places = checksums.whole(x).sums, sorted({0, len(words) // 2, len(words) - 1})
    for at in places:
        for bit in range(8 * x.element_size() - 1):
            words[at] ^= 1 << bit
            after = checksums.whole(x).sums
            assert after[0] != before[0] and after[1] != before[1]
            words[at] ^= 1 << bit
    assert checksums.whole(x).sums == before


def test_values_that_change_places_are_seen():
    """A plain sum of words would see none of these."""
    x = random((64, 3), torch.bfloat16)
    swapped = x.clone()
    swapped[[4, 9]] = x[[9, 4]]
    assert x.view(torch.int16).long().sum() == swapped.view(torch.int16).long().sum()
    one, other = checksums.whole(x).sums, checksums.whole(swapped).sums
    assert one[0] != other[0] and one[1] != other[1]
    zero, minus = torch.zeros(5, 4), torch.zeros(5, 4)
    minus[2, 2] = -0.0
    assert checksums.whole(zero) != checksums.whole(minus)


def test_no_two_of_many_small_changes_collide():
    """Each value of a vector by one, two or three ulps: 3,000 tensors, as many sums of either mix."""
    x, seen = random((1000,), torch.float32), [set(), set()]
    words = x.view(torch.int32)
    for at in range(1000):
        for ulps in (1, 2, 3):
            words[at] += ulps
            for kept, found in zip(seen, checksums.whole(x).sums, strict=True):
                kept.add(found)
            words[at] -= ulps
    assert [len(kept) for kept in seen] == [3000, 3000]


def cancelling(mix, words: torch.Tensor, flipped: int) -> list[int]:
    """Return, for each sum, how many changes of one word, the same in all, another place's change takes back."""
    index = torch.arange(len(words))
    moved = [after - before for before, after in zip(mix(index, words), mix(index, words ^ flipped), strict=True)]
    return [int(torch.isin(change, -change).sum()) for change in moved]


@pytest.mark.parametrize("flipped", [-(2**63), 2**62, 2**31, -(2**63) + 2**31], ids=hex)
def test_no_two_signs_that_change_cancel(flipped):
    """A word of 8 bytes ends with a sign: zeros that become -0.0, numbers that become their negatives."""

    def weak(index, words):
        return (checksums._folded(checksums._folded(checksums._folded(index * checksums.M1) ^ words) * checksums.M3),)

    for words in (torch.zeros(60_000, dtype=torch.int64), random((60_000, 2), torch.float32).view(torch.int64)[:, 0]):
        assert cancelling(checksums._mixed, words, flipped) == [0, 0]
        assert cancelling(weak, words, -(2**63))[0] > 0, "control: a product fewer"


def test_a_digest_tells_names_shapes_and_dtypes_apart():
    x = random((4, 6), torch.float32)
    found = [
        checksums.digest([(name, checksums.whole(tensor))])
        for name, tensor in (("a", x), ("b", x), ("a", x.view(6, 4)), ("a", x.view(torch.int32)), ("a", x + 1))
    ]
    assert len(set(found)) == 5
    pairs = [("a", checksums.whole(x)), ("b", checksums.whole(x + 1))]
    assert checksums.digest(pairs) == checksums.digest(pairs[::-1])

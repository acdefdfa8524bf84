"""Checksums of weights that several processes have rows of."""

import torch

from rlinvariant import checksums
from rlinvariant.sampler.weights import _joined

WHOLE = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).bfloat16()


def rows(first: int, end: int, weight: torch.Tensor = WHOLE) -> tuple[int, int, torch.Tensor]:
    return first, end - first, checksums.partial(weight[first:end], first)


def test_the_rows_of_all_processes_have_the_checksum_of_the_whole():
    whole = checksums.whole(WHOLE)
    assert _joined([rows(4, 10), rows(0, 4)], WHOLE) == whole
    assert _joined([rows(0, 5), rows(0, 5), rows(5, 10), rows(5, 10)], WHOLE) == whole, "heads of keys that two have"
    assert _joined([rows(0, 10)] * 3, WHOLE) == whole, "a norm"
    assert _joined([rows(0, 10), rows(10, 10)], WHOLE) == whole, "the last process has nothing but padding"


def test_rows_that_are_missing_or_differ_are_seen():
    other = WHOLE.clone()
    other.view(torch.int16)[7, 2] ^= 1
    whole = checksums.whole(WHOLE)
    assert _joined([rows(0, 4), rows(4, 10, other)], WHOLE) != whole
    assert _joined([rows(0, 10), rows(0, 10, other)], WHOLE) is None, "one of two that have the same rows"
    assert _joined([rows(0, 4)], WHOLE) != whole and _joined([rows(4, 10)], WHOLE) is None
    assert _joined([rows(0, 4), rows(5, 10)], WHOLE) is None

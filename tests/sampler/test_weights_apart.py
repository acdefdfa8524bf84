"""Checksums of weights that several processes have rows of."""

import torch

from rlinvariant import checksums
from rlinvariant.sampler.weights import joined

WHOLE = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).bfloat16()


def rows(first: int, end: int, weight: torch.Tensor = WHOLE) -> tuple[int, int, torch.Tensor]:
    return first, end - first, checksums.partial(weight[first:end], first)


def of(*held: tuple[int, int, torch.Tensor]) -> checksums.Checksum | None:
    return joined(held, WHOLE.dtype, WHOLE.shape[1:])


def test_the_rows_of_all_processes_have_the_checksum_of_the_whole():
    whole = checksums.whole(WHOLE)
    assert of(rows(4, 10), rows(0, 4)) == whole
    assert of(rows(0, 5), rows(0, 5), rows(5, 10), rows(5, 10)) == whole, "heads of keys that two have"
    assert of(*[rows(0, 10)] * 3) == whole, "a norm"
    assert of(rows(0, 10), rows(10, 10)) == whole, "the last process has nothing but padding"


def test_rows_that_are_missing_or_differ_are_seen():
    other = WHOLE.clone()
    other.view(torch.int16)[7, 2] ^= 1
    whole = checksums.whole(WHOLE)
    assert of(rows(0, 4), rows(4, 10, other)) != whole
    assert of(rows(0, 10), rows(0, 10, other)) is None, "one of two that have the same rows"
    assert of(rows(0, 4)) != whole and of(rows(4, 10)) is None
    assert of(rows(0, 4), rows(5, 10)) is None

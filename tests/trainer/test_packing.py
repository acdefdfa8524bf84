"""Packed rows: padding to few shapes changes no log-prob, and there are few shapes."""

import pytest
import torch

from rlinvariant.bits import assert_bits_equal
from rlinvariant.models import make_invariant
from rlinvariant.trainer.packing import Packed, pack, rounded
from tests.models.small import build
from tests.parity.device import DEVICE


def packed(rows: int, longest: int, seed: int, few_shapes: bool) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (rows, longest), generator=generator)
    lengths = torch.randint(3, longest + 1, (rows, 1), generator=generator)
    mask = (torch.arange(longest) < lengths).long()
    return pack(ids.to(DEVICE), mask.to(DEVICE), longest - 1, few_shapes=few_shapes)


def shape(batch: Packed) -> tuple:
    return batch.inputs["input_ids"].shape[1], len(batch.inputs["cu_seq_lens_q"]), batch.inputs["max_length_q"]


@pytest.mark.parametrize("seed", range(3))
def test_few_shapes_change_no_log_prob(seed):
    model = make_invariant(build("qwen3"), torch.bfloat16)
    found = []
    for few_shapes in (False, True):
        batch = packed(7, 33, seed, few_shapes)
        of = {"token_ids": batch.token_ids, "predicted_from": batch.predicted_from, "temperature": 1.0}
        found.append(batch.unpack(model(**batch.inputs, attention_mask=None, **of)[0].detach()))
    assert_bits_equal(*found, "log-probs")


def test_shapes_are_few_and_hold_every_token():
    """Control: without, nearly every batch has a shape of its own."""
    few = {shape(packed(256, 60, seed, True)) for seed in range(40)}
    every = {shape(packed(256, 60, seed, False)) for seed in range(40)}
    assert len(few) <= 4 and len(every) > 4 * len(few) // 2
    for seed in range(5):
        exact, batch = packed(256, 60, seed, False), packed(256, 60, seed, True)
        tokens, cu = batch.inputs["input_ids"].shape[1], batch.inputs["cu_seq_lens_q"]
        assert int(cu[-1]) == tokens and bool((cu.diff() >= 0).all()) and int(cu.diff().max()) <= 60
        real = exact.inputs["input_ids"].shape[1]
        assert real <= tokens <= real * 17 / 16 + 64
        assert torch.equal(
            batch.inputs["input_ids"][:, : int(exact.inputs["cu_seq_lens_q"][256])],
            exact.inputs["input_ids"][:, : int(exact.inputs["cu_seq_lens_q"][256])],
        )


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000, 32767, 32768, 44114])
def test_a_count_is_rounded_up_by_a_sixteenth_at_most(count):
    assert rounded(count, 64, False) == -(-count // 64) * 64
    found = rounded(count, 64, True)
    assert found >= count and found % 64 == 0 and found - count < max(64, count / 16)

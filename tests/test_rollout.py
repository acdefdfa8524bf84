import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlinvariant.rollout import Completion, is_cut, request_seed


def test_a_seed_is_the_documented_hash():
    digest = hashlib.blake2b(b"42/3/7/1", digest_size=8).digest()
    assert request_seed(42, 3, 7, 1) == int.from_bytes(digest, "big") // 2


def test_seeds_are_the_same_in_another_process():
    code = "from rlinvariant.rollout import request_seed; print(request_seed(1, 2, 3, 4))"
    seeds = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert seeds == {str(request_seed(1, 2, 3, 4))}


def test_seeds_of_a_run_are_distinct():
    places = list(itertools.product((0, 1), range(12), range(12), range(12)))
    assert len({request_seed(*place) for place in places}) == len(places)


def test_digits_do_not_run_together():
    assert request_seed(1, 11, 1, 1) != request_seed(11, 1, 1, 1) != request_seed(1, 1, 11, 1)


@given(st.tuples(*[st.integers(-(2**70), 2**70)] * 4))
def test_a_seed_is_a_63_bit_integer_that_torch_takes(place):
    seed = request_seed(*place)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)


def test_integers_of_any_kind_give_one_seed_and_floats_none():
    assert request_seed(1, 2, 3, 4) == request_seed(np.int64(1), 2, torch.tensor(3), np.uint8(4))  # pyright: ignore
    with pytest.raises(TypeError):
        request_seed(1, 2.0, 3, 4)  # pyright: ignore


def test_a_completion_has_one_logprob_per_token():
    assert Completion([5, 6], [-1.0, -2.0]).token_ids == [5, 6]
    with pytest.raises(ValueError, match="2 tokens came with 1 log-probs"):
        Completion([5, 6], [-1.0])


def test_a_completion_is_cut_unless_its_last_token_ends_it():
    assert is_cut([], {9}) and is_cut([9, 1], {9}) and not is_cut([1, 9], {9}) and not is_cut([9], [8, 9])

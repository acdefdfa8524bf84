"""Completions, checksums and weights go between trainers and servers with all their bits; a damaged answer is seen."""

import json
import struct

import pytest
import torch
from safetensors.torch import load
from safetensors.torch import save as saved

from rlinvariant import checksums
from rlinvariant.bits import assert_bits_equal
from rlinvariant.rollout import Completion
from rlinvariant.sampler import wire


def through_json(x):
    return json.loads(json.dumps(x))


def float32(word: int) -> float:
    return struct.unpack("<f", struct.pack("<I", word))[0]


def test_completions_keep_every_bit():
    words = [0x80000000, 0x80000001, 0xBF800001, 0xFF7FFFFF, 0xC2F6E979, *range(0xC1000000, 0xC1000040)]
    drawn = [
        Completion([7], [float32(words[0])], 3),
        Completion([], [], 1),
        Completion(list(range(len(words))), [*map(float32, words)]),
    ]
    back = wire.completions_of(through_json(wire.completions_to_json(drawn)), 3)
    assert back == drawn and [c.cached_tokens for c in back] == [3, 1, 0]
    assert struct.pack("<f", back[0].sampler_logprobs[0]) == b"\0\0\0\x80", "-0, which equals 0"


@pytest.mark.parametrize(
    "change", [{"lengths": [2]}, {"lengths": [1, 0]}, {"cached": []}, {"tokens": ""}, {"logprobs": "AAA="}]
)
def test_an_answer_that_does_not_add_up_is_refused(change):
    answer = wire.completions_to_json([Completion([7], [-1.0])])
    assert wire.completions_of(answer, 1)
    with pytest.raises(ValueError):
        wire.completions_of(answer | change, 1)


def test_checksums_come_back_whole():
    given = {
        name: checksums.whole(torch.randn(3, 5).to(dtype)) for name, dtype in (("a", torch.bfloat16), ("b", torch.float32))
    }
    assert wire.checksums_of(through_json(wire.checksums_to_json(given.items()))) == given
    with pytest.raises(ValueError, match="no dtype"):
        wire.checksums_of({"a": ["load", [1], [0, 0]]})


@pytest.mark.parametrize("most", [1, 40, 64, 10_000])
def test_weights_go_in_parts_that_are_not_larger_than_they_must_be(most, monkeypatch):
    monkeypatch.setattr(wire, "BUCKET_BYTES", most)
    weights = {str(i): torch.randn(n) for i, n in enumerate((3, 9, 1, 64, 7, 7))}
    parts = list(wire.buckets(weights.items(), torch.bfloat16, keep=True))
    assert all(len(part) == 1 or sum(2 * w.numel() for w in part.values()) <= most for part in parts) and all(parts)
    back = {name: w for part in parts for name, w in load_all(part).items()}
    assert list(back) == list(weights)
    for name, w in weights.items():
        assert_bits_equal(back[name], w.to(torch.bfloat16), name)
    elsewhere = list(wire.buckets(weights.items(), torch.bfloat16, keep=False))
    assert elsewhere == [{}] * len(parts), "as many parts where they are not kept: ranks wait for each other after each"


def load_all(part):
    return {name: load(saved(part))[name] for name in part}


def test_weights_are_saved_as_safetensors_without_a_copy():
    part = {"b": torch.randn(3, 5).bfloat16(), "a": torch.randn(7), "none": torch.zeros(0, 4), "cut": torch.randn(6, 4)[:, 1:]}
    buffers = wire.save(part)
    back = load(b"".join(buffers))
    assert list(back) and back.keys() == part.keys()
    for name, weight in part.items():
        assert_bits_equal(back[name], weight, name)
    part["a"][0] = 9.0
    assert load(b"".join(buffers))["a"][0] == 9.0, "the buffers are the weights' own memory"

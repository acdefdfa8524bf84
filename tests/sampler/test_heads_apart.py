"""Attention of the heads that one process of a sampler has is that of all heads."""

import pytest
import torch

from rlinvariant import ops
from rlinvariant.errors import UserError
from rlinvariant.models import make_invariant
from rlinvariant.models.families import FAMILIES
from rlinvariant.sampler.vllm_columns import require_heads_apart
from tests.parity.device import DEVICE


def test_heads_apart_have_the_bits_of_all(monkeypatch):
    from transformers import AutoModelForCausalLM

    model = make_invariant(AutoModelForCausalLM.from_config(FAMILIES["qwen3"](), dtype=torch.bfloat16))
    for count in (2, 4):  # two heads of keys: of four processes, two have the same
        require_heads_apart(model, count, torch.bfloat16, torch.device(DEVICE))
    own = ops.attention

    def by_number(q, *rest):
        return own(q, *rest) + (0.01 if q.shape[1] == 2 else 0.0)

    monkeypatch.setattr(ops, "attention", by_number)
    with pytest.raises(UserError, match="tensor_parallel_size=2: attention of 2 heads of 64 .1 for keys. has other bits here"):
        require_heads_apart(model, 2, torch.bfloat16, torch.device(DEVICE))

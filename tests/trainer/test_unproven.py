"""A GPU refuses what has run exactly on CPUs alone, unless it may be tried there."""

from types import SimpleNamespace

import pytest
import torch

from rlinvariant import support
from rlinvariant.bisect import command as bisect_command
from rlinvariant.errors import UserError
from rlinvariant.kernels import attention
from rlinvariant.rollout import ALL_TOKENS, Truncation
from rlinvariant.sampler.engine import Sampler


def test_what_was_proven_on_cpus_alone_is_refused_elsewhere():
    cpu, cuda = (SimpleNamespace(device=torch.device(kind)) for kind in ("cpu", "cuda"))
    truncation = Truncation(top_k=20, min_p=0.1)
    said = ["lora.r=8", *truncation.settings("trainer.")]
    assert support.unproven_problems(cpu, *said) == []
    assert [line.split(":")[0] for line in support.unproven_problems(cuda, *said)] == said
    assert said == ["lora.r=8", "trainer.top_k=20", "trainer.min_p=0.1"]
    assert support.unproven_problems(cuda, *ALL_TOKENS.settings()) == []


def test_truncation_may_be_tried_on_a_gpu(monkeypatch):
    """Control: without unproven_gpu=true it is refused by everyone, and the line says how it is tried."""
    from vllm import SamplingParams

    from rlinvariant.sampler.vllm_serve import Requests

    cuda, said = SimpleNamespace(device=torch.device("cuda")), Truncation(top_k=20).settings("trainer.")
    asked = SimpleNamespace(top_k=20, top_p=1.0, min_p=0.0, invariance="exact")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for lines in (support.unproven_problems(cuda, *said), bisect_command._truncation_problems(asked)):
        assert len(lines) == 1 and "proven on CPUs alone" in lines[0] and support.TRY in lines[0]
    with pytest.raises(ValueError, match="top_k=20"):
        Requests.validate_params(SamplingParams(top_k=20))
    monkeypatch.setenv(attention.UNPROVEN, "1")
    assert support.unproven_problems(cuda, *said) == [] == bisect_command._truncation_problems(asked)
    Requests.validate_params(SamplingParams(top_k=20))


def test_an_exact_engine_of_a_gpu_refuses_truncation(monkeypatch):
    engine = SimpleNamespace(invariant=True)
    how = {"temperature": 1.0, "max_tokens": 4, "top_k": 0, "top_p": 0.9}
    assert Sampler.params(engine, 1, **how).top_p == 0.9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"^top_p=0\.9: proven on CPUs alone so far; remove it; unproven_gpu=true"):
        Sampler.params(engine, 1, **how)
    assert Sampler.params(engine, 1, **how | {"top_p": 1.0}).top_p == 1.0
    assert Sampler.params(SimpleNamespace(invariant=False), 1, **how).top_p == 0.9, "a stock engine does as vLLM does"
    monkeypatch.setenv(attention.UNPROVEN, "1")
    assert Sampler.params(engine, 1, **how).top_p == 0.9

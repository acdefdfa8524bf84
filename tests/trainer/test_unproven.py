"""A GPU refuses what has run exactly on CPUs alone, unless it may be tried there."""

from types import SimpleNamespace

import torch

from rlinvariant import support
from rlinvariant.kernels import attention


def test_what_was_proven_on_cpus_alone_is_refused_elsewhere_until_it_may_be_tried(monkeypatch):
    cpu, cuda = (SimpleNamespace(device=torch.device(kind)) for kind in ("cpu", "cuda"))
    said = ["sampler.servers=URL", "another=1"]
    assert support.unproven_problems(cpu, *said) == []
    found = support.unproven_problems(cuda, *said)
    assert [line.split(":")[0] for line in found] == said
    assert all("proven on CPUs alone" in line and support.TRY in line for line in found)
    monkeypatch.setenv(attention.UNPROVEN, "1")
    assert support.unproven_problems(cuda, *said) == []

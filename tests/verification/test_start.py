"""A run begins on a certificate of the same machine and architecture, or on a comparison of a few hundred tokens."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rlinvariant.errors import ParityError
from rlinvariant.rollout import Truncation
from rlinvariant.sampler import vllm_linear
from rlinvariant.verification import certificate, load, start, truncation
from rlinvariant.verification import pair as pair_module
from rlinvariant.verification.relation import Relation
from tests.parity.harness import off_by_an_ulp
from tests.verification.certificates import a_certificate


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Give each test certificates of its own."""
    monkeypatch.setattr(certificate, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_training_looks_for_a_certificate_or_makes_sure(exact_engine, arithmetic_dir, monkeypatch):
    from transformers import AutoConfig

    model, config = load.trained(arithmetic_dir, "bfloat16"), AutoConfig.from_pretrained(arithmetic_dir)
    exact_engine.sync(model.named_parameters())
    before = {name: p.clone() for name, p in model.named_parameters()}
    line, record = start.prove(model, exact_engine, config, arithmetic_dir, "bfloat16")
    assert "no certificate" in line and f"rlinvariant verify {arithmetic_dir}" in line and ": 0 / " in line
    assert record["compared"] > 200 and record["mismatched"] == 0 < record["one_ulp"]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    certificate.write(a_certificate(subject=certificate.subject(config, "bfloat16"), tokens=61_440))
    line, record = start.prove(model, exact_engine, config, arithmetic_dir, "bfloat16")
    assert "this architecture is exact on this machine, as verified with random weights" in line
    assert "0 / 61,440 tokens differed, full form, 2026-01-01" in line and record["path"] in line
    with monkeypatch.context() as apart:
        apart.setattr(start, "largest", lambda missing: 1)  # another process has no certificate: all compare, as they meet
        assert start.prove(model, exact_engine, config, arithmetic_dir, "bfloat16")[1]["path"] is None
    own = a_certificate(subject=certificate.subject(config, "bfloat16"), model={"name": "m", "random_weights": False})
    certificate.write(own)
    assert "as verified with the weights of m:" in start.prove(model, exact_engine, config, arithmetic_dir, "bfloat16")[0]


def test_the_start_of_a_truncated_run_compares_the_kept_tokens(exact_engine, arithmetic_dir, monkeypatch):
    from transformers import AutoConfig

    model, config = load.trained(arithmetic_dir, "bfloat16"), AutoConfig.from_pretrained(arithmetic_dir)
    exact_engine.sync(model.named_parameters())
    asked = model, exact_engine, config, arithmetic_dir, "bfloat16"
    plain = start.prove(*asked)[1]
    certificate.write(a_certificate(subject=certificate.subject(config, "bfloat16")))
    line, record = start.prove(*asked, Truncation(top_p=0.8))  # the certificate says nothing of truncation
    assert record["path"] is None and record["compared"] == plain["compared"] + 144 and record["mismatched"] == 0
    seen = re.search(r"([\d,]+) / ([\d,]+) where the trainer keeps all tokens \(top_p=0\.8 and others\)", line)
    assert seen is not None and 0.8 * int(seen[2]) < int(seen[1]) <= int(seen[2])
    of_truncation = [{"name": truncation.NAME}]
    certificate.write(a_certificate(subject=certificate.subject(config, "bfloat16"), relations=of_truncation))
    assert start.prove(*asked, Truncation(top_p=0.8))[1]["path"] is not None
    certificate.write(a_certificate(subject=certificate.subject(config, "bfloat16")))
    score = pair_module.score
    monkeypatch.setattr(pair_module, "score", lambda *given: score(*given[:-1]))  # a trainer that keeps all tokens
    assert start.prove(*asked)[1]["path"] is not None, "the control"
    with pytest.raises(ParityError, match="first in truncated: sampler = trainer"):
        start.prove(*asked, Truncation(top_p=0.8))


def test_training_does_not_start_where_the_short_form_fails(exact_engine, arithmetic_dir, monkeypatch):
    from transformers import AutoConfig

    model, config = load.trained(arithmetic_dir, "bfloat16"), AutoConfig.from_pretrained(arithmetic_dir)
    exact_engine.sync(model.named_parameters())
    with monkeypatch.context() as blind:
        blind.setattr(start, "one_ulp", lambda *_: Relation("planted", compared=10))
        with pytest.raises(ParityError, match="the comparison is blind"):
            start.prove(model, exact_engine, config, arithmetic_dir, "bfloat16")
    with monkeypatch.context() as cut:
        cut.setattr(start, "alone", lambda *_: Relation("alone", compared=10, shown=False, lost="1 of 12 requests"))
        with pytest.raises(ParityError, match="first in alone: 1 of 12 requests"):
            start.prove(model, exact_engine, config, arithmetic_dir, "bfloat16")
    monkeypatch.setattr(vllm_linear._Head, "apply", off_by_an_ulp(40))
    with pytest.raises(ParityError, match="before the first step: .* log-probs differ.*0x.*rlinvariant bisect"):
        start.prove(model, exact_engine, config, arithmetic_dir, "bfloat16")


def test_what_decides_how_triton_rounds_is_part_of_a_certificate():
    """Triton's own list says which variables there are. Without fusion, say, a norm on a GPU has other bits."""
    knobs: Any = pytest.importorskip("triton").knobs
    named = {knob.key for knob in vars(knobs.language_knobs).values() if hasattr(knob, "key")}
    assert named and named <= {*certificate.KERNEL_VARIABLES}

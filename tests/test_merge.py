"""`rlinvariant merge`: a whole model out of an adapter and its base, and how much of the adapter is left in it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlinvariant import merge
from rlinvariant.config import LoraConfig
from rlinvariant.errors import UserError
from rlinvariant.models import lora
from tests import commands


@pytest.fixture(scope="module")
def adapter(arithmetic_dir, tmp_path_factory) -> str:
    """Adapters a thousandth as large as their weights, on a base in float32."""
    model = AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.float32)
    model = lora.applied(model, LoraConfig(r=4).peft_config(), 0)
    lora.randomise(model, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(0.01 if "lora_B" in name else 1)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    return str(path)


def test_a_whole_model_is_written(adapter, arithmetic_dir, tmp_path, capsys):
    assert commands.run("merge", adapter, "--out", str(tmp_path / "whole")) in (0, None)
    assert "100.0% of what the adapter adds is left after rounding to float32" in (said := capsys.readouterr().out)
    assert f"not bit-equal to what was trained: rlinvariant verify {adapter}" in said
    whole, base = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "whole", arithmetic_dir))
    moved = {name for name in base if not torch.equal(base[name], whole[name])}
    assert base.keys() == whole.keys() and len(moved) == 14 and all("_proj" in name for name in moved)
    assert (tmp_path / "whole" / "tokenizer_config.json").is_file(), "the base's"
    assert "not bit-equal" in (tmp_path / "whole" / "README.md").read_text()
    with pytest.raises(UserError, match="is there already"):
        commands.run("merge", adapter, "--out", str(tmp_path / "whole"))


def test_what_a_bf16_base_loses_is_said(arithmetic_dir):
    """Control: the same adapters on a base that is not rounded lose nothing."""
    left = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=torch.bfloat16).to(dtype)
        model = lora.applied(model, LoraConfig(r=4).peft_config(), 0)
        lora.randomise(model, 0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.mul_(0.002 if "lora_B" in name else 1)
        expected = {name: w.detach().clone() for name, w in lora.merged(model)}
        left[dtype] = merge.merge(model)
        assert all(torch.equal(w, expected[name]) for name, w in lora.base(model))
    assert left[torch.bfloat16] < 0.8 and abs(left[torch.float32] - 1) < 1e-3


def test_what_has_no_adapter_is_one_line(arithmetic_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in (arithmetic_dir, "nowhere"):
        with pytest.raises(UserError, match="merge: .*expected a run that trained adapters"):
            commands.run("merge", given, "--out", "whole")
    assert not Path("whole").exists()

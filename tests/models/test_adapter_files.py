"""PEFT's files: an adapter is read as the sampler takes it, or what is wrong with it is one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from rlinvariant.bits import same
from rlinvariant.errors import UserError
from rlinvariant.model_source import adapter_base, base_and_adapter, model_problems
from rlinvariant.models import adapter_files, lora
from tests.models.small import build
from tests.models.test_lora import adapted


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    adapted("llama", use_rslora=True).save_pretrained(path)
    return path


def test_what_is_read_is_what_a_trainer_syncs(saved):
    found, model = adapter_files.read(saved), adapter_files.loaded(build("llama"), saved)
    synced = dict(lora.adapters(model))
    assert found.ranks == lora.ranks(model) and len(found.weights) == len(synced) > 0
    assert all(same(weight, synced[name].detach()) for name, weight in found.weights)
    assert all(p.requires_grad and p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)


def configured(**changes: object):
    def change(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def of_weights(rename):
    def change(directory: Path) -> None:
        file = directory / adapter_files.WEIGHTS
        save_file({rename(name): weight for name, weight in load_file(file).items()}, file)

    return change


def drop_a_layer(directory: Path) -> None:
    file = directory / adapter_files.WEIGHTS
    save_file({name: weight for name, weight in load_file(file).items() if "layers.1" not in name}, file)


DAMAGES = {
    "no weights": (lambda d: (d / adapter_files.WEIGHTS).unlink(), r"adapter_model\.safetensors: missing"),
    "cut": (lambda d: (d / adapter_files.WEIGHTS).write_bytes(b"\0" * 40), r"safetensors: cannot be read"),
    "no JSON": (lambda d: (d / "adapter_config.json").write_text("{"), r"adapter_config\.json"),
    "dropout": (configured(lora_dropout=0.1), r"lora_dropout=0\.1: expected 0"),
    "another rank": (configured(r=4), r"lora_A\.weight is \[8, \d+\]: expected r=4|lora_B"),
    "a lone A": (of_weights(lambda n: n.replace("lora_B", "lora_C")), "expected pairs ending in lora_A.weight"),
    "another model's": (
        of_weights(lambda n: n.replace("layers.1", "layers.7")),
        r"no such projection: are they another model's\?",
    ),
    "too few": (drop_a_layer, r"missing from the file: are they another model's\?"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_read_is_one_line(saved, tmp_path, damage):
    change, line = DAMAGES[damage]
    shutil.copytree(saved, tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(UserError, match=line) as raised:
        adapter_files.loaded(build("llama"), tmp_path / "adapter")
    assert "\n" not in str(raised.value)


def test_adapters_of_another_width_are_one_line(saved, tmp_path):
    """PEFT's own error was a page, doctor saw nothing, and an engine failed after it had loaded the base."""
    found, wider = adapter_files.read(saved), build("llama").config
    found.require_fit(build("llama"))
    wider.save_pretrained(tmp_path)
    found.require_fit_to(str(tmp_path))
    wider.intermediate_size += 8
    wider.save_pretrained(tmp_path)
    line = r"adapter0: model\.layers\.0\.mlp\.down_proj\.lora_A\.weight is \[8, \d+\]: expected \[8, \d+\]: are they another"
    with pytest.raises(UserError, match=line):
        found.require_fit_to(str(tmp_path))


def test_the_base_is_the_one_that_peft_names(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    adapter = tmp_path / "adapter"
    LoraConfig(r=4, base_model_name_or_path=str(base)).save_pretrained(adapter)
    assert adapter_base(str(adapter)) == str(base) and adapter_base(str(base)) is None
    assert base_and_adapter(str(adapter)) == (str(base), str(adapter)) and base_and_adapter(str(base)) == (str(base), None)
    assert model_problems("MODEL", str(adapter), adapters=True) == []
    (line,) = model_problems("model", str(adapter))
    assert "expected a whole model, found a PEFT adapter" in line and "rlinvariant merge" in line
    shutil.rmtree(base)
    (line,) = model_problems("MODEL", str(adapter), adapters=True)
    assert line.startswith(f"MODEL={adapter}: base_model_name_or_path={base}: no such directory")
    configured(base_model_name_or_path=None)(adapter)
    (line,) = model_problems("MODEL", str(adapter), adapters=True)
    assert "base_model_name_or_path=None: expected the model" in line

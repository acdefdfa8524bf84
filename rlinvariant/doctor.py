"""`rlinvariant doctor`: is this machine able, which kernels would be used and why, and what is in the way.

Static: it reads versions, environment variables and configurations, builds kernels/cpu.c, and tries the vendor GEMM. Nothing is
trained and no weights are loaded. What is imported: torch, which takes most of its time; transformers only for a MODEL; vLLM
only with --engine, in processes of its own.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rlinvariant import runtime
from rlinvariant.arguments import model_problems
from rlinvariant.conflicts import environment_conflicts
from rlinvariant.errors import UserError, one_line
from rlinvariant.report.rundir import SCHEMA, environment
from rlinvariant.sampler import plugin

HELP = """usage: rlinvariant doctor [MODEL] [--json] [--engine]

Is this machine able to run exact mode, which kernels would be used and why, and what is in the way. One line each: ok, note
(slower, or worth knowing; exact all the same) or problem, with the fix. Exit code 1 if there is a problem.
MODEL      a Hugging Face directory or hub id: is it supported, and which kernel takes each of its weight shapes. Its
           configuration is read; no weights are loaded
--json     one JSON object in place of the table
--engine   also start vLLM with a tiny random model, in a process of its own, and ask it what it runs: about 20 s"""
SHAPES = ((128, 128), (384, 128), (128, 384), (512, 512))  # weights [N, K] of small models: tried in a fraction of a second
TF32 = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
PROJECT = "rlinvariant"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: what was looked at.
        verdict: "ok", "note" (exact all the same) or "problem".
        text: what was found; for a problem, with the fix.
        invariance_off: whether invariance=off runs in spite of it.
    """

    name: str
    verdict: str
    text: str
    invariance_off: bool = True


def doctor(argv: Sequence[str]) -> int:
    """Print the report. Returns 1 if exact mode cannot run here, else 0. Raises UserError for a wrong command line."""
    options = {x for x in argv if x.startswith("-")}
    models = [x for x in argv if x not in options]
    if options & {"--help", "-h"}:
        print(HELP)
        return 0
    if unknown := sorted(options - {"--json", "--engine"}):
        raise UserError(f"doctor: unknown option {unknown[0]}; expected --json or --engine")
    if len(models) > 1 or any("=" in x for x in models):
        raise UserError(f"doctor: expected at most one MODEL, a directory or hub id, got {' '.join(models)}")
    findings: list[Finding] = []
    found = examine(models[0] if models else None, "--engine" in options)
    if "--json" in options:
        with contextlib.redirect_stdout(sys.stderr):  # a library's remark must not end up in the JSON
            findings += found
            report = summary(findings)
        print(json.dumps(report, indent=2))
    else:
        for finding in found:
            findings.append(finding)
            _print(finding)
        print(conclusion(findings))
    return int(any(x.verdict == "problem" for x in findings))


def examine(model: str | None = None, engine: bool = False) -> Iterator[Finding]:
    """Look at everything, one finding at a time. Without a torch that can be imported it stops after the packages."""
    yield from packages()
    try:
        import torch
    except Exception as error:  # a broken install raises OSError, ImportError, RuntimeError, ...
        yield Finding("torch", "problem", f"cannot be imported ({one_line(error)}); install it anew: pip install -e .", False)
        return
    cuda = torch.cuda.is_available()
    yield from vllm_package("cuda" if cuda else "cpu")
    yield from cpu()
    yield from compiler()
    yield from gpu(cuda)
    yield from threads()
    yield from variables(os.environ, cuda)
    yield from accelerate_config(os.environ, cuda)
    yield from vllm_plugin(os.environ)
    if model is None:
        yield from kernels_cuda() if cuda else kernels_cpu([(n, k, False) for n, k in SHAPES], ("bfloat16", "float32"))
        from rlinvariant.models.families import FAMILIES

        verified = f"verified on a CPU: {', '.join(FAMILIES)}; others are checked module by module"
        yield Finding("models", "ok", f"{verified}: rlinvariant doctor MODEL")
    else:
        yield from of_model(model, cuda)
    if engine:
        yield from ask_engine()


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """The report as JSON: schema, exact, invariance_off (whether each can run here), findings, environment (or null)."""
    try:
        machine = environment()
    except Exception:  # no torch, which is a finding of its own
        machine = None
    return {
        "schema": SCHEMA,
        "exact": all(x.verdict != "problem" for x in findings),
        "invariance_off": all(x.invariance_off for x in findings),
        "findings": [asdict(x) for x in findings],
        "environment": machine,
    }


def conclusion(findings: Sequence[Finding]) -> str:
    """The last line of the report."""
    if not (problems := [x for x in findings if x.verdict == "problem"]):
        return "exact mode can run here"
    met = sum(not x.invariance_off for x in problems)
    off = f"invariance=off meets {met} of them too" if met else "invariance=off works, as none of it is in its way"
    return f"exact mode cannot run here: {len(problems)} problem{'s' * (len(problems) > 1)}, fixes above; {off}"


def packages() -> Iterator[Finding]:
    """Python and the packages against the ranges that pyproject.toml gives, as the installed project carries them."""
    try:
        requires = metadata.requires(PROJECT) or []
        expected = metadata.metadata(PROJECT)["Requires-Python"]
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError as error:  # PackageNotFoundError is one
        missing = (error.name or PROJECT).partition(".")[0]
        yield Finding("packages", "problem", f"{missing}: not installed in {sys.prefix}; pip install -e .", False)
        return
    version = ".".join(map(str, sys.version_info[:3]))
    if SpecifierSet(expected).contains(version):
        yield Finding("python", "ok", f"{version} (tested {expected})")
    else:
        yield Finding("python", "problem", f"{version}: expected {expected}; make .venv PYTHON=python3.11", False)
    fits = []
    for requirement in map(Requirement, requires):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        finding = _package(requirement)
        if finding.verdict == "ok":
            fits.append(finding.text)
        else:
            yield finding
    yield Finding("packages", "ok", ", ".join(fits))


def vllm_package(extra: str) -> Iterator[Finding]:
    """vLLM and what else comes with the extra "cpu" or "cuda"."""
    try:
        from packaging.requirements import Requirement

        requires = [Requirement(x) for x in metadata.requires(PROJECT) or []]
    except ImportError:
        return  # `packages` has said so
    for requirement in requires:
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        finding = _package(requirement, extra)
        if not requirement.name.startswith("vllm") and finding.verdict == "problem":
            finding = Finding(requirement.name, "note", f"{finding.text} (optional)")
        yield finding


def _package(requirement: Any, extra: str = "") -> Finding:
    name = requirement.name
    fix = f"pip install '{name}{requirement.specifier}'" if not extra else f"pip install -e '.[{extra}]'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "problem", f"missing: expected {requirement.specifier}; {fix}", False)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(
            name, "problem", f"{version}: expected {requirement.specifier}, the releases that were tested; {fix}", False
        )
    return Finding(name, "ok", f"{name} {version}" if not extra else f"{version} (tested {requirement.specifier})")


def cpu() -> Iterator[Finding]:
    about = environment()["cpu"]
    flags = " ".join(flag for flag, present in about["isa"].items() if present)
    yield Finding("cpu", "ok", f"{about['model']}, {about['cores']} cores, {flags or 'none of the flags looked for'}")


def compiler() -> Iterator[Finding]:
    """Build and load kernels/cpu.c. A GPU needs it too: modules are compared with what replaces them on the CPU."""
    from rlinvariant.kernels import cpu as c

    started = time.monotonic()
    try:
        c.library()
    except UserError as error:
        yield Finding("compiler", "problem", str(error))
    except OSError as error:
        fix = "empty it, or set RLINVARIANT_CACHE to a directory that can be written and from which libraries can be loaded"
        yield Finding("compiler", "problem", f"kernels/cpu.c: {one_line(error)} in {c.cache_dir()}; {fix}")
    except RuntimeError as error:
        fix = "install a current gcc, or set CC"
        yield Finding("compiler", "problem", f"kernels/cpu.c: {one_line(error)}; {fix}")
    else:
        took, name = f"{time.monotonic() - started:.2f} s", os.environ.get("CC", "gcc")
        yield Finding("compiler", "ok", f"{name}: kernels/cpu.c built and loaded, or found in {c.cache_dir()}, in {took}")


def gpu(cuda: bool) -> Iterator[Finding]:
    """Which device exact mode would run on, and whether it can."""
    import torch

    from rlinvariant.support import cuda_problems

    if not cuda:
        present = any(Path("/dev").glob("nvidia[0-9]*"))
        hidden = "a GPU is there, but torch does not see it (CUDA_VISIBLE_DEVICES, the driver, or a CPU build of torch)"
        text = f"{hidden if present else 'none'}; exact mode runs on the CPU, in bfloat16 or float32"
        yield Finding("gpu", "note" if present else "ok", text)
        return
    major, minor = torch.cuda.get_device_capability()
    yield Finding("gpu", "ok", f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}")
    if problems := list(cuda_problems(torch.bfloat16)):
        yield from (Finding("exact on gpu", "problem", x) for x in problems)
    else:
        yield Finding("exact on gpu", "ok", "bfloat16, FlashAttention-3 is in the vLLM wheel")


def threads() -> Iterator[Finding]:
    import torch

    policy, asked = os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{torch.get_num_threads()} of torch, {cores} cores, OMP_WAIT_POLICY={policy}, OMP_NUM_THREADS={asked or '(unset)'}"
    if (policy or "").lower() != "passive":
        spin = "threads that spin make a run up to 10 times slower on shared cores; export OMP_WAIT_POLICY=passive"
        yield Finding("threads", "note", f"{text}: {spin}")
    elif torch.get_num_threads() != cores:
        fix = "unset OMP_NUM_THREADS" if asked else f"export OMP_NUM_THREADS={cores}"
        yield Finding("threads", "note", f"{text}: not all cores are used; {fix}")
    else:
        yield Finding("threads", "ok", text)


def variables(env: Mapping[str, str], cuda: bool) -> Iterator[Finding]:
    """Environment variables that exact mode refuses, or that change other numbers of a run."""
    clean = True
    for name, invariance in (("off", "off"), ("exact", "exact")):
        for line in environment_conflicts(env, invariance):
            if name == "off" or line not in environment_conflicts(env, "off"):
                clean = False
                yield Finding("environment", "problem", line, invariance_off=name != "off")
    try:
        runtime.configure()
    except UserError as error:
        clean = False
        yield Finding("environment", "problem", str(error).removeprefix("environment: "), False)
    for name in TF32 if cuda else ():
        if env.get(name, "0") != "0":
            clean = False
            text = f"{name}={env[name]}: float32 products outside the ops are rounded to TF32; run `unset {name}`"
            yield Finding("environment", "note", text)
    if clean:
        yield Finding("environment", "ok", "no variable is in the way")


def accelerate_config(env: Mapping[str, str], cuda: bool) -> Iterator[Finding]:
    """What `accelerate launch` would take without --config_file."""
    cache = Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    folder = Path(env.get("HF_HOME") or cache).expanduser() / "accelerate"
    path = next((p for p in (folder / "default_config.yaml", folder / "default_config.json") if p.is_file()), None)
    if path is None:
        yield Finding("accelerate", "ok", f"no default configuration in {folder}; configs/ has ours")
        return
    import yaml  # accelerate's own dependency, as it reads this file with it

    otherwise = "or launch with --config_file configs/cpu.yaml (1gpu.yaml)"
    try:
        config = yaml.safe_load(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        yield Finding("accelerate", "problem", f"{path}: cannot be read ({one_line(error)}); remove it, {otherwise}", False)
        return
    problems = []
    # YAML reads an unquoted no as false
    if (precision := config.get("mixed_precision")) not in (None, False, "no"):
        problems.append((f"mixed_precision: {precision}: expected 'no': it would switch autocast on", True))
    if (kind := str(config.get("distributed_type", "NO"))) not in ("NO", "False", "MULTI_CPU", "MULTI_GPU"):
        problems.append((f"distributed_type: {kind}: expected NO, MULTI_CPU or MULTI_GPU: one process or data parallel", False))
    if config.get("use_cpu") and cuda:
        problems.append(("use_cpu: true: expected false where there is a GPU, which vLLM would take", True))
    for text, off in problems:
        yield Finding("accelerate", "problem", f"{path}: {text}; change it there, {otherwise}", off)
    if not problems:
        yield Finding("accelerate", "ok", f"{path}: nothing in the way")


def vllm_plugin(env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether every process of vLLM would find the plugin: its entry point, and VLLM_PLUGINS."""
    ours = next((x for x in metadata.entry_points(group="vllm.general_plugins") if x.name == PROJECT), None)
    named = env.get("VLLM_PLUGINS")
    if ours is None:
        text = f"no entry point {PROJECT} in vllm.general_plugins of {sys.prefix}; pip install -e ."
        yield Finding("vllm plugin", "problem", text)
        return
    try:
        registers = ours.load() is plugin.register
    except (ImportError, AttributeError) as error:
        yield Finding("vllm plugin", "problem", f"entry point {ours.value}: {one_line(error)}; install anew: pip install -e .")
        return
    if not registers:
        yield Finding("vllm plugin", "problem", f"entry point {ours.value} is another install's; pip install -e .")
    elif named is not None and PROJECT not in named.split(","):
        fix = f"run `unset VLLM_PLUGINS`, or add {PROJECT} to it"
        yield Finding("vllm plugin", "problem", f"VLLM_PLUGINS={named}: expected unset, or to name {PROJECT}; {fix}")
    else:
        yield Finding("vllm plugin", "ok", f"entry point {ours.value}; --engine asks a real vLLM process")


def kernels_cuda() -> Iterator[Finding]:
    few_many = "Triton for few rows, cuBLASLt without split-K for many; their bits are compared before a weight is first used"
    yield Finding("linear", "ok", few_many)
    yield Finding("attention", "ok", "FlashAttention-3 from the vLLM wheel, one split")
    yield Finding("other ops", "ok", "kernels/*.py, Triton")


def kernels_cpu(weights: Iterable[tuple[int, int, bool]], dtypes: Sequence[str]) -> Iterator[Finding]:
    """Which kernel takes each weight (N, K, whether it has a bias): the vendor GEMM where it passes `ops.linear.is_exact`."""
    import torch

    from rlinvariant.kernels import cpu as c
    from rlinvariant.ops.linear import is_exact

    count, weights = torch.get_num_threads(), list(weights)
    for dtype in dtypes:
        passed, failed, large = [], [], []
        for n, k, bias in weights:
            label = f"{n}x{k}{' with bias' if bias else ''}"
            if (need := 14 * n * k) > _free_bytes():
                large.append(f"{label} ({need / 2**30:.0f} GiB)")
            else:
                if n * k > 1 << 22:  # takes seconds, a head of 150,000 tokens a minute
                    print(f"trying the vendor GEMM on {label} ...", file=sys.stderr, flush=True)
                (passed if is_exact(n, k, getattr(torch, dtype), bias, count) else failed).append(label)
        why = f"a row's bits are equal in all sixteen calls here, with {count} threads"
        why_not = f"the vendor GEMM's bits of a row change with the number of rows, with {count} threads"
        if passed:
            yield Finding("linear", "ok", f"{dtype}: vendor GEMM for {', '.join(passed)}: {why}")
        if failed:
            yield Finding("linear", "ok", f"{dtype}: kernels/cpu.c for {', '.join(failed)}: {why_not}")
        if large:
            yield Finding("linear", "note", f"{dtype}: memory is too short to try, as a run would, {', '.join(large)}")
    yield Finding("other ops", "ok", f"kernels/cpu.c, {os.environ.get('CC', 'gcc')} {' '.join(c.FLAGS[:3])}")


def _free_bytes() -> float:
    """Memory that can be taken, as Linux counts it; elsewhere it is not known, and not limited."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), float("inf"))


def of_model(model: str, cuda: bool) -> Iterator[Finding]:
    """Whether a model is supported, by its configuration and by the trainer's audit with random weights, and its kernels."""
    if problems := model_problems("MODEL", model):
        yield Finding("model", "problem", problems[0], False)
        return
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from rlinvariant.models import unsupported

    logging.set_verbosity_error()
    runtime.quiet()
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):  # shapes without memory
            net = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever transformers raises on a configuration that it cannot use
        cause = one_line(error).partition(" Model type should be")[0]  # a hundred names follow
        fix = "name a directory or hub id of a causal LM that transformers loads without remote code"
        yield Finding("model", "problem", f"{model}: cannot be loaded ({cause}); {fix}", False)
        return
    layers = config.get_text_config().num_hidden_layers
    parameters = sum(p.numel() for p in net.parameters())
    yield Finding("model", "ok", f"{type(net).__name__}, {layers} layers, {parameters:,} parameters")
    device = "cuda" if cuda else "cpu"
    reasons = list(unsupported(config, device)) or _audit(config, device)
    for reason in reasons:
        fix = "" if "invariance=off" in reason else "; choose another model, or use invariance=off"
        yield Finding("model", "problem", f"{model}: {reason}{fix}")
    if reasons:
        return
    yield Finding(
        "model", "ok", "the trainer's audit of two layers, random weights: nothing is computed outside rlinvariant.ops"
    )
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    weights = dict.fromkeys((m.out_features, m.in_features, m.bias is not None) for m in linears)
    yield from kernels_cuda() if cuda else kernels_cpu(weights, ("bfloat16",))
    yield certified(model, config)


def certified(model: str, config: Any) -> Finding:
    """Whether `verify` has been here."""
    from rlinvariant.verification import certificate

    found = certificate.find(certificate.subject(config, "bfloat16"))
    if found is None:
        return Finding("certificate", "note", f"none of this architecture here, in bfloat16: rlinvariant verify {model}")
    return Finding("certificate", "ok", f"0 / {found['tokens']:,} tokens differed, {found['form']} form, {found['date'][:10]}")


def _audit(config: Any, device: str) -> list[str]:
    """What the trainer's audit refuses in two layers with few tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlinvariant.models import make_invariant, require_exact, two_layers

    small = two_layers(config)
    small.vocab_size = min(512, small.vocab_size)
    small.pad_token_id = None  # it may be beyond them
    try:
        with torch.random.fork_rng(), torch.device(device):
            require_exact(make_invariant(AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16)))
    except UserError as error:
        return [str(error)]
    except (RuntimeError, OSError) as error:  # no kernels, which is a finding of its own; or no memory
        return [f"the audit did not run ({one_line(error)})"]
    return []


def ask_engine() -> Iterator[Finding]:
    """Start vLLM's engine in a process that knows nothing of this one, and let it say what it runs."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlinvariant.sampler.ask", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            yield Finding("engine", "problem", f"no answer in 300 s; run {' '.join(command[:3])} DIRECTORY to see vLLM's log")
            return
    took = f"{time.monotonic() - started:.0f} s"
    lines = done.stdout.splitlines()
    proof = next((x.removeprefix("exact: ") for x in lines if x.startswith("exact: ")), None)
    if done.returncode == 0 and proof is not None:
        yield Finding("engine", "ok", f"{proof} ({took})")
        return
    log = done.stderr.splitlines() or [f"exit code {done.returncode}"]
    cause = next((x for x in log if re.search(r"\b\w+Error: ", x)), log[-1])  # the first: what follows comes of it
    text = f"vLLM did not start exactly: {one_line(cause)}; run {' '.join(command[:3])} DIRECTORY to see vLLM's log"
    yield Finding("engine", "problem", text)


def _print(finding: Finding) -> None:
    """One line to a pipe; on a terminal wrapped below the text's own column."""
    head = f"{finding.verdict:<8} {finding.name:<14} "
    if sys.stdout.isatty():
        width = max(60, shutil.get_terminal_size().columns)
        print(textwrap.fill(finding.text, width, initial_indent=head, subsequent_indent=" " * len(head)), flush=True)
    else:
        print(head + finding.text, flush=True)

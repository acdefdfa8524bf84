"""Find out, before weights are loaded, what exact mode lacks on this machine."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlinvariant.install import install_hint, installed_version
from rlinvariant.kernels import attention, choice, cpu

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

CAPABILITY = {  # compute capability -> GPUs that have it, and whether exact mode has been proven on one of them
    (9, 0): ("H100, H200", True),
    (8, 0): ("A100", False),
    (8, 6): ("RTX 3090, A40", False),
    (8, 9): ("RTX 4090, L40S", False),
    (10, 0): ("B200", False),
    (12, 0): ("RTX 5090", False),
}
RELEASES = {"vllm": ("0.26",), "torch": ("2.11",)}  # on which exact mode has been proven on a GPU
READ = {"vllm": (0, 33), "torch": (2, 99)}  # the newest that may be tried: of vLLM, the newest that `make contract` has read
TRY = "unproven_gpu=true (of other commands than train: RLINVARIANT_UNPROVEN_GPU=1) compares all at the start"
FA3 = "vllm_flash_attn/_vllm_fa3_C*.so"  # in vLLM's CUDA wheel


def device_problems(args: "GRPOConfig", invariance: str, dtype: torch.dtype) -> list[str]:
    """Return one line for each reason why `args.device` (of TrainingArguments) cannot run this.

    vLLM and a compiler are missed here, not when they are first needed, which is after a recipe has made its model.
    """
    kind = args.device.type
    if problems := choice.misplaced(choice.asked(), invariance, kind):
        return problems
    if (kind == "cpu" or invariance == "off") and importlib.util.find_spec("vllm") is None:
        return [f"package vllm: missing; {install_hint('cpu' if kind == 'cpu' else 'cuda')}"]
    if invariance == "off" or (kind == "cpu" and not torch.cuda.is_available()):
        return [] if invariance == "off" else cpu.compiler_problems()
    if kind == "cpu":
        return ["use_cpu=True: expected False where there is a GPU, which vLLM would take; or hide it: CUDA_VISIBLE_DEVICES="]
    if kind != "cuda":
        return [f"device={args.device}: expected cpu or cuda; set use_cpu=True, or use invariance=off"]
    return list(cuda_problems(dtype))


def cuda_problems(dtype: torch.dtype) -> Iterator[str]:
    """Yield one line for each reason why this machine's GPU cannot run exactly."""
    major, minor = torch.cuda.get_device_capability()
    _, proven = CAPABILITY.get((major, minor), ("", False))
    if not proven and not ((major, minor) in CAPABILITY and attention.unproven_allowed()):
        try_it = f"{TRY}, use " if (major, minor) in CAPABILITY else "use "
        yield (
            f"device={torch.cuda.get_device_name()} (sm_{major}{minor}): exact mode runs on sm_90 (H100, H200), where its "
            f"kernels were measured; {try_it}invariance=off, or a CPU (CUDA_VISIBLE_DEVICES= with the [cpu] install)"
        )
    if dtype != torch.bfloat16:
        yield f"dtype={str(dtype)[6:]}: expected bfloat16 on a GPU: its kernels have no float32; remove it"
    for package in ("triton", "vllm"):
        if importlib.util.find_spec(package) is None:
            yield f"package {package}: missing; {install_hint('cuda')}"
    vllm = importlib.util.find_spec("vllm")
    places = [] if vllm is None else [Path(at) for at in vllm.submodule_search_locations or ()]
    needed = vllm is not None and f"sm_{major}{minor}" in attention.table()["flash_attention_3"]
    needed = needed and choice.chosen() != "chunked"
    if needed and not any(found for at in places for found in at.glob(FA3)):
        yield f"FlashAttention-3: no {FA3} in the installed vllm, whose CUDA wheel holds it; {install_hint('cuda')}"
    for package, releases in RELEASES.items():
        if package == "vllm" and vllm is None:
            continue
        version = installed_version(package) or "unknown"
        may_be_tried = _release(releases[-1]) < _release(version) <= READ[package]
        if _release(version) not in map(_release, releases) and not (may_be_tried and attention.unproven_allowed()):
            fix = f"{install_hint('cuda')}{f'; or {TRY}' if may_be_tried else ''}"
            yield f"{package}=={version}: expected {' or '.join(releases)} on a GPU; {fix}"


def _release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version; none of what is no version."""
    parts = version.split(".")[:2]
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def allow_unproven(said: bool) -> None:
    """Let this process, and those that it starts, try what is unproven on this GPU: `unproven_gpu=true` of a configuration."""
    if said:
        os.environ[attention.UNPROVEN] = "1"


def unproven_here() -> str | None:
    """Return what exact mode has not been proven on, this kind of GPU or a release; None where it is proven, and on a CPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    found = [] if CAPABILITY.get((major, minor), ("", False))[1] else [f"{torch.cuda.get_device_name()} (sm_{major}{minor})"]
    for package, releases in RELEASES.items():
        if _release(version := installed_version(package) or "unknown") not in map(_release, releases):
            found.append(f"{package} {version}")
    return ", ".join(found) or None

"""What exact mode needs of the machine, found out before weights are loaded."""

import importlib.util
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

CAPABILITY = (9, 0)  # H100, H200: where the order of summation of every kernel used has been measured
VLLM = ("0.26",)  # releases on which exact mode has run on a GPU


def device_problems(args: Any, invariance: str, dtype: torch.dtype) -> list[str]:
    """One line for each reason why `args.device` (of TrainingArguments) cannot run this."""
    kind = args.device.type
    if invariance == "off" or (kind == "cpu" and not torch.cuda.is_available()):
        return []
    if kind == "cpu":
        return ["use_cpu=True: expected False where there is a GPU, which vLLM would take; or hide it: CUDA_VISIBLE_DEVICES="]
    if kind != "cuda":
        return [f"device={args.device}: expected cpu or cuda; set use_cpu=True, or use invariance=off"]
    return list(cuda_problems(dtype))


def cuda_problems(dtype: torch.dtype) -> Iterator[str]:
    """One line for each reason why this machine's GPU cannot run exactly."""
    name = torch.cuda.get_device_name()
    if (found := torch.cuda.get_device_capability()) != CAPABILITY:
        yield (
            f"device={name} (sm_{found[0]}{found[1]}): exact mode runs on sm_90 (H100, H200), where its kernels were measured; "
            "use invariance=off, or a CPU (CUDA_VISIBLE_DEVICES= with the [cpu] install)"
        )
    if dtype != torch.bfloat16:
        yield f"dtype={str(dtype)[6:]}: expected bfloat16 on a GPU: FlashAttention-3 has no float32; remove it"
    for package in ("triton", "vllm"):
        if importlib.util.find_spec(package) is None:
            yield f"package {package}: missing; pip install -e '.[cuda]'"
    if importlib.util.find_spec("vllm") is not None and ".".join(_version("vllm").split(".")[:2]) not in VLLM:
        yield f"vllm=={_version('vllm')}: expected {' or '.join(VLLM)} on a GPU; pip install -e '.[cuda]'"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"

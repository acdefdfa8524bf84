"""End-to-end tests run on this machine's GPU if it has one, else on its CPU, with the same relations."""

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BLOCK = 16 if CUDA else 32  # tokens per KV page: the least that vLLM's cache takes; its defaults would hide page edges


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """Skip a test where there is a GPU, as it needs what a GPU does not have or refuses; `reason` says which."""
    return pytest.mark.skipif(CUDA, reason=f"CPU only: {reason}")


fp32_only_on_cpu = cpu_only("FlashAttention-3 has no float32; on a GPU it is refused, see tests/trainer/test_devices.py")

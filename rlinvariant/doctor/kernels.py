"""Find out which kernel would take which weight."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlinvariant.doctor.finding import Finding
from rlinvariant.text import say

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SMALL_WEIGHT_SHAPES = (
    (128, 128),
    (384, 128),
    (128, 384),
    (512, 512),
)  # [N, K] of small models, tried in a fraction of a second


def kernels_cuda(config: "PreTrainedConfig | None" = None) -> Iterator[Finding]:
    """Name the kernels of a GPU; with a model's configuration, the attention that its layers take."""
    from rlinvariant.kernels import attention, choice
    from rlinvariant.models.limits import attention_of

    few_many = "Triton for few rows, cuBLASLt without split-K for many; their bits are compared before a weight is first used"
    yield Finding("linear", "ok", few_many)
    if config is not None:
        yield Finding("attention", "ok", attention_of(config))
    elif (chosen := choice.chosen()) == "chunked" or not attention.flash_heads():
        yield Finding("attention", "ok", f"{attention.OWN}; attention={chosen}")
    else:
        heads = ", ".join(map(str, attention.flash_heads()))
        others = "others are refused" if chosen == "flash" else f"{attention.OWN} for others"
        which = f"{attention.FLASH} for heads of {heads} without window and cap, {others}"
        yield Finding("attention", "ok", f"{which}; attention={chosen}")
    yield Finding("other ops", "ok", "kernels/*.py, Triton")


def kernels_cpu(weights: Iterable[tuple[int, int, bool]], dtypes: Sequence[str]) -> Iterator[Finding]:
    """Find out which kernel takes each weight: the vendor GEMM where it passes `ops.linear.is_exact`, ours elsewhere.

    Args:
        weights: (N, K, whether it has a bias) of each.
        dtypes: "bfloat16", "float32" or both.
    """
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
                if n * k > 1 << 22:  # it takes seconds; a head of 150,000 tokens takes a minute
                    say(f"trying the vendor GEMM on {label} ...", error=True)
                (passed if is_exact(n, k, getattr(torch, dtype), bias, count) else failed).append(label)
        why = f"a row's bits are equal in all sixteen calls here, with {count} threads"
        why_not = f"the vendor GEMM's bits of a row change with the number of rows, with {count} threads"
        if passed:
            yield Finding("linear", "ok", f"{dtype}: vendor GEMM for {', '.join(passed)}: {why}")
        if failed:
            yield Finding("linear", "ok", f"{dtype}: kernels/linear.c for {', '.join(failed)}: {why_not}")
        if large:
            yield Finding("linear", "note", f"{dtype}: memory is too short to try, as a run would, {', '.join(large)}")
    yield Finding("other ops", "ok", f"kernels/*.c, {os.environ.get('CC', 'gcc')} {' '.join(c.FLAGS[:3])}")


def _free_bytes() -> float:
    """Return how much memory can be taken, as Linux counts it; infinity elsewhere, where it is not known."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), float("inf"))

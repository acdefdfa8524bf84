"""A CPU in place of the GPU, so that the GPU benchmarks' own code can run here: tensors, graphs and clocks, no kernels."""

import sys
import time
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rlinvariant.bench import gpu


class OnCpu(TorchFunctionMode):
    """Whatever is asked for on "cuda" is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        args = tuple("cpu" if isinstance(a, str) and a.startswith("cuda") else a for a in args)
        return func(*args, **kwargs)


def turns(graphs: Any, rounds: int) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for times, graph in zip(found, graphs, strict=True):
            began = time.perf_counter()
            graph.replay()
            times.append((time.perf_counter() - began) * 1e3)
    return found


def install(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "capture", lambda calls, pool=None: gpu.Loop(calls))
    monkeypatch.setattr(gpu, "turns", turns)
    monkeypatch.setattr(gpu, "COLD", 1 << 20)
    for name in ("synchronize", "empty_cache", "graph_pool_handle", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    product = lambda x, w, b: torch.nn.functional.linear(x.float(), w.float()).to(x.dtype)  # noqa: E731
    linear = types.ModuleType("rlinvariant.kernels.linear")
    vars(linear).update(tiled=lambda x, w, b, tile: product(x, w, b), cublaslt=product, MANY=(128, 128, 64, 8, 3))
    monkeypatch.setitem(sys.modules, linear.__name__, linear)
    import rlinvariant.kernels

    monkeypatch.setattr(rlinvariant.kernels, "linear", linear, raising=False)

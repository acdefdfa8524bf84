"""Time kernels on a GPU: launches captured in CUDA graphs, both sides in turns, inputs rotated so that no cache holds them."""

import contextlib
import functools
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, Protocol

import torch

from rlinvariant import machine
from rlinvariant.bench.measure import Numbers

Call = Callable[[], object]
GRAPH_LAUNCHES = 20  # in one graph: the cost of starting it is spread over them
ROTATED_BYTES = 200 << 20  # inputs in rotation, several times the level-2 cache


class Replayable(Protocol):
    """Stands for a CUDA graph: whatever has `replay`."""

    def replay(self) -> object: ...


class Loop:
    """Calls that a CUDA graph cannot hold, replayed from Python."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls

    def replay(self) -> None:
        for call in self.calls:
            call()


def name() -> str:
    """Return the name of the directory of results: "h200", or "cpu" without a GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().removeprefix("NVIDIA ").lower()).strip("-")


def memory_gib() -> float:
    """Return the memory of the GPU, or of a machine without one, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


@contextlib.contextmanager
def leaving(gib: float | None) -> Iterator[None]:
    """Take all of the GPU's free memory but `gib` GiB meanwhile; nothing with None."""
    more = 0 if gib is None else torch.cuda.mem_get_info()[0] - int(gib * 2**30)
    taken = torch.empty(max(0, more), dtype=torch.uint8, device="cuda") if more > 0 else None
    try:
        yield
    finally:
        del taken
        if more > 0:
            torch.cuda.empty_cache()


def large() -> bool:
    """Return whether the GPU has over 120 GiB, as an H200 has. On less, benchmarks of several engines hold fewer at a time."""
    return torch.cuda.is_available() and memory_gib() > 120


def environment() -> dict[str, object]:
    """Return what a result says about the GPU beyond `machine.environment`: driver, clocks, power; nothing without one."""
    known = machine.gpu()
    if not known:
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader", "-i", "0"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        asked = ""
    names = ("driver", "clock", "largest_clock", "power_limit")
    found = dict(zip(names, asked.split(", "), strict=False)) if asked else {}
    return {"gpu": known | found}


def copies(size: int) -> int:
    """Return how many inputs of `size` bytes must take turns for each to be out of the cache when its turn comes."""
    return max(1, -(-ROTATED_BYTES // size))


def rotate(calls: Sequence[Call], launches: int = GRAPH_LAUNCHES) -> list[Call]:
    """Return at least `launches` calls, in which each of `calls` occurs equally often, or once more than another."""
    return [calls[i % len(calls)] for i in range(max(launches, len(calls)))]


@functools.cache
def _stream() -> torch.cuda.Stream:
    """Return the one stream that captures, so that cuBLAS has one workspace for all graphs."""
    return torch.cuda.Stream()


def capture(calls: Sequence[Call], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Return a graph of the calls, after one of them has run: what compiles, loads or checks cannot be captured.

    `torch.cuda.graph` would collect garbage and empty the allocator's cache every time, which takes far longer than this.
    """
    graph, stream = torch.cuda.CUDAGraph(), _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def turns(graphs: Sequence[Replayable], rounds: int) -> list[list[float]]:
    """Replay all graphs in turns, forwards and backwards, `rounds` times; return the milliseconds of each graph's replays."""
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in graphs]
    for graph in graphs:
        graph.replay()  # and keep the GPU behind the processor, so that no launch is waited for
    for at in range(rounds):
        for i in range(len(graphs)) if at % 2 else reversed(range(len(graphs))):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graphs[i].replay()
            end.record()
            events[i].append((start, end))
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) for start, end in pairs] for pairs in events]


def pair(ours: Sequence[Call], stock: Sequence[Call], seconds: float, graphs: bool = True) -> Numbers:
    """Time two functions, each given as calls with inputs of their own; return the numeric fields of a Row, in microseconds.

    Args:
        seconds: about how long to measure.
        graphs: capture the calls; else they are launched from Python, and an operator that waits for the GPU may be timed.
    """
    torch.cuda.synchronize()
    for call in (*ours, *stock):
        call()
    torch.cuda.synchronize()
    sides = [rotate(x) if graphs else list(x) for x in (ours, stock)]
    held: list[Replayable] = [capture(x) if graphs else Loop(x) for x in sides]
    once = sum(median(x) for x in turns(held, 3)) / 1e3
    times = turns(held, min(200, max(5, round(seconds / max(once, 1e-6)))))
    wall = [median(x) * 1e3 / len(side) for x, side in zip(times, sides, strict=True)]
    return numbers(wall[0], wall[1], "us", len(times[0]))


def numbers(ours: float, stock: float, unit: str, samples: int) -> Numbers:
    """Return the numeric fields of a Row. Nobody shares the GPU, so `others` is 0."""
    return {
        "ours": round(ours, 2),
        "stock": round(stock, 2),
        "unit": unit,
        "ratio": round(ours / max(stock, 1e-9), 3),
        "samples": samples,
        "others": 0.0,
    }

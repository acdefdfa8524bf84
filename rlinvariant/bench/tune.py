"""Find the fastest tile of `kernels.linear` for each weight shape and row count, among tiles that all give the same bits.

Compile every candidate in parallel, check its bits at every shape, time it once at each, then time the best few, cuBLASLt and
stock cuBLAS in turns. Weights are rotated, so that each comes from memory, as between two layers.
"""

import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rlinvariant import bits
from rlinvariant.bench import gpu
from rlinvariant.errors import one_line
from rlinvariant.files import write_atomically
from rlinvariant.models.shapes import SHAPES

TILES_FILE = Path(__file__).parents[1] / "kernels" / "linear_tiles.json"
Tile = tuple[int, int, int, int, int]  # weight rows, x rows, depth, warps, stages
ROW_COUNTS = (16, 32, 64, 128, 256)  # those of kernels/linear.py; the tile for 16 rows serves 1 to 16
SHARED_MEMORY_BYTES = 227 << 10  # what a program may have on sm_90
TIMED_AGAIN = 4  # candidates: the fastest of the first timing
GRAPH_WEIGHT_BYTES = 1 << 30  # a graph reads at least so many, but has at most GRAPH_LAUNCHES launches


def shapes(tiny: bool) -> list[tuple[int, int]]:
    """Return [N, K] of every weight of the models that are tuned for, largest first."""
    if tiny:
        return [(2048, 2048), (896, 896)]
    large = (x for name, x in SHAPES.items() if not name.startswith("tiny"))
    return sorted({s for x in large for s in x.linears.values()}, key=lambda s: -s[0] * s[1])


def candidates(rows: int) -> list[Tile]:
    """Return the tiles worth trying for so many rows.

    With few rows the time is that of reading the weight: enough bytes must be on their way at any time, in few deep programs
    or in several shallow ones on each multiprocessor. So the stages fill all of the shared memory, or a half, or a quarter.
    """
    found = set()
    for bm in {min(rows, 128), max(16, rows // 2)} if rows < 256 else (64, 128, 256):
        for bn in (16, 32, 64, 128):
            area = bn * bm
            if (bm > 64 and bn < 64) or (bm == 64 and bn < 32):
                continue  # each program would read more of x than of the weight
            for bk in (64, 128, 256, 512) if area <= 512 else (64, 128, 256):
                size = (bn + bm) * bk * 2
                for room in (SHARED_MEMORY_BYTES, SHARED_MEMORY_BYTES // 2 - 1024, SHARED_MEMORY_BYTES // 4 - 1024):
                    stages = min(6, room // size)
                    if stages < 3 or size * (stages - 1) < 24 << 10:
                        continue
                    found |= {(bn, bm, bk, warps, stages) for warps in _warps(area, bk)}
    return sorted(found)


def _warps(area: int, bk: int) -> tuple[int, ...]:
    if area <= 512:
        return (1, 2, 4) if bk <= 128 else (2, 4)
    return (2, 4) if area <= 1024 else (4,) if area <= 4096 else (4, 8)


def run(path: Path, tiny: bool) -> None:
    """Tune, print what was found, and write {"tiles", "environment"} after every shape. Exit 1 if any bits differ."""
    began = time.perf_counter()
    wanted = {rows: candidates(rows)[: 6 if tiny else None] for rows in ((16, 256) if tiny else ROW_COUNTS)}
    distinct = sorted({tile for some in wanted.values() for tile in some})
    failed = dict(zip(distinct, _compile(distinct), strict=True))
    for tile, why in failed.items():
        if why:
            print(f"does not compile: {tile}: {why}")
    print(f"{sum(not why for why in failed.values())} candidates compiled in {time.perf_counter() - began:.0f} s", flush=True)
    all_shapes = shapes(tiny)
    pool = torch.randn(max(max(n * k for n, k in all_shapes), gpu.ROTATED_BYTES), device="cuda", dtype=torch.bfloat16)
    tiles: dict[str, dict[str, Tile | None]] = {}
    ratios: dict[int, list[float]] = {rows: [] for rows in wanted}
    differing: list[str] = []
    for n, k in all_shapes:
        weights = [
            pool[i * n * k : (i + 1) * n * k].view(n, k) for i in range(min(gpu.copies(2 * n * k), len(pool) // (n * k)))
        ]
        shape = _Shape(n, k, weights)
        tiles[f"{n}x{k}"] = {}
        for rows, some in wanted.items():
            fit: list[Tile | None] = [t for t in some if not failed[t] and k % t[2] == 0]
            tile, ratio = shape.best(rows, fit if rows <= 16 else [None, *fit])  # one row: see kernels.linear.tile_for
            tiles[f"{n}x{k}"][str(rows)] = tile
            ratios[rows].append(ratio)
        differing += shape.differing
        _save(path, tiles)
    for rows, some in ratios.items():
        mean = math.exp(sum(map(math.log, some)) / len(some))
        print(f"{rows:4} rows: {mean:.3f}x of cuBLAS in the geometric mean of {len(some)} shapes, {max(some):.2f}x at worst")
    print(f"{path}, {time.perf_counter() - began:.0f} s")
    if differing:
        sys.exit("BITS DIFFER: " + "; ".join(differing))


class _Shape:
    """Holds one weight shape, with operands to check bits with and weights that take turns."""

    def __init__(self, n: int, k: int, weights: list[Tensor]) -> None:
        from rlinvariant.kernels import linear

        self.n, self.k, self.weights, self.differing = n, k, weights, []
        self.x, self.w = bits.cancelling(max(ROW_COUNTS), n, k, torch.bfloat16, "cuda")
        self.many: Tile = linear.FALLBACK_TILE
        self.expected = linear.tiled(self.x, self.w, None, self.many)
        self.launches = max(len(weights), min(gpu.GRAPH_LAUNCHES, -(-GRAPH_WEIGHT_BYTES // (2 * n * k))))

    def best(self, rows: int, some: Sequence[Tile | None]) -> tuple[Tile | None, float]:
        """Return the fastest of `some` for so many rows, and its time as a share of stock cuBLAS's."""
        x, pool = torch.randn(rows, self.k, device="cuda", dtype=torch.bfloat16), torch.cuda.graph_pool_handle()

        def graph(function: Callable[[Tensor, Tensor], Any]) -> torch.cuda.CUDAGraph:
            return gpu.capture(gpu.rotate([partial(function, x, w) for w in self.weights], self.launches), pool)

        stock = graph(lambda x, w: torch.mm(x, w.t()))
        same = [tile for tile in some if self._same(rows, tile)] or [self.many]
        graphs = {tile: graph(partial(_product, tile)) for tile in same}
        rough = {tile: _time(graph) for tile, graph in graphs.items()}
        last = [*sorted(rough, key=lambda t: rough[t])[:TIMED_AGAIN]]
        last += [] if None in last or None not in graphs else [None]
        times = [median(x) * 1e3 / self.launches for x in gpu.turns([stock, *(graphs[t] for t in last)], 9)]
        found = sorted(zip(times[1:], last, strict=True), key=lambda pair: pair[0])
        text = "  ".join(f"{'cublaslt' if t is None else ','.join(map(str, t))} {us:.1f}" for us, t in found)
        print(f"{self.n}x{self.k} {rows:3}: {found[0][0] / times[0]:.2f}x of {times[0]:.1f} us: {text}", flush=True)
        return found[0][1], found[0][0] / times[0]

    def _same(self, rows: int, tile: Tile | None) -> bool:
        y = _product(tile, self.x[:rows], self.w)
        if bits.same(y, self.expected[:rows]):
            return True
        self.differing.append(f"{self.n}x{self.k}, {rows} rows, {tile or 'cublaslt'}")
        print(f"BITS DIFFER, left out: {self.differing[-1]}", flush=True)
        return False


def _product(tile: Tile | None, x: Tensor, w: Tensor) -> Tensor:
    from rlinvariant.kernels import linear

    return linear.cublaslt(x, w, None) if tile is None else linear.tiled(x, w, None, tile)


def _time(graph: torch.cuda.CUDAGraph) -> float:
    """Return the milliseconds of a replay: the lesser of two that follow another."""
    return min(gpu.turns([graph], 2)[0])


def _compile(some: Sequence[Tile]) -> list[str]:
    """Compile and run each tile on a small weight, and return why it failed, or "". The processes fill Triton's cache."""
    workers = min(os.cpu_count() or 1, 16, len(some))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        return list(executor.map(_try, some))


def _try(tile: Tile) -> str:
    from rlinvariant.kernels import linear

    x, w = torch.zeros(2, 256, 1024, device="cuda", dtype=torch.bfloat16)
    try:
        linear.tiled(x, w, None, tile)
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler or the driver says, the candidate is out
        return f"{type(error).__name__}: {one_line(error, 120)}"
    return ""


def _save(path: Path, tiles: dict[str, dict[str, Tile | None]]) -> None:
    from rlinvariant.machine import environment

    lines = ",\n".join(f"  {json.dumps(shape)}: {json.dumps(by_rows)}" for shape, by_rows in sorted(tiles.items()))
    about = json.dumps(environment() | gpu.environment())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f'{{"tiles": {{\n{lines}\n}},\n"environment": {about}}}\n')

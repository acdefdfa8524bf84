"""Time two functions, or several processes, that take turns; describe the machine; write rows of JSON.

The machine may be shared, so samples come in windows of a few turns, and a window counts by what other processes used of the
processors meanwhile: only the quiet windows are kept, or, where there are few, the quietest third, and every row says which.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")
QUIET = 0.05  # share of the processors used by others, up to which a window is undisturbed


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` is ours / stock: of medians of wall time, of peak memory, or of tokens per second."""

    bench: str
    case: str
    ours: float
    stock: float
    unit: str
    ratio: float
    target: float | None  # the ratio promised, if any: at most, or with unit "tok/s" at least
    bits_equal: dict[str, bool | None]  # "ours", "stock": are the bits the same for a row alone and in a batch?
    samples: int
    others: float  # largest share of the processors that other processes used during a sample that counts
    cpu_ratio: float | None = None  # the same ratio of processor time, which other processes disturb less


class Others:
    """What share of the processors is used by processes other than this one and `pids`."""

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self.pids = pids
        self.share()

    def share(self) -> float:
        """Since the last call."""
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        busy, total = sum(ticks) - ticks[3] - ticks[4], sum(ticks)
        own = sum(os.times()[:2]) * os.sysconf("SC_CLK_TCK")
        for pid in self.pids:
            own += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        last, self._last = getattr(self, "_last", (0, 0, 0)), (busy, total, own)
        busy, total, own = (now - then for now, then in zip(self._last, last, strict=True))
        return max(0.0, (busy - own) / total) if total else 0.0


def quietest(windows: Sequence[tuple[float, T]]) -> tuple[list[T], float]:
    """The samples of quiet windows (share, sample), at least a third of them all, and the largest share among them."""
    windows = sorted(windows, key=lambda window: window[0])
    least = -(-len(windows) // 3)
    kept = windows[: max(least, sum(share <= QUIET for share, _ in windows))]
    return [sample for _, sample in kept], round(kept[-1][0], 3)


def pair(ours: Callable[[], Any], stock: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Time two functions in turns, for about `seconds` in all: the numeric fields of a Row, in microseconds."""
    functions = (ours, stock)
    loops = []
    for f in functions:
        f()
        once = min(_time(f, 1)[0] for _ in range(3))
        loops.append(max(1, round(0.002 / once)))  # a sample lasts about 2 ms, or one call
    others, windows, end = Others(), [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(windows) < 3:
        samples: list[tuple[tuple[float, float], ...]] = []
        window_end = time.perf_counter() + min(0.3, seconds / 5)
        while time.perf_counter() < window_end or not samples:
            turn = (0, 1) if len(samples) % 2 else (1, 0)
            both = {i: _time(functions[i], loops[i]) for i in turn}
            samples.append((both[0], both[1]))
        windows.append((others.share(), samples))
    kept, share = quietest(windows)
    wall = [median(s[i][0] for window in kept for s in window) * 1e6 for i in (0, 1)]
    cpu = [median(s[i][1] for window in kept for s in window) for i in (0, 1)]
    return {
        "ours": round(wall[0], 2), "stock": round(wall[1], 2), "unit": "us", "ratio": round(wall[0] / wall[1], 3),
        "samples": sum(map(len, kept)), "others": share, "cpu_ratio": round(cpu[0] / cpu[1], 3),
    }  # fmt: skip


def _time(f: Callable[[], Any], loops: int) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(loops):
        f()
    return (time.perf_counter() - wall) / loops, (time.process_time() - cpu) / loops


class Worker:
    """A process that answers requests, one line of JSON each. Several take turns: one computes while the others wait."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", module, *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, bufsize=1)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.log.seek(0)
        raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended: {self.log.read()[-3000:]}")  # type: ignore[arg-type]

    def close(self) -> None:
        self.process.communicate()


class Link:
    """The worker's end. Whatever else is printed goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def requests(self) -> Iterator[dict[str, Any]]:
        for line in iter(sys.stdin.readline, ""):
            yield json.loads(line)

    def send(self, **answer: Any) -> None:
        self._out.write(json.dumps(answer) + "\n")


def turns(workers: dict[str, Worker], seconds: float, **request: Any) -> tuple[list[dict[str, dict[str, Any]]], float]:
    """Ask all workers the same, in turns, for about `seconds`: {name: answer} of each round that counts, and `others`."""
    windows, end = [], time.perf_counter() + seconds
    others = Others([worker.process.pid for worker in workers.values()])
    while time.perf_counter() < end or len(windows) < 3:
        order = list(workers) if len(windows) % 2 else list(reversed(workers))
        answers = {name: workers[name].ask(**request) for name in order}
        windows.append((others.share(), answers))
    return quietest(windows)


def rounds(workers: dict[str, Worker], count: int, **request: Any) -> list[dict[str, dict[str, Any]]]:
    """Ask all workers the same, in turns, `count` times: {name: answer} of each round. For a GPU, which nobody shares."""
    return [{name: workers[name].ask(**request) for name in (workers if at % 2 else reversed(workers))} for at in range(count)]


def peak_memory() -> float:
    """Of this process so far, MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write(path: Path, rows: Iterable[Any], tiny: bool) -> None:
    """Measure, print every row as it comes, and write {"environment", "rows"}; what came before a failure to PATH.partial.

    Exit 1 if the bits of ours differ anywhere.
    """
    from rlinvariant.bench import gpu
    from rlinvariant.report.rundir import environment

    began, others, measured, whole = os.getloadavg(), Others(), [], False
    try:
        for row in rows:
            measured.append(row)
            print(_line(row), flush=True)
        whole = True
    finally:
        machine = {"loadavg": [began, os.getloadavg()], "others": round(others.share(), 3), "tiny": tiny, **gpu.environment()}
        machine["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY")
        path = path if whole else path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment() | machine, "rows": [asdict(row) for row in measured]}
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(path)
    if differing := [what for row in measured if (what := _differing(row))]:
        sys.exit(f"BITS DIFFER in {len(differing)} rows: {'; '.join(differing)[:2000]}")


def _differing(row: Any) -> str:
    """What must not be: ours, dependent on the batch, or a token that sampler and trainer see differently."""
    if isinstance(row, Row):
        return row.case if row.bench != "peer" and row.bits_equal["ours"] is False else ""
    return f"{row.model}, {row.compared}: {row.mismatched}" if row.mismatched else ""


def _line(row: Any) -> str:
    if not isinstance(row, Row):
        return " ".join(f"{name}={value}" for name, value in asdict(row).items())
    bits = " ".join(f"{side} {'same' if same else 'DIFFER'}" for side, same in row.bits_equal.items() if same is not None)
    target = "" if row.target is None else f" (target {row.target})"
    return f"{row.ratio:7.2f}x  {row.ours:>12,.1f} / {row.stock:,.1f} {row.unit}  {row.case}{target}; bits: {bits or '-'}"

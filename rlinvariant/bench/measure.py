"""Time two functions, or several processes, that take turns; describe the machine; write rows of JSON.

The machine may be shared, so samples come in windows of a few turns, and a window counts by what other processes used of the
processors meanwhile: only the quiet windows are kept, or, where there are few, the quietest third, and every row says which.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NotRequired, TypedDict, TypeVar

from rlinvariant.files import write_atomically

T = TypeVar("T")
QUIET_SHARE = 0.05  # of the processors: a window in which others used no more is undisturbed


@dataclass(frozen=True, kw_only=True)
class Row:
    """Holds one comparison. `ratio` is ours / stock: of medians of wall time, of peak memory, or of tokens per second."""

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
    cpu_ratio: float | None = None  # the same of processor time, which other processes disturb less, if that could be had


def compared(
    bench: str,
    case: str,
    ours: float,
    stock: float,
    unit: str,
    target: float | None,
    equal: Mapping[str, bool | None],
    samples: int,
    digits: int = 1,
) -> Row:
    """Return the row of two numbers of a GPU, which nobody shares; `equal` may lack a side, whose bits were not looked at."""
    return Row(
        bench=bench,
        case=case,
        ours=round(ours, digits),
        stock=round(stock, digits),
        unit=unit,
        ratio=round(ours / max(stock, 1e-9), 3),
        target=target,
        bits_equal={side: equal.get(side) for side in ("ours", "stock")},
        samples=samples,
        others=0.0,
    )


@dataclass(frozen=True)
class Missing:
    """Stands for a comparison that was not made: whose process ended, and what the others measured."""

    bench: str
    case: str
    missing: str
    found: dict[str, float]


class Numbers(TypedDict):
    """Holds the numeric fields of a Row."""

    ours: float
    stock: float
    unit: str
    ratio: float
    samples: int
    others: float
    cpu_ratio: NotRequired[float | None]


Answer = dict[str, Any]
"""A line of JSON from another process: each benchmark knows what it has asked for."""


class Others:
    """Measures which share of the processors is used by processes other than this one and `pids`."""

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self.pids = pids
        self.share()

    def share(self) -> float:
        """Return the share since the last call."""
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        busy, total = sum(ticks) - ticks[3] - ticks[4], sum(ticks)
        own = sum(os.times()[:2]) * os.sysconf("SC_CLK_TCK")
        for pid in self.pids:
            own += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        last, self._last = getattr(self, "_last", (0, 0, 0)), (busy, total, own)
        busy, total, own = (now - then for now, then in zip(self._last, last, strict=True))
        return max(0.0, (busy - own) / total) if total else 0.0


def quietest(windows: Sequence[tuple[float, T]]) -> tuple[list[T], float]:
    """Return the samples of the quiet windows (share, sample), at least a third of all, and the largest share among them."""
    windows = sorted(windows, key=lambda window: window[0])
    least = -(-len(windows) // 3)
    kept = windows[: max(least, sum(share <= QUIET_SHARE for share, _ in windows))]
    return [sample for _, sample in kept], round(kept[-1][0], 3)


def pair(ours: Callable[[], object], stock: Callable[[], object], seconds: float) -> Numbers:
    """Time two functions in turns, for about `seconds` in all; return the numeric fields of a Row, in microseconds."""
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
        "ours": round(wall[0], 2),
        "stock": round(wall[1], 2),
        "unit": "us",
        "ratio": round(wall[0] / wall[1], 3),
        "samples": sum(map(len, kept)),
        "others": share,
        "cpu_ratio": used(*cpu),
    }


def used(ours: float, stock: float) -> float | None:
    """Return the ratio of processor times; None where stock's is below the clock's ticks: of a process, 10 ms on Linux."""
    return round(ours / stock, 3) if stock else None


def _time(f: Callable[[], object], loops: int) -> tuple[float, float]:
    """Return the wall and processor seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(loops):
        f()
    return (time.perf_counter() - wall) / loops, (time.process_time() - cpu) / loops


class WorkerEnded(RuntimeError):
    """Tells that a worker's process ended before it answered."""


class Worker:
    """Runs a process that answers requests, each a line of JSON. Workers take turns: one computes, the others wait."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.name = " ".join([module.rpartition(".")[2], *(a for a in arguments if "/" not in a)])
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command, pipe = [sys.executable, "-m", module, *arguments], subprocess.PIPE
        self.process = subprocess.Popen(  # with its own children, in a group that can be ended
            command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, bufsize=1, process_group=0
        )

    def ask(self, **request: object) -> Answer:
        """Send a request and wait for the answer. Raises WorkerEnded as `answer` does."""
        self.send(**request)
        return self.answer()

    def send(self, **request: object) -> None:
        """Send a request. Workers compute at the same time when all are sent to before any is waited for."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # `answer` says why
            self.process.stdin.write(json.dumps(request) + "\n")

    def answer(self) -> Answer:
        """Wait for the answer to a request that was sent.

        Raises:
            WorkerEnded: the process has ended; the message has its exit code and the end of its log.
        """
        assert self.process.stdout is not None
        while not self.ready(2):
            pass
        if line := self.process.stdout.readline() if select.select([self.process.stdout], [], [], 0)[0] else "":
            return json.loads(line)
        raise WorkerEnded(f"{self.name} ended with exit code {self.process.wait()}\n{self._log()}")

    def ready(self, seconds: float) -> bool:
        """Return whether the process answers or ends within `seconds`; a child of it may still hold the pipe."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], seconds)[0]) or self.process.poll() is not None

    def _log(self, lines: int = 40) -> str:
        """Return the end of the log, after earlier lines that name an error, which a process of the worker may have written."""
        size = os.fstat(self.log.fileno()).st_size
        text = os.pread(self.log.fileno(), 1 << 18, max(0, size - (1 << 18))).decode(errors="replace").splitlines()
        earlier = [line for line in text[:-lines] if "Error: " in line]
        return "\n".join([*earlier[-10:], *text[-lines:]])

    def no_more(self) -> None:
        """Close the worker's input, upon which it ends."""
        with suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()

    def close(self, seconds: float = 10) -> None:
        """Let the process end; after `seconds`, kill it and whatever it has started."""
        self.no_more()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Workers:
    """Holds workers by side. Some may end early; `missing` says why. Use it with `with`, which closes the workers."""

    def __init__(self, workers: Mapping[str, Worker]) -> None:
        self.alive, self.missing = dict(workers), dict[str, str]()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.alive.values():
            worker.no_more()
        for worker in self.alive.values():
            worker.close()

    def ask(self, sides: Iterable[str], together: bool = False, **request: object) -> dict[str, Answer]:
        """Ask the workers that are still alive, one after the other or all at once; return {side: answer}."""
        sides = [side for side in sides if side in self.alive]
        for side in sides if together else ():
            self.alive[side].send(**request)
        found = {}
        for side in sides:
            if not together:
                self.alive[side].send(**request)
            found[side] = self._answer(side)
        return {side: answer for side, answer in found.items() if answer is not None}

    def first(self, sides: Sequence[str]) -> dict[str, Answer | None]:
        """Wait for the first answers to what was sent; return {side: answer}, None for a worker that has ended."""
        while True:
            if ready := [side for side in sides if self.alive[side].ready(0.5 / len(sides))]:
                return {side: self._answer(side) for side in ready}

    def _answer(self, side: str) -> Answer | None:
        try:
            return self.alive[side].answer()
        except WorkerEnded as ended:
            print(ended, flush=True)
            self.missing[side] = reason(str(ended))
            self.alive.pop(side).close()
            return None

    def rounds(self, sides: Sequence[str], count: int, **request: object) -> list[dict[str, Answer]]:
        """Ask in turns, `count` times: for a GPU, which nobody shares."""
        return [self.ask(sides if at % 2 else sides[::-1], False, **request) for at in range(count)]


def reason(text: str) -> str:
    """Return one line that says why a worker ended: which one, and the last line of its log that looks like an error."""
    first, *log = text.splitlines()
    errors = [line.strip() for line in log if "Error: " in line]
    told = [line for line in errors if "Engine core" not in line and "Worker failed" not in line]  # vLLM's, of another process
    return f"{first}: {(told or errors or log or [''])[-1][:300]}"


class Link:
    """Serves a worker's own side of the pipe. Whatever else the process prints goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def requests(self) -> Iterator[Answer]:
        """Yield requests until there are no more."""
        for line in iter(sys.stdin.readline, ""):
            yield json.loads(line)

    def send(self, **answer: object) -> None:
        """Answer a request."""
        self._out.write(json.dumps(answer) + "\n")


def turns(workers: dict[str, Worker], seconds: float, **request: object) -> tuple[list[dict[str, Answer]], float]:
    """Ask all workers the same, in turns, for about `seconds`; return {name: answer} of each quiet round, and `others`."""
    windows, end = [], time.perf_counter() + seconds
    others = Others([worker.process.pid for worker in workers.values()])
    while time.perf_counter() < end or len(windows) < 3:
        order = list(workers) if len(windows) % 2 else list(reversed(workers))
        answers = {name: workers[name].ask(**request) for name in order}
        windows.append((others.share(), answers))
    return quietest(windows)


def peak_memory() -> float:
    """Return the peak memory of this process so far, in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write(path: Path, rows: Iterable[Any], tiny: bool) -> None:
    """Measure, print every row as it comes, and write {"environment", "complete", "rows"} after each.

    A row takes the place of an earlier one of the same case.

    Raises:
        SystemExit: the bits of ours differ anywhere, or a process ended; everything is written before.
    """
    machine = Machine(tiny)
    measured: dict[tuple[str, str], Any] = {}

    def save(complete: bool) -> None:
        machine.write(path, {"complete": complete, "rows": [asdict(row) for row in measured.values()]})

    end_on_sigterm()
    for row in rows:
        measured[row.bench, row.case if hasattr(row, "case") else f"{row.model}, {row.dtype}, {row.compared}"] = row
        print(_line(row), flush=True)
        save(complete=False)
    missing = [row.missing for row in measured.values() if isinstance(row, Missing)]
    save(complete=not missing)
    print(path)
    if differing := [what for row in measured.values() if (what := _differing(row))]:
        sys.exit(f"BITS DIFFER in {len(differing)} rows: {'; '.join(differing)[:2000]}")
    if missing:
        sys.exit(f"not measured: {'; '.join(dict.fromkeys(missing))}")


class Machine:
    """Records where and how undisturbed results are measured, from the moment that this object is made."""

    def __init__(self, tiny: bool) -> None:
        from rlinvariant.bench import gpu
        from rlinvariant.machine import environment

        self._known = environment() | {"tiny": tiny, **gpu.environment()}
        self._began, self._start, self._others, self._most = os.getloadavg(), time.perf_counter(), Others(), 0.0

    def write(self, path: Path, content: Mapping[str, object]) -> None:
        """Write a result with its environment in one move: whoever kills this process leaves a whole file."""
        self._most = max(self._most, self._others.share())
        now = {"loadavg": [self._began, os.getloadavg()], "others": round(self._most, 3)}
        now |= {"seconds": round(time.perf_counter() - self._start, 1), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY")}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"environment": self._known | now, **content}, indent=1) + "\n")


def end_on_sigterm() -> None:
    """Make SIGTERM end this process by an exception, so that its workers end too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _differing(row: Any) -> str:
    """Return what must not be: ours depends on the batch, or sampler and trainer see a token differently; "" otherwise."""
    if isinstance(row, Missing):
        return ""
    if isinstance(row, Row):
        return row.case if row.bench != "peer" and row.bits_equal["ours"] is False else ""
    return f"{row.model}, {row.compared}: {row.mismatched}" if row.mismatched else ""


def _line(row: Any) -> str:
    if isinstance(row, Missing):
        return f"MISSING  {row.case}: {row.missing}; {row.found}"
    if not isinstance(row, Row):
        return " ".join(f"{name}={value}" for name, value in asdict(row).items())
    bits = " ".join(f"{side} {'same' if same else 'DIFFER'}" for side, same in row.bits_equal.items() if same is not None)
    target = "" if row.target is None else f" (target {row.target})"
    return f"{row.ratio:7.2f}x  {row.ours:>12,.1f} / {row.stock:,.1f} {row.unit}  {row.case}{target}; bits: {bits or '-'}"

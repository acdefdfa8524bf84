"""The report of an ablation against its limits, and what writing a step's numbers adds to the step.

The page: `rlinvariant report` in a process of its own, on 12 runs of 1,000 steps. The step: a run of the recipe arithmetic that
also logs to W&B, offline; to the median step is added the median time of the calls, and of W&B's own process all that it used
of the processors, for each step.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rlinvariant.bench.measure import Link, Others, Row, Worker
from rlinvariant.keys import KEYS

PAGE_SECONDS, PAGE_MIB = 10, 1024  # the limits that the page is held to
NO_BITS: dict[str, bool | None] = {"ours": None, "stock": None}


def rows(tiny: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ablation-speed"
        steps = 20 if tiny else 1000
        write_ablation(path, steps)
        others, samples = Others(), []
        for _ in range(1 if tiny else 5):
            samples.append(report(path))
        own = sum(s[2] for s in samples) / (sum(s[0] for s in samples) * (os.cpu_count() or 1))  # children: `others` has them
        share, case = round(max(0.0, others.share() - own), 3), f"page of 12 runs x {steps:,} steps; stock: the limit"
        wall, peak = median(s[0] for s in samples), max(s[1] for s in samples)
        processor = median(s[2] for s in samples)
        for what, ours, limit, unit, used in (
            ("seconds", round(wall, 2), PAGE_SECONDS, "s", round(processor / PAGE_SECONDS, 3)),
            ("peak memory", round(peak), PAGE_MIB, "MiB", None),
        ):
            ratio = round(ours / limit, 3)
            yield Row(
                bench="report_speed",
                case=f"{case}, {what}",
                ours=ours,
                stock=limit,
                unit=unit,
                ratio=ratio,
                target=1.0,
                bits_equal=NO_BITS,
                samples=len(samples),
                others=share,
                cpu_ratio=used,
            )
    worker = Worker(__name__, "4" if tiny else "120", *(["trainer.per_device_train_batch_size=8"] if tiny else []))
    others = Others([worker.process.pid])
    answer = worker.ask()
    share = round(others.share(), 3)
    worker.close()
    step = answer["step"]
    for what, keys in (
        ("metrics.jsonl", ["metrics"]),
        ("metrics.jsonl and W&B, offline", ["metrics", "wandb", "wandb_process"]),
    ):
        total = step + sum(answer[key] for key in keys)
        yield Row(
            bench="report_speed",
            case=f"step that writes {what}; stock: that writes nothing",
            ours=round(total * 1e3, 2),
            stock=round(step * 1e3, 2),
            unit="ms",
            ratio=round(total / step, 4),
            target=1.01,
            bits_equal=NO_BITS,
            samples=answer["steps"],
            others=share,
        )


def report(path: Path) -> tuple[float, float, float]:
    """Run `rlinvariant report PATH`; return its (seconds, MiB, processor seconds)."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "rlinvariant.cli", "report", str(path)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0 and (path / "report.html").stat().st_size > 10_000
    return time.perf_counter() - began, used.ru_maxrss / 1024, used.ru_utime + used.ru_stime


def write_ablation(path: Path, steps: int) -> None:
    """Write 4 arms x 3 seeds with every key; numbers differ from step to step, so that no two points of a curve are one."""
    import numpy as np

    random = np.random.default_rng(0)
    arms = [{"name": name, "description": f"arm {name}", "overrides": []} for name in ("exact", "drift", "tis", "sampler")]
    spec = {"schema": 1, "command": "none", "recipe": "arithmetic", "steps": steps, "seeds": [0, 1, 2], "arms": arms}
    path.mkdir(parents=True)
    (path / "ablation.json").write_text(json.dumps(spec))
    for arm in arms:
        for seed in (0, 1, 2):
            run = path / arm["name"] / f"seed-{seed}"
            run.mkdir(parents=True)
            config = {"recipe": "arithmetic", "steps": steps, "seed": seed}
            (run / "config.json").write_text(json.dumps({k: {"value": v, "source": "default"} for k, v in config.items()}))
            with (run / "metrics.jsonl").open("w") as file:
                for step, values in enumerate(random.lognormal(size=(steps, len(KEYS))).tolist(), 1):
                    counts = {"onpolicy/mismatched_tokens": 3, "onpolicy/compared_tokens": 4096, "onpolicy/unscored_tokens": 0}
                    file.write(json.dumps({"step": step, **dict(zip(KEYS, values, strict=True)), **counts}) + "\n")


def _worker(steps: str, *settings: str) -> None:
    """Train and time what is written; answer one request with the seconds of a step without it, and of each part."""
    from rlinvariant import run
    from rlinvariant.config import parse
    from rlinvariant.report import wandb_log
    from rlinvariant.report.rundir import RunDir, read_metrics

    link, spent, process = Link(), dict[str, list[float]](metrics=[], wandb=[]), 0.0

    def timed(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> None:
            began = time.perf_counter()
            call(*args)
            spent[what].append(time.perf_counter() - began)

        return wrapper

    start = wandb_log.start

    def timed_start(*args: Any) -> Any:
        mode, log, finish = start(*args)
        assert mode == "offline" and log is not None
        before = _wandb_seconds()

        def timed_finish() -> None:
            nonlocal process
            process = _wandb_seconds() - before
            finish()

        return mode, timed("wandb", log), timed_finish

    wandb_log.start = timed_start
    RunDir.append_metrics = timed("metrics", RunDir.append_metrics)
    with tempfile.TemporaryDirectory() as directory:
        cache = Path("runs/.cache").resolve()  # the warm start's, if there is one
        os.chdir(directory)
        if cache.is_dir():
            Path("runs").mkdir()
            Path("runs/.cache").symlink_to(cache)
        run.run(parse(["recipe=arithmetic", f"steps={steps}", "run=speed", "wandb.mode=offline", *settings]))
        found = [row["step_time"] for row in read_metrics(Path("runs/speed"))][1:]  # the first one starts things up
        for _ in link.requests():
            calls = {what: median(seconds) for what, seconds in spent.items()}
            link.send(step=median(found), steps=len(found), wandb_process=process / int(steps), **calls)
        os.chdir("/")


def _wandb_seconds() -> float:
    """Return the processor seconds so far of W&B's own processes, children of this one."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended meanwhile
            continue
        values = fields.split()
        if name.startswith(("wandb", "gpu_stats")) and int(values[1]) == os.getpid():
            ticks += int(values[11]) + int(values[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    _worker(*sys.argv[1:])

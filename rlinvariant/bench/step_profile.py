"""Time of a whole GRPO step, part by part: seconds of each part, and how long the GPU works in it.

Of four sizes of model, and of one with adapters.

One process trains as `bench step` does, exact mode, with nothing set for speed: the micro-batches are what the trainer chooses.
Every part waits for the GPU when it begins and when it ends, so a part's seconds are its own; a step with these waits takes
longer than one without, and both are told. Rollout and weight sync are timed and not traced. The kernels that take the most
time are printed, and not kept.
"""

import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rlinvariant.bench import gpu_step
from rlinvariant.bench.gpu_step import Size
from rlinvariant.bench.measure import Link, Missing, Worker, Workers

SIZES = {
    "smollm2-135m": Size(prompts=32, rows=64, length=52, short=16, kv_gib=4.0, stop_share=1 / 40),
    "qwen3-0.6b": Size(prompts=64, rows=16, length=512, short=64, kv_gib=14.0),
    "qwen3-1.7b": Size(prompts=64, rows=16, length=512, short=64, kv_gib=14.0),
    "qwen3-8b-half": Size(prompts=32, rows=8, length=512, short=64, kv_gib=8.0),
}
ADAPTED = "qwen3-1.7b", 16  # model and rank
PEAK_FLOPS = 790e12  # of an H200's bf16 matrix products, as measured: 09-speed.md
REST = "everything else"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Holds the time of one part of a step. `busy_ms` is None where the GPU was not traced.

    Args:
        bench, model, compared: which benchmark, model and part of the step.
        wall_ms: its own wall time, without that of parts inside it.
        busy_ms: for how long of that at least one kernel or copy ran.
        kernels: how many kernels and copies ran.
        mismatched: tokens of the step whose log-probs differ.
        note: what else is to be said.
    """

    bench: str
    model: str
    dtype: str
    compared: str
    wall_ms: float
    busy_ms: float | None
    kernels: int | None
    mismatched: int
    note: str = ""


def rows(tiny: bool) -> Iterator[Part | Missing]:
    from rlinvariant.models.shapes import build

    whole = ["tiny"] if tiny else [*SIZES]
    for model, rank in [*((model, 0) for model in whole), ("tiny", 8) if tiny else ADAPTED]:
        size, name = gpu_step.SIZES["tiny"] if tiny else SIZES[model], f"{model}, adapters" if rank else model
        with tempfile.TemporaryDirectory() as directory:
            path = build(model, directory, stops=size.stops(model))
            with Workers({"exact": Worker(__name__, path, model, "tiny" if tiny else "full", str(rank))}) as workers:
                workers.ask(["exact"], what="step", length=size.short)
                steps = [workers.ask(["exact"], what="step", length=size.length) for _ in range(1 if tiny else 3)]
                parts = workers.ask(["exact"], what="profile", length=size.length)
                if not parts:
                    yield Missing("profile", name, "; ".join(workers.missing.values()), {})
                    continue
                print("\n".join(parts["exact"]["kernels"]), flush=True)
                yield from _parts(name, [step["exact"] for step in steps], parts["exact"])


def _parts(model: str, steps: list[dict[str, Any]], traced: dict[str, Any]) -> Iterator[Part]:
    part = functools.partial(Part, bench="profile", model=model, dtype="bfloat16", mismatched=traced["mismatched"])
    for name, (wall, busy, kernels) in traced["parts"].items():
        yield part(compared=name, wall_ms=round(wall, 1), busy_ms=busy, kernels=kernels)
    flops = (4 * traced["parameters"] + 2 * traced["moving"]) * traced["trained_tokens"]
    for what in ("step", "all but the rollout"):
        seconds = median(step[what] for step in steps)
        rate = f"{flops / seconds / PEAK_FLOPS:.1%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s (6PN, or 4PN where frozen)"
        share = rate if what != "step" else ""
        peak = f"peak {traced['peak_gib']:.1f} GiB" if what == "step" else ""
        tokens = f"{traced['trained_tokens']:,} tokens, {traced['sampled_tokens']:,} of them sampled" if what == "step" else ""
        note = ", ".join(filter(None, (tokens, peak, share)))
        yield part(compared=f"{what}, not traced", wall_ms=round(seconds * 1e3, 1), busy_ms=None, kernels=None, note=note)


@dataclass
class Trace:
    """Marks parts of a step in the profiler's time line; parts may be inside others."""

    profiler: Any = None
    longest: list[str] = field(default_factory=list)  # kernels, after `stop`

    def wrap(self, owner: object, method: str, name: str) -> None:
        """Make `owner.method` a part: every call is marked, and waits for the GPU at both ends while it is traced."""
        import torch

        called: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(called)
        def marked(*arguments: Any, **options: Any) -> Any:
            if self.profiler is None:
                return called(*arguments, **options)
            _wait()
            with torch.profiler.record_function(f"part:{name}"):
                try:
                    return called(*arguments, **options)
                finally:
                    _wait()

        setattr(owner, method, marked)

    def start(self) -> None:
        import torch

        _wait()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiler.start()
        self.began = time.perf_counter()

    def stop(self) -> dict[str, tuple[float, float | None, int | None]]:
        """Return {part: (own milliseconds, GPU busy milliseconds, kernels)} since `start`; the rest is a part too."""
        _wait()
        whole = (time.perf_counter() - self.began) * 1e3
        self.profiler.stop()
        events, self.profiler = self.profiler.events(), None
        self.longest = _longest(events)
        return _own_times(events, whole)


def _own_times(events: Any, whole: float) -> dict[str, tuple[float, float | None, int | None]]:
    from torch._C._autograd import DeviceType

    cuda = DeviceType.CUDA
    marks = [e for e in events if e.name.startswith("part:") and e.device_type != cuda]
    marks.sort(key=lambda e: e.time_range.start)
    kernels = sorted(
        ((e.time_range.start, e.time_range.end) for e in events if e.device_type == cuda and not e.name.startswith("part:")),
    )
    own: dict[str, list[float]] = {}
    for mark in marks:
        begin, end = mark.time_range.start, mark.time_range.end
        busy, count = _busy(kernels, begin, end)
        entry = own.setdefault(mark.name.removeprefix("part:"), [0.0, 0.0, 0])
        for at, value in enumerate(((end - begin) / 1e3, busy / 1e3, count)):
            entry[at] += value
        around = [m for m in marks if m is not mark and m.time_range.start <= begin and end <= m.time_range.end]
        if around:  # taken from the innermost part around it
            outer = max(around, key=lambda m: m.time_range.start)
            entry = own.setdefault(outer.name.removeprefix("part:"), [0.0, 0.0, 0])
            for at, value in enumerate(((end - begin) / 1e3, busy / 1e3, count)):
                entry[at] -= value
    busy, count = _busy(kernels, float("-inf"), float("inf"))
    rest = whole - sum(e[0] for e in own.values()), busy / 1e3 - sum(e[1] for e in own.values())
    own[REST] = [*rest, count - sum(e[2] for e in own.values())]
    traced = bool(kernels)
    return {
        name: (wall, round(busy, 1) if traced else None, int(count) if traced else None)
        for name, (wall, busy, count) in own.items()
    }


def _longest(events: Any, count: int = 20) -> list[str]:
    """Return lines of the kernels that take the most time in all: milliseconds, how many there were, and the name."""
    from torch._C._autograd import DeviceType

    found: dict[str, list[float]] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.name.startswith("part:"):
            found.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    most = sorted(found.items(), key=lambda kernel: -sum(kernel[1]))[:count]
    return [f"{sum(each):9.1f} ms  {len(each):7,}  {name[:100]}" for name, each in most]


def _busy(kernels: list[tuple[float, float]], begin: float, end: float) -> tuple[float, int]:
    """Return the microseconds of [begin, end) in which any kernel runs, and how many start there; kernels are sorted."""
    busy, upto, count = 0.0, begin, 0
    for start, stop in kernels:
        if begin <= start < end:
            busy += max(0.0, stop - max(start, upto))
            upto, count = max(upto, stop), count + 1
    return busy, count


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _trace_parts(trainer: Any, trace: Trace) -> None:
    """Name the parts of a step after what they do."""
    trace.wrap(trainer, "_calculate_rewards", "rewards")
    trace.wrap(trainer, "_generate_and_score_completions", "rollout's bookkeeping")
    trace.wrap(trainer, "_get_per_token_logps_and_entropies", "log-probs: forward")
    trace.wrap(trainer, "_compute_loss", "loss, metrics")
    trace.wrap(trainer, "_finish_passes", "comparison and metrics, when all is computed")
    trace.wrap(trainer, "_require_finite", "checks that numbers are finite")
    trace.wrap(trainer, "_clip_grad_norm", "clipping")
    trace.wrap(trainer.accelerator, "backward", "backward")


def _worker(path: str, model: str, which: str, rank: str) -> None:
    import torch
    from transformers import TrainerCallback

    link, trace, size = Link(), Trace(), gpu_step.SIZES["tiny"] if which == "tiny" else SIZES[model]
    with tempfile.TemporaryDirectory() as directory:
        trainer: Any = gpu_step.ours(path, directory, size, int(rank))
        _trace_parts(trainer, trace)
        requests, generate, seconds = link.requests(), trainer.sampler.generate, {}
        asked: dict[str, Any] = {}

        def generated(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            found = generate(*arguments, **options)
            seconds["rollout"] = time.perf_counter() - began
            seconds["sampled"] = sum(len(completion.token_ids) for completion in found)
            seconds["trained"] = seconds["sampled"] + sum(map(len, arguments[0]))
            if asked["what"] == "profile":
                trace.start()
            return found

        trainer.sampler.generate = generated

        class Turns(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                request = next(requests, None)
                if request is None:
                    sys.exit(0)
                asked.update(request)
                trainer.max_completion_length = request["length"]
                self.began = time.perf_counter()
                if state.global_step == 1:
                    trace.wrap(trainer.optimizer, "step", "optimizer")

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if "onpolicy/mismatched_tokens" not in (logs or {}):
                    return
                _wait()
                whole = time.perf_counter() - self.began
                parts: dict[str, Any] = {}
                if asked["what"] == "profile":
                    timed = {"rollout": seconds["rollout"], "weight sync": logs["time/sync"]}
                    parts = {name: (1e3 * s, None, None) for name, s in timed.items()} | trace.stop()
                peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
                answer = {
                    "step": whole,
                    "all but the rollout": whole - seconds["rollout"],
                    "mismatched": int(logs["onpolicy/mismatched_tokens"]),
                    "sampled_tokens": seconds["sampled"],
                    "trained_tokens": seconds["trained"],
                    "parameters": sum(p.numel() for p in trainer.model.parameters()),
                    "moving": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                    "peak_gib": peak,
                    "parts": parts,
                    "kernels": trace.longest,
                }
                link.send(**answer)

        trainer.add_callback(Turns())
        trainer.train()


if __name__ == "__main__":
    _worker(*sys.argv[1:])

"""LoRA: steps against full training and against TRL's own adapters, and rollouts with and without adapters.

Every projection of the decoder has an adapter of rank 16. Steps are those of `bench step` with half as many prompts, so that
three sides fit on one card; rollouts are those of `bench sampler`: with B = 0, as adapters begin, which takes as long as any
other. Sides take turns.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rlinvariant.bench import gpu, gpu_step, sampler
from rlinvariant.bench.measure import Missing, Row, Worker, Workers, compared

RANK = 16
SIDES = {"adapters": ("exact", RANK), "full": ("exact", 0), "stock": ("stock", RANK)}  # TRL's runs on a GPU alone
NAMES = {"full": "against full training", "stock": "against TRL's adapters and stock vLLM"}
ROUNDS = 3
PARTS = {"step": "s", "all but the rollout": "s", "rollout": "s", "weight sync": "ms", "peak memory": "MiB"}
TARGETS = {("full", "step"): 0.93, ("full", "all but the rollout"): 0.8, ("stock", "step"): 0.6}
RATES = {1: 0.85, 16: 0.9, 64: 0.9, 256: 0.9}  # requests at once -> least rate, as a multiple of the rate without adapters
PROJECTIONS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def rows(tiny: bool) -> Iterator[Row | Missing]:
    from rlinvariant.models.shapes import build

    which, model = ("tiny", "tiny") if tiny or gpu.name() == "cpu" else ("adapters", gpu_step.MODEL)
    size = gpu_step.SIZES[which]
    with tempfile.TemporaryDirectory() as directory:
        path = build(model, directory, stops=size.stops(model))
        yield from _steps(f"{model}, {size.prompts} prompts x {gpu_step.GENERATIONS}", path, which)
        yield from _rates(model, path, "tiny" if which == "tiny" else "gpu")


def every_projection(path: str) -> dict[str, int]:
    """Return the rank of an adapter on each projection of the checkpoint's decoder, as `Sampler` takes them."""
    layers = json.loads((Path(path) / "config.json").read_text())["num_hidden_layers"]
    return {f"model.layers.{layer}.{name}": RANK for layer in range(layers) for name in PROJECTIONS}


def _trainer(side: str, path: str, which: str) -> Worker:
    mode, rank = SIDES[side]
    return Worker("rlinvariant.bench.gpu_step", mode, path, which, str(rank))


def _steps(name: str, path: str, which: str) -> Iterator[Row | Missing]:
    size, sides = gpu_step.SIZES[which], [side for side in SIDES if gpu.name() != "cpu" or side != "stock"]
    with Workers({side: _trainer(side, path, which) for side in sides}) as workers:
        workers.ask(sides, together=True, length=size.short)
        answers = workers.rounds(sides, 1 if which == "tiny" else ROUNDS, length=size.length)
    found = {side: [a[side] for a in answers if side in a] for side in sides}
    parts = {side: _parts(some) for side, some in found.items() if some}
    same = {side: all(a["exact"] for a in some) for side, some in found.items()}
    for other, against in NAMES.items():
        if other not in sides:
            continue
        for part, unit in PARTS.items():
            case = f"{part} {against}: {name}"
            if "adapters" not in parts or other not in parts:
                numbers = {side: parts[side][part] for side in ("adapters", other) if side in parts}
                yield Missing("lora", case, "; ".join(workers.missing.values()), numbers)
            elif parts[other][part]:  # TRL does not time its sync
                equal = {"ours": same["adapters"], "stock": same[other]} if part == "step" else {}
                ours, stock = (parts[side][part] for side in ("adapters", other))
                yield compared("lora", case, ours, stock, unit, TARGETS.get((other, part)), equal, len(answers), 3)


def _parts(answers: list[dict[str, Any]]) -> dict[str, float]:
    def middle(key: str) -> float:
        return median(a[key] or 0.0 for a in answers)

    return {
        "step": middle("seconds"),
        "all but the rollout": median(a["seconds"] - a["rollout"] for a in answers),
        "rollout": middle("rollout"),
        "weight sync": 1e3 * middle("sync"),
        "peak memory": middle("peak"),
    }


def _rates(model: str, path: str, size: str) -> Iterator[Row | Missing]:
    sides, setup = ("adapters", "exact"), sampler.SETUPS[size]
    with Workers({side: Worker("rlinvariant.bench.sampler", side, path, size) for side in sides}) as workers:
        workers.ask(sides, together=True, what="start")
        alone = {side: found["differing"] == 0 for side, found in workers.ask(sides, what="alone").items()}
        for batch, target in RATES.items():
            case = f"rollout with adapters against without: {model}, batch {batch}"
            if batch > max(setup.targets):
                continue
            workers.ask(sides, what="generate", batch=batch)  # warm up
            answers = workers.rounds(sides, ROUNDS, what="generate", batch=batch)
            rates = {s: median(a[s]["tokens"] / a[s]["seconds"] for a in answers if s in a) for s in sides if s in answers[0]}
            if len(rates) < len(sides):
                yield Missing("lora", case, "; ".join(workers.missing.values()), rates)
            else:
                equal = {"ours": alone["adapters"], "stock": alone["exact"]}
                yield compared("lora", case, rates["adapters"], rates["exact"], "tok/s", target, equal, ROUNDS, 3)

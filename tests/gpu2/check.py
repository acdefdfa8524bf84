"""Checks of what the runs of run.sh have left: `python -m tests.gpu2.check WHAT ...`, in the directory of `runs`."""

import json
import random
import re
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from rlinvariant import bits
from rlinvariant.report import rollouts
from rlinvariant.report.rundir import read_metrics

RUNS = Path("runs")
WITHIN_S = 60  # from a fault on one process to the end of all
TARGET, LARGEST = 0.85, 256  # of stock's rate over as many processes, at this batch


def rows() -> None:
    """Write prompts of random words, ragged."""
    rng = random.Random(0)
    lines = [" ".join(f"w{rng.randrange(3, 900)}" for _ in range(rng.randint(1, 120))) for _ in range(400)]
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))


def exact(run: str, steps: str) -> None:
    """Require as many steps, every token compared and none different."""
    found = read_metrics(RUNS / run)
    assert len(found) == int(steps), f"{len(found)} rows"
    wrong = sum(row["onpolicy/mismatched_tokens"] + row["onpolicy/unscored_tokens"] for row in found)
    of = sum(row["onpolicy/compared_tokens"] for row in found)
    print(f"row {run}: mismatched {wrong:,.0f} / {of:,.0f} tokens in {steps} steps")
    assert wrong == 0 < of and all(row["onpolicy/coverage"] == 1 == row["onpolicy/weights_equal"] for row in found)


def rollout(one: str, other: str) -> None:
    """Require the same prompts, seeds, tokens and log-probs in the first step of two runs."""
    drawn = []
    for run in (one, other):
        found, _ = rollouts.read(RUNS / run, 1)
        asked = [(list(prompt), seed) for prompt, seed, _ in found.requests]
        drawn.append([(a, list(c.token_ids), c.sampler_logprobs) for a, c in zip(asked, found.completions, strict=True)])
    print(f"row first step of {one} and {other}: {len(drawn[0])} completions, equal: {drawn[0] == drawn[1]}")
    assert drawn[0] == drawn[1] and drawn[0]


def _words(one: str, other: str) -> tuple[int, int, str]:
    """Return how many words differ, of how many, and where."""
    a, b = (load_file(RUNS / run / "model/model.safetensors") for run in (one, other))
    assert a.keys() == b.keys() and all(x.dtype == torch.float32 for x in a.values())
    wrong = {name: int((bits.words(x) != bits.words(b[name])).sum()) for name, x in a.items()}
    where = [f"{name} {count:,}" for name, count in wrong.items() if count]
    of = f", in {len(where)} of {len(a)} weights: {'; '.join(where[:12])}" if where else ""
    return sum(wrong.values()), sum(x.numel() for x in a.values()), of


def _moved(run: str) -> int:
    """Return how many weights are others than when the run began."""
    start = load_file(Path(json.loads((RUNS / run / "config.json").read_text())["model"]["value"]) / "model.safetensors")
    trained = load_file(RUNS / run / "model/model.safetensors")
    return sum(int((bits.words(x) != bits.words(start[name].float())).sum()) for name, x in trained.items())


def weights(one: str, other: str) -> None:
    """Require the same float32 weights of two runs, most of which have moved."""
    wrong, of, where = _words(one, other)
    moved = _moved(one)
    print(f"row weights of {one} and {other}: {wrong:,} / {of:,} words differ{where}; {moved:,} have moved from their start")
    assert wrong == 0 and moved > of // 2


def differ(one: str, other: str) -> None:
    """Require other weights: the control of `weights`."""
    wrong, of, _ = _words(one, other)
    print(f"row control, weights of {one} and {other}: {wrong:,} / {of:,} words differ")
    assert wrong > 0


def pace(one: str, other: str) -> None:
    """Say how fast the trainer of another run is beside one's: tokens a second, the median of the steps after the second."""
    rates = [median(row["perf/trainer_tok_s"] for row in read_metrics(RUNS / run)[2:]) for run in (one, other)]
    print(f"row trainer of {other}: {rates[1]:,.0f} tokens/s, {rates[1] / rates[0]:.3f} of {one}'s {rates[0]:,.0f}")


def fault(run: str, when: str, code: str) -> None:
    """Require that a planted fault has ended all processes in time, with exit code 1 and one count."""
    seconds = time.time() - float(Path(when).read_text())
    result = json.loads((RUNS / run / "result.json").read_text())
    print(f"row fault on rank 1: exit code {code}, {seconds:.0f} s after it, {result['error']}")
    assert code == "1" and seconds < WITHIN_S and result["outcome"] == "not exact"
    assert re.search(r"mismatched [\d,]+ / [\d,]+ tokens", result["error"])


def targets(log: str) -> None:
    """Require of the largest batch that our columns are fast enough beside vLLM's own cut."""
    found: dict[tuple[str, int], float] = {}
    for side, batch, value in re.findall(r"^row rate (\w+) over 2 batch (\d+): ([\d.]+)", Path(log).read_text(), re.M):
        found[side, int(batch)] = float(value)
    assert found, "no rates were measured"
    for batch in sorted({batch for _, batch in found}):
        print(f"row batch {batch}: {found['exact', batch] / found['stock', batch]:.3f} of stock's rate over two")
    if ("exact", LARGEST) in found:
        assert found["exact", LARGEST] >= TARGET * found["stock", LARGEST]


if __name__ == "__main__":
    checks: dict[str, Any] = {f.__name__: f for f in (rows, exact, rollout, weights, differ, fault, pace, targets)}
    checks[sys.argv[1]](*sys.argv[2:])

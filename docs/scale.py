"""Fill the tables of docs/how-to/scale.md: memory, traffic and time of a step on machines past those that were measured.

python docs/scale.py

The formulas are here, one function each; what they are fitted to and checked against is read from the results of the
benchmarks. tests/docs/test_scale.py compares what is committed with what this writes.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/how-to/scale.md"
RESULTS = ROOT / "rlinvariant/bench/results"
GB = 1e9
CARD_GB, CARD_TFLOPS = 141.0, 790.0  # of an H200: memory, and the rate of a large bf16 product (docs/results/gpu-cost.md)
NETWORK = 8 * 50e9 * 0.8  # bytes/s into a host with a 400 Gb/s card for each of 8 GPUs, four fifths of the data sheet's
GPUS = (8, 64, 512)


@dataclass(frozen=True)
class Model:
    """Describes a model by its shape, as config.json names it; `spread` is the processes of its engine."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    tied: bool = False
    spread: int = 1

    @property
    def layer(self) -> int:
        """Return the parameters of a layer's products."""
        attention = self.hidden * self.head * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def ends(self) -> int:
        """Return the parameters of embedding and lm_head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Return P, without norms and biases, which are a thousandth."""
        return self.layers * self.layer + self.ends


MEASURED = Model("Qwen3-1.7B", 2048, 6144, 28, 16, 8, 128, 151936, tied=True)
MODELS = (
    Model("Qwen3-8B", 4096, 12288, 36, 32, 8, 128, 151936),
    Model("Qwen3-32B", 5120, 25600, 64, 64, 8, 128, 151936, spread=4),
    Model("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128, 128256, spread=8),
)


# ---- the formulas


def states(model: Model, gpus: int) -> float:
    """Return the bytes on a card of weights, gradients and Adam's two moments, in float32, in shards."""
    return 16 * model.parameters / gpus


def gathered(model: Model) -> float:
    """Return the bytes of what is whole for a while: two layers, the embedding and the lm_head, in float32."""
    return 4 * (2 * model.layer + model.ends)


def engine(model: Model) -> float:
    """Return the bytes on a card of the engine's copy of the weights, in bfloat16."""
    return 2 * model.parameters / model.spread


def kv_token(model: Model) -> float:
    """Return the bytes on a card of the keys and values of a token, in bfloat16."""
    return 2 * 2 * model.layers * model.kv_heads * model.head / model.spread


def received(model: Model, gpus: int) -> float:
    """Return the bytes that a card gets in a step of one micro-batch.

    Weights in float32 for forward and backward, gradients once to be averaged and once for the norm: 4 P each; the engine's
    weights in bfloat16: 2 P.
    """
    return (4 * 4 + 2) * model.parameters * (1 - 1 / gpus)


def train_s(model: Model, tokens: float, share: float, tflops: float = CARD_TFLOPS) -> float:
    """Return the seconds of forward and backward of a card's tokens, at a share of the rate of a large product."""
    return 6 * model.parameters * tokens / (share * tflops * 1e12)


def rollout_s(model: Model, tokens: float, rate: float) -> float:
    """Return the seconds of a card's sampled tokens: as many parameters are read and multiplied for each as there are."""
    return tokens * model.parameters / MEASURED.parameters / rate


# ---- what was measured


def results(machine: str, name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / machine / f"{name}.json").read_text())["rows"]


def profile() -> dict[str, float]:
    """Return the step of the 1.7B shape on an H200: tokens, sampled ones, seconds of the rollout and of all else, the share."""
    rows = {row["compared"]: row for row in results("h200", "profile") if row["model"] == "qwen3-1.7b"}
    note, rest = rows["step, not traced"]["note"], rows["all but the rollout, not traced"]
    tokens, sampled = (int(x.replace(",", "")) for x in re.findall(r"[\d,]*\d", note)[:2])
    share = float(rest["note"].partition("%")[0]) / 100
    return {
        "tokens": tokens,
        "sampled": sampled,
        "rollout": rows["rollout"]["wall_ms"] / 1e3,
        "rest": rest["wall_ms"] / 1e3,
        "share": share,
    }


def checks() -> list[tuple[str, str, str, str]]:
    """Return what a formula says of what was measured, and was not used for the formula."""
    h100 = {row["case"].partition(":")[0]: row["ours"] for row in results("h100-80gb-hbm3", "step")}
    alone = next(row["ours"] for row in results("h100-80gb-hbm3", "trainer") if row["case"].startswith("8 equal rows"))
    p, seen = MEASURED.parameters, profile()
    memory = (16 + 2 + 2) * p + 14 * 2**30  # one card, with working copies; the benchmark's cache has 14 GiB
    rate = 1 / train_s(MEASURED, 1, seen["share"] * 3 / 4)  # all activations are computed twice: 8 P in place of 6
    found = [
        ("memory of a step, 1.7B on one H100, without activations", memory / GB, h100["peak memory of the process's tensors"]),
        ("tokens/s of forward and backward, 1.7B on one H100, activations computed twice", rate, alone),
    ]
    found[0] = (*found[0][:2], found[0][2] * 2**20 / GB)
    digits = (".1f", ",.0f")
    return [
        (what, f"{says:{d}}", f"{was:{d}}", f"{says / was:.2f}") for (what, says, was), d in zip(found, digits, strict=True)
    ]


# ---- the tables


def table(head: str, rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {head} |", "|---" + "|--:" * head.count("|") + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def memory_table() -> str:
    rows = []
    for model in MODELS:
        for gpus in GPUS:
            parts = [states(model, gpus), gathered(model), engine(model)]
            left = CARD_GB - sum(parts) / GB
            room = f"{left * GB / kv_token(model) / 1e6:.1f} M tokens" if left > 0 else "does not fit"
            numbers = [f"{x / GB:.1f}" for x in (*parts, sum(parts))]
            rows.append((model.name, str(gpus), *numbers, f"{left:.0f}", room))
    head = "model | GPUs | states | gathered | engine | sum, GB | left of 141 | if all were keys and values"
    return table(head, rows)


def time_table() -> str:
    seen, rows = profile(), []
    rate = seen["sampled"] / seen["rollout"]
    for model in MODELS:
        rollout = rollout_s(model, seen["sampled"], rate)
        train = train_s(model, seen["tokens"], seen["share"])
        for gpus in GPUS:
            moved = received(model, gpus)
            wire = moved / NETWORK if gpus > 8 else moved / 350e9
            total = rollout + train + wire
            million = total / (gpus * seen["sampled"] / 1e6)
            numbers = (rollout, train, moved / GB, wire, total)
            rows.append((model.name, str(gpus), *(f"{x:.1f}" for x in numbers), f"{million:.2f}"))
    head = "model | GPUs | rollout, s | train, s | received, GB | in seconds | step, s | s for a million sampled tokens"
    return table(head, rows)


def host_table() -> str:
    rows = [
        (
            model.name,
            f"{model.parameters / 1e9:.1f}",
            f"{8 * 4 * model.parameters / GB:,.0f}",
            f"{12 * model.parameters / GB:,.0f}",
            f"{2 * model.parameters / GB:.0f}",
        )
        for model in MODELS
    ]
    head = "model | P, billions | host memory to load, 8 processes, GB | checkpoint, GB | a sync, to each server, GB"
    return table(head, rows)


def filled(text: str) -> str:
    """Return the page with its tables as they are now."""
    tables = {
        "checks": table("what | formula | measured | ratio", checks()),
        "memory": memory_table(),
        "time": time_table(),
        "hosts": host_table(),
    }
    for name, made in tables.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert start and end, f"{PAGE.name} has no place for the table {name}"
        text = f"{before}{start}{made}\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
    print(PAGE)

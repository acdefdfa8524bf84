"""Tokens per second of the exact sampler against stock vLLM with its defaults; on a GPU also against VLLM_BATCH_INVARIANT=1.

Each engine has a process of its own on the same device; they start together, which takes less time than one after the other,
and then take turns. First it is seen whether a request has the same log-probs alone as among all: the stock engines are given
seeds for that, and none when they are timed. An engine that ends early costs its own rows alone.
"""

import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from rlinvariant.bench.measure import Link, Missing, Row, Worker, Workers
from rlinvariant.rollout import Completion


@dataclass(frozen=True)
class Setup:
    """Describes what is measured on one kind of machine."""

    model: str
    targets: dict[int, float | None]  # requests at once -> least rate, as a multiple of stock's
    prompt_tokens: tuple[int, int]
    new_tokens: int
    alone: int  # requests that are also run alone
    kv_gib: float
    engines: tuple[str, ...]


SETUPS = {
    # 256 requests hold 16 GiB at their end, 112 KiB a token; three engines fit on 80 GB
    "gpu": Setup("qwen3-1.7b", {1: 0.97, 16: 1.2, 64: 1.2, 256: 1.2}, (64, 512), 256, 4, 17, ("exact", "stock", "peer")),
    "cpu": Setup("smollm2-135m", {1: 1.0, 8: 1.0, 32: 1.0}, (40, 60), 38, 4, 0.5, ("exact", "stock")),
    "tiny": Setup("tiny", {1: None, 4: None}, (64, 512), 8, 2, 0.5, ("exact", "stock")),
    "moe": Setup("qwen3-30b-a3b-quarter", {16: 0.85, 64: 0.85, 256: 0.85}, (64, 512), 256, 4, 8, ("exact", "stock")),
    "tiny-moe": Setup("tiny-moe", {1: None, 4: None}, (64, 512), 8, 2, 0.5, ("exact", "stock")),
}
ROUNDS, PEER_ROUNDS = 3, 1  # turns of each batch size; the peer has no target and is slow
LABELS = {
    "exact": "ours",
    "logprobs": "ours, and vLLM's own report of log-probs (logprobs=0)",
    "peer": "VLLM_BATCH_INVARIANT=1",
}


class Engine(Protocol):
    """Drives an engine that is timed."""

    vocabulary: int

    def generate(
        self, prompts: Sequence[list[int]], length: int, seeds: Sequence[int] | None, logprobs: bool = False
    ) -> list[Completion]: ...

    def forget(self) -> None: ...


def rows(tiny: bool) -> Iterator[Row | Missing]:
    return measured("tiny" if tiny else machine())


def measured(size: str) -> Iterator[Row | Missing]:
    """Yield the rows of one of `SETUPS`."""
    from rlinvariant.models.shapes import build

    setup = SETUPS[size]
    with tempfile.TemporaryDirectory() as directory:
        path = build(setup.model, directory)
        with Workers({side: Worker(__name__, side, path, size) for side in setup.engines}) as workers:
            started = {side: a["seconds"] for side, a in workers.ask(setup.engines, together=True, what="start").items()}
            compared = [side for side in setup.engines if side != "stock"]
            for side in compared:
                yield _row(workers, side, "seconds to start, all engines at once", started, "s", None, {}, 1)
            alone = workers.ask(setup.engines, what="alone")
            same = {side: found["differing"] == 0 for side, found in alone.items()}
            apart = {side: float(found["differing"]) for side, found in alone.items()}
            for side in compared:
                found = next(iter(alone.values()), {"requests": 0, "batch": 0, "tokens": 0})
                case = f"{found['requests']} requests alone against among {found['batch']}: log-probs that differ"
                target = 0.0 if side == "exact" else None
                yield _row(workers, side, case, apart, f"of {found['tokens']}", target, same, 1)
            for batch in setup.targets:
                yield from _batch(workers, setup, batch, same)


def machine() -> str:
    """Return "gpu" or "cpu"."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def _batch(workers: Workers, setup: Setup, batch: int, same: dict[str, bool]) -> Iterator[Row | Missing]:
    """Yield rates at one batch size; the first and the largest are warm already."""
    asked: dict[str, Any] = {"what": "generate", "batch": batch}
    if batch not in (min(setup.targets), max(setup.targets)):
        workers.ask(setup.engines, **asked)
    rates: dict[str, list[float]] = {side: [] for side in (*LABELS, "stock")}
    for at in range(ROUNDS):
        turn = ("exact", "logprobs", "stock", *(("peer",) if "peer" in setup.engines and at < PEER_ROUNDS else ()))
        for side in turn if at % 2 else turn[::-1]:
            engine, more = ("exact", {"logprobs": True}) if side == "logprobs" else (side, {})
            for found in workers.ask([engine], **asked, more=more).values():
                rates[side].append(found["tokens"] / found["seconds"])
    speed = {side: median(values) for side, values in rates.items() if values}
    for side in LABELS:
        if side != "peer" or side in setup.engines:
            target = setup.targets[batch] if side == "exact" else None
            yield _row(workers, side, f"{setup.model}, batch {batch}", speed, "tok/s", target, same, len(rates[side]))


def _row(
    workers: Workers,
    side: str,
    case: str,
    found: dict[str, float],
    unit: str,
    target: float | None,
    same: dict[str, bool],
    samples: int,
) -> Row | Missing:
    """Return one side against the stock engine, or what is known of them where one has ended."""
    bench, case = "peer" if side == "peer" else "sampler", f"{LABELS[side]}: {case}"
    engine = "exact" if side == "logprobs" else side
    if side not in found or "stock" not in found:
        gone = [reason for name, reason in workers.missing.items() if name in (engine, "stock")]
        return Missing(bench, case, "; ".join(gone), {s: round(found[s], 1) for s in (side, "stock") if s in found})
    ratio = round(found[side] / max(found["stock"], 1e-9 if unit in ("tok/s", "s") else 1), 3)
    equal = {"ours": same.get(engine), "stock": same.get("stock")}
    return Row(
        bench=bench,
        case=case,
        ours=round(found[side], 1),
        stock=round(found["stock"], 1),
        unit=unit,
        ratio=ratio,
        target=target,
        bits_equal=equal,
        samples=samples,
        others=0.0,
    )


class Ours:
    def __init__(self, path: str, tokens: int, kv_gib: float, ranks: Mapping[str, int] | None = None) -> None:
        from rlinvariant.sampler.engine import Sampler

        self.sampler = Sampler(path, invariant=True, max_model_len=tokens, kv_cache_gib=kv_gib, ranks=ranks)
        self.vocabulary = self.sampler.llm.llm_engine.model_config.get_vocab_size()

    def generate(
        self, prompts: Sequence[list[int]], length: int, seeds: Sequence[int] | None, logprobs: bool = False
    ) -> list[Completion]:
        seeds = range(len(prompts)) if seeds is None else seeds
        more: dict[str, Any] = {"logprobs": 0} if logprobs else {}
        return self.sampler.generate(prompts, seeds, temperature=1.0, max_tokens=length, ignore_eos=True, **more)

    def forget(self) -> None:
        self.sampler.llm.reset_prefix_cache()


class Stock:
    """Drives vLLM with its defaults; only the memory for keys and values is given, so that several engines fit.

    It is asked for the log-prob of each token, as ours always has it.
    """

    def __init__(self, path: str, tokens: int, kv_gib: float) -> None:
        from vllm import LLM

        self.llm = LLM(
            path,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=tokens,
            gpu_memory_utilization=0.01,
            kv_cache_memory_bytes=int(kv_gib * 2**30),
            generation_config="vllm",
            use_tqdm_on_load=False,
        )
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()

    def generate(
        self, prompts: Sequence[list[int]], length: int, seeds: Sequence[int] | None, logprobs: bool = True
    ) -> list[Completion]:
        from vllm import SamplingParams

        from rlinvariant.sampler.engine import reported

        shared: Any = {"temperature": 1.0, "max_tokens": length, "logprobs": 0, "detokenize": False, "ignore_eos": True}
        params = [SamplingParams(seed=s, **shared) for s in (seeds or [None] * len(prompts))]
        outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        return reported(outputs)

    def forget(self) -> None:
        self.llm.reset_prefix_cache()


def _worker(side: str, path: str, size: str) -> None:
    began = time.perf_counter()
    link = Link()
    prepare(stock=side not in ("exact", "adapters"))
    if side == "peer":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    setup = SETUPS[size]
    if side == "adapters":  # of bench/lora.py
        from rlinvariant.bench.lora import every_projection

        engine = Ours(path, 1024, setup.kv_gib, every_projection(path))
    else:
        engine = (Ours if side == "exact" else Stock)(path, 1024, setup.kv_gib)
    serve(link, engine, setup, time.perf_counter() - began)


def prepare(stock: bool) -> None:
    """Set vLLM's environment variables in a process that is to have an engine."""
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if stock:
        # FlashInfer's sampler serves top-p and top-k alone, of which there is none here; but vLLM's warm-up calls it, which
        # compiles it with nvcc, and without its sources the engine ends
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"


def serve(link: Link, engine: Engine, setup: Setup, started: float) -> None:
    """Answer the requests that `rows` makes."""
    from rlinvariant.bench.compare import differing

    batch, length, few = max(setup.targets), setup.new_tokens, setup.alone
    rng = random.Random(0)
    lengths = [rng.randrange(*setup.prompt_tokens) for _ in range(batch)]
    prompts = [[rng.randrange(engine.vocabulary) for _ in range(n)] for n in lengths]
    for request in link.requests():
        if request["what"] == "start":
            link.send(seconds=started)
            continue
        engine.forget()
        if request["what"] == "alone":
            seeds = list(range(1, batch + 1))
            together = engine.generate(prompts, length, seeds)
            count = 0
            for i in range(few):
                engine.forget()
                count += differing(engine.generate(prompts[i : i + 1], length, seeds[i : i + 1])[0], together[i])
            link.send(differing=count, tokens=few * length, requests=few, batch=batch)
        else:
            began = time.perf_counter()
            out = engine.generate(prompts[: request["batch"]], length, None, **request.get("more", {}))
            seconds = time.perf_counter() - began
            link.send(seconds=seconds, tokens=sum(len(c.token_ids) for c in out))


if __name__ == "__main__":
    _worker(*sys.argv[1:])

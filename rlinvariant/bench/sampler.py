"""Tokens per second of the exact sampler against stock vLLM with its defaults, and against VLLM_BATCH_INVARIANT=1.

Each engine has a process of its own on the same GPU, and they take turns. First it is seen whether a request has the same
log-probs alone as among 256: the stock engines are given seeds for that, and none when they are timed.
"""

import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, Protocol

from rlinvariant.bench.measure import Link, Row, Worker, rounds
from rlinvariant.rollout import Completion

MODEL = "qwen3-1.7b"
TARGETS = {1: 0.92, 16: 0.95, 64: 0.95, 256: 0.97}
PROMPT, LENGTH, ALONE = (64, 512), 256, 6  # tokens; new tokens; requests that are also run alone
KV_GIB = 28  # for 256 requests of the longest kind
NAMES = {"exact": "ours", "stock": "stock vLLM", "peer": "VLLM_BATCH_INVARIANT=1"}


class Engine(Protocol):
    vocabulary: int

    def generate(self, prompts: Sequence[list[int]], length: int, seeds: Sequence[int] | None) -> list[Completion]: ...

    def forget(self) -> None: ...


def rows(tiny: bool) -> Iterator[Row]:
    from rlinvariant.bench.models import build

    size, count = ("tiny", 2) if tiny else ("full", 5)
    batches = (1, 4) if tiny else tuple(TARGETS)
    with tempfile.TemporaryDirectory() as directory:
        path = build("tiny" if tiny else MODEL, directory)
        workers = {side: Worker(__name__, side, path, size) for side in NAMES}  # they start together
        alone = {side: worker.ask(what="alone") for side, worker in workers.items()}
        same = {side: found["differing"] == 0 for side, found in alone.items()}
        for side in ("exact", "peer"):
            found, stock = alone[side], alone["stock"]
            case = f"{NAMES[side]}: {found['requests']} requests alone against among {found['batch']}: log-probs that differ"
            yield Row(_bench(side), case, found["differing"], stock["differing"], f"of {found['tokens']}",
                      round(found["differing"] / max(1, stock["differing"]), 3), 0.0 if side == "exact" else None,
                      {"ours": same[side], "stock": same["stock"]}, 1, 0.0)  # fmt: skip
        for batch in batches:
            rounds(workers, 1, what="generate", batch=batch)  # warm up
            answers = rounds(workers, count, what="generate", batch=batch)
            speed = {side: median(a[side]["tokens"] / a[side]["seconds"] for a in answers) for side in NAMES}
            for side in ("exact", "peer"):
                yield Row(_bench(side), f"{NAMES[side]}: {MODEL}, batch {batch}", round(speed[side], 1),
                          round(speed["stock"], 1), "tok/s", round(speed[side] / speed["stock"], 3),
                          TARGETS.get(batch) if side == "exact" else None,
                          {"ours": same[side], "stock": same["stock"]}, count, 0.0)  # fmt: skip
        for worker in workers.values():
            worker.close()


def _bench(side: str) -> str:
    return "peer" if side == "peer" else "sampler"


class _Ours:
    def __init__(self, path: str, tokens: int, kv_gib: float) -> None:
        from rlinvariant.sampler.engine import Sampler

        self.sampler = Sampler(path, invariant=True, max_model_len=tokens, kv_cache_gib=kv_gib)
        self.vocabulary = self.sampler.llm.llm_engine.model_config.get_vocab_size()

    def generate(self, prompts: Sequence[list[int]], length: int, seeds: Sequence[int] | None) -> list[Completion]:
        seeds = range(len(prompts)) if seeds is None else seeds
        return self.sampler.generate(prompts, seeds, temperature=1.0, max_tokens=length, ignore_eos=True)

    def forget(self) -> None:
        self.sampler.llm.reset_prefix_cache()


class _Stock:
    """vLLM with its defaults; only the memory for keys and values is given, so that several engines fit."""

    def __init__(self, path: str, tokens: int, kv_gib: float) -> None:
        from vllm import LLM

        self.llm = LLM(
            path, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=tokens, gpu_memory_utilization=0.01,
            kv_cache_memory_bytes=int(kv_gib * 2**30), generation_config="vllm", use_tqdm_on_load=False,
        )  # fmt: skip
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()

    def generate(self, prompts: Sequence[list[int]], length: int, seeds: Sequence[int] | None) -> list[Completion]:
        from vllm import SamplingParams

        shared: Any = {"temperature": 1.0, "max_tokens": length, "logprobs": 0, "detokenize": False, "ignore_eos": True}
        params = [SamplingParams(seed=s, **shared) for s in (seeds or [None] * len(prompts))]
        outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        found = []
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            table: Any = output.outputs[0].logprobs
            found.append(Completion(ids, [row[i].logprob for i, row in zip(ids, table, strict=True)]))
        return found

    def forget(self) -> None:
        self.llm.reset_prefix_cache()


def _worker(side: str, path: str, size: str) -> None:
    link = Link()
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if side == "peer":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    serve(link, (_Ours if side == "exact" else _Stock)(path, 1024, KV_GIB if size == "full" else 0.5), size)


def serve(link: Link, engine: Engine, size: str) -> None:
    """Answer what `rows` asks."""
    from rlinvariant.bench.compare import differing

    batch, length, few = (256, LENGTH, ALONE) if size == "full" else (4, 8, 2)
    rng = random.Random(0)
    prompts = [[rng.randrange(engine.vocabulary) for _ in range(rng.randrange(*PROMPT))] for _ in range(batch)]
    for request in link.requests():
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
            out = engine.generate(prompts[: request["batch"]], length, None)
            seconds = time.perf_counter() - began
            link.send(seconds=seconds, tokens=sum(len(c.token_ids) for c in out))


if __name__ == "__main__":
    _worker(*sys.argv[1:])

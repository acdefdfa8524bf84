"""Count the sampled tokens whose log-prob is not the same 32 bits, on a GPU, at the shapes of real models.

Random weights, ragged prompts. Each model has two processes: one with the exact sampler and trainer, one with stock vLLM and a
stock model of transformers, the control. With `tokens`, one long run of the 1.7B shape instead: as many tokens as asked for.
"""

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlinvariant.bench.compare import Parity, against_stock_trainer, against_trainer, differing
from rlinvariant.bench.measure import Link, Worker
from rlinvariant.rollout import Completion, request_seed

SMALL = ("qwen3-0.6b", "qwen3-1.7b", "qwen2.5-0.5b", "llama-3.2-1b")
LARGE = ("qwen3-8b",)  # has the GPU to itself
TEMPERATURES = (1.0, 0.7)
PACKED = (1, 16)  # rows scored together
REQUESTS, LENGTH, PROMPT, APART = 128, 128, (3, 600), 16
SOAK_MODEL, SOAK_REQUESTS, SOAK_LENGTH, SOAK_PROMPT = "qwen3-1.7b", 1024, 512, (16, 256)
SOAK_TOGETHER, SOAK_ROWS, SOAK_KV_GIB = 640, 48, 56  # requests decoded at a time; rows scored at a time; memory
SOAK_SECONDS = 480  # a run that would take longer ends here, and says how far it came
SOAK_CONTROL = 32  # requests of the first rollout that the control scores


def rows(tiny: bool, tokens: int | None = None) -> Iterator[Parity]:
    with tempfile.TemporaryDirectory() as directory:
        if tokens is not None:
            yield from _soak(directory, tokens, tiny)
            return
        for models, at_a_time in ((("tiny",), 2),) if tiny else ((SMALL, 4), (LARGE, 1)):
            yield from _models(Path(directory), models, at_a_time, "tiny" if tiny else "full")


def _models(directory: Path, models: tuple[str, ...], at_a_time: int, size: str) -> Iterator[Parity]:
    """So many processes at a time; the rows of a model as soon as both of its processes are done."""
    from rlinvariant.bench.models import build

    paths = {model: build(model, directory / model) for model in models}

    def count(model: str, side: str) -> dict[str, list[int]]:
        worker = Worker(__name__, side, paths[model], size)
        found = worker.ask(what="count")
        worker.close()
        return found

    with ThreadPoolExecutor(at_a_time) as pool:
        jobs = {model: [pool.submit(count, model, side) for side in ("exact", "stock")] for model in models}
        for model, (exact, stock) in jobs.items():
            theirs = stock.result()
            for what, (mismatched, of) in exact.result().items():
                control = "stock vLLM and transformers" if "trainer" in what else "stock vLLM"
                yield Parity("parity", model, "bfloat16", what, of, mismatched, control, theirs[what][0])


def _worker(side: str, path: str, size: str) -> None:
    link = Link()
    for _ in link.requests():
        link.send(**_count(side, path, size))


def _count(side: str, path: str, size: str) -> dict[str, tuple[int, int]]:
    """{what is compared: (mismatched, tokens)}"""
    requests, length, longest = (REQUESTS, LENGTH, PROMPT) if size == "full" else (8, 8, (3, 40))
    model, engine = _pair(side, path, kv_gib=6.0 if size == "full" else 0.3)
    prompts = _prompts(random.Random(0), requests, longest, model.config.vocab_size)
    found: dict[str, tuple[int, int]] = {}
    for t in TEMPERATURES:

        def draw(order: list[int], t: float = t) -> dict[int, Completion]:
            seeds = [request_seed(0, 0, i, 0) for i in order]
            out = engine.generate([prompts[i] for i in order], seeds, temperature=t, max_tokens=length, ignore_eos=True)
            return dict(zip(order, out, strict=True))

        everyone = list(range(requests))
        engine.llm.reset_prefix_cache()
        cold = draw(everyone)
        warm = draw(everyone[::-1])
        count = sum(differing(cold[i], warm[i]) for i in everyone)
        found[f"sampler: cold prefix against warm, shuffled, T = {t}"] = count, requests * length
        apart = everyone[: min(APART, requests // 2)]
        count = 0
        for i in apart:
            engine.llm.reset_prefix_cache()
            count += differing(cold[i], draw([i])[i])
        found[f"sampler: batch against alone, T = {t}"] = count, len(apart) * length
        for rows_ in PACKED:
            drawn = [cold[i] for i in everyone]
            if side == "exact":
                count = against_trainer(model, prompts, drawn, t, rows_)
            elif rows_ == PACKED[0]:
                count = against_stock_trainer(model, prompts, drawn, t)
            found[f"sampler against trainer, micro-batch {rows_}, T = {t}"] = count, requests * length
    return found


def _pair(side: str, path: str, kv_gib: float, **options: Any) -> tuple[Any, Any]:
    """Trainer's model, made first, and sampler of a checkpoint: exact, or stock."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlinvariant.models import make_invariant, require_exact
    from rlinvariant.sampler.engine import Sampler

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if side == "exact":
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map=device)
        require_exact(make_invariant(model, torch.bfloat16))
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map=device)
    return model.eval(), Sampler(path, invariant=side == "exact", max_model_len=1024, kv_cache_gib=kv_gib, options=options)


def _prompts(rng: random.Random, count: int, lengths: tuple[int, int], vocabulary: int) -> list[list[int]]:
    return [[rng.randrange(vocabulary) for _ in range(rng.randrange(*lengths))] for _ in range(count)]


def _soak(directory: str, tokens: int, tiny: bool) -> Iterator[Parity]:
    """Rollouts of new prompts and seeds until `tokens` are compared, each scored before the next; T alternates."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlinvariant.bench.models import build

    name = "tiny" if tiny else SOAK_MODEL
    requests, length, kv_gib = (8, 16, 0.3) if tiny else (SOAK_REQUESTS, SOAK_LENGTH, SOAK_KV_GIB)
    path = build(name, directory)
    model, engine = _pair("exact", path, kv_gib, max_num_seqs=SOAK_TOGETHER)
    seed = time.time_ns() % 2**31  # every run adds tokens that no other run has seen
    rng, vocabulary = random.Random(seed), model.config.vocab_size
    compared = mismatched = sampled = control = of_control = step = 0
    began = time.perf_counter()
    while compared < tokens and time.perf_counter() - began < SOAK_SECONDS:
        prompts, t = _prompts(rng, requests, SOAK_PROMPT, vocabulary), TEMPERATURES[step % len(TEMPERATURES)]
        seeds = [request_seed(seed, step, i, 0) for i in range(requests)]
        drawn = engine.generate(prompts, seeds, temperature=t, max_tokens=length, ignore_eos=True)
        sampled += sum(len(c.token_ids) for c in drawn)
        mismatched += against_trainer(model, prompts, drawn, t, SOAK_ROWS)
        compared += sum(len(c.sampler_logprobs) for c in drawn)
        if step == 0:
            stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map=model.device).eval()
            control = against_stock_trainer(stock, prompts[:SOAK_CONTROL], drawn[:SOAK_CONTROL], t)
            of_control = sum(len(c.token_ids) for c in drawn[:SOAK_CONTROL])
            del stock
        step += 1
        seconds = time.perf_counter() - began
        print(f"{mismatched:,} mismatched of {compared:,} compared, {sampled:,} sampled, {seconds:.0f} s", flush=True)
    what = (
        f"soak: sampler against trainer, {step} rollouts of {requests} x {length}, seed {seed}, coverage {compared / sampled}"
    )
    against = f"stock transformers, first {of_control:,} tokens"
    yield Parity("parity", name, "bfloat16", what, compared, mismatched, against, control)


if __name__ == "__main__":
    _worker(*sys.argv[1:])

"""Count the sampled tokens whose log-prob is not the same 32 bits, on a GPU, at the shapes of real models.

Random weights, ragged prompts. Each model has two processes: one with the exact sampler and trainer, one with stock vLLM and a
stock model of transformers, the control. `soak` is one long run of the 1.7B shape instead: as many tokens as asked for, of
short prompts, or all of them beyond 8k of context.
"""

import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinvariant.bench import gpu
from rlinvariant.bench.compare import Parity, against_stock_trainer, against_trainer, differing
from rlinvariant.bench.measure import Link, Machine, Missing, Worker, Workers, end_on_sigterm, reason
from rlinvariant.rollout import Completion, request_seed

SMALL_MODELS = ("qwen3-0.6b", "qwen3-1.7b", "qwen2.5-0.5b", "llama-3.2-1b")
LARGE_MODELS = ("qwen3-8b",)  # has the GPU to itself
TEMPERATURES = (1.0, 0.7)
ROWS_SCORED_TOGETHER = (1, 16)
REQUESTS, NEW_TOKENS, PROMPT_TOKENS, ALONE_REQUESTS = 128, 128, (3, 600), 16
SOAK_MODEL = "qwen3-1.7b"
SOAK_SIDES = ("exact-1", "exact-2")  # two: while one's processor schedules or its trainer scores, the other's tokens are drawn
SOAK_SECONDS = 530  # a run that would take longer ends here, and says how far it came
SOAK_CONTROL_REQUESTS = 100  # requests that the control draws


@dataclass(frozen=True)
class Soak:
    """Describes the rollouts of a soak.

    Args:
        requests: decoded at a time, at most as many as vLLM's largest CUDA graph has.
        kv_gib: memory for keys and values, in GiB.
        rows: scored at a time.
        prompts: the least tokens of a prompt, and one more than the most.
        samples: completions of a prompt; all but the first find it in the prefix cache.
        new_tokens: of each completion.
    """

    requests: int
    kv_gib: float
    rows: int
    prompts: tuple[int, int] = (16, 65)
    samples: int = 1
    new_tokens: int = 512


LONG = (8192, 9217)
SOAKS = {
    "full": Soak(512, 32.0, 112),
    "small": Soak(256, 16.0, 56),
    "tiny": Soak(8, 0.3, 8, new_tokens=16),
    "full, long": Soak(128, 32.0, 6, LONG, 16),
    "small, long": Soak(64, 16.0, 3, LONG, 16),
    "tiny, long": Soak(8, 0.3, 3, (300, 333), 4, 16),
}


def rows(tiny: bool) -> Iterator[Parity | Missing]:
    with tempfile.TemporaryDirectory() as directory:
        for models, at_a_time in ((("tiny",), 2),) if tiny else ((SMALL_MODELS, 4 if gpu.large() else 2), (LARGE_MODELS, 1)):
            yield from _models(Path(directory), models, at_a_time, "tiny" if tiny else "full")


def _models(directory: Path, models: tuple[str, ...], at_a_time: int, size: str) -> Iterator[Parity | Missing]:
    """Run `at_a_time` processes; yield the rows of a model as soon as both of its processes are done."""
    from rlinvariant.models.shapes import build

    paths = {model: build(model, directory / model) for model in models}

    def count(model: str, side: str) -> dict[str, list[int]]:
        worker = Worker(__name__, side, paths[model], size)
        try:
            return worker.ask(what="count")
        finally:
            worker.close()

    with ThreadPoolExecutor(at_a_time) as pool:
        jobs = {model: [pool.submit(count, model, side) for side in ("exact", "stock")] for model in models}
        for model, (exact, stock) in jobs.items():
            if ended := [str(error) for job in (exact, stock) if (error := job.exception())]:
                print("\n".join(ended), flush=True)
                yield Missing("parity", model, "; ".join(map(reason, ended)), {})
                continue
            theirs = stock.result()
            for what, (mismatched, of) in exact.result().items():
                control = "stock vLLM and transformers" if "trainer" in what else "stock vLLM"
                yield Parity("parity", model, "bfloat16", what, of, mismatched, control, theirs[what][0])


def _worker(side: str, path: str, size: str) -> None:
    link = Link()
    if side in (*SOAK_SIDES, "control"):
        _soak_worker(link, side, path, size)
        return
    for _ in link.requests():
        link.send(**_count(side, path, size))


def _count(side: str, path: str, size: str) -> dict[str, tuple[int, int]]:
    """Return {what is compared: (mismatched, tokens)}."""
    requests, length, longest = (REQUESTS, NEW_TOKENS, PROMPT_TOKENS) if size == "full" else (8, 8, (3, 40))
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
        apart = everyone[: min(ALONE_REQUESTS, requests // 2)]
        count = 0
        for i in apart:
            engine.llm.reset_prefix_cache()
            count += differing(cold[i], draw([i])[i])
        found[f"sampler: batch against alone, T = {t}"] = count, len(apart) * length
        for rows_ in ROWS_SCORED_TOGETHER:
            drawn = [cold[i] for i in everyone]
            if side == "exact":
                count = against_trainer(model, prompts, drawn, t, rows_)
            elif rows_ == ROWS_SCORED_TOGETHER[0]:
                count = against_stock_trainer(model, prompts, drawn, t)
            found[f"sampler against trainer, micro-batch {rows_}, T = {t}"] = count, requests * length
    return found


def _pair(side: str, path: str, kv_gib: float) -> tuple[Any, Any]:
    """Return the trainer's model, which is made first, and the sampler of a checkpoint, both exact or both stock."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlinvariant.sampler.engine import Sampler

    if side == "exact":
        model = _exact_model(path)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map=device).eval()
    return model, Sampler(path, invariant=side == "exact", max_model_len=1024, kv_cache_gib=kv_gib)


def _exact_model(path: str) -> Any:
    """Return the trainer's model, with fp32 parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlinvariant.models import make_trainable, require_exact

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map=device)
    require_exact(make_trainable(model, torch.bfloat16))
    return model.eval()


def _prompts(rng: random.Random, count: int, lengths: tuple[int, int], vocabulary: int) -> list[list[int]]:
    return [[rng.randrange(vocabulary) for _ in range(rng.randrange(*lengths))] for _ in range(count)]


def soak(file: Path, tokens: int, tiny: bool, long: bool = False) -> None:
    """Draw and score new prompts with new seeds until `tokens` are compared, and add them to what `file` has.

    `long`: every token comes after 8,192 or more. The file is written after every rollout: {"tokens", "mismatched",
    "coverage", "control", "runs": [...]}. The control, a stock engine against the same trainer, is made once.

    Raises:
        SystemExit: a token of ours differs, the control does not, or not all tokens were compared.
    """
    from rlinvariant.models.shapes import build

    end_on_sigterm()
    began, machine, name = time.perf_counter(), Machine(tiny), "tiny" if tiny else SOAK_MODEL
    kept = json.loads(file.read_text()) if file.exists() else {"runs": [], "control": None}
    run: dict[str, Any] = {"tokens": 0, "sampled": 0, "mismatched": 0, "rollouts": 0, "seconds": 0.0, "missing": {}}
    run["seed"] = time.time_ns() % 2**31  # every run adds tokens that no other run has seen
    rng = random.Random(run["seed"])
    with tempfile.TemporaryDirectory() as directory:
        path = build(name, directory)
        size = ("tiny" if tiny else "full" if gpu.large() else "small") + ", long" * long
        if not kept["control"]:  # before the others: a third engine might not fit
            with Workers({"control": Worker(__name__, "control", path, size)}) as workers:
                found = workers.ask(["control"], seed=rng.getrandbits(48), temperature=TEMPERATURES[0])
                kept["control"] = {"compared": "stock vLLM against the same trainer", **found["control"]} if found else None
                run["missing"] |= workers.missing
                print(f"control: {kept['control']}", flush=True)
        with Workers({side: Worker(__name__, side, path, size) for side in SOAK_SIDES}) as workers:
            waited = dict.fromkeys(workers.alive, 0.0)  # the longest that each took
            asked: dict[str, float] = {}
            temperatures = itertools.cycle(TEMPERATURES)

            def ask(side: str) -> None:
                asked[side] = time.perf_counter()
                workers.alive[side].send(seed=rng.getrandbits(48), temperature=next(temperatures))

            for side in SOAK_SIDES:
                ask(side)
            while asked:
                for side, found in workers.first(list(asked)).items():
                    now = time.perf_counter()
                    waited[side] = now - asked.pop(side)
                    if found is None:
                        run["missing"][side] = workers.missing[side]
                    else:
                        run["rollouts"] += 1
                        for key in ("tokens", "sampled", "mismatched"):
                            run[key] += found[key]
                    run["seconds"] = round(now - began, 1)
                    _save(file, machine, name + f", after {LONG[0]:,} tokens or more" * long, kept, run)
                    on_the_way = len(asked) * (run["tokens"] // max(1, run["rollouts"]))
                    print(
                        f"{side}: {found}; {run['mismatched']:,} mismatched of {run['tokens']:,}, {now - began:.0f} s",
                        flush=True,
                    )
                    in_time = now - began + waited[side] < SOAK_SECONDS
                    if found is not None and run["tokens"] + on_the_way < tokens and in_time:
                        ask(side)
    control = kept["control"]
    if run["mismatched"] or control is None or not control["mismatched"] or run["tokens"] < tokens:
        sys.exit(f"soak: {run['mismatched']:,} mismatched of {run['tokens']:,} (asked for {tokens:,}); control: {control}")


def _save(file: Path, machine: Machine, model: str, kept: dict[str, Any], run: dict[str, Any]) -> None:
    runs = [*kept["runs"], run]
    tokens, sampled, mismatched = (sum(r[key] for r in runs) for key in ("tokens", "sampled", "mismatched"))
    total = {"model": model, "tokens": tokens, "mismatched": mismatched, "coverage": tokens / max(1, sampled)}
    machine.write(file, {**total, "control": kept["control"], "runs": runs})


def _soak_worker(link: Link, side: str, path: str, size: str) -> None:
    """Answer each request with a rollout that the exact trainer scored; the control draws it from a stock engine."""
    from rlinvariant.sampler.engine import Sampler

    of = SOAKS[size]
    count = min(SOAK_CONTROL_REQUESTS, of.requests) if side == "control" else of.requests
    model = _exact_model(path)
    kv_gib = of.kv_gib / 2 if side == "control" else of.kv_gib
    room = {"max_model_len": max(1024, of.prompts[1] + of.new_tokens), "options": {"max_num_seqs": of.requests}}
    engine = Sampler(path, invariant=side != "control", kv_cache_gib=kv_gib, **room)
    for request in link.requests():
        rng, began = random.Random(request["seed"]), time.perf_counter()
        different = _prompts(rng, -(-count // of.samples), of.prompts, model.config.vocab_size)
        prompts = [prompt for prompt in different for _ in range(of.samples)][:count]
        seeds = [rng.getrandbits(62) for _ in prompts]
        how = {"temperature": request["temperature"], "max_tokens": of.new_tokens}
        drawn = engine.generate(prompts, seeds, **how, ignore_eos=True)
        drew = time.perf_counter()
        mismatched = against_trainer(model, prompts, drawn, request["temperature"], of.rows)
        engine.llm.reset_prefix_cache()
        link.send(
            tokens=sum(len(c.sampler_logprobs) for c in drawn),
            sampled=sum(len(c.token_ids) for c in drawn),
            mismatched=mismatched,
            rollout_s=round(drew - began, 1),
            score_s=round(time.perf_counter() - drew, 1),
        )


if __name__ == "__main__":
    _worker(*sys.argv[1:])

# pyright: reportCallIssue=false
"""Whole GRPO steps on one GPU: ours against stock TRL with stock vLLM colocated, both as their users would start them.

Only our micro-batches are bounded, at 8,192 tokens: by itself our trainer takes what memory is free, which both share here.
64 prompts x 8 completions of up to 512 tokens; a share of the vocabulary ends a completion, so lengths vary as in a real run.
The learning rate is 0, so that every step samples from the same policy. Each side is a process, and they take turns, after a
step of short completions that compiles and allocates; on a GPU that cannot hold both, one follows the other.
"""

import importlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from rlinvariant.bench import gpu
from rlinvariant.bench.gpu_trainer import grpo_arguments
from rlinvariant.bench.measure import Link, Missing, Row, Worker, Workers, compared, peak_memory

if TYPE_CHECKING:
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer

MODEL = "qwen3-1.7b"
GENERATIONS, PROMPT_TOKENS = 8, (64, 256)
ROUNDS = 3  # steps of each side; fewer, but at least one, if sides that run together would need over MOST_SECONDS
MOST_SECONDS = 225
TARGET = 0.37
SIDES = ("exact", "stock")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Describes the steps of a benchmark.

    Args:
        prompts: of a step; each has GENERATIONS completions.
        rows: of a micro-batch.
        length, short: the most tokens of a completion, and in the first step, which compiles and allocates.
        kv_gib: memory for keys and values, in GiB.
        stop_share: the share of the vocabulary that ends a completion.
        tokens: the most of a micro-batch of ours; None: as many as fit into nine tenths of the free memory, as any user gets;
            a side that starts on the same GPU at the same time would find nothing left.
    """

    prompts: int
    rows: int
    length: int
    short: int
    kv_gib: float
    stop_share: float = 1 / 300
    tokens: int | None = None

    def stops(self, model: str) -> int:
        """Return how many tokens of a model of `shapes.SHAPES` end a completion."""
        from rlinvariant.models.shapes import SHAPES

        return round(SHAPES[model].vocab * self.stop_share)


SIZES = {
    "tiny": Size(prompts=2, rows=8, length=8, short=4, kv_gib=0.3),
    "full": Size(prompts=64, rows=16, length=512, short=64, kv_gib=14.0, tokens=8192),
    "adapters": Size(prompts=32, rows=16, length=512, short=64, kv_gib=8.0, tokens=8192),  # three sides on one card
    "large": Size(prompts=16, rows=8, length=256, short=32, kv_gib=8.0),  # of models that fill the card
}


def rows(tiny: bool) -> Iterator[Row | Missing]:
    from rlinvariant.models.shapes import build

    which, model = ("tiny", "tiny") if tiny else ("full", MODEL)
    size = SIZES[which]
    name = f"{model}, {size.prompts} prompts x {GENERATIONS}, up to {size.length} new tokens"
    with tempfile.TemporaryDirectory() as directory:
        path = build(model, directory, stops=size.stops(model))
        answers: list[dict[str, dict[str, Any]]] = [{} for _ in range(ROUNDS)]
        missing: dict[str, str] = {}
        groups = [SIDES] if tiny or gpu.large() else [(side,) for side in SIDES]
        for group in groups:
            began = time.perf_counter()
            with Workers({side: Worker(__name__, side, path, which) for side in group}) as workers:
                workers.ask(group, together=True, length=size.short)
                print(f"{', '.join(group)}: started after {time.perf_counter() - began:.0f} s", flush=True)
                for at, answer in enumerate(answers):
                    round_began = time.perf_counter()
                    answer |= (found := workers.ask(group if at % 2 else group[::-1], length=size.length))
                    for side, of_side in found.items():
                        numbers = ", ".join(f"{k} {v if v is None else round(v, 2)}" for k, v in of_side.items())
                        print(f"{side}: {numbers}", flush=True)
                    missing |= workers.missing
                    whole = [a for a in answers if len(a) == len(SIDES)]
                    yield from _rows(name, missing, whole or [a for a in answers if a] or answers[:1])
                    now = time.perf_counter()
                    if workers.missing or now - began + (now - round_began) > MOST_SECONDS:
                        break


def _rows(name: str, missing: dict[str, str], answers: list[dict[str, dict[str, Any]]]) -> Iterator[Row | Missing]:
    """Yield what is known so far: a later row takes the place of an earlier one."""
    sides = [side for side in SIDES if side in answers[0]]
    seconds = {side: median(a[side]["seconds"] for a in answers) for side in sides}
    if len(sides) < len(SIDES):
        yield Missing("step", f"step: {name}", "; ".join(missing.values()) or "the other side has not run", seconds)
        return
    same = {side: all(a[side]["exact"] for a in answers) for side in SIDES}
    equal: dict[str, bool | None] = {"ours": same["exact"], "stock": same["stock"]}
    none: dict[str, bool | None] = {"ours": None, "stock": None}
    tokens = {side: mean(a[side]["tokens"] for a in answers) for side in SIDES}

    def row(case: str, found: dict[str, float], unit: str, target: float | None, bits: dict[str, bool | None]) -> Row:
        mine, stock = (found[side] for side in SIDES)
        return compared("step", f"{case}: {name}", mine, stock, unit, target, bits, len(answers), 3)

    yield row("step", seconds, "s", TARGET, equal)
    yield row("sampled tokens of a step", tokens, "tokens", None, none)
    yield row("step, for each million sampled tokens", {s: seconds[s] / tokens[s] * 1e6 for s in SIDES}, "s", None, equal)
    rollout = {side: median(a[side]["rollout"] for a in answers) for side in SIDES}
    yield row("rollout", rollout, "s", None, none)
    yield row("all but the rollout", {side: seconds[side] - rollout[side] for side in SIDES}, "s", None, none)
    yield row("peak memory of the process's tensors", {s: answers[-1][s]["peak"] for s in SIDES}, "MiB", None, none)


def reward(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    """Return rewards that differ within a group."""
    return [float(len(ids) % 7) for ids in completion_ids]


def _worker(side: str, path: str, which: str, rank: str = "0") -> None:
    link = Link()
    with tempfile.TemporaryDirectory() as directory:
        trainer = (ours if side == "exact" else _stock)(path, directory, SIZES[which], int(rank))
        trainer.add_callback(_turns(link, trainer))
        trainer.train()


def _settings(size: Size) -> dict[str, Any]:
    """Return TRL's settings that both sides have."""
    return {
        "per_device_train_batch_size": size.rows,
        "gradient_accumulation_steps": size.prompts * GENERATIONS // size.rows,
        "max_completion_length": size.length,
        "max_steps": 10**6,
        "temperature": 1.0,
    }


def _dataset(path: str) -> tuple[Any, Any]:
    """Return prompts of random words, and the tokenizer that makes a token of each."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    rng, words = random.Random(0), tokenizer.vocab_size
    texts = [" ".join(f"w{rng.randrange(words // 2, words)}" for _ in range(rng.randrange(*PROMPT_TOKENS))) for _ in range(512)]
    return Dataset.from_list([{"prompt": text} for text in texts]), tokenizer


def _adapters(rank: int) -> dict[str, Any]:
    """Return the argument of both trainers that gives every projection an adapter; none with rank 0."""
    if not rank:
        return {}
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")}


def ours(path: str, directory: str, size: Size, rank: int = 0) -> "InvariantGRPOTrainer":
    """Return our trainer of a model in `path`, in exact mode; with adapters if they have a rank."""
    import torch

    from rlinvariant.api import grpo_trainer
    from rlinvariant.trainer.interface import SamplerOptions

    dataset, tokenizer = _dataset(path)
    settings = {"bf16": False, "use_cpu": not torch.cuda.is_available(), "vllm_importance_sampling_correction": False}
    args = grpo_arguments(directory, **_settings(size), **settings)
    most = size.prompts * GENERATIONS
    sampler: SamplerOptions = {"max_model_len": 1024, "kv_cache_gib": size.kv_gib, "options": {"max_num_seqs": most}}
    own: Any = {"sampler_options": sampler, "on_row": lambda *_: None, "tokens_per_microbatch": size.tokens, **_adapters(rank)}
    return grpo_trainer(path, reward, args, dataset, processing_class=tokenizer, **own)


def _stock(path: str, directory: str, size: Size, rank: int = 0) -> Any:
    """Return TRL's trainer as it comes, with its vLLM in this process.

    Only vLLM's memory is given in bytes, as ours is, so that both sides fit: TRL would give a share of the GPU's memory, from
    which vLLM subtracts whatever another process takes meanwhile.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # TRL's engine must be in this process
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # see bench/sampler.py
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1"}
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.grpo_trainer import GRPOTrainer

    generation: Any = importlib.import_module("trl.generation.vllm_generation")
    llm, memory = generation.LLM, {"kv_cache_memory_bytes": int(size.kv_gib * 2**30)}
    generation.LLM = lambda **arguments: llm(**arguments | memory)
    dataset, tokenizer = _dataset(path)
    args = grpo_arguments(
        directory,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=1024,
        vllm_gpu_memory_utilization=0.01,
        **_settings(size),
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return GRPOTrainer(model, reward, args, train_dataset=dataset, processing_class=tokenizer, **_adapters(rank))


def _limit(trainer: Any, length: int) -> None:
    """Set how long completions may get from now on."""
    trainer.max_completion_length = length
    if (generation := getattr(trainer, "vllm_generation", None)) is not None:
        generation.max_completion_length = length


def _time_rollouts(trainer: Any) -> list[float]:
    """Return a list that gets the seconds of every call of TRL's vLLM from now on; ours are in the log."""
    seconds: list[float] = []
    generation: Any = getattr(trainer, "vllm_generation", None)
    if hasattr(generation, "generate"):
        generate = generation.generate

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            found = generate(*arguments, **options)
            seconds.append(time.perf_counter() - began)
            return found

        generation.generate = timed
    return seconds


def _turns(link: Link, trainer: Any) -> Any:
    """Return a callback that waits before every step until this side is asked for one, and answers after it."""
    import torch
    from transformers import TrainerCallback

    requests, rollouts = link.requests(), _time_rollouts(trainer)
    cuda = torch.cuda.is_available()

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            request = next(requests, None)
            if request is None:
                sys.exit(0)
            _limit(trainer, request["length"])
            rollouts.clear()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.began

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            """Answer: TRL logs the numbers of a step after its end."""
            logs = logs or {}
            if "completions/mean_length" not in logs:
                return
            rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
            apart = logs.get("onpolicy/mismatched_tokens", logs.get("sampling/sampling_logp_difference/max"))
            link.send(
                seconds=self.seconds,
                tokens=float(logs["completions/mean_length"]) * rows,
                exact=apart == 0,
                rollout=logs.get("time/rollout", sum(rollouts)),
                train=logs.get("time/train"),
                sync=logs.get("time/sync"),
                peak=torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0,
                reserved=torch.cuda.max_memory_reserved() / 2**20 if cuda else peak_memory(),
            )

    return Turns()


if __name__ == "__main__":
    _worker(*sys.argv[1:])

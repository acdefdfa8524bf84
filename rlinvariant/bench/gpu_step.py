# pyright: reportCallIssue=false
"""Whole GRPO steps on one GPU: ours against stock TRL with stock vLLM colocated, both as their users would start them.

64 prompts x 8 completions of up to 512 tokens; a share of the vocabulary ends a completion, so lengths vary as in a real run.
The learning rate is 0, so that every step samples from the same policy. Each side is a process, and they take turns.
"""

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from statistics import mean, median
from typing import Any

from rlinvariant.bench.gpu_trainer import grpo_arguments
from rlinvariant.bench.measure import Link, Row, Worker, rounds

MODEL = "qwen3-1.7b"
# name -> (prompts, micro-batch in rows, longest completion, steps measured, GiB for keys and values)
SIZES = {"tiny": (2, 8, 8, 2, 0.3), "full": (64, 16, 512, 3, 18.0)}
GENERATIONS, PROMPT, STOP_SHARE = 8, (64, 256), 1 / 300
TARGET = 0.85
SIDES = ("exact", "stock")


def rows(tiny: bool) -> Iterator[Row]:
    from rlinvariant.bench.models import SHAPES, build

    size, model = ("tiny", "tiny") if tiny else ("full", MODEL)
    prompts, _, length, count, _ = SIZES[size]
    with tempfile.TemporaryDirectory() as directory:
        path = build(model, directory, stops=round(SHAPES[model].vocab * STOP_SHARE))
        workers: dict[str, Worker] = {}
        for side in reversed(SIDES):  # one after the other: vLLM measures how much memory is left when it starts
            workers[side] = Worker(__name__, side, path, size)
            workers[side].ask()  # warm up
        answers = rounds(workers, count)
        seconds = {side: median(a[side]["seconds"] for a in answers) for side in SIDES}
        tokens = {side: mean(a[side]["tokens"] for a in answers) for side in SIDES}
        parts = {part: median(a["exact"][part] for a in answers) for part in ("rollout", "train", "sync")}
        same = {side: all(a[side]["exact"] for a in answers) for side in SIDES}
        equal: dict[str, bool | None] = {"ours": same["exact"], "stock": same["stock"]}
        print("of ours: " + ", ".join(f"{part} {value:.2f} s" for part, value in parts.items()), flush=True)
        name = f"{model}, {prompts} prompts x {GENERATIONS}, up to {length} new tokens"
        many = f"{tokens['exact']:,.0f} and {tokens['stock']:,.0f} tokens a step"
        yield Row("step", f"step: {name}; {many}", round(seconds["exact"], 3), round(seconds["stock"], 3), "s",
                  round(seconds["exact"] / seconds["stock"], 3), TARGET, equal, count, 0.0)  # fmt: skip
        ours, stock = (seconds[side] / tokens[side] * 1e6 for side in SIDES)
        yield Row("step", f"step, for each million sampled tokens: {name}", round(ours, 2), round(stock, 2), "s",
                  round(ours / stock, 3), None, equal, count, 0.0)  # fmt: skip
        ours, stock = (answers[-1][side]["peak"] for side in SIDES)
        yield Row("step", f"peak memory of the process's tensors: {name}", round(ours), round(stock), "MiB",
                  round(ours / stock, 3), None, {"ours": None, "stock": None}, 1, 0.0)  # fmt: skip
        for worker in workers.values():
            worker.close()


def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Something that differs within a group."""
    return [float(len(ids) % 7) for ids in completion_ids]


def _worker(side: str, path: str, size: str) -> None:
    link = Link()
    prompts, rows_, length, _, kv_gib = SIZES[size]
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "per_device_train_batch_size": rows_, "gradient_accumulation_steps": prompts * GENERATIONS // rows_,
            "max_completion_length": length, "max_steps": 10**6, "temperature": 1.0,
        }  # fmt: skip
        trainer = (_ours if side == "exact" else _stock)(path, directory, settings, kv_gib)
        trainer.add_callback(_turns(link))
        trainer.train()


def _dataset(path: str) -> tuple[Any, Any]:
    """Prompts of random words, and the tokenizer that makes a token of each."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    rng, words = random.Random(0), tokenizer.vocab_size
    texts = [" ".join(f"w{rng.randrange(words // 2, words)}" for _ in range(rng.randrange(*PROMPT))) for _ in range(512)]
    return Dataset.from_list([{"prompt": text} for text in texts]), tokenizer


def _ours(path: str, directory: str, settings: dict[str, Any], kv_gib: float) -> Any:
    import torch

    from rlinvariant.run import grpo_trainer

    dataset, tokenizer = _dataset(path)
    settings |= {"bf16": False, "use_cpu": not torch.cuda.is_available(), "vllm_importance_sampling_correction": False}
    args = grpo_arguments(directory, **settings)
    most = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    sampler = {"max_model_len": 1024, "kv_cache_gib": kv_gib, "options": {"max_num_seqs": most}}
    return grpo_trainer(
        path, reward, args, dataset, processing_class=tokenizer, sampler_options=sampler, on_row=lambda *_: None
    )


def _stock(path: str, directory: str, settings: dict[str, Any], kv_gib: float) -> Any:
    """TRL as it comes, its vLLM in this process. Of vLLM's memory only the share is set, so that both sides fit."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.grpo_trainer import GRPOTrainer

    dataset, tokenizer = _dataset(path)
    total = torch.cuda.get_device_properties().total_memory / 2**30
    share = (kv_gib + 6) / total  # and the model, and what vLLM computes with
    args = grpo_arguments(
        directory, bf16=True, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=1024,
        vllm_gpu_memory_utilization=round(share, 3), **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return GRPOTrainer(model, reward, args, train_dataset=dataset, processing_class=tokenizer)


def _turns(link: Link) -> Any:
    """A callback that waits before every step until this side is asked for one, and answers after it."""
    import torch
    from transformers import TrainerCallback

    requests = link.requests()
    cuda = torch.cuda.is_available()

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if next(requests, None) is None:
                sys.exit(0)
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.began

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            """After the step's end, with its numbers."""
            logs = logs or {}
            if "completions/mean_length" not in logs:
                return
            rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
            apart = logs.get("onpolicy/mismatched_tokens", logs.get("sampling/sampling_logp_difference/max"))
            link.send(
                seconds=self.seconds, tokens=float(logs["completions/mean_length"]) * rows, exact=apart == 0,
                peak=torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0,
                **{part: logs.get(f"time/{part}", 0.0) for part in ("rollout", "train", "sync")},
            )  # fmt: skip

    return Turns()


if __name__ == "__main__":
    _worker(*sys.argv[1:])

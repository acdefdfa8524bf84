# pyright: reportCallIssue=false
"""Log-probs of TRL's padded rows and their gradients, on a GPU: packed and exact against TRL's own path.

Each side is a process of its own on the same GPU, with fp32 parameters and gradient checkpointing; they take turns. The stock
side is TRL's `GRPOTrainer` as it is: padded forward, bf16 autocast, SDPA, TRL's chunked lm head.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from rlinvariant.bench.measure import Link, Row, Worker, peak_memory, rounds
from rlinvariant.bench.trainer import padded_batch

MODEL = "qwen3-1.7b"
# name -> (rows, prompt tokens, completion tokens); ragged rows have an eighth to all of these
SIZES = {"tiny": (4, 16, 24), "2k": (8, 512, 1536), "8k": (4, 1024, 7168)}
LEAST = 1 / 8
TARGETS = {"equal": 1.0, "ragged": 1.25}
SIDES = ("exact", "stock")


def rows(tiny: bool) -> Iterator[Row]:
    from rlinvariant.bench.models import build

    with tempfile.TemporaryDirectory() as directory:
        path = build("tiny" if tiny else MODEL, directory)
        for size in ("tiny",) if tiny else ("2k", "8k"):
            workers = {side: Worker(__name__, side, path, size) for side in SIDES}
            yield from _size(workers, size, 2 if tiny else 5)
            for worker in workers.values():
                worker.close()


def _size(workers: dict[str, Worker], size: str, count: int) -> Iterator[Row]:
    same = {side: {case: worker.ask(case=case, what="bits")["same"] for case in TARGETS} for side, worker in workers.items()}
    number, prompt, completion = SIZES[size]
    for case, target in TARGETS.items():
        equal: dict[str, bool | None] = {"ours": same["exact"][case], "stock": same["stock"][case]}
        name = f"{number} {case} rows of {'' if case == 'equal' else 'up to '}{prompt}+{completion} tokens"
        for what, label in (("train", "forward + backward"), ("old", "the same, and TRL's old-logprob pass")):
            rounds(workers, 1, case=case, what=what)  # warm up
            answers = rounds(workers, count, case=case, what=what)
            ours, stock = (median(a[side]["tokens"] / a[side]["seconds"] for a in answers) for side in SIDES)
            yield Row("trainer", f"{name}, {label}", round(ours, 1), round(stock, 1), "tok/s", round(ours / stock, 3),
                      target if what == "train" else None, equal, count, 0.0)  # fmt: skip
    ours, stock = (workers[side].ask(what="memory")["peak"] for side in SIDES)
    yield Row("trainer", f"{size}, peak memory: parameters, gradients, activations", round(ours), round(stock), "MiB",
              round(ours / stock, 3), 1.0, {"ours": None, "stock": None}, 1, 0.0)  # fmt: skip


def grpo_arguments(directory: str, **settings: Any) -> Any:
    """TRL's configuration of both sides."""
    from trl.trainer.grpo_config import GRPOConfig

    return GRPOConfig(
        output_dir=directory, num_generations=8, gradient_checkpointing=True, save_strategy="no", report_to=[],
        logging_steps=1, disable_tqdm=True, learning_rate=0.0, dataloader_pin_memory=False, **settings,
    )  # fmt: skip


def _trainer(side: str, path: str, directory: str) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.grpo_trainer import GRPOTrainer

    from rlinvariant.trainer.grpo import InvariantGRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    shared: Any = {
        "reward_funcs": lambda completions, **_: [0.0] * len(completions),
        "train_dataset": Dataset.from_list([{"prompt": "w4 w5"}] * 8),
        "processing_class": AutoTokenizer.from_pretrained(path),
    }
    settings = {"temperature": 0.7, "per_device_train_batch_size": 8, "use_cpu": not torch.cuda.is_available()}
    if side == "stock":
        return GRPOTrainer(model, args=grpo_arguments(directory, bf16=True, **settings), **shared)
    none: Any = lambda: None  # noqa: E731 - nothing is sampled here
    return InvariantGRPOTrainer(model, args=grpo_arguments(directory, bf16=False, **settings), sampler=none, **shared)


def _worker(side: str, path: str, size: str) -> None:
    import torch

    link = Link()
    torch.manual_seed(0)
    number, prompt, completion = SIZES[size]
    with tempfile.TemporaryDirectory() as directory:
        trainer = _trainer(side, path, directory)
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs)
    device, model = trainer.accelerator.device, trainer.accelerator.prepare(trainer.model)
    model.train()
    wait, peak = _device(device.type)
    shape = (trainer.model.config.vocab_size, number, prompt, completion)
    batches = {case: [x.to(device) for x in padded_batch(case, *shape, LEAST)] for case in TARGETS}
    upstream = torch.randn(number, completion, device=device)

    def logprobs(ids: Any, mask: Any) -> Any:
        with trainer.compute_loss_context_manager():
            return trainer._get_per_token_logps_and_entropies(model, ids, mask, completion, compute_entropy=True)[0]

    for request in link.requests():
        ids, mask = batches[request.get("case", "equal")]
        if request["what"] == "memory":
            link.send(peak=peak())
        elif request["what"] == "bits":  # every row with the others, and alone
            with torch.no_grad():
                full = logprobs(ids, mask)
                alone = torch.cat([logprobs(ids[i : i + 1], mask[i : i + 1]) for i in range(number)])
            keep = mask[:, -completion:].bool()
            link.send(same=torch.equal(full[keep].view(torch.int32), alone[keep].view(torch.int32)))
        else:
            model.zero_grad(set_to_none=True)
            wait()
            began = time.perf_counter()
            if request["what"] == "old" and side == "stock":
                with torch.no_grad():
                    logprobs(ids, mask)
            ((logprobs(ids, mask) * upstream) * mask[:, -completion:]).sum().backward()
            wait()
            link.send(seconds=time.perf_counter() - began, tokens=int(mask.sum()))


def _device(kind: str) -> tuple[Callable[[], None], Callable[[], float]]:
    """How to wait for it, and its peak memory so far in MiB."""
    import torch

    if kind == "cpu":
        return lambda: None, peak_memory
    return torch.cuda.synchronize, lambda: torch.cuda.max_memory_allocated() / 2**20


if __name__ == "__main__":
    _worker(*sys.argv[1:])

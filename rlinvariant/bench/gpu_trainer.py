# pyright: reportCallIssue=false
"""Log-probs of TRL's padded rows and their gradients, on a GPU: packed and exact against TRL's own path.

Each side is a process of its own on the same GPU, with fp32 parameters and gradient checkpointing; they take turns. The stock
side is TRL's `GRPOTrainer` as it is: padded forward, bf16 autocast, SDPA, TRL's chunked lm head.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from rlinvariant import bits
from rlinvariant.bench.measure import Link, Missing, Row, Worker, Workers, compared, peak_memory
from rlinvariant.bench.trainer import padded_batch
from rlinvariant.types import Untyped

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

MODEL = "qwen3-1.7b"
# name -> (rows, prompt tokens, completion tokens, times); ragged rows have an eighth to all of these
SIZES = {"tiny": (4, 16, 24, 2), "2k": (8, 512, 1536, 3), "8k": (4, 1024, 7168, 3)}
LEAST_SHARE = 1 / 8
TARGETS = {"equal": 1.0, "ragged": 1.25}
SIDES = ("exact", "stock")


def rows(tiny: bool) -> Iterator[Row | Missing]:
    return measured("tiny" if tiny else MODEL, ("tiny",) if tiny else ("2k", "8k"))


def measured(
    model: str, sizes: tuple[str, ...], targets: Mapping[str, float] = TARGETS, memory: float | None = 1.0
) -> Iterator[Row | Missing]:
    """Yield the rows of one model of `shapes.SHAPES`, for some of `SIZES`.

    `targets` are those of equal and ragged rows, `memory` is that of the peak memory.
    """
    from rlinvariant.models.shapes import SHAPES, build

    name = "" if model in ("tiny", MODEL) else f"{model}, "
    name += "stock's weights in bfloat16, " if SHAPES[model].experts else ""
    with tempfile.TemporaryDirectory() as directory:
        path = build(model, directory)
        with Workers({side: Worker(__name__, side, path) for side in SIDES}) as workers:  # they start together
            for size in sizes:
                yield from _size(workers, name, size, targets, memory)


def _size(
    workers: Workers, model: str, size: str, targets: Mapping[str, float], memory: float | None
) -> Iterator[Row | Missing]:
    number, prompt, completion, count = SIZES[size]
    for case, target in targets.items():
        name = f"{model}{number} {case} rows of {'' if case == 'equal' else 'up to '}{prompt}+{completion} tokens"
        asked: dict[str, Any] = {"size": size, "case": case}
        same = {side: found["same"] for side, found in workers.ask(SIDES, what="bits", **asked).items()}
        workers.ask(SIDES, what="train", **asked)  # warm up
        answers = workers.rounds(SIDES, count, what="train", **asked)
        for what, label in (("train", "forward + backward"), ("step", "the same, and TRL's old-logprob pass")):
            found = {side: [a[side]["tokens"] / a[side][what] for a in answers if side in a] for side in SIDES}
            speed = {side: median(rates) for side, rates in found.items() if rates}
            yield _row(workers, f"{name}, {label}", speed, "tok/s", target if what == "train" else None, same, count)
    peak = {side: found["peak"] for side, found in workers.ask(SIDES, what="memory").items()}
    yield _row(workers, f"{model}{size}, peak memory: parameters, gradients, activations", peak, "MiB", memory, {}, 1)


def _row(
    workers: Workers, case: str, found: dict[str, float], unit: str, target: float | None, same: dict[str, bool], samples: int
) -> Row | Missing:
    if len(found) < len(SIDES):
        return Missing("trainer", case, "; ".join(workers.missing.values()), found)
    ours, stock = (found[side] for side in SIDES)
    equal = {"ours": same.get("exact"), "stock": same.get("stock")}
    return compared("trainer", case, ours, stock, unit, target, equal, samples)


def grpo_arguments(directory: str, **settings: Untyped) -> "GRPOConfig":
    """Return TRL's configuration, which both sides share."""
    from trl.trainer.grpo_config import GRPOConfig

    return GRPOConfig(
        output_dir=directory,
        num_generations=8,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        learning_rate=0.0,
        dataloader_pin_memory=False,
        **settings,
    )


def _trainer(side: str, path: str, directory: str) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.grpo_trainer import GRPOTrainer

    from rlinvariant.models.limits import mixture_of
    from rlinvariant.trainer.grpo import InvariantGRPOTrainer

    experts = side == "stock" and mixture_of(AutoConfig.from_pretrained(path)) is not None  # see bench/moe.py
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if experts else torch.float32)
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


def _worker(side: str, path: str) -> None:
    import torch

    link = Link()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        trainer = _trainer(side, path, directory)
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs)
    device, model = trainer.accelerator.device, trainer.accelerator.prepare(trainer.model)
    model.train()
    wait, peak = _device(device.type)

    def logprobs(ids: Any, mask: Any, completion: int) -> Any:
        with trainer.compute_loss_context_manager():
            return trainer._get_per_token_logps_and_entropies(model, ids, mask, completion, compute_entropy=True)[0]

    for request in link.requests():
        if request["what"] == "memory":
            link.send(peak=peak())
            continue
        number, prompt, completion, _ = SIZES[request["size"]]
        torch.manual_seed(0)  # the same batch every time, and on both sides
        batch = padded_batch(request["case"], trainer.model.config.vocab_size, number, prompt, completion, LEAST_SHARE)
        ids, mask = (x.to(device) for x in batch)
        if request["what"] == "bits":  # every row with the others, and alone
            with torch.no_grad():
                full = logprobs(ids, mask, completion)
                alone = torch.cat([logprobs(ids[i : i + 1], mask[i : i + 1], completion) for i in range(number)])
            keep = mask[:, -completion:].bool()
            link.send(same=bool(bits.same(full[keep], alone[keep])))
        else:
            upstream = torch.randn(number, completion, device=device) * mask[:, -completion:]
            model.zero_grad(set_to_none=True)
            wait()
            began = time.perf_counter()
            if side == "stock":
                with torch.no_grad():
                    logprobs(ids, mask, completion)
                wait()
            old = time.perf_counter()
            (logprobs(ids, mask, completion) * upstream).sum().backward()
            wait()
            end = time.perf_counter()
            link.send(train=end - old, step=end - began, tokens=int(mask.sum()))


def _device(kind: str) -> tuple[Callable[[], None], Callable[[], float]]:
    """Return two functions: one waits for the device, one gives its peak memory in MiB (on a GPU since it was last asked)."""
    import torch

    if kind == "cpu":
        return lambda: None, peak_memory

    def peak() -> float:
        found = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return found

    return torch.cuda.synchronize, peak


if __name__ == "__main__":
    _worker(*sys.argv[1:])

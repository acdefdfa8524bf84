"""A checkpoint, hashed and flushed, against TRL's own: how long training waits for it, and when it is safe from a power cut.

Both write fp32 weights and the two moments of Adam. TRL's is done when the kernel has the bytes; ours goes on beside training,
until every byte is hashed and on the disk and the directory has its name. The two take turns, with an empty write cache.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rlinvariant.bench.measure import Others, Row

MODEL, CPU_MODEL = "qwen3-1.7b", "qwen2.5-0.5b"
TURNS = 3
TARGET = 1.2  # ours / TRL's, of the time that training waits


def rows(tiny: bool) -> Iterator[Row]:
    import torch

    from rlinvariant.models.shapes import build

    name = "tiny" if tiny else MODEL if torch.cuda.is_available() else CPU_MODEL
    with tempfile.TemporaryDirectory(dir=os.environ.get("RLINVARIANT_BENCH_DISK")) as directory:
        path = build(name, Path(directory) / "model")
        ours, stock = (_trainer(path, Path(directory) / side, side == "ours") for side in ("ours", "stock"))
        waits: dict[str, list[float]] = {"ours": [], "stock": [], "disk": []}
        others = Others()
        for _ in range(2 if tiny else TURNS):
            waits["stock"].append(_save(stock))
            began = time.perf_counter()
            waits["ours"].append(_save(ours))
            ours._wait_for_disk()
            waits["disk"].append(time.perf_counter() - began)
        size = sum(file.stat().st_size for file in (Path(directory) / "ours").rglob("*") if file.is_file())
        share = round(others.share(), 3)
    of = f"{name}, {size / 2**30:.1f} GiB with Adam's moments"
    for case, key, target in (("training waits", "ours", TARGET), ("until it is whole on the disk", "disk", None)):
        mine, theirs = median(waits[key]) * 1e3, median(waits["stock"]) * 1e3
        yield Row(
            bench="saving",
            case=f"{case}: {of}",
            ours=round(mine, 1),
            stock=round(theirs, 1),
            unit="ms",
            ratio=round(mine / theirs, 3),
            target=target,
            bits_equal={"ours": None, "stock": None},
            samples=len(waits["ours"]),
            others=share,
        )


def _trainer(path: str, directory: Path, ours: bool) -> Any:
    """Return a trainer that has taken one step with gradients of 1, so that the optimizer has its moments."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from rlinvariant.trainer.checkpointed import CheckpointedTrainer

    args = GRPOConfig(str(directory), bf16=False, use_cpu=not torch.cuda.is_available(), report_to="none", save_total_limit=1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    data = Dataset.from_list([{"prompt": "w1"}] * 64)
    kind = CheckpointedTrainer if ours else GRPOTrainer
    trainer: Any = kind(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args,
        data,
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    trainer.create_optimizer_and_scheduler(100)
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return trainer


def _save(trainer: Any) -> float:
    """Save once more, with nothing left to be written from before, and return how long the caller waits, in seconds."""
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    os.sync()
    trainer.state.global_step += 1
    began = time.perf_counter()
    trainer._save_checkpoint(trainer.model, None)
    return time.perf_counter() - began

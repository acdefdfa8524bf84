"""The arithmetic recipe at the smallest size, whose reward writes down what the process holds at each step.

$SOAK names the file: one JSON line per step, with resident memory and its anonymous part in bytes, open files, threads.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any

import chz

from rlinvariant.config import Config
from rlinvariant.recipes import arithmetic

DEFAULTS = arithmetic.DEFAULTS | {
    "data.eval_size": 16,
    "trainer.per_device_train_batch_size": 16,
    "trainer.num_generations": 4,
    "trainer.max_completion_length": 32,
    "wandb.mode": "disabled",
}


@chz.chz
class Data(arithmetic.Data):
    leak_mib: float = chz.field(default=0.0, doc="MiB that each step keeps for ever: the fault that a soak must see.")


check, prepare_model, datasets = arithmetic.check, arithmetic.prepare_model, arithmetic.datasets
kept: list[bytes] = []


def reward_funcs(config: Config) -> list[Any]:
    (reward,) = arithmetic.reward_funcs(config)

    def measured(trainer_state: Any, **columns: Any) -> list[float]:
        if (path := os.environ.get("SOAK")) and trainer_state is not None:
            with open(path, "a") as file:
                file.write(json.dumps({"step": trainer_state.global_step, **held()}) + "\n")
        kept.append(os.urandom(int(config.data.leak_mib * 2**20)))  # random, so that the kernel gives real pages
        return reward(trainer_state=trainer_state, **columns)

    return [measured]


def held() -> dict[str, int]:
    """Return what this process holds of the system: bytes of memory, open files, threads; and whether a checkpoint is on its
    way to the disk meanwhile, in a thread that has a file open."""
    began = _saves()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = {name: int(lines[name].split()[0]) for name in ("VmRSS", "RssAnon")}
    return {
        "rss": kib["VmRSS"] * 1024,
        "anonymous": kib["RssAnon"] * 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(lines["Threads"]),
        "saving": began or _saves(),
    }


def _saves() -> bool:
    return any(thread.name.startswith("checkpoint-") for thread in threading.enumerate())

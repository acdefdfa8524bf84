"""A reward that varies in an untrained model; it says what memory was used, and plants a fault where it is asked to.

Completions of one prompt must differ in it: where all are alike, nothing is trained, and weights are equal for that alone.
"""

import os
import time
from pathlib import Path
from typing import Any

import torch


def even(completions: list[str], trainer_state: Any = None, **_: Any) -> list[float]:
    """Grade by how many words end in an even digit: about half."""
    step, rank = getattr(trainer_state, "global_step", 0), os.environ.get("RANK", "0")
    if torch.cuda.is_available():
        print(f"peak {step} {rank} {torch.cuda.max_memory_allocated() / 2**30:.1f}", flush=True)
    if os.environ.get("GPU2_FAULT") and rank == "1" and step == 1:
        _differ()
    if os.environ.get("GPU2_FLIP") and step == 0:
        _flip()
    return [sum(word[-1] in "02468" for word in text.split()) / 64 for text in completions]


def _differ() -> None:
    """Let this process's log-probs be one ulp off from now on, and say when it began."""
    from rlinvariant.trainer import InvariantGRPOTrainer

    compare = InvariantGRPOTrainer._compare

    def off(self: Any, logprobs: torch.Tensor, inputs: Any) -> None:
        Path(os.environ["GPU2_FAULT"]).write_text(str(time.time()))
        compare(self, torch.nextafter(logprobs, torch.zeros_like(logprobs) - 1e9), inputs)

    InvariantGRPOTrainer._compare = off  # type: ignore[method-assign]


def _flip() -> None:
    """Flip one bit of the last word of all that is sent to servers from now on."""
    from rlinvariant.sampler import served

    save = served.save

    def flipped(part: Any) -> list[bytes | memoryview]:
        sent = bytearray(b"".join(save(part)))
        sent[-1] ^= 1
        return [memoryview(sent)]

    served.save = flipped

"""Tokens per second of engines at several batch sizes: `torchrun -m tests.gpu2.rates MODEL exact stock`, or in one process.

Engines are started one after the other and timed in turn, the best of three.
"""

import os
import sys
import time
from typing import Any

import torch
from transformers import AutoConfig

from rlinvariant import launch, runtime
from rlinvariant.sampler.engine import Sampler

BATCHES, PROMPT, ROUNDS = (1, 16, 256), 64, 3


def rate(engine: Sampler, batch: int, new: int, vocabulary: int) -> float:
    """Return how many tokens are drawn in a second, from a cold cache."""
    prompts = [[3 + (i * 7 + j * 13) % (vocabulary - 3) for j in range(PROMPT)] for i in range(batch)]
    engine.llm.reset_prefix_cache()
    began = time.perf_counter()
    engine.generate(prompts, list(range(batch)), temperature=1.0, max_tokens=new, ignore_eos=True)
    return batch * new / (time.perf_counter() - began)


def main(path: str, *sides: str) -> int:
    runtime.configure()
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if launch.is_launched() else 1
    if ranks > 1:
        launch.join()
    cuda, vocabulary = torch.cuda.is_available(), AutoConfig.from_pretrained(path).vocab_size
    batches, new, kv = (BATCHES, 128, 16.0) if cuda else ((1, 4), 8, 0.1)
    options: dict[str, Any] = {"max_num_seqs": 256}
    if ranks > 1:  # stock sums by its own all-reduce: the one that it fuses with the norm needs NVLink multicast, which is off
        options |= {"tensor_parallel_size": ranks, "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}}}
    engines = {
        side: Sampler(path, invariant=side == "exact", max_model_len=PROMPT + new + 1, kv_cache_gib=kv, options=options)
        for side in sides
    }
    for batch in batches:
        best = dict.fromkeys(sides, 0.0)
        for turn in range(ROUNDS + 1):
            for side, engine in engines.items():
                found = rate(engine, batch, new, vocabulary)
                best[side] = max(best[side], found) if turn else 0.0  # the first warms up
        for side, found in best.items():
            if os.environ.get("RANK", "0") == "0":
                print(f"row rate {side} over {ranks} batch {batch}: {found:.1f} tokens/s", flush=True)
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)

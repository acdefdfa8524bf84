"""Tokens of an engine over all processes against a whole model in each: `torchrun -m tests.gpu2.columns MODEL`.

Each process scores the completions of its own number with its own whole model. The control is vLLM's own cut with our ops.
"""

import os
import random
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from rlinvariant import bits, launch, runtime
from rlinvariant.models import make_invariant
from rlinvariant.models.load import load
from rlinvariant.rollout import request_seed
from rlinvariant.sampler.engine import Sampler
from rlinvariant.trainer.score import Layout, score

GPU = {"tokens": 200_000, "new": 128, "longest": 600, "control": 64, "forward": 16_384, "kv": 24.0}
CPU = {"tokens": 200, "new": 12, "longest": 40, "control": 4, "forward": 512, "kv": 0.1}


def differing(model: Any, engine: Sampler, count: int, size: dict[str, Any], seed: int, vocabulary: int) -> tuple[int, int]:
    """Return how many log-probs of some requests differ from the trainer's, on all processes, and how many there are."""
    rng, rank, ranks = random.Random(seed), dist.get_rank(), dist.get_world_size()
    prompts = [[rng.randrange(3, vocabulary) for _ in range(rng.randint(1, size["longest"]))] for _ in range(count)]
    seeds = [request_seed(seed, 0, i, 0) for i in range(count)]
    began = time.monotonic()
    drawn = engine.generate(prompts, seeds, temperature=1.0, max_tokens=size["new"], ignore_eos=True)
    rate = sum(len(c.token_ids) for c in drawn) / (time.monotonic() - began)
    own = slice(rank, None, ranks)
    scored = torch.cat(score(model, prompts[own], drawn[own], 1.0, Layout(64, tokens=size["forward"])))
    sampled = torch.tensor([x for c in drawn[own] for x in c.sampler_logprobs], dtype=torch.float64).float()
    device = next(model.parameters()).device
    found = torch.tensor([int((bits.words(sampled) != bits.words(scored)).sum()), len(sampled)], device=device)
    dist.all_reduce(found)
    wrong, of = found.tolist()
    if rank == 0:
        print(f"drawn at {rate:,.0f} tokens/s", flush=True)
    return wrong, of


def main(path: str) -> int:
    from rlinvariant.sampler.vllm_columns import vllms_plan

    runtime.configure()
    launch.join()
    cuda, ranks = torch.cuda.is_available(), int(os.environ["WORLD_SIZE"])
    size, device = (GPU, "cuda") if cuda else (CPU, "cpu")
    vocabulary = AutoConfig.from_pretrained(path).vocab_size
    model = load(AutoModelForCausalLM, path, dtype=torch.float32, device_map=device).eval()
    make_invariant(model)
    options = {"tensor_parallel_size": ranks, "max_num_seqs": 256}
    room: dict[str, Any] = {"invariant": True, "max_model_len": size["longest"] + size["new"] + 1}
    engine = Sampler(path, **room, kv_cache_gib=size["kv"], options=options)
    names = engine.differing_weights(model.named_parameters())
    wrong, of = differing(model, engine, -(-size["tokens"] // size["new"]), size, 1, vocabulary)
    with vllms_plan():
        control = Sampler(path, **room, kv_cache_gib=size["kv"] / 8, options=options | {"enforce_eager": True})
    seen, among = differing(model, control, size["control"], size, 2, vocabulary)
    if dist.get_rank() == 0:
        print(f"row columns over {ranks} processes: {wrong:,} / {of:,} differ, {len(names)} parameters differ", flush=True)
        print(f"row control, vLLM's own cut: {seen:,} / {among:,} differ", flush=True)
    dist.barrier()
    return int(bool(wrong or names) or of < size["tokens"] or seen < among // 2)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)

"""Tokens per second, exact against stock, of the same requests in the same run."""

import time
from collections.abc import Callable
from typing import Any

import torch

from rlinvariant.sampler.drive import Request, drive
from rlinvariant.trainer.score import score, stock_score
from rlinvariant.verify.relations import Pair, basic


def rates(pair: Pair, plain: Any, stock: Any) -> dict[str, Any]:
    """{"sampler" | "trainer": {"exact", "stock": tok/s, "requests", "tokens"}}: the better of two of each, taken in turn.

    The trainer's is a forward without gradients, of prompts with completions: ours packed, stock one sequence at a time, as its
    padded batches have no positions of their own.
    """
    requests = [Request(r.prompt, r.seed, 1.0, r.max_tokens, ignore_eos=True) for r in basic(pair, salt=2)]
    drawn = sum(r.max_tokens for r in requests)
    prompts, completions = [r.prompt for r in requests], _completions(pair, requests)
    whole = drawn + sum(map(len, prompts))
    layout = pair.packed()
    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
        "sampler": (lambda: drive(pair.sampler, requests), lambda: drive(stock, requests), drawn),
        "trainer": (
            lambda: score(pair.model, prompts, completions, 1.0, layout),
            lambda: stock_score(plain, prompts, completions, 1.0),
            whole,
        ),
    }
    found: dict[str, Any] = {}
    for side, (ours, theirs, tokens) in sides.items():
        seconds = {"exact": float("inf"), "stock": float("inf")}
        for name, run in (("exact", ours), ("stock", theirs)) * 2:
            seconds[name] = min(seconds[name], _timed(run))
        found[side] = {k: tokens / s for k, s in seconds.items()} | {"requests": len(requests), "tokens": tokens}
    return found


def _completions(pair: Pair, requests: list[Request]) -> Any:
    return drive(pair.sampler, requests).completions


def _timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began

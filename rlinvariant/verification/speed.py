"""Tokens per second, exact against stock, of the same requests in the same run."""

import time
from collections.abc import Callable
from typing import Any

import torch

from rlinvariant.trainer.packing import pack
from rlinvariant.trainer.score import Layout, padded
from rlinvariant.verification.relations import Pair, basic

REQUESTS, ROWS = 64, 8  # drawn at a time, scored at a time


def rates(pair: Pair, plain: Any, stock: Any) -> dict[str, Any]:
    """{"sampler" | "trainer": {"exact", "stock": tok/s, "tokens"}}: the best of three of each, taken in turn.

    The sampler's are tokens drawn; the trainer's those of prompts and completions, in a forward without gradients to log-probs:
    ours packed, stock padded, as TRL gives them to it.
    """
    requests = (basic(pair, salt=2) * REQUESTS)[:REQUESTS]
    length = pair.sizes.tokens
    prompts, seeds = [[*r.prompt[:32]] for r in requests], list(range(len(requests)))

    def draw(engine: Any) -> Any:
        engine.llm.reset_prefix_cache()
        return engine.generate(prompts, seeds, temperature=1.0, max_tokens=length, ignore_eos=True)

    some = draw(pair.sampler)[:ROWS]
    rows = [[*r.prompt] for r in requests[:ROWS]]
    device = next(pair.model.parameters()).device
    ids, mask, columns = padded(rows, [c.token_ids for c in some], Layout(ROWS))
    ids, mask = ids.to(device), mask.to(device)

    def packed() -> Any:
        batch = pack(ids, mask, columns)
        where = {"token_ids": batch.token_ids, "predicted_from": batch.predicted_from}
        return pair.model(**batch.inputs, attention_mask=None, **where, temperature=1.0)

    def unpacked() -> Any:
        logits = plain(input_ids=ids, attention_mask=mask, logits_to_keep=columns + 1).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(2, ids[:, -columns:, None])

    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
        "sampler": (lambda: draw(pair.sampler), lambda: draw(stock), REQUESTS * length),
        "trainer": (packed, unpacked, int(mask.sum())),
    }
    found: dict[str, Any] = {}
    for side, (ours, theirs, tokens) in sides.items():
        seconds = {"exact": float("inf"), "stock": float("inf")}
        for name, run in (("exact", ours), ("stock", theirs)) * 3:
            seconds[name] = min(seconds[name], _timed(run))
        found[side] = {k: tokens / s for k, s in seconds.items()} | {"tokens": tokens}
    return found


@torch.no_grad()
def _timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began

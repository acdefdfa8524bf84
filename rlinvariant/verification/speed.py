"""Tokens per second, exact against stock, on the same requests in the same process.

B: sequences, T: tokens of a padded sequence, V: vocabulary.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from rlinvariant.trainer.packing import pack
from rlinvariant.trainer.score import Layout, padded
from rlinvariant.types import JsonObject
from rlinvariant.verification.pair import Pair, basic_requests

DRAWN_REQUESTS, SCORED_ROWS = 64, 8


def rates(pair: Pair, plain: Any, stock: Any) -> JsonObject:
    """Return {"sampler" | "trainer": {"exact": tok/s, "stock": tok/s, "tokens": int}}, the best of three of each, in turn.

    The sampler's tokens are those drawn. The trainer's are those of prompts and completions, in a forward without gradients
    that ends in log-probs: ours packed, stock padded, as TRL gives them to it.

    Args:
        pair: the exact sides.
        plain: transformers' own model.
        stock: vLLM's own engine.
    """
    requests = (basic_requests(pair, salt=2) * DRAWN_REQUESTS)[:DRAWN_REQUESTS]
    length = pair.sizes.tokens
    prompts, seeds = [[*r.prompt[:32]] for r in requests], list(range(len(requests)))

    def draw(engine: Any) -> Any:
        engine.llm.reset_prefix_cache()
        return engine.generate(prompts, seeds, temperature=1.0, max_tokens=length, ignore_eos=True)

    drawn = draw(pair.sampler)[:SCORED_ROWS]
    scored = [[*r.prompt] for r in requests[:SCORED_ROWS]]
    device = next(pair.model.parameters()).device
    ids_BT, mask_BT, columns = padded(scored, [c.token_ids for c in drawn], Layout(SCORED_ROWS))
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)

    def packed() -> Any:
        batch = pack(ids_BT, mask_BT, columns)
        where = {"token_ids": batch.token_ids, "predicted_from": batch.predicted_from}
        return pair.model(**batch.inputs, attention_mask=None, **where, temperature=1.0)

    def unpacked() -> Any:
        out = plain(input_ids=ids_BT, attention_mask=mask_BT, logits_to_keep=columns + 1)
        logits_BTV = out.logits[:, :-1].float()
        return logits_BTV.log_softmax(-1).gather(2, ids_BT[:, -columns:, None])

    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
        "sampler": (lambda: draw(pair.sampler), lambda: draw(stock), DRAWN_REQUESTS * length),
        "trainer": (packed, unpacked, int(mask_BT.sum())),
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
    """Return how many seconds `run` takes, on the GPU too."""
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began

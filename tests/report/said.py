"""Rows of completions as training makes them, from drawn log-probs."""

from typing import Any

import numpy as np


def said(step: int, groups: int = 2, size: int = 4, mismatched: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """Return the rows of a step: `groups` prompts, `size` completions each, rewards 0, 1/4, 2/4, ... within a group."""
    random = np.random.default_rng(step)
    rows = []
    for i in range(groups * size):
        length = 1 + i % 5
        logprobs = -random.random(length).astype(np.float32)
        row = {
            "step": step,
            "sample_id": i,
            "group": i // size,
            "prompt_id": f"{step:06x}{i // size:06x}",
            "prompt": f"{step}+{i // size}=",
            "completion": f"sample {i}",
            "prompt_token_ids": np.asarray([7, i // size], np.int32),
            "token_ids": np.arange(length, dtype=np.int32),
            "sampler_logprobs": logprobs,
            "tool_mask": None,
            "tool_results": None,
            "trainer_logprobs": logprobs - np.float32(0.5) if i < mismatched else None,
            "mismatched_tokens": length if i < mismatched else 0,
            "rewards": {"exact": i % size / size, "format": None},
            "reward": i % size / size,
            "advantage": i % size / size - 0.5,
            "length": length,
            "truncated": i % 2 == 0,
            "extra": {"note": i} if i % 2 else {},
        }
        rows.append(row | changes)
    return rows

"""The division of a batch: which rows go into which part, and a part of a batch."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlinvariant.trainer.packing import Sizes
from rlinvariant.trainer.turns import sampled_mask
from rlinvariant.types import JsonObject, JsonRow

Rows: TypeAlias = Tensor | slice
"""The numbers of some rows of a batch, int64, or all of them."""


def pack_rows(lengths: Sequence[int], most: int, least_parts: int = 1) -> list[list[int]]:
    """Sort rows into parts of about as many tokens: the longest first, each into the part with the fewest.

    Args:
        lengths: tokens of each row.
        most: tokens of a part; if a row is longer, its tokens.
        least_parts: how many parts there are at least, and no more than rows.

    Returns:
        The rows of each part, ascending: the fewest parts of at most `most` tokens that this way of dividing finds.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    most = max(most, *lengths)
    for count in range(min(len(lengths), max(least_parts, math.ceil(sum(lengths) / most))), len(lengths) + 1):
        parts, sizes = [[] for _ in range(count)], [0] * count
        for row in order:
            at = sizes.index(min(sizes))
            parts[at].append(row)
            sizes[at] += lengths[row]
        if all(size <= most for size in sizes):
            return [sorted(part) for part in parts]
    raise AssertionError("a part for each row is one that fits")


def merged(micro_batch: int, steps: int, steps_per_generation: int) -> tuple[int, int, int]:
    """Return TRL's rows of a micro-batch, micro-batches of a step and of a rollout, with as few micro-batches as possible."""
    factor = math.gcd(steps, steps_per_generation)
    return micro_batch * factor, steps // factor, steps_per_generation // factor


def lengths(batch: JsonRow) -> Tensor:
    """Return the tokens of each row of a batch, [B] int64: of its prompt and its completion."""
    return batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)


def sizes_of(batch: JsonRow) -> dict[str, list[int]]:
    """Return how many tokens each row of a batch has, its completion has, and were sampled; the device is waited for, once."""
    counts = torch.stack([lengths(batch), batch["completion_mask"].sum(1), sampled_mask(batch).sum(1)]).tolist()
    return dict(zip(("row_tokens", "completion_tokens", "sampled_tokens"), counts, strict=True))


def sizes(part: JsonRow, scored: str) -> Sizes | None:
    """Return what `pack` has to know of a part's numbers, if `sizes_of` was asked for its batch's.

    Args:
        scored: which tokens are, by a name of those that `sizes_of` has.
    """
    tokens = part.get("row_tokens")
    return None if tokens is None else Sizes(sum(tokens), max(tokens), sum(part[scored]))


def rows_of(batch: JsonRow, rows: Tensor, weight: float) -> JsonObject:
    """Return a part of a batch: some rows of every tensor and list that has one entry for each row, and its share."""
    count, part = len(batch["completion_mask"]), dict[str, Any]()
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            part[key] = value[rows]
        elif isinstance(value, list) and len(value) == count:
            part[key] = [value[row] for row in rows.tolist()]
        else:
            part[key] = value
    return part | {"num_items_in_batch": batch["num_items_in_batch"] * weight, "weight": weight}

"""The trainer's log-probs of given completions, in whatever batch, order and padding.

B: sequences of a micro-batch, L: columns of the padded batch, C: columns of completions, S: tokens to score, V: vocabulary.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlinvariant.rollout import ALL_TOKENS, Completion, Truncation
from rlinvariant.trainer.packing import pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """Describes how completions reach the trainer's model.

    Args:
        micro_batch: most sequences in one forward.
        order: "as sampled", "reversed" or "shuffled".
        prompts: side on which prompts are padded, "left" as TRL does or "right".
        padding: columns of padding beyond the longest, of prompts and of completions.
        grad: keep what a backward needs.
        tokens: most tokens in one forward, of more than one sequence; None: any number.
    """

    micro_batch: int
    order: str = "as sampled"
    prompts: str = "left"
    padding: int = 0
    grad: bool = False
    tokens: int | None = None


def score(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    temperature: float,
    layout: Layout,
    truncation: Truncation = ALL_TOKENS,
) -> list[Tensor]:
    """Compute fp32 log-probs of each completion, on the CPU, by `pack` and the patched model, as the trainer does.

    Of the tokens that `truncation` keeps: as drawn, or none of the log-probs is the sampler's.
    """
    device = next(model.parameters()).device
    order = list(range(len(prompts)))
    if layout.order == "reversed":
        order.reverse()
    elif layout.order == "shuffled":
        random.Random(7).shuffle(order)
    found: dict[int, Tensor] = {}
    for rows in _batches(order, [len(p) + len(c.token_ids) for p, c in zip(prompts, completions, strict=True)], layout):
        ids_BL, mask_BL, length = padded([prompts[i] for i in rows], [completions[i].token_ids for i in rows], layout)
        packed = pack(ids_BL.to(device), mask_BL.to(device), length)
        with torch.set_grad_enabled(layout.grad):
            logprobs_S, _ = model(
                **packed.inputs,
                attention_mask=None,
                token_ids=packed.token_ids,
                predicted_from=packed.predicted_from,
                temperature=temperature,
                **asdict(truncation),
            )
        logprobs_BC, keep_BC = packed.unpack(logprobs_S.detach()).cpu(), packed.keep.cpu()
        for row, i in enumerate(rows):
            found[i] = logprobs_BC[row][keep_BC[row]]
    return [found[i] for i in range(len(order))]


@torch.no_grad()
def stock_score(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], completions: Sequence[Completion], temperature: float
) -> list[Tensor]:
    """Compute the same by a model of transformers as it is, one completion at a time: a control."""
    found, device = [], next(model.parameters()).device
    for prompt, completion in zip(prompts, completions, strict=True):
        ids_1L = torch.tensor([[*prompt, *completion.token_ids]], device=device)
        logits_CV = model(input_ids=ids_1L).logits[0, len(prompt) - 1 : -1].float() / temperature
        found.append(logits_CV.log_softmax(-1).gather(1, ids_1L[0, len(prompt) :, None])[:, 0].cpu())
    return found


def _batches(order: Sequence[int], lengths: Sequence[int], layout: Layout) -> Iterator[list[int]]:
    rows: list[int] = []
    for i in order:
        full = layout.tokens is not None and sum(lengths[j] for j in rows) + lengths[i] > layout.tokens
        if rows and (full or len(rows) == layout.micro_batch):
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


def padded(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], layout: Layout
) -> tuple[Tensor, Tensor, int]:
    """Return TRL's batch: ids [prompts | completions], mask, and the completions' width; padding has ids like any token."""
    width = max(map(len, prompts)) + layout.padding
    length = max(map(len, completions)) + layout.padding
    ids_BL = torch.zeros(len(prompts), width + length, dtype=torch.int64)
    ids_BL += torch.arange(ids_BL.shape[1]) % 8
    mask_BL = torch.zeros_like(ids_BL)
    for row, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        start = width - len(p) if layout.prompts == "left" else 0
        for begin, tokens in ((start, p), (width, c)):
            ids_BL[row, begin : begin + len(tokens)] = torch.tensor(tokens)
            mask_BL[row, begin : begin + len(tokens)] = 1
    return ids_BL, mask_BL, length

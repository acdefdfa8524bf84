"""TRL's padded batch as one packed row, and back.

B: sequences, L: columns of the padded batch, C: the last of them, which belong to completions; N: real tokens, and those that
are added to make a multiple; S: tokens to score.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant.kernels.rows import GEMM_ROW_STEP

PADDED_LONGEST = 128  # the least that few shapes have as the longest sequence


class Sizes(NamedTuple):
    """Holds what a batch's shapes follow from: its tokens, those of its longest sequence, and those to score."""

    tokens: int
    longest: int
    scored: int


@dataclass(frozen=True)
class Packed:
    """Holds the real tokens of a padded batch, end to end, and the tokens to score."""

    inputs: dict[str, Tensor | int]  # what the model takes: ids and positions [1, N], cumulative lengths
    token_ids: Tensor  # [S] the tokens to score
    predicted_from: Tensor  # [S] row of the position that predicts each
    keep: Tensor  # [B, C] where they stand in the padded completions
    at: Tensor  # [S] the same as places in it, flattened: ascending int64

    def unpack(self, values: Tensor) -> Tensor:
        """Lay [S] out as [B, C], zero where there is no token. Raises ValueError for any other number than S."""
        if len(values) != len(self.token_ids):
            raise ValueError(f"{len(values)} log-probs were computed for {len(self.token_ids)} sampled tokens")
        return values.new_zeros(self.keep.numel()).index_copy(0, self.at, values).view(self.keep.shape)


def rounded(count: int, multiple: int, few: bool) -> int:
    """Return the next multiple; if `few`, of a sixteenth of the power of two below, where that is more."""
    step = max(multiple, (1 << (count.bit_length() - 1)) // 16) if few else multiple
    return -(-count // step) * step


def pack(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    multiple: int | None = None,
    wanted: Tensor | None = None,
    few_shapes: bool = False,
    sizes: Sizes | None = None,
) -> Packed:
    """Drop the padding of a batch and find the completion tokens.

    Positions count real tokens, so a left-padded row is rotated as vLLM rotated it; TRL's padded forward passes none.

    Args:
        input_ids: [B, L] int64, prompts left-padded, completions right-padded.
        attention_mask: [B, L], 1 on real tokens.
        completion_length: C, how many of the last columns belong to completions.
        multiple: of what N is to be, by default what suits the device; the rest is a sequence that nothing is scored of.
        wanted: [B, C] bool, which of the completions' real tokens to score; None: all.
        few_shapes: round up the number of tokens, by at most a sixteenth or to a multiple, of sequences, and the length of the
            longest, so that batches of about the same size have the same shapes (models/graphs.py).
        sizes: of this batch; None: the device is waited for, and asked.
    """
    multiple = multiple or (GEMM_ROW_STEP if input_ids.is_cuda else 1)
    mask_BL = attention_mask.bool()
    lengths_B = mask_BL.sum(1)
    keep_BC = mask_BL[:, -completion_length:]
    keep_BC = keep_BC if wanted is None else keep_BC & wanted
    # The device is told what there is: it would have to be asked how many bits of a mask are set.
    tokens, longest, scored = sizes or torch.stack([lengths_B.sum(), lengths_B.max(), keep_BC.sum()]).tolist()
    row_of_BL = mask_BL.view(-1).cumsum(0).view(mask_BL.shape) - 1
    at_S = _set(keep_BC, scored)
    scored_S = row_of_BL[:, -completion_length:].reshape(-1)[at_S]
    at_N = _set(mask_BL, tokens)
    ids_N, positions_N = input_ids.reshape(-1)[at_N], (attention_mask.cumsum(1) - 1).view(-1)[at_N]
    if missing := rounded(tokens, multiple, few_shapes) - tokens:
        ids_N = F.pad(ids_N, (0, missing))
        positions_N = F.pad(positions_N, (0, missing))
        # of rows that are no longer than real ones, or they would cost more
        rest = [lengths_B.new_full((missing // longest,), longest), lengths_B.new_full((1,), missing % longest)]
        lengths_B = torch.cat([lengths_B, *rest])
    if few_shapes:
        lengths_B = F.pad(lengths_B, (0, rounded(len(lengths_B), 16, True) - len(lengths_B)))  # of no token
        longest = max(PADDED_LONGEST, 1 << (longest - 1).bit_length())
    cu = F.pad(lengths_B.cumsum(0), (1, 0)).to(torch.int32)
    inputs: dict[str, Tensor | int] = {
        "input_ids": ids_N[None],
        "position_ids": positions_N[None],
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return Packed(inputs, ids_N[scored_S], scored_S - 1, keep_BC, at_S)


def _set(mask: Tensor, count: int) -> Tensor:
    """Return where, in a flattened mask, its `count` set bits are, ascending, [count] int64."""
    return mask.reshape(-1).argsort(descending=True, stable=True)[:count]

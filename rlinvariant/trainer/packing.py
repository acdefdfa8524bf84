"""TRL's padded batch as one packed row, and back.

B: sequences, L: columns of the padded batch, C: the last of them, which belong to completions; N: real tokens, and those that
are added to make a multiple; S: tokens to score.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant.kernels.rows import GEMM_ROW_STEP


@dataclass(frozen=True)
class Packed:
    """Holds the real tokens of a padded batch, end to end, and the tokens to score."""

    inputs: dict[str, Tensor | int]  # what the model takes: ids and positions [1, N], cumulative lengths
    token_ids: Tensor  # [S] the tokens to score
    predicted_from: Tensor  # [S] row of the position that predicts each
    keep: Tensor  # [B, C] where they stand in the padded completions

    def unpack(self, values: Tensor) -> Tensor:
        """Lay [S] out as [B, C], zero where there is no token. Raises ValueError for any other number than S."""
        if len(values) != len(self.token_ids):
            raise ValueError(f"{len(values)} log-probs were computed for {len(self.token_ids)} sampled tokens")
        return values.new_zeros(self.keep.shape).masked_scatter(self.keep, values)


def pack(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    multiple: int | None = None,
    wanted: Tensor | None = None,
) -> Packed:
    """Drop the padding of a batch and find the completion tokens.

    Positions count real tokens, so a left-padded row is rotated as vLLM rotated it; TRL's padded forward passes none.

    Args:
        input_ids: [B, L] int64, prompts left-padded, completions right-padded.
        attention_mask: [B, L], 1 on real tokens.
        completion_length: C, how many of the last columns belong to completions.
        multiple: of what N is to be, by default what suits the device; the rest is a sequence that nothing is scored of.
        wanted: [B, C] bool, which of the completions' real tokens to score; None: all.
    """
    multiple = multiple or (GEMM_ROW_STEP if input_ids.is_cuda else 1)
    mask_BL = attention_mask.bool()
    lengths_B = mask_BL.sum(1)
    row_of_BL = torch.full_like(input_ids, -1)
    row_of_BL[mask_BL] = torch.arange(int(lengths_B.sum()), device=input_ids.device)
    keep_BC = mask_BL[:, -completion_length:]
    keep_BC = keep_BC if wanted is None else keep_BC & wanted
    scored_S = row_of_BL[:, -completion_length:][keep_BC]
    ids_N, positions_N = input_ids[mask_BL], (attention_mask.cumsum(1) - 1)[mask_BL]
    if missing := -len(ids_N) % multiple:
        ids_N = F.pad(ids_N, (0, missing))
        positions_N = F.pad(positions_N, (0, missing))
        lengths_B = F.pad(lengths_B, (0, 1), value=missing)
    cu = F.pad(lengths_B.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths_B.max())
    inputs: dict[str, Tensor | int] = {
        "input_ids": ids_N[None],
        "position_ids": positions_N[None],
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return Packed(inputs, ids_N[scored_S], scored_S - 1, keep_BC)

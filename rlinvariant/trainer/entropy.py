"""The layer of the trainer by which entropies are those of a whole batch, where TRL's loss is that of a part of it.

Two of TRL's terms depend on what else is in a batch: only tokens whose entropy is above a quantile of the batch are trained on
(`top_entropy_quantile`), and the entropy bonus (`entropy_coef`) is a mean over its tokens, whatever the loss is.

Methods of TRL's trainer that are overridden:

    compute_loss            gives a part's entropy bonus the share that its tokens have in the batch
    get_high_entropy_mask   is that of the whole batch

B: rows of a batch, T: tokens of a completion.
"""

from typing import Any

import torch
from torch import Tensor

from rlinvariant.trainer.checkpointed import CheckpointedTrainer
from rlinvariant.trainer.turns import sampled_mask


class WholeEntropyTrainer(CheckpointedTrainer):
    """Takes from a part of a batch what `_entropy_terms` has put there, as the module says."""

    _high_entropy: Tensor | None = None  # of the part in progress
    _tool_mask: Tensor | None
    _trainer_entropies: Tensor  # [B, T] fp32, of the last forward
    _entropy_bonus_enabled: bool
    _last_world_entropy: float
    entropy_coef: float
    top_entropy_quantile: float
    use_adaptive_entropy: bool
    current_gradient_accumulation_steps: Any

    def _entropy_terms(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return what the parts of a batch have to know of it: a row for each of its rows, and a number.

        Forwards that take no gradient give the entropies, where a quantile is asked for: they have the bits of those to come.
        """
        terms, mask_BT = dict[str, Any](), sampled_mask(inputs).long()
        self._tool_mask = inputs.get("tool_mask")
        if self.top_entropy_quantile < 1.0:
            ids, mask = (torch.cat([inputs[f"{of}_{what}"] for of in ("prompt", "completion")], 1) for what in ("ids", "mask"))
            with torch.no_grad():
                entropies = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, mask_BT.shape[1], compute_entropy=True
                )[1]
            terms["high_entropy"] = super().get_high_entropy_mask(entropies, mask_BT, 1 - self.top_entropy_quantile)
            mask_BT = mask_BT * terms["high_entropy"]
        if self._entropy_bonus_enabled:
            tokens = mask_BT.sum(1).tolist()
            terms |= {"bonus_mask": mask_BT, "bonus_row_tokens": tokens, "bonus_tokens": sum(tokens)}
        return terms

    def get_high_entropy_mask(self, entropies, mask, threshold):
        whole = self._high_entropy
        return super().get_high_entropy_mask(entropies, mask, threshold) if whole is None else whole

    def compute_loss(self, model, inputs, *args, **kwargs):
        self._high_entropy = inputs.get("high_entropy")
        kept = not self.use_adaptive_entropy or self._last_world_entropy <= self.args.entropy_target
        coefficient = self.entropy_coef if kept else 0.0  # which TRL's own may change
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        entropies_BT, self._trainer_entropies = self._trainer_entropies, self._trainer_entropies.detach()
        if coefficient and (mask_BT := inputs.get("bonus_mask")) is not None:
            own = sum(inputs["bonus_row_tokens"])
            missing = own / max(1, inputs["bonus_tokens"]) / inputs["weight"] - 1
            bonus = (entropies_BT * mask_BT).sum() / max(1, own) / self.current_gradient_accumulation_steps
            loss = loss - coefficient * missing * bonus if missing else loss
        return loss

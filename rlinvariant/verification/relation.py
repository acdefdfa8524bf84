"""One line of the table of `verify`: what was compared, how much of it differs, and where first."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from rlinvariant.bits import compare
from rlinvariant.metrics import first_mismatch, mismatches
from rlinvariant.rollout import Completion

LogProbs = Sequence[float] | np.ndarray | Tensor
"""The log-probs of one sequence, [N]."""


@dataclass
class Relation:
    """Holds a claim about bits, the numbers compared for it, and those that differ.

    Args:
        name: the claim, as the table prints it.
        compared: numbers compared.
        mismatched: those of them that are not the same bits.
        how: what the engine did, for the table.
        shown: False where the engine did not do what the name says; nothing is proved then.
        first: the first difference, in words.
        lost: which requests did not come to their end, in words; "" if all did.
        unit: what is counted, "tokens" or "words".
    """

    name: str
    compared: int = 0
    mismatched: int = 0
    how: str = ""
    shown: bool = True
    first: str | None = None
    lost: str = ""
    unit: str = "tokens"

    @property
    def holds(self) -> bool:
        """Return whether the claim was tried, and no number differs."""
        return self.shown and self.compared > 0 and self.mismatched == 0

    @property
    def remarks(self) -> str:
        """Join, for the table, what the engine did and which requests were lost."""
        return "; ".join(filter(None, (self.how, self.lost)))

    def add(self, a: Sequence[LogProbs], b: Sequence[LogProbs], what: str = "") -> None:
        """Compare two lists of sequences of fp32 log-probs; what one of two sequences lacks counts as differing."""
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            x, y = (np.asarray(v, np.float32) for v in (x, y))
            both, longest = min(len(x), len(y)), max(len(x), len(y))
            wrong = int(mismatches(x[:both], y[:both]).sum()) + longest - both
            self.compared += longest
            self.mismatched += wrong
            if wrong and self.first is None:
                where = f"{len(x)} log-probs against {len(y)}"
                if (at := first_mismatch(x[None, :both], y[None, :both], np.ones((1, both)))) is not None:
                    a_word, b_word = f"{at.sampler_logprob:.9g} {at.sampler_hex}", f"{at.trainer_logprob:.9g} {at.trainer_hex}"
                    where = f"position {at.position}: {a_word} != {b_word}"
                self.first = f"{what}sequence {i}, {where}"

    def count(self, a: Tensor, b: Tensor, what: str) -> None:
        """Compare two outputs of an op word by word. Unlike in `add`, a NaN equals the same NaN here."""
        self.compared += a.numel()
        if (difference := compare(a, b)) is not None:
            self.mismatched += difference.count
            self.first = self.first or f"{what}{difference}"

    def of(self, again: Sequence[Completion | None], first: Sequence[Completion]) -> "Relation":
        """Compare a second draw with the first; after the first token that differs, every log-prob counts as differing."""
        kept = []
        for a, b in zip(again, first, strict=True):
            ids = a.token_ids if a is not None else []
            parted = next((i for i, (x, y) in enumerate(zip(ids, b.token_ids, strict=False)) if x != y), len(ids))
            kept.append(a.sampler_logprobs[:parted] if a is not None else [])
        self.add(kept, [b.sampler_logprobs for b in first])
        return self

"""The turns of a rollout on one rank: which sample a request goes on with, its seed, its limit; and which tokens were sampled.

N: samples of a rollout on this rank, B: rows of a batch, C: columns of completions.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from rlinvariant.errors import UserError
from rlinvariant.rollout import Batch, Completion, request_seed
from rlinvariant.types import Untyped

if TYPE_CHECKING:
    from rlinvariant.trainer.drawing import DrawingTrainer


def sampled_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which tokens of completions were sampled and are trained on, [B, C] bool: neither padding nor a tool's."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).bool()


def rollouts_before(seeded: Mapping[bool, tuple[int, int]], training: bool, step: int) -> int:
    """Return how many rollouts a step has had before this one, in training or in evaluation.

    Args:
        seeded: training or not -> the last step that had one, and how many it had had before that.
        training, step: of this one.
    """
    last, earlier = seeded.get(training, (-1, 0))
    return earlier + 1 if last == step else 0


class Turns:
    """Keeps what one call of TRL's `_generate` has drawn so far.

    Args:
        seeds: [N] of the samples' first turns.

    Attributes:
        batches: the requests of each turn, in order of time.
        conversations: [N] the messages of each sample that follow its prompt, which TRL's loop adds to; None: not in that loop.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = seeds
        self._drawn = [0] * len(seeds)  # how many turns of each sample
        self._first: list[int | None] = [None] * len(seeds)  # tokens of each sample's first prompt
        self._said: list[list[int]] = [[] for _ in seeds]  # tokens of each sample up to the end of its last turn
        self._silent = [False] * len(seeds)  # whether the last turn had no room for a token
        self._turns: list[list[Completion]] = [[] for _ in seeds]  # of each sample, those with a token
        self.batches: list[Batch] = []
        self.conversations: Sequence[Sequence[Mapping[str, Any]]] | None = None

    def require(self, prompts: Sequence[Sequence[int]], samples: Sequence[int]) -> None:
        """Refuse samples that there are not, or another number of them than of prompts. Raises UserError."""
        if len(samples) != len(prompts):
            raise UserError(f"draw: {len(samples)} samples for {len(prompts)} prompts; expected one for each")
        if strange := [sample for sample in samples if not 0 <= sample < len(self._seeds)]:
            raise UserError(f"draw: sample {strange[0]}: expected 0 to {len(self._seeds) - 1}, the prompts of `rollout_func`")

    def seeds(self, samples: Sequence[int]) -> list[int]:
        """Return the seed of the next turn of each; a sample that is there twice has two turns, and two seeds."""
        found, drawn = [], list(self._drawn)
        for sample in samples:
            first, turn = self._seeds[sample], drawn[sample]
            found.append(first if turn == 0 else request_seed(first, turn, 0, 0))
            drawn[sample] += 1
        return found

    def later(self, samples: Sequence[int]) -> list[bool]:
        """Return whether the next turn of each is not its first."""
        return [self._drawn[sample] > 0 for sample in samples]

    def limits(
        self, prompts: Sequence[Sequence[int]], samples: Sequence[int], max_completion_length: int, max_model_len: int
    ) -> list[int]:
        """Return how many tokens each turn may have; 0 where no room is left. A first turn's is checked by the engine."""
        found = []
        for prompt, sample in zip(prompts, samples, strict=True):
            if (first := self._first[sample]) is None:
                found.append(max_completion_length)
            else:
                left = max_completion_length - max(0, len(prompt) - first)
                found.append(max(0, min(left, max_model_len - len(prompt))))
        return found

    def add(self, prompts: Sequence[Sequence[int]], samples: Sequence[int], drawn: Sequence[Completion]) -> None:
        """Keep what a turn has drawn."""
        for prompt, sample, completion in zip(prompts, samples, drawn, strict=True):
            if self._first[sample] is None:
                self._first[sample] = len(prompt)
            self._drawn[sample] += 1
            self._turns[sample] += [completion] if completion.token_ids else []
            self._said[sample] = [*prompt, *completion.token_ids]
            self._silent[sample] = not completion.token_ids

    def experts(self, sampled: Sequence[Sequence[int]]) -> list[np.ndarray] | None:
        """Return the experts of each sample's tokens, of all its turns, [tokens, layers].

        None where the engine did not say, or where the samples are other tokens than were drawn: a `rollout_func` may cut them.

        Args:
            sampled: the tokens of each sample that are the model's.
        """
        if any(turn.experts is None for turns in self._turns for turn in turns) or not all(self._turns):
            return None
        if any(
            [t for turn in turns for t in turn.token_ids] != [*own] for turns, own in zip(self._turns, sampled, strict=True)
        ):
            return None
        return [np.concatenate([turn.experts for turn in turns if turn.experts is not None]) for turns in self._turns]

    def continued(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Return the samples that TRL's loop goes on with: those whose last message is a tool's, unless they had no more room.

        Raises:
            RuntimeError: a prompt is not what its sample has said so far, and more.
        """
        if self.conversations is None:
            return list(range(len(prompts)))
        found = [i for i, said in enumerate(self.conversations) if said[-1]["role"] == "tool" and not self._silent[i]]
        if len(found) != len(prompts) or any(
            len(prompt) <= len(self._said[i]) or list(prompt[: len(self._said[i])]) != self._said[i]
            for i, prompt in zip(found, prompts, strict=True)
        ):
            raise RuntimeError("a turn's prompts are not the tokens of the samples whose tools were called: TRL has changed")
        return found


class AttachedSampler:
    """Stands where TRL looks for a vLLM of its own, and lends it the trainer's."""

    def __init__(self, trainer: "DrawingTrainer") -> None:
        self._trainer = trainer

    @property
    def llm(self) -> Untyped:
        """Return the engine, of which TRL reads max_model_len."""
        return self._trainer.sampler.llm

    def sync_weights(self) -> None:
        """Give the engine the trainer's weights. All ranks call this."""
        self._trainer.sync(stale=bool(self._trainer.model.training))

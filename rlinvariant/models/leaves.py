"""Sums of the gradients of a step's samples that neither ranks nor micro-batches decide: a tree over the samples' numbers.

    gradient = sum(0, n);   sum(a, b) = sum(a, m) + sum(m, b) with m = (a + b) // 2, and a leaf where b = a + 1

A leaf is what a backward of one sample alone gives, in the dtype of the parameter, float32. Of W processes, a power of two that
divides n, each has n / W neighbours, which are a branch of that tree; the tree over ranks of `models.ordered` is what is left
of it. A branch of c samples holds ceil(log2 c) + 1 gradients at most, the leaf in progress among them.
"""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from rlinvariant.models import ordered


def additions(count: int) -> list[int]:
    """Return, for each leaf of a tree over so many, how many sums are complete with it, and can be taken then."""
    if count == 1:
        return [0]
    left, right = additions(count // 2), additions(count - count // 2)
    return [*left, *right[:-1], right[-1] + 1]


class Leaves:
    """Takes the gradient of every parameter away after each backward, and adds it where it belongs in the tree.

    Args:
        named: names and parameters; each must get a gradient in every backward. One optimizer step is `begin`, as many
            backwards as it says, and `finish`.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._named = [(name, p) for name, p in named if p.requires_grad]
        self._sums: dict[nn.Parameter, list[Tensor]] = {}
        self._seen: dict[nn.Parameter, int] = {}
        self._additions: list[int] = []
        for _, p in self._named:
            p.register_post_accumulate_grad_hook(self._take)

    def begin(self, count: int) -> None:
        """Forget what was added; so many backwards follow."""
        self._additions = additions(count)
        for _, p in self._named:
            self._sums[p], self._seen[p], p.grad = [], 0, None

    def _take(self, p: Any) -> None:
        if p not in self._sums:  # a backward that is no part of a step
            return
        sums, leaf = self._sums[p], self._seen[p]
        if leaf == len(self._additions):
            name = next(name for name, q in self._named if q is p)
            raise RuntimeError(f"gradients=invariant: {name}: a backward more than the {leaf} samples of the step")
        sums.append(p.grad)
        p.grad, self._seen[p] = None, leaf + 1
        for _ in range(self._additions[leaf]):
            last = sums.pop()
            sums[-1].add_(last)

    def finish(self) -> None:
        """Give every parameter the sum over all samples, of all ranks, each of which calls this.

        Raises:
            RuntimeError: a parameter had no gradient in some backward.
        """
        for name, p in self._named:
            if self._seen[p] != len(self._additions):
                raise RuntimeError(
                    f"gradients=invariant: {name} has gradients of {self._seen[p]} of {len(self._additions)} samples"
                )
        for _, p in self._named:
            (own,) = self._sums.pop(p)
            p.grad = ordered.total(own) if dist.is_initialized() and dist.get_world_size() > 1 else own

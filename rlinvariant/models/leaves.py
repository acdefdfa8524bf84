"""Sums of the gradients of a step's samples that neither ranks nor micro-batches decide: a tree over the samples' numbers.

    gradient = sum(0, n);   sum(a, b) = sum(a, m) + sum(m, b) with m = (a + b) // 2, and a leaf where b = a + 1

A leaf is what a backward of one sample alone gives, in the dtype of the parameter, float32. Of W processes, a power of two that
divides n, each has n / W neighbours, which are a branch of that tree; the tree over ranks of `models.ordered` is what is left
of it. A branch of c samples holds ceil(log2 c) + 1 gradients at most, the leaf in progress among them.

Weights in shards are added by the unit: what FSDP gives to its reduce-scatter is the unit's whole gradient of one sample. The
sums stay whole, and are cut when they are added over the ranks, after the last sample.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlinvariant.models import ordered, shards


def additions(count: int) -> list[int]:
    """Return, for each leaf of a tree over so many, how many sums are complete with it, and can be taken then."""
    if count == 1:
        return [0]
    left, right = additions(count // 2), additions(count - count // 2)
    return [*left, *right[:-1], right[-1] + 1]


class Branch:
    """Adds what one backward after the other gives of the same weights, each where it belongs in the tree.

    Args:
        name: of the weights.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.sums: list[Tensor] = []
        self.seen = 0
        self.additions: list[int] | None = None  # None: no step is in progress

    def begin(self, additions: list[int]) -> None:
        """Forget what was added; as many leaves follow as there are `additions`."""
        self.additions, self.sums, self.seen = additions, [], 0

    def add(self, leaf: Tensor) -> bool:
        """Add the next leaf, which is taken over and written to; return whether it was the last one."""
        assert self.additions is not None
        if self.seen == len(self.additions):
            raise RuntimeError(f"gradients=invariant: {self.name}: a backward more than the {self.seen} samples of the step")
        self.sums.append(leaf)
        for _ in range(self.additions[self.seen]):
            last = self.sums.pop()
            self.sums[-1].add_(last)
        self.seen += 1
        return self.seen == len(self.additions)

    def require_all(self) -> None:
        """Raise RuntimeError unless there was a leaf of each sample."""
        assert self.additions is not None
        if self.seen != len(self.additions):
            raise RuntimeError(
                f"gradients=invariant: {self.name} has gradients of {self.seen} of {len(self.additions)} samples"
            )


class Leaves:
    """Takes the gradient of every parameter away after each backward, and adds it where it belongs in the tree.

    Args:
        named: names and parameters; each that is trained must get a gradient in every backward. One optimizer step is `begin`,
            as many backwards as it says, and `finish`.
        models: which have the parameters that are in shards; FSDP reduces the gradients of each backward of theirs.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], models: Iterable[nn.Module] = ()) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1  # alone, FSDP reduces nothing, and hands on each gradient
        self._in_units: list[tuple[str, nn.Parameter]] = []
        self._branches: dict[nn.Parameter, Branch] = {}
        for name, p in named:
            if p.requires_grad and several and shards.is_shard(p):
                self._in_units.append((name, p))
            elif p.requires_grad:
                self._branches[p] = Branch(name)
                p.register_post_accumulate_grad_hook(self._take)
        units = ((name, unit) for model in models for name, unit in model.named_modules() if isinstance(unit, FSDPModule))
        self._units = [_Unit(Branch(f"unit {name or 'root'}"), unit, shards.reduced(unit)) for name, unit in units if several]

    def begin(self, count: int) -> None:
        """Forget what was added; so many backwards follow."""
        of_step = additions(count)
        for branch in (*self._branches.values(), *(unit.branch for unit in self._units)):
            branch.begin(of_step)
        for p in (*self._branches, *(p for _, p in self._in_units)):
            p.grad = None

    def _take(self, p: Any) -> None:
        if (branch := self._branches[p]).additions is None:  # a backward that is no part of a step
            return
        leaf, p.grad = p.grad, None
        branch.add(leaf)

    def finish(self) -> None:
        """Give every parameter the sum over all samples, of all ranks, each of which calls this.

        Raises:
            RuntimeError: a parameter had no gradient in some backward.
        """
        used = [unit.branch for unit in self._units if unit.branch.seen]  # of what is frozen, nothing comes
        for branch in (*self._branches.values(), *used):
            branch.require_all()
        if missing := [name for name, p in self._in_units if p.grad is None]:
            raise RuntimeError(f"gradients=invariant: {missing[0]} has no gradient")
        for p, branch in self._branches.items():
            (own,) = branch.sums
            p.grad = ordered.total(own) if dist.is_initialized() and dist.get_world_size() > 1 else own
        for branch in (*self._branches.values(), *(unit.branch for unit in self._units)):
            branch.sums, branch.additions = [], None


class _Unit(ordered.OrderedReduceScatter):
    """Takes the place of the reduce-scatter of a unit of FSDP: gives this process's part of a sum after the step's last sample.

    FSDP adds what it gets to the gradient there is: until then it gets -0, to which every number can be added without a change.
    It leaves out a weight without a gradient, and others would lie in its place: the `numbers` of a unit are always as many.
    """

    def __init__(self, branch: Branch, unit: FSDPModule, numbers: int) -> None:
        self.branch, self.numbers = branch, numbers
        unit.set_custom_reduce_scatter(self)

    def reduce(self, output: Tensor, whole: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType) -> None:
        if self.branch.additions is None:
            return super().reduce(output, whole, group, op)
        if op != dist.ReduceOp.AVG:  # by FSDP itself nothing is divided then; nor is it here
            raise RuntimeError(f"gradients=invariant: FSDP asks for {op}, expected a mean")
        if whole.numel() != self.numbers:
            part = f"{whole.numel():,} of {self.numbers:,} numbers"
            raise RuntimeError(f"gradients=invariant: {self.branch.name} has gradients of {part} in sample {self.branch.seen}")
        if whole.is_cuda:
            whole.record_stream(torch.cuda.current_stream())  # FSDP's own, which outlives its claim
        if self.branch.add(whole):
            output.copy_(ordered.reduce_scatter(self.branch.sums.pop(), group))
        else:
            output.fill_(-0.0)

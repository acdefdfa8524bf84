"""A LoRA adapter inside vLLM's linear layers: `ops.lora_linear`, with the weight and B side by side in memory.

A layer's `weight`, which vLLM's loaders write to, is a view of the first K columns of [N, K + R]; the base exists once.

K, N: columns and rows of a layer's weight, which may be several projections that vLLM has merged; R: columns for the adapter.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from rlinvariant import bits, ops
from rlinvariant.models.lora import A, B
from rlinvariant.ops.linear import pack_weight
from rlinvariant.ops.lora import RANK_STEP
from rlinvariant.sampler.weights import target
from rlinvariant.types import Untyped

Pairs = Iterable[tuple[str, Tensor]]
PARTS: dict[Any, int] = {None: 0, "q": 0, "k": 1, "v": 2}  # vLLM numbers the others itself
_expected: ContextVar[Mapping[str, int] | None] = ContextVar("adapters of the engine that is being made", default=None)


@contextmanager
def expecting(ranks: Mapping[str, int]) -> Iterator[None]:
    """Let an engine that is made inside make room for adapters: of which projections, by name, and of which rank."""
    token = _expected.set(ranks)
    try:
        yield
    finally:
        _expected.reset(token)


class Adapters:
    """Holds the adapters of one of vLLM's layers, and multiplies with them."""

    def __init__(self, layer: Untyped, ranks: Mapping[int, int]) -> None:
        n, k = layer.weight.shape
        step = RANK_STEP[layer.weight.device.type]
        self.ranks, columns = ranks, -(-max(ranks.values()) // step) * step
        self.wide = layer.weight.new_zeros(n, k + columns)
        self.a = layer.weight.new_zeros(len(layer.parts), columns, k)
        self.wide[:, :k] = layer.weight.data
        layer.weight.data = self.wide[:, :k]
        self.sizes, self.k = list(layer.parts), k
        self.packed: dict[int, list[Tensor | None]] = {}
        # Copies of projections without an adapter, whose rows lie apart in `wide`
        self.alone = {i: rows.contiguous() for i, rows in enumerate(self._held()) if i not in ranks}

    def refresh(self) -> None:
        """Copy anew what is multiplied by in a copy. In place: compiled code and CUDA graphs read where the copies lie."""
        held = self._held()
        for part, copy in self.alone.items():
            copy.copy_(held[part])

    def pack(self, bias: bool) -> None:
        """Pack anew what each projection multiplies by, for the number of threads set now."""
        self.packed = {torch.get_num_threads(): [pack_weight(x, [len(x)], bias) for x in self._operands()]}

    def stale(self) -> bool:
        """Return whether a copy that is multiplied by has other bytes than what it was made from."""
        held = self._held()
        copies = [(copy, held[i]) for i, copy in self.alone.items()]
        for packed in self.packed.values():
            copies += [(copy.to_dense(), of) for copy, of in zip(packed, held, strict=True) if copy is not None]
        return not all(bits.same(copy, of) for copy, of in copies)

    def _held(self) -> list[Tensor]:
        """Return views of each projection's weight: [n, K + R] with an adapter, [n, K] without."""
        rows = self.wide.split(self.sizes)
        return [part if i in self.ranks else part[:, : self.k] for i, part in enumerate(rows)]

    def _operands(self) -> list[Tensor]:
        """Return what each projection multiplies by: what `_held` does, all contiguous."""
        return [part if i in self.ranks else self.alone[i] for i, part in enumerate(self.wide.split(self.sizes))]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the products of all projections, side by side, for x [*rows, K]."""
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        none = [None] * len(self.sizes)
        packed = self.packed.get(torch.get_num_threads(), none) if self.packed else none  # the compiler knows no threads
        parts = []
        for part, weight in enumerate(self._operands()):
            how = biases[part], packed[part]
            adapted = part in self.ranks
            parts.append(ops.wide_linear(x, weight, self.a[part], *how) if adapted else ops.linear(x, weight, *how))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def slot(self, part: int, which: str) -> Tensor:
        """Return where a projection's A [R, K] or B [N, R] is kept."""
        rank = self.ranks[part]
        return self.a[part, :rank] if which == A else self.wide.split(self.sizes)[part][:, self.k : self.k + rank]


def attach(model: nn.Module) -> None:
    """Make room for the adapters that are expected, in the layers of vLLM's model, before weights are loaded."""
    found: dict[str, dict[int, int]] = {}
    for name, rank in (_expected.get() or {}).items():
        layer, part = _place(model, name)
        found.setdefault(layer, {})[part] = rank
    for name, ranks in found.items():
        layer: Any = model.get_submodule(name)
        layer.adapters = Adapters(layer, ranks)


def load(model: nn.Module, weights: Pairs) -> None:
    """Copy adapters into their slots, rounded to the engine's dtype; and renew the copies, of a base that may have changed."""
    for name, weight in weights:
        _slot(model, name).copy_(weight)
    for held in layers(model).values():
        held.refresh()


def differing(model: nn.Module, weights: Pairs) -> list[str]:
    """Name the adapters whose bytes are not those of `weights` cast to the engine's dtype, and those that `weights` lack.

    Layers that multiply by an old copy of what they hold are named, too.
    """
    bad, seen = [], 0
    for name, weight in weights:
        slot, seen = _slot(model, name), seen + 1
        if slot.shape != weight.shape or not bits.same(slot, weight.detach().to(slot.dtype)):
            bad.append(name)
    own = layers(model)
    bad += [f"{name}.weight (copy)" for name, held in own.items() if held.stale()]
    held = sum(2 * len(adapters.ranks) for adapters in own.values())
    return bad if seen == held else [*bad, f"{held - seen} adapter weights, which were not given"]


def layers(model: nn.Module) -> dict[str, Adapters]:
    """Return the adapters of vLLM's layers, by the layers' names."""
    found: dict[str, Any] = {name: getattr(layer, "adapters", None) for name, layer in model.named_modules()}
    return {name: adapters for name, adapters in found.items() if adapters is not None}


def _slot(model: nn.Module, name: str) -> Tensor:
    which = A if name.endswith(A) else B
    layer, part = _place(model, name.removesuffix(f".{which}"))
    holder: Any = model.get_submodule(layer)
    return holder.adapters.slot(part, which)


def _place(model: nn.Module, projection: str) -> tuple[str, int]:
    """Return the layer of vLLM's model that computes a projection, and which of its parts that is."""
    name, shard = target(model, f"{projection}.weight")
    return name.removesuffix(".weight"), PARTS[shard] if shard in PARTS else int(shard)

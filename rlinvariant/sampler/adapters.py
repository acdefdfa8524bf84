"""A LoRA adapter inside vLLM's linear layers: `ops.lora_linear`, with the weight and B side by side in memory.

A layer's `weight`, which vLLM's loaders write to, is a view of the first K columns of [N, K + R]; the base exists once.

K, N: columns and rows of a layer's weight, which may be several projections that vLLM has merged; R: columns for the adapter.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlinvariant import bits, ops
from rlinvariant.checksums import Checksum
from rlinvariant.errors import UserError
from rlinvariant.models.lora import A, B
from rlinvariant.ops.linear import linear_columns, pack_weight
from rlinvariant.ops.lora import columns, is_joinable, widened_by
from rlinvariant.sampler import weights as synced
from rlinvariant.sampler.weights import target
from rlinvariant.types import Untyped

Pairs = Iterable[tuple[str, Tensor]]
TOGETHER = 64  # adapter weights that are compared at once
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
    """Holds the adapters of one of vLLM's layers, and multiplies with them.

    On CUDA, where an output column does not depend on those beside it, the projections that vLLM has merged are one product:
    one A of all their rows, and each B in columns of its own (`ops.lora.columns`), beside which the others' rows have zeros.
    """

    def __init__(self, layer: Untyped, ranks: Mapping[int, int], joined: bool | None = None) -> None:
        n, k = layer.weight.shape
        self.ranks, self.joined = ranks, layer.weight.is_cuda and is_joinable(k) if joined is None else joined
        of_all = [ranks.get(part, 0) for part in range(len(layer.parts))]
        begins, r = columns(of_all if self.joined else [max(of_all)], layer.weight.device.type)
        self.begins = begins if self.joined else [0] * len(layer.parts)
        self.wide = layer.weight.new_zeros(n, k + r)
        self.a = layer.weight.new_zeros(1 if self.joined else len(layer.parts), r, k)
        self.wide[:, :k] = layer.weight.data
        layer.weight.data, layer.packed = self.wide[:, :k], {}
        self.sizes, self.k, self.cuts = list(layer.parts), k, list(layer.cuts)
        self.packed: dict[int, list[Tensor | None]] = {}
        # Copies of projections without an adapter, whose rows lie apart in `wide`
        alone = {} if self.joined else {i: rows for i, rows in enumerate(self._held()) if i not in ranks}
        self.alone = {i: rows.contiguous() for i, rows in alone.items()}

    def refresh(self) -> None:
        """Copy anew what is multiplied by in a copy. In place: compiled code and CUDA graphs read where the copies lie."""
        held = self._held()
        for part, copy in self.alone.items():
            copy.copy_(held[part])

    def pack(self, bias: bool) -> None:
        """Pack anew what each projection multiplies by, for the number of threads set now."""
        self.packed = {
            torch.get_num_threads(): [
                pack_weight(x, [len(x)], bias, [cut.whole]) for x, cut in zip(self._operands(), self.cuts, strict=True)
            ]
        }

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
        if self.joined:
            return ops.wide_linear(x, self.wide, self.a[0], bias)
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        none = [None] * len(self.sizes)
        packed = self.packed.get(torch.get_num_threads(), none) if self.packed else none  # the compiler knows no threads
        parts = []
        for part, weight in enumerate(self._operands()):
            how, adapted = (biases[part], packed[part]), part in self.ranks
            if not x.is_cuda and packed[part] is None and len(weight) < self.cuts[part].whole:
                read = widened_by(x, self.a[part]) if adapted else x
                parts.append(linear_columns(read, weight, biases[part], self.cuts[part].whole))
            else:
                parts.append(ops.wide_linear(x, weight, self.a[part], *how) if adapted else ops.linear(x, weight, *how))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def slot(self, part: int, which: str) -> "Slot":
        """Return where a projection's A [R, K] or B [N, R] is kept: A whole, and those rows of B that this process has of W."""
        first, rank, cut = self.begins[part], self.ranks[part], self.cuts[part]
        if which == A:
            return Slot(self.a[0 if self.joined else part, first : first + rank], rank, 0)
        return Slot(self.wide.split(self.sizes)[part][:, self.k + first : self.k + first + rank], cut.whole, cut.first)


class Slot(NamedTuple):
    """Holds a view of where some rows of A or B are kept, how many rows the whole has, and the number of the first one here."""

    kept: Tensor
    whole: int
    first: int

    def takes(self, weight: Tensor) -> bool:
        """Return whether a whole weight has the right shape."""
        return weight.shape == (self.whole, self.kept.shape[1])

    def of(self, weight: Tensor) -> Tensor:
        """Return those rows of a whole weight."""
        return weight[self.first : self.first + len(self.kept)]


def attach(model: nn.Module, ranks: Mapping[str, int] | None = None) -> None:
    """Make room for adapters, with zeros in it, in layers of vLLM's model that have none.

    Args:
        model: vLLM's.
        ranks: as for `expecting`; None: what is expected.
    """
    for name, parts in _by_layer(model, (_expected.get() or {}) if ranks is None else ranks).items():
        layer: Any = model.get_submodule(name)
        layer.adapters = Adapters(layer, parts)


def make_room(model: nn.Module, ranks: Mapping[str, int]) -> bool:
    """Give the layers of a model that runs room for these adapters and no others; return whether they had other room before.

    Then the weights are to be packed anew. Nothing may be compiled: code made for layers without adapters would ignore them.
    """
    held = layers(model)
    if {name: adapters.ranks for name, adapters in held.items()} == _by_layer(model, ranks):
        return False
    for name, adapters in held.items():
        layer: Any = model.get_submodule(name)
        layer.weight.data, layer.adapters = adapters.wide[:, : adapters.k].contiguous(), None
    attach(model, ranks)
    return True


def unknown(model: nn.Module, ranks: Mapping[str, int]) -> str | None:
    """Return the first of the projections that no layer of vLLM's model computes; None if there are all."""
    own = dict(model.named_modules())
    for name in ranks:
        layer, part = _place(model, name)
        if part >= len(getattr(own.get(layer), "parts", ())):
            return name
    return None


def _by_layer(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """Return the rank of each part of vLLM's layers that is to have an adapter, by the layers' names."""
    found: dict[str, dict[int, int]] = {}
    for name, rank in ranks.items():
        layer, part = _place(model, name)
        found.setdefault(layer, {})[part] = rank
    return found


def load(model: nn.Module, weights: Pairs) -> None:
    """Copy adapters into their slots, rounded to the engine's dtype; and renew the copies, of a base that may have changed.

    Raises:
        UserError: there is no room for one, or for one of another rank.
    """
    own, kept, given = layers(model), list[Tensor](), list[Tensor]()
    for name, weight in weights:
        slot = _slot(model, own, name)
        if not slot.takes(weight):
            room = [slot.whole, slot.kept.shape[1]]
            raise UserError(f"{name} is {[*weight.shape]}: the engine has room for {room}")
        kept.append(slot.kept)
        given.append(slot.of(weight))
    if kept:
        torch._foreach_copy_(kept, given)  # pyright: ignore[reportPrivateImportUsage]
    for held in own.values():
        held.refresh()


def differing(model: nn.Module, weights: Pairs) -> list[str]:
    """Name the adapters whose bytes are not those of `weights` cast to the engine's dtype, and those that `weights` lack.

    Layers that multiply by an old copy of what they hold are named, too.
    """
    own = layers(model)
    held = [(name, _slot(model, own, name), weight.detach()) for name, weight in weights]
    bad = [name for name, slot, weight in held if not slot.takes(weight)]
    fit = [(name, slot.kept, slot.of(weight)) for name, slot, weight in held if slot.takes(weight)]
    groups = [fit[at : at + TOGETHER] for at in range(0, len(fit), TOGETHER)]
    same = torch.stack([_all_same(group) for group in groups]).tolist() if groups else []
    for group, equal in zip(groups, same, strict=True):
        bad += [] if equal else synced.unequal((name, kept, weight.to(kept.dtype)) for name, kept, weight in group)
    return bad + _stale_or_missing(own, len(held))


def _all_same(group: Sequence[tuple[str, Tensor, Tensor]]) -> Tensor:
    """Return whether each weight, cast, is what is kept, as a bool tensor []: side by side, in a few kernels for all."""
    kept = torch.cat([kept.reshape(-1) for _, kept, _ in group])
    given = torch.cat([given.reshape(-1) for _, _, given in group])
    return bits.same(kept, given.to(kept.dtype))


def differing_checksums(model: nn.Module, weights: Mapping[str, Checksum]) -> list[str]:
    """Name the parameters of an exact engine, and its adapters, whose words do not have the sums that they should have.

    An adapter that there is no room for is named, too. An engine may be spread over several processes: all must call this.

    Args:
        model: vLLM's.
        weights: the checksum of each, by its Hugging Face name.
    """
    of_adapters = {name: expected for name, expected in weights.items() if name.endswith((A, B))}
    from rlinvariant.sampler.vllm_columns import of_all

    bad = synced.differing_checksums(model, {name: expected for name, expected in weights.items() if name not in of_adapters})
    own, slots = layers(model), dict[str, Slot]()
    for name in of_adapters:
        with suppress(UserError):
            slots[name] = _slot(model, own, name)
    everywhere = of_all(synced.summed({name: [(x.first, len(x.kept), x.kept)] for name, x in slots.items()}))
    for name, expected in of_adapters.items():
        kept = slots[name].kept if name in slots else torch.empty(0, 0, dtype=expected.dtype)
        held = [rows for each in everywhere for rows in each.get(name, [])]
        if synced.joined(held, kept.dtype, kept.shape[1:]) != expected:
            bad.append(name)
    return bad + _stale_or_missing(own, len(of_adapters))


def _stale_or_missing(own: Mapping[str, Adapters], seen: int) -> list[str]:
    """Name the layers that multiply by old copies, and say how many adapter weights are held beside those that were `seen`."""
    bad = [f"{name}.weight (copy)" for name, held in own.items() if held.stale()]
    held = sum(2 * len(adapters.ranks) for adapters in own.values())
    return bad if seen == held else [*bad, f"{held - seen} adapter weights, which were not given"]


def layers(model: nn.Module) -> dict[str, Adapters]:
    """Return the adapters of vLLM's layers, by the layers' names."""
    found: dict[str, Any] = {name: getattr(layer, "adapters", None) for name, layer in model.named_modules()}
    return {name: adapters for name, adapters in found.items() if adapters is not None}


def _slot(model: nn.Module, own: Mapping[str, Adapters], name: str) -> Slot:
    """Return where an adapter's A or B is kept; `own` are `layers`. Raises UserError where there is no room for it."""
    which = A if name.endswith(A) else B
    layer, part = _place(model, name.removesuffix(f".{which}"))
    held = own.get(layer)
    if held is None or part not in held.ranks:
        raise UserError(f"{name}: the engine has no room for this adapter")
    return held.slot(part, which)


def _place(model: nn.Module, projection: str) -> tuple[str, int]:
    """Return the layer of vLLM's model that computes a projection, and which of its parts that is."""
    name, shard = target(model, f"{projection}.weight")
    return name.removesuffix(".weight"), PARTS[shard] if shard in PARTS else int(shard)

"""Find the parameters of a vLLM model whose bytes are not the trainer's."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlinvariant import bits, checksums
from rlinvariant.checksums import Checksum
from rlinvariant.sampler import packed
from rlinvariant.types import Untyped

T = TypeVar("T")
MERGE_ORDER: list[Any] = [None, "q", "k", "v", *range(16)]  # how vLLM stacks the parts of a merged projection

PADDED = ("embed_tokens.weight", "lm_head.weight")  # vLLM pads the vocabulary


def differing(model: Untyped, weights: Iterable[tuple[str, Tensor]], invariant: bool) -> list[str]:
    """Name the parameters whose bytes differ; `Sampler.differing_weights` says which are compared, and how."""
    parts = _by_place(model, ((name, weight.detach()) for name, weight in weights))
    own = dict(model.named_parameters())
    tied = "lm_head.weight" not in own
    bad = [name for name in parts if name not in own and not (tied and name == "lm_head.weight")]
    bad += [name for name in own if name not in parts]
    copies = (x for x in own.items() if x[0] in parts and not _is_memory_of(x[1], _in_order(parts[x[0]])))
    bad += unequal((name, *_readable(model, name, have.detach(), _here(model, name, parts[name]))) for name, have in copies)
    bad += _stale_copies(model) if invariant else []
    head = getattr(model, "lm_head", None)
    embedding = next((_here(model, n, x) for n, x in parts.items() if n.endswith("embed_tokens.weight")), None)
    packed_apart = tied and hasattr(head, "cpu_linear") and not invariant
    if packed_apart and embedding is not None and not _same(*_columns(head, embedding)):
        bad.append("lm_head.weight")
    return bad


def views(model: Untyped, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the engine's own memory of each weight that it has in the weight's shape, dtype and device, by the weight's name.

    A weight with room for an adapter beside it is a view whose rows lie apart. Each is a storage of its own to PyTorch, though
    the parts of a merged weight lie in one: transformers saves no weights that lie apart in one storage.
    """
    parts = _by_place(model, ((name, (name, weight)) for name, weight in weights))
    own, found = dict(model.named_parameters()), {}
    for place, pieces in parts.items():
        first = 0
        for name, weight in _in_order(pieces) if place in own else []:
            rows = own[place].data[first : first + len(weight)]
            first += len(weight)
            if (rows.shape, rows.dtype, rows.device) == (weight.shape, weight.dtype, weight.device):
                found[name] = torch.from_dlpack(rows)
    return found


def _is_memory_of(have: Tensor, pieces: Sequence[Tensor]) -> bool:
    """Return whether the parts of a weight are the engine's own memory, as `views` gives it: then nothing need be read."""
    counts = [len(piece) for piece in pieces]
    if not have.numel() or len(have) < sum(counts):  # of an engine over several processes, whose part is copied
        return False
    rows = have.data[: sum(counts)].split(counts)
    place = lambda t: (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device)  # noqa: E731
    return len(rows) == len(pieces) and all(place(a) == place(b) for a, b in zip(rows, pieces, strict=True))


def differing_checksums(model: Untyped, weights: Mapping[str, Checksum]) -> list[str]:
    """Name the parameters of an exact engine whose words do not have the sums that they should have.

    An engine may be spread over several processes: each sums its own rows, and all must call this. Rows that several have must
    be the same in all.
    """
    from rlinvariant.sampler.vllm_columns import of_all

    parts = _by_place(model, weights.items())
    own = dict(model.named_parameters())
    bad = [name for name in parts if name not in own and not ("lm_head.weight" not in own and name == "lm_head.weight")]
    here: dict[str, list[tuple[int, int, Tensor]]] = {}
    for name, have in own.items():
        cuts = _cuts(model, name, [part.shape[0] for part in _in_order(parts.get(name, {}))])
        rows = [rows for _, _, rows in cuts]
        have = have[: sum(rows)] if name.endswith(PADDED) else have
        if sum(rows) == len(have):
            here[name] = [(first, n, part) for part, (_, first, n) in zip(have.split(rows), cuts, strict=True)]
    everywhere = of_all(summed(here))
    for name, have in own.items():
        held = zip(*(each.get(name, []) for each in everywhere), strict=False)
        found = [joined(rows, have.dtype, have.shape[1:]) for rows in held]
        if name not in parts or found != _in_order(parts[name]):
            bad.append(name)
    return bad + _stale_copies(model)


Rows = tuple[int, int, Tensor]
"""Number of the first of some rows of a weight, how many they are, and their sums, on the host."""


def summed(here: Mapping[str, list[tuple[int, int, Tensor]]]) -> dict[str, list[Rows]]:
    """Return the sums of the rows in the place of the rows, for each part of each weight; the device is waited for once."""
    every = [(rows, first) for parts in here.values() for first, _, rows in parts]
    read = iter(checksums.partials(every).cpu() if every else ())
    return {name: [(first, n, next(read)) for first, n, _ in parts] for name, parts in here.items()}


def joined(held: Iterable[Rows], dtype: torch.dtype, row: Sequence[int]) -> Checksum | None:
    """Return the checksum of a weight whose rows, each of the shape `row`, several processes have.

    None if rows are missing, or are not the same in all that have them.
    """
    apart: dict[int, Rows] = {}
    for first, rows, sums in held:
        _, rows_before, sums_before = apart.setdefault(first, (first, rows, sums))
        if rows_before != rows or not torch.equal(sums_before, sums):
            return None
    end, total = 0, torch.zeros(2, dtype=torch.int64)
    for first, rows, sums in sorted(apart.values(), key=lambda row: row[:2]):
        if first != end:
            return None
        end, total = first + rows, total + sums
    return checksums.of(dtype, (end, *row), total)


def _stale_copies(model: Any) -> list[str]:
    """Name the weights whose packed copies, which an exact CPU engine multiplies by, are not the weights."""
    from rlinvariant.sampler.vllm_linear import multiplied, products

    layers = {name: layer for name, layer in products(model).items() if getattr(layer, "packed", None)}
    return [
        f"{name}.weight (packed copy)"
        for name, layer in layers.items()
        if not all(_same(copy.to_dense(), multiplied(layer)) for copy in layer.packed.values())
    ]


def target(model: Untyped, name: str) -> tuple[str, Untyped]:
    """Return where vLLM keeps a Hugging Face parameter: the name of its own parameter, and which part of it."""
    places: dict[str, tuple[str, Any]] = model.__dict__.setdefault("places", {})  # every sync asks for all of them
    if name not in places:
        places[name] = _target(model, name)
    return places[name]


def _target(model: Untyped, name: str) -> tuple[str, Untyped]:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for original, (merged, shard) in getattr(mapper, "orig_to_new_stacked", {}).items():
        if f"{original}." in name:
            return name.replace(original, merged), shard
    return packed.place(model, name), None


def _by_place(model: Untyped, named: Iterable[tuple[str, T]]) -> dict[str, dict[Any, T]]:
    """Return what belongs to Hugging Face parameters by the name of vLLM's own parameter, and by the part of it."""
    parts: dict[str, dict[Any, T]] = {}
    for name, found in named:
        place, shard = target(model, name)
        parts.setdefault(place, {})[shard] = found
    return parts


def _in_order(pieces: dict[Any, Any]) -> list[Any]:
    """Return the parts of a merged weight in vLLM's order."""
    return [pieces[shard] for shard in sorted(pieces, key=MERGE_ORDER.index)]


def _cuts(model: Any, name: str, wholes: list[int]) -> list[tuple[int, int, int]]:
    """Return which rows of each part of a merged weight are in this process: rows of the whole, the first, how many.

    Layers of an exact engine say it (`vllm_columns.Cut`); any other parameter is whole. Where the weights have not as many rows
    as they should, nothing is cut.
    """
    cuts = getattr(model.get_submodule(name.rpartition(".")[0]), "cuts", [])
    return cuts if [cut.whole for cut in cuts] == wholes else [(rows, 0, rows) for rows in wholes]


def _here(model: Any, name: str, pieces: dict[Any, Tensor]) -> Tensor:
    """Return those rows that this process has of the parts of a merged weight, side by side."""
    parts = _in_order(pieces)
    held = zip(parts, _cuts(model, name, [len(part) for part in parts]), strict=True)
    rows = [part[first : first + count] for part, (_, first, count) in held]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _readable(model: Any, name: str, have: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parameter as vLLM computes with it, and what it should be, in one dtype."""
    if have.dim() >= 3:
        return have, packed.as_packed(model.get_submodule(name.rpartition(".")[0]), have, expected)
    if have.numel() == 0 and expected.numel():
        return _columns(model.get_submodule(name.rpartition(".")[0]), expected)
    if name.endswith(PADDED):
        have = have[: len(expected)]
    return have, expected.to(have.dtype)


def _columns(layer: Any, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Return up to 64 columns of a packed weight, read by multiplying unit vectors, and the same columns of `expected`."""
    n, k = expected.shape
    at = torch.arange(0, k, max(1, k // 64))
    dtype = next((p.dtype for p in layer.parameters()), torch.bfloat16)
    units = torch.zeros(len(at), k, dtype=dtype)
    units[torch.arange(len(at)), at] = 1
    product = layer.cpu_linear(units, layer.weight, None)
    product = product[:, :n] if hasattr(layer, "org_vocab_size") else product  # vLLM pads the vocabulary
    return product.to(dtype), expected.to(dtype)[:, at].t()


def unequal(named: Iterable[tuple[str, Tensor, Tensor]]) -> list[str]:
    """Name those of some pairs of tensors that differ in their shape or in a bit; the device is waited for once."""
    names: list[str] = []
    found: list[Tensor] = []
    for name, a, b in named:
        names.append(name)
        found.append(bits.same(a, b) if a.shape == b.shape else a.new_zeros((), dtype=torch.bool))
    read = torch.stack(found).tolist() if found else []
    return [name for name, equal in zip(names, read, strict=True) if not equal]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(bits.same(a, b))

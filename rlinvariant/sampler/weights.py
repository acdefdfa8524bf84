"""Find the parameters of a vLLM model whose bytes are not the trainer's."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlinvariant import bits, checksums
from rlinvariant.checksums import Checksum
from rlinvariant.types import Untyped

MERGE_ORDER: list[Any] = [None, "q", "k", "v", *range(16)]  # how vLLM stacks the parts of a merged projection

PADDED = ("embed_tokens.weight", "lm_head.weight")  # vLLM pads the vocabulary


def differing(model: Untyped, weights: Iterable[tuple[str, Tensor]], invariant: bool) -> list[str]:
    """Name the parameters whose bytes differ; `Sampler.differing_weights` says which are compared, and how."""
    parts: dict[str, dict[Any, Tensor]] = {}
    for name, weight in weights:
        place, shard = target(model, name)
        parts.setdefault(place, {})[shard] = weight.detach()
    own = dict(model.named_parameters())
    tied = "lm_head.weight" not in own
    bad = [name for name in parts if name not in own and not (tied and name == "lm_head.weight")]
    for name, have in own.items():
        if name not in parts or not _same(*_readable(model, name, have.detach(), _whole(parts[name]))):
            bad.append(name)
    bad += _stale_copies(model) if invariant else []
    head = getattr(model, "lm_head", None)
    embedding = next((_whole(x) for n, x in parts.items() if n.endswith("embed_tokens.weight")), None)
    packed_apart = tied and hasattr(head, "cpu_linear") and not invariant
    if packed_apart and embedding is not None and not _same(*_columns(head, embedding)):
        bad.append("lm_head.weight")
    return bad


def differing_checksums(model: Untyped, weights: Mapping[str, Checksum]) -> list[str]:
    """Name the parameters of an exact engine whose words do not have the sums that they should have."""
    parts: dict[str, dict[Any, Checksum]] = {}
    for name, checksum in weights.items():
        place, shard = target(model, name)
        parts.setdefault(place, {})[shard] = checksum
    own = dict(model.named_parameters())
    bad = [name for name in parts if name not in own and not ("lm_head.weight" not in own and name == "lm_head.weight")]
    for name, have in own.items():
        expected = [parts[name][shard] for shard in sorted(parts[name], key=MERGE_ORDER.index)] if name in parts else []
        rows = [part.shape[0] for part in expected]
        if name.endswith(PADDED):
            have = have[: sum(rows)]
        if not rows or sum(rows) != len(have) or [checksums.whole(part) for part in have.split(rows)] != expected:
            bad.append(name)
    return bad + _stale_copies(model)


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
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for original, (merged, shard) in getattr(mapper, "orig_to_new_stacked", {}).items():
        if f"{original}." in name:
            return name.replace(original, merged), shard
    return name, None


def _whole(pieces: dict[Any, Tensor]) -> Tensor:
    if len(pieces) == 1:
        return next(iter(pieces.values()))
    return torch.cat([pieces[shard] for shard in sorted(pieces, key=MERGE_ORDER.index)])


def _readable(model: Any, name: str, have: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parameter as vLLM computes with it, and what it should be, in one dtype."""
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


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(bits.same(a, b))

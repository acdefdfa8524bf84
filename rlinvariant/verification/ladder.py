"""Every op, as this model calls it on this device: does a row's result depend on the rows beside it?

One packed forward of the model is watched; each distinct call of an op (by weights' shapes, dtypes and constants) is then made
again with fewer rows, in reversed order, and among rows of NaN. Attention is called again a sequence at a time. The control is
torch's own product in the same ladder.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlinvariant.ops.linear import cancelling
from rlinvariant.verification.relations import Relation

# Row counts at which kernels change: 1 (oneDNN, cuBLASLt), vector and tile edges, 256 (vLLM's norms)
ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
PRIMES = (521, 509, 503, 499, 491, 487, 479, 467, 463, 461, 457, 449)  # numbers of rows: no other dimension may have them
OURS = "rlinvariant"


class _Calls(TorchDispatchMode):
    """The first of each distinct call of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == OURS:
            key = (str(func), *(_signature(x) for x in args))
            self.found.setdefault(key, (func, args))
        return func(*args, **(kwargs or {}))


def _signature(x: Any) -> Any:
    return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else str(x)


@torch.no_grad()
def ladder(model: Any, generator: torch.Generator) -> Iterator[Relation]:
    """One relation for each op that the model calls, and one for the control; counts are of output words."""
    device, taken = next(model.parameters()).device, {n for p in model.parameters() for n in p.shape}
    packed, scored = [p for p in PRIMES if p not in taken][:2]  # tokens of the forward, and those whose log-probs are asked for
    lengths = [1, 2, 17, 64, 129]
    lengths.append(packed - sum(lengths))
    cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, packed), generator=generator).to(device)
    longest = min(max(lengths), model.config.get_text_config().max_position_embeddings)
    positions = torch.cat([torch.arange(n) % longest for n in lengths])[None].to(device)
    with _Calls() as calls:
        model(
            input_ids=ids, position_ids=positions, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=max(lengths),
            max_length_k=max(lengths), attention_mask=None, token_ids=ids[0, 1 : scored + 1],
            predicted_from=torch.arange(scored, device=device), temperature=0.7,
        )  # fmt: skip
    relations: dict[str, Relation] = {}
    shapes: dict[str, int] = {}
    stock = Relation("stock: torch's linear, a row = among others", unit="words")
    for func, args in calls.found.values():
        name = func.__name__.split(".")[0]
        relation = relations.setdefault(name, Relation(f"op {name}: a row = among others", unit="words"))
        shapes[name] = shapes.get(name, 0) + 1
        relation.how = f"{shapes[name]} distinct call{'s' * (shapes[name] > 1)}"
        if "cu_seqlens" in {a.name for a in func._schema.arguments}:
            _sequences(relation, func, args, lengths)
        else:
            if name == "linear":
                args = _cancelling(args)
            _rows(relation, functools.partial(_call, func), args, (scored, packed))
            if name == "linear":
                _rows(stock, _stock_linear, args, (scored, packed))
    yield from relations.values()
    yield stock


def _stock_linear(x: Tensor, w: Tensor, b: Tensor | None = None, *_: Any) -> tuple[Tensor]:
    return (F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype)),)


def _cancelling(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Operands of the same shapes that show every other order of summation."""
    x, w, *more = args
    rows, (n, k) = x.numel() // x.shape[-1], w.shape
    a, b = (t.to(x.device) for t in cancelling(rows, n, k, x.dtype))
    return a.view(x.shape), b, *(torch.zeros_like(t) if isinstance(t, Tensor) else t for t in more)


def _call(func: Any, *args: Any) -> tuple[Any, ...]:
    out = func(*args)
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _is_rows(x: Any, size: int) -> int | None:
    """Which dimension of x has the rows."""
    return next((d for d, n in enumerate(x.shape) if n == size), None) if isinstance(x, Tensor) else None


def _rows(relation: Relation, call: Any, args: tuple[Any, ...], sizes: tuple[int, ...]) -> None:
    size = next(n for n in sizes if any(_is_rows(x, n) is not None for x in args))
    dims = [_is_rows(x, size) for x in args]

    def pick(change: Any) -> tuple[Any, ...]:
        return tuple(x if d is None else change(x, d) for x, d in zip(args, dims, strict=True))

    whole = call(*args)

    def add(rows: slice, got: tuple[Any, ...], what: str) -> None:
        for a, b in zip(whole, got, strict=True):
            if (d := _is_rows(a, size)) is not None:
                expected = a[(slice(None),) * d + (rows,)]
                relation.count(expected, b[(slice(None),) * d + (rows,)] if b.shape != expected.shape else b, what)

    for m in (m for m in ROWS if m < size):
        for first in (0, size - m):
            add(slice(first, first + m), call(*pick(lambda x, d: x.narrow(d, first, m).clone())), f"{m} rows from {first}: ")  # noqa: B023
    turned = call(*pick(lambda x, d: x.flip(d)))
    add(slice(None), tuple(x.flip(d) if (d := _is_rows(x, size)) is not None else x for x in turned), "reversed: ")
    rows = slice(100, 117)

    def among_nan(x: Tensor, d: int) -> Tensor:
        if not x.is_floating_point():
            return x
        out = torch.full_like(x, float("nan"))
        at = (slice(None),) * d + (rows,)
        out[at] = x[at]
        return out

    add(rows, call(*pick(among_nan)), "among NaN: ")


def _sequences(relation: Relation, func: Any, args: tuple[Any, ...], lengths: list[int]) -> None:
    """Attention: each sequence by itself."""
    names = [a.name for a in func._schema.arguments]
    whole = _call(func, *args)
    at = 0
    for n in lengths:
        own = list(args)
        for i, x in enumerate(args):
            if names[i].startswith("cu_seqlens"):
                own[i] = torch.tensor([0, n], dtype=torch.int32, device=x.device)
            elif names[i].startswith("max_seqlen"):
                own[i] = n
            elif isinstance(x, Tensor) and len(x) == sum(lengths):
                own[i] = x[at : at + n].clone()
        for a, b in zip(whole, _call(func, *own), strict=True):
            if isinstance(a, Tensor) and len(a) == sum(lengths):
                relation.count(a[at : at + n], b, f"sequence of {n}: ")
        at += n

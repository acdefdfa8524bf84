"""The ladder of row counts: does a row's result of an op depend on the rows beside it, as this model calls the op here?

One packed forward of the model is watched. Each distinct call of an op (by shapes and dtypes of weights, and by constants) is
made again with fewer rows, in reversed order, and among rows of NaN. Attention is called again one sequence at a time. Operands
are those in which a fault shows (trials.py), and each op has a control: a planted fault, which the same comparison must see. So
has the machine: torch's own product on the same ladder.

B: sequences, 1 for a packed row; T: tokens of the row.
"""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlinvariant.text import plural
from rlinvariant.verification.relation import Relation
from rlinvariant.verification.trials import Arguments, Call, by_definition, trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Kernels change at 1 row (oneDNN, cuBLASLt), at the edges of vectors and tiles, and at 256 rows (vLLM's norms)
ROW_COUNTS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
FAULTY_COUNTS = (1, 9, 65)  # of calls with a planted fault
# Lengths of the watched forward: a prime that no dimension of the model has tells which dimension of a tensor is the rows
FORWARD_LENGTHS = (521, 509, 503, 499, 491, 487, 479, 467, 463, 461, 457, 449)
OP_NAMESPACE = "rlinvariant"


class _DistinctCalls(TorchDispatchMode):
    """Keeps the first of each distinct call of an op of this package: `found` has the op and its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == OP_NAMESPACE:
            key = (str(func), *(_signature(x) for x in args))
            self.found.setdefault(key, (func, args))
        return func(*args, **(kwargs or {}))


def _signature(x: Any) -> Any:
    return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else str(x)


@torch.no_grad()
def ladder(model: "PreTrainedModel", generator: torch.Generator) -> Iterator[Relation]:
    """Yield one relation for each op that the model calls, one for its planted fault, and one for torch's product.

    Args:
        model: a trainer's model, patched.
        generator: decides the token ids of the watched forward.

    All count output words.
    """
    taken = {n for p in model.parameters() for n in p.shape}
    packed, scored = [n for n in FORWARD_LENGTHS if n not in taken][:2]  # tokens of the forward; log-probs that it is asked for
    lengths = [1, 2, 17, 64, 129]
    lengths.append(packed - sum(lengths))
    calls = _watch_forward(model, lengths, scored, generator)
    relations, planted = dict[str, Relation](), dict[str, Relation]()
    shapes: dict[str, int] = {}
    stock = Relation("stock: torch's linear, a row = among others", unit="words")
    for func, given in calls:
        name = func.__name__.split(".")[0]
        names = [a.name for a in func._schema.arguments]
        arguments = dict(zip(names, given, strict=False))
        how, call = trial(name, arguments), functools.partial(_call, func)
        relation = relations.setdefault(name, Relation(f"op {name}: a row = among others", unit="words"))
        fault = planted.setdefault(name, Relation(f"planted: op {name}, {how.fault}", unit="words"))
        shapes[name] = shapes.get(name, 0) + 1
        relation.how = plural(shapes[name], "distinct call")
        arguments = arguments if how.hard is None else how.hard(arguments)
        if "cu_seqlens" in names:
            _sequences(relation, call, arguments, lengths, call)
            _sequences(fault, call, arguments, lengths, functools.partial(how.wrong, call))
            continue
        for right, wrong in zip(by_definition(name, arguments), call(arguments), strict=False):
            if right is not None:
                relation.count(right, wrong, "by definition: ")
        _rows(relation, call, arguments, (scored, packed))
        _rows(fault, call, arguments, (scored, packed), functools.partial(how.wrong, call))
        if name == "linear":
            _rows(stock, _stock_linear, arguments, (scored, packed))
    yield from relations.values()
    yield from planted.values()
    yield stock


def _watch_forward(model: Any, lengths: list[int], scored: int, generator: torch.Generator) -> list[tuple[Any, Any]]:
    """Return the distinct calls of ops, as op and arguments, in a packed forward of sequences of these lengths.

    The forward is asked for `scored` log-probs.
    """
    device, config, tokens = next(model.parameters()).device, model.config.get_text_config(), sum(lengths)
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
    ids_BT = torch.randint(0, config.vocab_size, (1, tokens), generator=generator).to(device)
    longest = min(max(lengths), config.max_position_embeddings)
    positions_BT = torch.cat([torch.arange(n) % longest for n in lengths])[None].to(device)
    with _DistinctCalls() as calls:
        model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
            attention_mask=None,
            token_ids=ids_BT[0, 1 : scored + 1],
            predicted_from=torch.arange(scored, device=device),
            temperature=0.7,
        )
    return list(calls.found.values())


def _stock_linear(a: Arguments) -> tuple[Tensor]:
    x, w, b = a["x"], a["weight"], a["bias"]
    return (F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype)),)


def _call(func: Any, a: Arguments) -> tuple[Any, ...]:
    out = func(*a.values())
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _row_dimension(x: Any, size: int) -> int | None:
    """Return which dimension of x has the `size` rows, None if none has."""
    return next((d for d, n in enumerate(x.shape) if n == size), None) if isinstance(x, Tensor) else None


def _rows(relation: Relation, call: Call, given: Arguments, sizes: tuple[int, ...], wrong: Call | None = None) -> None:
    """Compare one call's rows with those of calls on fewer rows, reversed rows, and rows among NaN.

    Args:
        relation: gets the counts.
        call: the op, as a function that returns a tuple of outputs.
        given: arguments of the call; tensors with a dimension of one of the `sizes` are cut along it.
        sizes: numbers of rows that the call may have.
        wrong: the op with a fault: calls on a few row counts are its, and no others are made.
    """
    size = next(n for n in sizes if any(_row_dimension(x, n) is not None for x in given.values()))
    dims = {name: _row_dimension(x, size) for name, x in given.items()}

    def pick(change: Any) -> Arguments:
        return {name: x if (d := dims[name]) is None else change(x, d) for name, x in given.items()}

    whole = call(given)

    def add(rows: slice, got: tuple[Any, ...], what: str) -> None:
        for a, b in zip(whole, got, strict=True):
            if (d := _row_dimension(a, size)) is not None:
                expected = a[(slice(None),) * d + (rows,)]
                relation.count(expected, b[(slice(None),) * d + (rows,)] if b.shape != expected.shape else b, what)

    for count in (n for n in (ROW_COUNTS if wrong is None else FAULTY_COUNTS) if n < size):
        for first in (0, size - count):
            fewer = (wrong or call)(pick(lambda x, d, first=first, count=count: x.narrow(d, first, count).clone()))
            add(slice(first, first + count), fewer, f"{count} rows from {first}: ")
    if wrong is not None:
        return
    turned = call(pick(lambda x, d: x.flip(d)))
    add(slice(None), tuple(x.flip(d) if (d := _row_dimension(x, size)) is not None else x for x in turned), "reversed: ")
    rows = slice(100, 117)

    def among_nan(x: Tensor, d: int) -> Tensor:
        if not x.is_floating_point():
            return x
        out = torch.full_like(x, float("nan"))
        at = (slice(None),) * d + (rows,)
        out[at] = x[at]
        return out

    add(rows, call(pick(among_nan)), "among NaN: ")


def _sequences(relation: Relation, call: Call, given: Arguments, lengths: list[int], alone: Call) -> None:
    """Compare attention over all sequences with what `alone` gives for each sequence by itself."""
    whole = call(given)
    at = 0
    for n in lengths:
        own = dict(given)
        for name, x in given.items():
            if name.startswith("cu_seqlens"):
                own[name] = torch.tensor([0, n], dtype=torch.int32, device=x.device)
            elif name.startswith("max_seqlen"):
                own[name] = n
            elif isinstance(x, Tensor) and len(x) == sum(lengths):
                own[name] = x[at : at + n].clone()
        for a, b in zip(whole, alone(own), strict=True):
            if isinstance(a, Tensor) and len(a) == sum(lengths):
                relation.count(a[at : at + n], b, f"sequence of {n}: ")
        at += n

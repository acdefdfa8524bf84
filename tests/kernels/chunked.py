"""Run the attention of kernels/chunked_*.py in Triton's interpreter, with a matrix unit that has bits. See test_chunked.py."""

import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlinvariant import bits
from rlinvariant.ops.attention import attention_ref
from tests.kernels import matrix_unit  # noqa: F401  # before the kernels
from tests.ladders import randn
from tests.ops.sequences import Cache, offsets

from rlinvariant.kernels import chunked_attention, chunked_backward, chunked_calls, chunked_decode  # isort: skip

ORDER = chunked_calls.Order(16, 32)
DECODE = chunked_calls.Decode(4, 2, 8)
LENGTHS = (1, 17, 32, 65)  # around multiples of a block and of a chunk
FORMS = (  # window, softcap, sinks
    (None, None, False),
    (20, 3.0, True),
    (40, None, False),
    (7, None, False),
    (None, 2.0, True),
)
SCALE = 0.3
PAGES = ((1, 4, 64), (1, 16, 2), (1, 5, 0), (3, 4, 64), (20, 4, 64))  # last queries, tokens of a page, slots


def operands(heads: int, kv_heads: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v in which a sequence's second half of keys repeats the first, with values that cancel: rounding is left."""
    q, k, v = (randn(sum(LENGTHS), h, d, seed=i, dtype=torch.bfloat16) for i, h in enumerate((heads, kv_heads, kv_heads)))
    for a, b in pairwise(offsets(LENGTHS).tolist()):
        half = (b - a) // 2
        k[a + half : a + 2 * half], v[a + half : a + 2 * half] = k[a : a + half], -v[a : a + half]
        v[a + 2 * half : b] /= 1024
    return q * 2, k, v


def tile(rows: int) -> chunked_calls.Tile:
    return chunked_calls.Tile(rows, 4, 2)


def form(window: int | None, softcap: float | None) -> chunked_calls.Form:
    return chunked_calls.Form(SCALE, window, softcap)


class Case:
    """Holds one form over packed sequences, the same in pages, and the output of the tile of 64 rows."""

    def __init__(self, shape: tuple[int, int, int], window: int | None, softcap: float | None, sinks: bool) -> None:
        self.q, self.k, self.v = operands(*shape)
        self.form, self.group = form(window, softcap), shape[0] // shape[1]
        self.sinks = randn(shape[0], seed=9) * 2 if sinks else None
        self.cu = offsets(LENGTHS)
        self.out, self.lse = self.packed(64)

    def packed(self, rows: int, order: chunked_calls.Order = ORDER, calls: ModuleType = chunked_calls) -> tuple[Tensor, Tensor]:
        return calls.packed(self.q, self.k, self.v, self.cu, max(LENGTHS), self.form, self.sinks, tile(rows), order)

    def paged(
        self, last: int, page: int, slots: int = 64, order: chunked_calls.Order = ORDER, calls: ModuleType = chunked_calls
    ) -> tuple[Tensor, Tensor]:
        """Return the output for the last queries of each sequence, and what it should be.

        Two sequences without queries follow, as where a CUDA graph is larger than its batch: one of no keys, one of stale keys.
        """
        cache = Cache(self.k, self.v, LENGTHS, page)
        counts = [min(last, n) for n in LENGTHS]
        if window := self.form.window:  # pages before the window have been given to others
            for b, (n, count) in enumerate(zip(LENGTHS, counts, strict=True)):
                cache.table[b, : max(0, n - count - window + 1) // page] = cache.table[b, -1]
        at = torch.cat([torch.arange(end - n, end) for end, n in zip(self.cu[1:].tolist(), counts, strict=True)])
        out = torch.full_like(self.q[at], float("nan"))
        table = torch.cat([cache.table, torch.zeros(2, cache.table.shape[1], dtype=torch.int32)])
        lens = torch.cat([self.cu.diff(), torch.tensor([0, max(LENGTHS)], dtype=torch.int32)])
        calls.paged(
            *(self.q[at], cache.pages, table, offsets([*counts, 0, 0]), lens, last, max(LENGTHS), self.form, out),
            *(self.sinks, None, tile(32), order, DECODE, slots),
        )
        return out, self.out[at]


def same(what: str, found: Tensor, expected: Tensor) -> None:
    if difference := bits.compare(found, expected):
        raise AssertionError(f"{what}: {difference}")
    compared.append(what)


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp in fp64, and the weighted sum of |v|."""
    q, k, v = (x.double() for x in (case.q, case.k, case.v))
    return (with_sinks(q, k, x, case) for x in (v, v.abs()))


def with_sinks(q: Tensor, k: Tensor, v: Tensor, case: Case, sinks: Tensor | None = None) -> Tensor:
    """Attend in fp64; a sink is a key whose value is 0 and whose score is the sink."""
    f, sinks = case.form, case.sinks if sinks is None else sinks
    if sinks is None:
        return attention_ref(q, k, v, case.cu, f.scale, None, f.window, f.softcap)
    out = []
    for a, b in pairwise(case.cu.tolist()):
        qs, ks, vs = (x[a:b].transpose(0, 1) for x in (q, k, v))
        ks, vs = (x.repeat_interleave(case.group, 0) for x in (ks, vs))
        s = qs @ ks.mT * f.scale
        s = s if f.softcap is None else torch.tanh(s / f.softcap) * f.softcap
        i, j = torch.arange(b - a)[:, None], torch.arange(b - a)
        s = s.masked_fill(~((j <= i) & (j > i - (f.window or b))), -torch.inf)
        s = torch.cat([s, sinks.double()[:, None, None].expand(-1, b - a, 1)], -1)
        out.append((s.softmax(-1)[..., :-1] @ vs).transpose(0, 1))
    return torch.cat(out)


def accurate(case: Case) -> None:
    """A weight is rounded to bf16, by up to 2^-8, in the sum of values and in the sum of weights; so is the output."""
    expected, size = reference(case)
    allowed = (2**-8 + 2**-12) * size + 2**-7 * expected.abs()
    wrong = (case.out.double() - expected).abs() > allowed
    assert not wrong.any(), f"{case.form}: {int(wrong.sum())} values beyond their bound"
    control = case.out.double().roll(1, 0)
    assert ((control - expected).abs() > allowed).any()
    compared.append("accuracy")


def equal(shape: tuple[int, int, int], what: tuple[Any, ...], tiles: tuple[int, ...] = (16, 128), pages: Any = PAGES) -> None:
    """Packed is paged, by any tile, in any chunks, in any company."""
    case = Case(shape, *what)
    accurate(case)
    for rows in tiles:
        out, lse = case.packed(rows)
        same(f"{what}, tiles of {rows}", out, case.out)
        same(f"{what}, tiles of {rows}, log-sum-exp", lse, case.lse)
    a, b = case.cu[2:4].tolist()
    alone = chunked_calls.packed(
        *(case.q[a:b], case.k[a:b], case.v[a:b], offsets((b - a,)), b - a, case.form, case.sinks, tile(64), ORDER)
    )
    same(f"{what}, alone", alone[0], case.out[a:b])
    for last, page, slots in pages:
        same(f"{what}, the last {last}, {slots} slots", *case.paged(last, page, slots))


def planted(module: ModuleType, old: str, new: str) -> Iterator[ModuleType]:
    """Yield chunked_calls with one line of a kernel's source replaced."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1, f"{source.count(old)} of {old!r}"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "planted.py"
        path.write_text(source.replace(old, new))
        spec: Any = importlib.util.spec_from_file_location("planted", path)
        changed = importlib.util.module_from_spec(spec)
        sys.modules["planted"] = changed
        spec.loader.exec_module(changed)
        names = [n for n in ("_tiles", "_parts", "_fold_parts") if hasattr(changed, n) and hasattr(chunked_calls, n)]
        before = {name: getattr(chunked_calls, name) for name in names}
        vars(chunked_calls).update({name: getattr(changed, name) for name in names})
        try:
            yield chunked_calls
        finally:
            vars(chunked_calls).update(before)


def found(what: str, compare: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Control: these differ."""
    a, b = compare()
    assert bits.compare(a, b) is not None, f"control: {what} changes no bit"
    controls.append(what)


def faults(shape: tuple[int, int, int]) -> None:
    case, windowed = Case(shape, None, None, False), Case(shape, 20, None, False)
    found("another block", lambda: case.paged(1, 4, order=chunked_calls.Order(32, 32)))
    found("another chunk", lambda: case.paged(1, 4, order=chunked_calls.Order(16, 64)))
    for calls in planted(chunked_attention, "first = oldest // N * N", "first = oldest"):
        found("blocks that begin with the window", lambda calls=calls: (windowed.packed(16, calls=calls)[0], windowed.out))
    forward = "place = (slot + start + j).to(tl.int64) * tl.num_programs(1) + kv_head"
    backward = "place = (slot + tl.maximum(chunks - 1 - start - j, 0)).to(tl.int64) * tl.num_programs(1) + kv_head"
    for calls in planted(chunked_decode, forward, backward):
        found("a descending fold", lambda calls=calls: case.paged(1, 4, calls=calls))


def gradients(shape: tuple[int, int, int], what: tuple[Any, ...]) -> None:
    """Gradients against autograd in fp64, of the same bf16 operands."""
    case = Case(shape, *what)
    dout = randn(*case.out.shape, seed=5, dtype=torch.bfloat16)
    leaves = [x.double().requires_grad_() for x in (case.q, case.k, case.v)]
    sinks = None if case.sinks is None else case.sinks.double().requires_grad_()
    leaves += [] if sinks is None else [sinks]
    out = with_sinks(*leaves[:3], case, sinks)
    expected = torch.autograd.grad(out, leaves, dout.double())
    saved = (dout, case.q, case.k, case.v, case.cu, case.out, case.lse, max(LENGTHS))
    ours = [*chunked_backward.backward(*saved, case.form, chunked_calls.Backward(16, 32, 4, 2))]
    ours += [] if sinks is None else [chunked_backward.sinks_gradient(dout, case.out, case.lse, case.sinks)]
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, expected, strict=True)]
    assert max(errors) < 2**-6, (what, errors)  # a few roundings to bf16, of up to 2^-8 each
    if case.form.softcap:  # control: without the slope of tanh
        plain = chunked_calls.Form(SCALE, case.form.window)
        dq, *_ = chunked_backward.backward(*saved, plain, chunked_calls.Backward(16, 32, 4, 2))
        assert (dq.double() - expected[0]).norm() / expected[0].norm() > 2**-4
    compared.append("gradients")


compared: list[str] = []
controls: list[str] = []
if __name__ == "__main__":
    if sys.argv[1:] == ["full"]:
        for shape, what in itertools.product(((4, 2, 16), (3, 1, 24), (2, 2, 32)), FORMS):
            equal(shape, what)
            gradients(shape, what)
        faults((4, 2, 16))
    else:
        equal((4, 2, 16), FORMS[1], (16,), (PAGES[1], PAGES[4]))
        case = Case((4, 2, 16), None, None, False)
        found("another block", lambda: case.paged(1, 4, order=chunked_calls.Order(32, 32)))
    print("compared", len(compared), "controls", len(controls))

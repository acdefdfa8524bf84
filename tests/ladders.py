"""Tools that the op tests share: devices, batch sizes, neighbours, thread counts, and the checks of a relation between bits.

How accurate an op must be is in tests/bounded.py.

A check takes the function that it tests, so that each test can hand it a stock or a broken function and see it fail.
Tensors are made on the default device, which tests/ops/conftest.py sets to that of the test.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from rlinvariant import bits
from rlinvariant.bits import assert_bits_equal, compare

# 1: oneDNN and cuBLASLt take another kernel. 7-9, 15-17, 31-33, 63-65: vector and tile edges (9 and 16:
# FlashAttention-3).
# 127-129: its largest tile. 255-257: vLLM's norm kernel, and `linear`'s rows per call. 1024: many tiles.
LADDER = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1024)
DTYPES = (torch.bfloat16, torch.float32)
NEIGHBOURS = (0.0, float("inf"), float("nan"), 1e30, None)  # None: random rows

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def dtype_name(value: object) -> str | None:
    """Test ids for dtypes; pytest's own for the rest."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def per_device(names: str, cpu: Iterable, cuda: Iterable, indirect: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Parametrise a test by device and `names` together: for what one device does not take.

    Values are tuples if there are several names. Those in `indirect` are fixtures.
    """
    several = "," in names
    rows = [("cpu", *(v if several else (v,))) for v in cpu]
    rows += [pytest.param("cuda", *(v if several else (v,)), marks=pytest.mark.gpu) for v in cuda]
    return pytest.mark.parametrize(f"device, {names}", rows, ids=dtype_name, indirect=["device", *indirect])


cpu_only = pytest.mark.parametrize("device", DEVICES[:1], indirect=True)
gpu_only = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
matrix_dtypes = per_device("dtype", DTYPES, [torch.bfloat16])  # what `linear` and `attention` take


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, wide: bool = False) -> Tensor:
    """Normal values, the same on every device; `wide` spreads their exponents, so that another order of summation shows."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng, device="cpu")
    if wide:
        x = x * torch.exp2(torch.randint(-8, 8, shape, generator=rng, device="cpu"))
    return x.to(torch.get_default_device(), dtype)


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, shape, generator=rng, device="cpu").to(torch.get_default_device())


def randperm(n: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=rng, device="cpu").to(torch.get_default_device())


def cancelling(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`bits.cancelling`, the same on every device, and none that a check at the start has seen."""
    x, w = bits.cancelling(rows, n, k, dtype, "cpu", seed=1)
    return x.to(torch.get_default_device()), w.to(torch.get_default_device())


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same(a: Tensor | tuple[Tensor, ...], b: Tensor | tuple[Tensor, ...], what: str) -> None:
    """Every output has the same bits."""
    for i, (x, y) in enumerate(zip(_tuple(a), _tuple(b), strict=True)):
        assert_bits_equal(x, y, f"{what}, output {i}")


def assert_batch_invariant(f: Function, *rows: Tensor, ladder: tuple[int, ...] = LADDER) -> None:
    """f(rows[:m]) = f(rows)[:m] for every m of the ladder, and f(rows[s:]) = f(rows)[s:], which moves every row."""
    full = _tuple(f(*rows))
    for m in ladder:
        if m <= len(rows[0]):
            assert_same(f(*(x[:m].clone() for x in rows)), tuple(y[:m] for y in full), f"the first {m} rows alone")
    for s in (1, 21):
        assert_same(f(*(x[s:].clone() for x in rows)), tuple(y[s:] for y in full), f"without the first {s} rows")


def assert_needle(f: Function, *rows: Tensor, size: int = 33) -> None:
    """A row keeps its bits when it stands first, in the middle or last among rows that would poison any shared sum."""
    alone = f(*(x[:1] for x in rows))
    for neighbour in NEIGHBOURS:
        for at in (0, 1, size // 2, size - 1):  # places of both parities: a kernel may pair its rows
            hay = [_hay(x, size, neighbour) for x in rows]
            for h, x in zip(hay, rows, strict=True):
                h[at] = x[0]
            found = tuple(y[at : at + 1] for y in _tuple(f(*hay)))
            assert_same(found, alone, f"a row at {at} of {size} rows of {neighbour}")


def assert_thread_invariant(f: Function, *inputs: Tensor) -> None:
    """1, 2 and 3 threads give the same bits: one that divides the work evenly and one that does not."""
    with threads(1):
        one = f(*inputs)
    for count in (2, 3):
        with threads(count):
            assert_same(f(*inputs), one, f"{count} threads")


def gradients(f: Function, inputs: tuple[Tensor, ...], seed: int = 99) -> tuple[Tensor, ...]:
    """Gradients of a random projection of f's outputs, with respect to every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = [y for y in _tuple(f(*leaves)) if y.requires_grad]  # ids have none
    return torch.autograd.grad(outputs, leaves, [randn(*y.shape, seed=seed + i).to(y) for i, y in enumerate(outputs)])


def assert_registered(operator: torch._ops.OpOverload, *inputs: object) -> None:
    """Schema, shape function and autograd key agree with what the operator does, and the number of rows may be left open."""
    torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    if fixed := fixed_rows(operator, *inputs):
        raise AssertionError(
            f"{operator}: a compiler that leaves the number of rows open, as vLLM's does, finds it fixed: {fixed}"
        )


def fixed_rows(f: Callable[..., object], *inputs: object) -> dict:
    """Return which open sizes the shapes of f's outputs fix, where every size like that of the first input's rows is open."""
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment) as mode:
        rows = next(x.shape[0] for x in inputs if isinstance(x, Tensor))

        def fake(x: object) -> object:
            if not isinstance(x, Tensor):
                return x
            sizes = [DimDynamic.DYNAMIC if size == rows else DimDynamic.STATIC for size in x.shape]
            return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes))

        f(*map(fake, inputs))
    return environment.replacements


def assert_opaque(f: Function, *inputs: object, backend: str = "eager") -> None:
    """f compiles to one graph, which keeps its bits."""
    expected = f(*inputs)
    assert_same(torch.compile(f, fullgraph=True, backend=backend)(*inputs), expected, f"compiled by {backend}")


def assert_control(check: Callable[..., None], planted: Function, stock: list[tuple[Function, tuple[Tensor, ...]]]) -> None:
    """`check` finds a planted fault, and a stock function on one of several inputs; a blind stock control is xfailed."""
    inputs = stock[0][1]
    with pytest.raises(AssertionError):
        check(planted, *inputs)
    for f, xs in stock:
        try:
            check(f, *xs)
        except AssertionError:
            return
    pytest.xfail("blind: on this machine the stock function passes; the planted fault was found")


def differs(a: Tensor, b: Tensor) -> bool:
    return compare(a, b) is not None


def _tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _hay(x: Tensor, size: int, neighbour: float | None) -> Tensor:
    shape = (size, *x.shape[1:])
    if not x.is_floating_point():
        return x[:1].expand(shape).clone()
    return randn(*shape, dtype=x.dtype, seed=7) if neighbour is None else x.new_full(shape, neighbour)

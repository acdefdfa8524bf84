"""The meaning of "equal": two tensors are equal when every word of one is the same bits as in the other.

`torch.equal` says 0 == -0, bf16 == fp32 and NaN != NaN; a claim about bits needs none of the three.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

_FLOAT_WORDS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_INT64_MAX = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Difference:
    """Describes how two tensors of one shape and dtype differ; the first difference is the first in row-major order."""

    dtype: torch.dtype
    count: int
    total: int
    coordinate: tuple[int, ...]
    a: float | int
    b: float | int
    a_hex: str
    b_hex: str
    max_ulps: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.count:,} of {self.total:,} {dtype} values differ, by up to {self.max_ulps:,} ulp; "
            f"first at {self.coordinate}: {self.a!r} ({self.a_hex}) != {self.b!r} ({self.b_hex})"
        )


def compare(a: Tensor, b: Tensor) -> Difference | None:
    """Compare two tensors word by word; None if all bits are the same.

    Args:
        a, b: same shape and dtype, any strides; bf16, fp16, fp32, fp64, bool or integer. Of two devices: on the CPU.

    Raises:
        TypeError: the dtypes differ, or are not one of those above.
        ValueError: the shapes differ.

    Bits: 0 and -0 differ; two NaNs are equal only as the same word.
    """
    a, b = _checked(a, b)
    words_a, words_b = words(a), words(b)
    differs = words_a != words_b
    count = int(differs.sum())
    if count == 0:
        return None
    flat = int(differs.flatten().to(torch.uint8).argmax())  # argmax returns the first of equal maxima
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), a.shape)) if a.dim() else ()
    return Difference(
        dtype=a.dtype,
        count=count,
        total=a.numel(),
        coordinate=at,
        a=a[at].item(),
        b=b[at].item(),
        a_hex=word(a[at]),
        b_hex=word(b[at]),
        max_ulps=int(ulps(a[differs], b[differs]).max()),
    )


def same(a: Tensor, b: Tensor) -> Tensor:
    """Return whether two tensors of one shape and dtype have the same bits, as a bool tensor []: no device is waited for.

    Raises:
        TypeError, ValueError: as `compare`.

    Bits: as `compare`: same(a, b) is true exactly where compare(a, b) is None.
    """
    a, b = _checked(a, b)
    return (words(a) == words(b)).all()


def cancelling(
    rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return x [rows, k] and w [n, k] whose products x @ w.T are exactly zero in real arithmetic.

    A computed product is then nothing but rounding error, and another order of summation shows in nearly every element; with
    ordinary operands a bf16 result hides it.

    Args:
        rows, n, k: sizes; of an odd k the last column takes part in no cancellation.
        dtype: of both; values have normal mantissas, x with exponents spread over 2**-4 to 2**3.
        device: where they are made, by a generator of their own.
        seed: another one gives other operands. Calls with the same sizes, device and seed return the same bits.
    """
    rng = torch.Generator(device).manual_seed(seed * 2_000_003 + n * 1_000_003 + k)
    drawn = dtype if rng.device.type == "cuda" else torch.float32  # a CPU would draw bf16 from few values; a GPU rounds fp32
    x = torch.randn(rows, k, generator=rng, device=device, dtype=drawn)
    x *= torch.exp2(torch.randint(-4, 4, (rows, k), generator=rng, device=device, dtype=torch.int8)).to(drawn)
    w = torch.randn(n, k, generator=rng, device=device, dtype=drawn)
    order = torch.randperm(k, generator=rng, device=device)
    one, other = order[: k // 2], order[k // 2 : k // 2 * 2]
    x[:, one], w[:, one] = -x[:, other], w[:, other]
    return x.to(dtype), w.to(dtype)


def assert_bits_equal(a: Tensor, b: Tensor, what: str) -> None:
    """Raise AssertionError with the whole difference, headed by `what`, unless all bits are the same."""
    difference = compare(a, b)
    if difference is not None:
        raise AssertionError(f"{what}: {difference}")


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256, as hex, of named tensors: of their names, dtypes, shapes and bytes, in order of names."""

    def one(item: tuple[str, Tensor]) -> bytes:
        name, x = item
        raw = x.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data
        return hashlib.sha256(f"{name} {x.dtype} {list(x.shape)}\0".encode() + hashlib.sha256(raw).digest()).digest()

    with ThreadPoolExecutor(8) as threads:  # hashing leaves Python's lock: eight times as fast on a host of many cores
        return hashlib.sha256(b"".join(threads.map(one, sorted(tensors, key=lambda item: item[0])))).hexdigest()


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Count the representable values from a to b, element by element.

        ulps = |order(a) - order(b)|,  order(x) = word(x) if its sign bit is clear, else -1 - (word(x) without the sign)

    Returns:
        int64 of the shape of a. 0 exactly where the words are the same: -0 and 0 are 1 apart, and a NaN counts by its
        word, beyond infinity. A distance over 2**63 - 1 (fp64 and int64 only) is given as 2**63 - 1.

    Raises:
        TypeError, ValueError: as `compare`.
    """
    a, b = _checked(a, b)
    order_a, order_b = _order(a), _order(b)
    distance = torch.maximum(order_a, order_b) - torch.minimum(order_a, order_b)
    return torch.where(distance < 0, _INT64_MAX, distance)


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dtype != b.dtype:
        raise TypeError(f"cannot compare bits of {a.dtype} with bits of {b.dtype}")
    if a.dtype not in _FLOAT_WORDS and a.dtype not in _INTEGERS:
        raise TypeError(f"cannot compare bits of {a.dtype}: expected a real floating point or integer dtype")
    if a.shape != b.shape:
        raise ValueError(f"cannot compare shape {tuple(a.shape)} with shape {tuple(b.shape)}")
    a, b = a.detach(), b.detach()
    return (a, b) if a.device == b.device else (a.cpu(), b.cpu())


def words(x: Tensor) -> Tensor:
    """Return the bits of each value as an integer of the same size."""
    return x.view(_FLOAT_WORDS[x.dtype]) if x.dtype in _FLOAT_WORDS else x


def _order(x: Tensor) -> Tensor:
    if x.dtype not in _FLOAT_WORDS:
        return x.to(torch.int64)
    bits = words(x)
    magnitude = bits & torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, ~magnitude, magnitude).to(torch.int64)


def word(x: Tensor) -> str:
    """Return the bits of one value, as hex."""
    digits = 2 * x.element_size()
    return f"0x{int(words(x)) & (16**digits - 1):0{digits}X}"

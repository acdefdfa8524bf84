"""A bound of a result's distance from the exact one, derived from the arithmetic: the yardstick of every test of accuracy.

PyTorch's own error is no yardstick: its kernels sum in another order on each make of CPU and GPU, so that a bound of twice its
error fails where it happens to do well, and hides a fault where it does badly.

The derivation is a running error analysis (Wilkinson 1963; Higham 2002, "Accuracy and Stability of Numerical Algorithms",
sections 2.2, 3.1, 3.3), element by element. A `Bounded` holds what a number would be without rounding, in fp64, and a bound of
the error of the number that a correct kernel has in its place. With u the unit roundoff (2^-24 in fp32, 2^-8 in bf16), x' the
computed number, |x' - x| <= e, and F the least that a kernel may round to 0:

    + - *            exact operands: u |result|; errors e of the operands are carried through the operation exactly
    sum, product     n terms t:      g sum |t| + sum e,  g = (1 + u)^depth - 1, where depth is how many additions the term that
    of matrices                      waits longest goes through: n in any order, less where ops/ promises an order.
                                     sum |t| is the condition: a sum that cancels may lose digits, and no more than it must.
    a / b, 1/sqrt    4 u             a GPU's are within 2 ulp
    exp x            (4 + 2 |x|) u   2 ulp, and a GPU multiplies x by log2(e) first; + F
    tanh x, log x    8 u, 4 u
    rounding to bf16 2^-8 |x|

where every u on the right is relative to the result. tests/bounds.py has each op's formula in these steps, with the roundings
that its docstring in rlinvariant/ops names; a GPU's matrix unit cuts digits instead of rounding (2 u) and multiplies bf16.
Nothing is fitted to a measurement. Beside each op's test of accuracy stand planted faults that its bound must find.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

U = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
FP32 = U[torch.float32]
LEAST = 2.0**-124  # exponentials below are 0


class Bounded:
    """Exact values, fp64, and a bound for each of the error of what a kernel has in its place."""

    def __init__(self, value: Tensor, error: Tensor | float = 0.0) -> None:
        self.value = value.double()
        self.error = torch.zeros_like(self.value) + error

    @property
    def most(self) -> Tensor:
        return self.value.abs() + self.error

    def rounded(self, unit: float, least: float = 0.0) -> "Bounded":
        return Bounded(self.value, self.error + unit * self.most + least)

    def to(self, dtype: torch.dtype) -> "Bounded":
        """A result is in fp32 already; to bf16 it is rounded."""
        return self if dtype is torch.float32 else self.rounded(U[dtype])

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Bounded":
        """Rearranged or masked: nothing is computed."""
        return Bounded(move(self.value), move(self.error))

    def __neg__(self) -> "Bounded":
        return Bounded(-self.value, self.error)

    def __add__(self, other: "Bounded") -> "Bounded":
        return Bounded(self.value + other.value, self.error + other.error).rounded(FP32)

    def __sub__(self, other: "Bounded") -> "Bounded":
        return self + -other

    def __mul__(self, other: "Bounded") -> "Bounded":
        error = self.value.abs() * other.error + self.error * other.most
        return Bounded(self.value * other.value, error).rounded(FP32)

    def __truediv__(self, other: "Bounded") -> "Bounded":
        value = self.value / other.value
        error = (self.error + value.abs() * other.error) / (other.value.abs() - other.error)
        return Bounded(value, error).rounded(4 * FP32)

    def sum(self, dim: int, depth: float, unit: float = FP32) -> "Bounded":
        error = self.error.sum(dim, keepdim=True) + grown(depth, unit) * self.most.sum(dim, keepdim=True)
        return Bounded(self.value.sum(dim, keepdim=True), error)

    def rsqrt(self) -> "Bounded":
        value = self.value.rsqrt()
        return Bounded(value, value * ((1 - self.error / self.value).rsqrt() - 1)).rounded(4 * FP32)

    def exp(self) -> "Bounded":
        value = self.value.exp()
        own = (4 + 2 * self.value.abs()) * FP32
        return Bounded(value, value * (self.error.expm1() * (1 + own) + own) + LEAST)

    def log(self) -> "Bounded":
        return Bounded(self.value.log(), -(-self.error / self.value).log1p()).rounded(4 * FP32)

    def sigmoid(self) -> "Bounded":
        """1 / (1 + exp(-x)): an error d of x moves it by at most s (1 - s) (e^d - 1); one of exp(-x) counts for its 1 - s."""
        s = self.value.sigmoid()
        own = (4 + 2 * self.value.abs()) * FP32
        return Bounded(s, s * (-self.value).sigmoid() * (self.error.expm1() + own)).rounded(5 * FP32, LEAST)

    def tanh(self) -> "Bounded":
        t = self.value.tanh()
        return Bounded(t, (1 - t * t) * self.error * (2 * self.error).exp()).rounded(8 * FP32)


def grown(depth: float, unit: float) -> float:
    """(1 + unit)^depth - 1"""
    return (1 + unit) ** depth - 1


def number(x: float) -> Bounded:
    """A Python number, rounded to fp32 on its way into a kernel."""
    return exact(x).rounded(FP32)


def exact(x: Tensor | float) -> Bounded:
    return Bounded(torch.as_tensor(x, dtype=torch.float64))


@dataclass(frozen=True)
class Arithmetic:
    """Says what computes: the dtype of inputs and outputs, and the type of the device."""

    dtype: torch.dtype
    device: str

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def multiplied(self, x: Bounded) -> Bounded:
        """Intermediate results on their way into a matrix unit: a GPU's takes bf16."""
        return x.to(torch.bfloat16) if self.gpu else x

    def matmul(self, x: Bounded, y: Bounded, depth: float, stored: torch.dtype = torch.float32) -> Bounded:
        """x @ y; on a GPU `stored` says in what a vendor's product keeps the parts of a sum that it splits."""
        growth = grown(depth, 2 * FP32 if self.gpu else FP32)
        if self.gpu and stored is torch.bfloat16:
            growth += U[stored]
        error = x.value.abs() @ y.error + x.error @ y.most + growth * (x.most @ y.most)
        return Bounded(x.value @ y.value, error)


def assert_accurate(ours, ref, bound, *inputs: Tensor, grad: bool = False) -> None:
    """Every element of `ours` lies within its bound of `ref` in fp64 on the same inputs.

    Args:
        ours, ref: functions of the inputs; `ref` also takes fp64, and has gradients by autograd.
        bound: bound(arithmetic, *inputs) for outputs, bound(arithmetic, *inputs, *gradients of outputs) for gradients.
        inputs: floating point; the first has the dtype of the outputs.
        grad: compare the gradients of a random projection of the outputs instead of the outputs.
    """
    wide, found = [x.double() for x in inputs], _outputs(ours, inputs)
    arithmetic = Arithmetic(inputs[0].dtype, inputs[0].device.type)
    projection = [_noise(y, i) for i, y in enumerate(found)] if grad else []
    run = (lambda f, xs: _gradients(f, xs, projection)) if grad else _outputs
    limits = bound(arithmetic, *map(Bounded, wide), *map(Bounded, projection))
    results = zip(run(ours, inputs) if grad else found, run(ref, wide), run(ref, inputs), limits, strict=True)
    for i, (a, t, stock, limit) in enumerate(results):
        a, t, stock = a.double(), t.double(), stock.double()
        assert (limit.value - t).norm() <= 1e-9 * t.norm() + 1e-30, f"output {i}: the bound is that of another function"
        error, allowed = (a - t).abs(), limit.error + LEAST
        assert allowed.isfinite().all(), f"output {i}: a bound that is not finite bounds nothing"
        if not (error <= allowed).all():  # also where it is NaN
            worst = int((error / allowed).nan_to_num(torch.inf).argmax())
            raise AssertionError(
                f"output {i}: {int((~(error <= allowed)).sum())} of {a.numel()} elements beyond their bounds, worst: "
                f"{a.flatten()[worst]:.9g}, exactly {t.flatten()[worst]:.9g}, error {error.flatten()[worst]:.2e} > "
                f"{allowed.flatten()[worst]:.2e}; PyTorch errs by {(stock - t).abs().flatten()[worst]:.2e} there"
            )


def assert_found(check: Callable[[Callable], None], ours: Callable, fault: Callable) -> None:
    """Control of a bound: the check passes the op and does not pass the planted fault."""
    check(ours)
    with pytest.raises(AssertionError, match="beyond their bounds"):
        check(fault)


def coarse_sum(terms: Tensor, dim: int, part_size: int = 16) -> Tensor:
    """Planted fault: `part_size` terms at a time are added in fp32, and their sums in bf16. Returns fp32."""
    total = torch.zeros(())
    for part in terms.float().split(part_size, dim):
        total = (total + part.sum(dim)).bfloat16().float()
    return total


def slope_scaled(f: Callable, by: float) -> Callable:
    """Planted fault: f, with gradients that are `by` times what they should be."""

    def planted(*inputs: Tensor):
        outputs = tuple(by * y + ((1 - by) * y).detach() for y in _outputs(f, inputs))
        return outputs if len(outputs) > 1 else outputs[0]

    return planted


def _outputs(f, inputs) -> tuple[Tensor, ...]:
    y = f(*inputs)
    return y if isinstance(y, tuple) else (y,)


def _noise(y: Tensor, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(99 + seed)
    return torch.randn(y.shape, generator=rng, device="cpu").to(y.device, y.dtype)


def _gradients(f, inputs, projection) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = _outputs(f, leaves)
    return torch.autograd.grad(outputs, leaves, [g.to(y) for g, y in zip(projection, outputs, strict=True)])

"""Matrix product with a low-rank adapter inside it: one sum, one rounding.

Adding `s (x A^T) B^T` to a product that is rounded to bf16 already, as PEFT does under bf16, or merging `s B A` into a bf16
weight, loses whatever lies below half an ulp: of an adapter whose product is a thousandth of the weight, half. Here the adapter
is R more columns of the sum, and nothing is lost. It is also why no kernel is new: `linear` sums over K + R columns.

R: rows of A, as many as the adapter's rank, K: columns of the weight, N: its rows, T: rows of x. Of projections that are one
product, R and N are those of all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlinvariant.ops.linear import linear, linear_ref, product

MATRIX_STEP = 16  # products that a matrix unit adds in a step
RANK_STEP = {"cpu": MATRIX_STEP, "cuda": 64}  # R is padded with zeros to a multiple


def lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a frozen weight and by an adapter.

        h = linear(x, a);  y = linear([x | h], [weight | b], bias)

    Args:
        x: [*rows, K], bf16 or fp32.
        weight: [N, K], any float dtype; cast to x.dtype at use. It gets no gradient.
        a: [R, K], any float dtype; cast to x.dtype at use.
        b: [N, R], likewise; what PEFT multiplies the result by (alpha / r) is to be in it.
        bias: [N] or None; cast to x.dtype. It gets no gradient.

    Returns:
        [*rows, N] in x.dtype.

    Raises:
        ValueError: shapes or dtypes are not as above.

    Order: as in `linear`: the columns of the weight, ascending, then those of b, which are padded with zeros to a multiple of
        RANK_STEP; then the bias, and one rounding. h is rounded to x.dtype, as any activation.
    Bits: y[m] depends on x[m] and the weights alone. Gradients come from stock GEMMs: deterministic, not invariant.
    Ref: Hu et al. 2021, arXiv:2106.09685.
    """
    if a.dim() != 2 or a.shape[1] != x.shape[-1] or b.shape != (len(weight), len(a)):
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)}"
        raise ValueError(f"lora_linear: expected x [*, K], weight [N, K], a [R, K] and b [N, R], got {shapes}")
    return _LoraLinear.apply(x, bias, 1, weight, a, b)


def joined_lora_linear(
    x: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor | None], b: Sequence[Tensor | None], bias: Tensor | None = None
) -> Tensor:
    """Compute `lora_linear` of several projections as one product, on CUDA, where no column depends on those beside it.

    Of a K for which `is_joinable`.

    Args:
        x: [*rows, K], bf16.
        weights: [N, K] of each projection, any float dtype.
        a, b: [R, K] and [N, R] of each, any float dtype; None for both: it has no adapter.
        bias: [sum of N] or None.

    Returns:
        [*rows, sum of N] in x.dtype: the projections side by side.

    Order: as in `lora_linear`. An adapter has columns of its own (`columns`), in which the other projections' rows have zeros,
        which change no sum of finite numbers.
    Bits, Ref: those of `lora_linear`. dx is one sum over the columns of all projections.
    """
    return _LoraLinear.apply(x, bias, len(weights), *weights, *a, *b)


def lora_linear_ref(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `lora_linear` in plain PyTorch, for x of any float dtype; differentiable by autograd."""
    return linear_ref(torch.cat([x, linear_ref(x, a)], -1), torch.cat([weight, b.to(weight.dtype)], -1), bias)


def is_joinable(k: int) -> bool:
    """Return whether projections by weights of k columns, with adapters, may be one product on CUDA.

    Where k ends inside a step of the matrix unit, an adapter's first products share that step with the weight's last ones, or
    with another adapter's zeros.
    """
    return k % MATRIX_STEP == 0


def columns(ranks: Sequence[int], device: str) -> tuple[list[int], int]:
    """Return where each adapter's columns begin beside the weights', and how many columns there are, which are zero elsewhere.

    Each begins where a step of the matrix unit does, so that its products are added in the steps that they have alone.

    Args:
        ranks: R of each adapter, in order; 0: there is none.
        device: "cpu" or "cuda".
    """
    ends = list(accumulate(-(-rank // MATRIX_STEP) * MATRIX_STEP for rank in ranks))
    begins, step = [0, *ends[:-1]], RANK_STEP[device]
    return begins, -(-(begins[-1] + ranks[-1]) // step) * step


@contextmanager
def unpadded() -> Iterator[None]:
    """Leave out the padding for a while, for a control."""
    steps = dict(RANK_STEP)
    RANK_STEP.update(dict.fromkeys(steps, 1))
    try:
        yield
    finally:
        RANK_STEP.update(steps)


def widened_by(x: Tensor, a: Tensor) -> Tensor:
    """Return [x | x A^T], [*rows, K + R], for the rows of all adapters, zeros between them, as `columns` says."""
    return torch.cat([x, linear(x, a)], -1)


def wide_linear(x: Tensor, weight: Tensor, a: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """Compute `lora_linear` by a weight that has b beside it in memory, as a sampler keeps it; it has no gradients.

    Args:
        x: [*rows, K], bf16 or fp32.
        weight: [N, K + R] in x.dtype: the weight, and b, with zeros where `columns` has none.
        a: [R, K] in x.dtype, likewise.
        bias: [N] or None.
        packed: what `linear.pack_weight` made of `weight`, or None.

    Order, Bits, Ref: those of `lora_linear`.
    """
    return linear(widened_by(x, a), weight, bias, packed)


def side_by_side(
    weights: Sequence[Tensor], a: Sequence[Tensor | None], b: Sequence[Tensor | None], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `joined_lora_linear` multiplies by, in the dtype of `like`: the weight and the a of `wide_linear`."""
    a_RK, begins = _below(a, like)
    return _beside(weights, b, begins, len(a_RK), like), a_RK


class _LoraLinear(torch.autograd.Function):
    """Computes some projections as one product. Operands are the weights, then A of each, then B of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, count: int, *operands: Tensor | None) -> Tensor:
        weights: Any = operands[:count]
        a, b = operands[count : 2 * count], operands[2 * count :]
        a_RK, ctx.begins = _below(a, x)
        wide = widened_by(x, a_RK)
        ctx.save_for_backward(x, wide[..., x.shape[-1] :].contiguous(), a_RK, *operands)
        return linear(wide, _beside(weights, b, ctx.begins, len(a_RK), x), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, h, a_RK, *operands = ctx.saved_tensors
        count, (r, k) = len(ctx.begins), a_RK.shape
        weights, a, b = (operands[i * count : (i + 1) * count] for i in range(3))
        in_x, _, _, *needed = ctx.needs_input_grad
        in_a, in_b = needed[count : 2 * count], needed[2 * count :]
        dy_TN, x_TK, h_TR = (t.reshape(-1, t.shape[-1]) for t in (dy, x, h))
        dwide_TKR = dy_TN @ _beside(weights, b, ctx.begins, r, dy)  # of x and of h in one product
        dh_TR = dwide_TKR[:, k:].contiguous()
        dx = torch.addmm(dwide_TKR[:, :k], dh_TR, a_RK).view(x.shape) if in_x else None
        da = product(dh_TR.t(), x_TK, _dtype(a)) if any(in_a) else None
        db = product(dy_TN.t(), h_TR, _dtype(b)) if any(in_b) else None
        of_a, of_b, row = list[Tensor | None](), list[Tensor | None](), 0
        for i, (at, weight, rows) in enumerate(zip(ctx.begins, weights, a, strict=True)):
            rank, n = 0 if rows is None else len(rows), len(weight)
            of_a.append(da[at : at + rank] if da is not None and in_a[i] else None)
            of_b.append(db[row : row + n, at : at + rank] if db is not None and in_b[i] else None)
            row += n
        return dx, None, None, *[None] * count, *of_a, *of_b


def _below(a: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, list[int]]:
    """Return [R, K] in the dtype of `like`: every A in rows of its own, zeros elsewhere; and where each begins."""
    ranks = [0 if rows is None else len(rows) for rows in a]
    begins, r = columns(ranks, like.device.type)
    a_RK = like.new_zeros(r, like.shape[-1])
    _copy([(a_RK[at : at + rank], rows) for at, rank, rows in zip(begins, ranks, a, strict=True)])
    return a_RK, begins


def _beside(weights: Sequence[Tensor], b: Sequence[Tensor | None], begins: Sequence[int], r: int, like: Tensor) -> Tensor:
    """Return [N, K + R] in the dtype of `like`: the weights one below the other, each B in its own rows and columns, zeros."""
    k, sizes = weights[0].shape[1], [len(weight) for weight in weights]
    wide = like.new_empty(sum(sizes), k + r)
    wide[:, k:].zero_()
    parts = wide.split(sizes)
    of_b = [(part[:, k + at :][:, : 0 if y is None else y.shape[1]], y) for part, at, y in zip(parts, begins, b, strict=True)]
    _copy([(part[:, :k], weight) for part, weight in zip(parts, weights, strict=True)] + of_b)
    return wide


def _copy(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Copy each second tensor, unless it is None, into the first, and cast it."""
    taken = [(to, source) for to, source in pairs if source is not None]
    torch._foreach_copy_([to for to, _ in taken], [source for _, source in taken])  # pyright: ignore[reportPrivateImportUsage]


def _dtype(of: Sequence[Tensor | None]) -> torch.dtype:
    return next(t.dtype for t in of if t is not None)

"""Matrix product in which an output element depends on its own row of x and its own row of the weight, and on nothing else.

R: rows of x, K: columns of x and of the weight, over which is summed, N: rows of the weight.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant import bits
from rlinvariant.errors import UserError
from rlinvariant.kernels import cpu
from rlinvariant.kernels.routes import ROUTES as _routes
from rlinvariant.ops.register import define

CALL_ROWS = 256  # at most so many rows go into one call of the vendor GEMM
ROW_STEP = 16  # rows are padded to a multiple of this: sixteen possible calls per weight shape, few enough to test them all


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """Multiply by a weight matrix.

        y[m, n] = round(sum_k x[m, k] * weight[n, k] + bias[n])

    Args:
        x: [*rows, K], bf16 or fp32.
        weight: [N, K], any float dtype; cast to x.dtype at use, so fp32 master weights get fp32 gradients.
        bias: [N] or None; cast to x.dtype.
        packed: what `pack_weight` returned for this weight and this number of threads, or None. The call then reads that copy;
            it has the same bits, and no gradient.

    Order: CPU: fp32 accumulation, either by the vendor GEMM (oneDNN, MKL) in calls of 16, 32, ..., 256 rows, where
        `is_exact` has proven all sixteen equal on this machine; or by `lanes` over K (kernels/cpu.h), which needs no proof.
        CUDA (bf16): 16 products at a time into one fp32 accumulator, K ascending; see kernels/linear.py.
    Bits: y[m] depends on x[m], weight and bias alone: batch, position and chunk invariant. dx and dweight come from the
        stock GEMM: deterministic, not invariant.
    Ref: He et al. 2025, "Defeating Nondeterminism in LLM Inference".
    """
    if packed is None:
        return _linear(x, weight, bias)
    _check(x, weight, bias)
    b_N = None if bias is None else bias.to(x.dtype).contiguous()
    y_RN = _in_calls(x.reshape(-1, x.shape[-1]).contiguous(), lambda x_RK: _by_packed(x_RK, packed, b_N))
    return y_RN.view(*x.shape[:-1], len(weight))


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `linear` in plain PyTorch: x of any float dtype, in the order of whatever kernel PyTorch takes."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@functools.cache
def is_exact(n: int, k: int, dtype: torch.dtype, bias: bool, threads: int) -> bool:
    """Return whether the vendor GEMM keeps a row's bits for a weight [n, k], in all sixteen calls that `linear` would make.

    Operands are those of `bits.cancelling`, which another order of summation cannot hide behind. Every row count is compared, a
    shifted order of rows, and rows beside zeros, huge values and NaN. This takes under a second, once a process.
    The answer holds for one number of threads: sampler and trainer must use the same.
    """
    x_RK, w_NK = bits.cancelling(CALL_ROWS, n, k, dtype)
    bias_N = torch.zeros(n, dtype=dtype) if bias else None
    return _keeps_rows(lambda x: F.linear(x, w_NK, bias_N), x_RK, F.linear(x_RK, w_NK, bias_N))


def _keeps_rows(product: Callable[[Tensor], Tensor], x_RK: Tensor, full_RN: Tensor) -> bool:
    """Return whether the product of any rows of x, in any call that `linear` makes, is those rows of `full_RN`."""
    for rows in range(ROW_STEP, CALL_ROWS + 1, ROW_STEP):
        if not bits.same(product(x_RK[:rows].clone()), full_RN[:rows]):
            return False
    if not bits.same(product(x_RK.roll(ROW_STEP // 2 + 1, 0)), full_RN.roll(ROW_STEP // 2 + 1, 0)):
        return False
    for rows in (ROW_STEP, CALL_ROWS):
        for at in (0, rows - 1):
            for neighbour in (0.0, 1e30, float("nan")):
                tile_RK = torch.full_like(x_RK[:rows], neighbour)
                tile_RK[at] = x_RK[at]
                if not bits.same(product(tile_RK)[at], full_RN[at]):
                    return False
    return True


def linear_columns(x: Tensor, weight: Tensor, bias: Tensor | None, whole: int) -> Tensor:
    """Return, on a CPU, those columns of `linear` that belong to some rows of a weight, of which this process has no others.

    There is no gradient. On CUDA it is `linear`: there no column depends on how many there are.

    Args:
        x: [*rows, K], bf16 or fp32.
        weight: [N, K] in x.dtype, one of the equal parts that a weight of `whole` rows was cut into; zeros fill the last.
        bias: [N] of the same part, or None.
        whole: rows of the whole weight.

    Raises:
        UserError: the vendor's GEMM of this CPU adds such a part's products in another order than the whole weight's.

    Bits: those of `linear` by the whole weight.
    """
    _check(x, weight, bias)
    k, b_N = weight.shape[1], None if bias is None else bias.contiguous()
    vendor = is_exact(whole, k, x.dtype, b_N is not None, torch.get_num_threads())
    if vendor and not is_cuttable(len(weight), whole, k, x.dtype, b_N is not None, torch.get_num_threads()):
        raise UserError(
            f"sampler.tensor_parallel_size: this CPU's product by {len(weight)} of {whole} rows of a weight, {k} columns, has "
            "other bits than the product by all of them; expected 1: remove it"
        )
    y_RN = (_vendor if vendor else _written)(x.reshape(-1, k).contiguous(), _aligned(weight), b_N)
    return y_RN.view(*x.shape[:-1], len(weight))


@functools.cache
def is_cuttable(n: int, whole: int, k: int, dtype: torch.dtype, bias: bool, threads: int) -> bool:
    """Return whether the vendor GEMM gives each part [n, k] of a weight [whole, k] the bits of the whole, in all its calls."""
    x_RK, w_NK = bits.cancelling(CALL_ROWS, whole, k, dtype)
    bias_N = torch.zeros(whole, dtype=dtype) if bias else None
    parts, biases = _cut(w_NK, n), [None] * (-(-whole // n)) if bias_N is None else _cut(bias_N, n)

    def product(x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, w, b) for w, b in zip(parts, biases, strict=True)], -1)[:, :whole]

    return _keeps_rows(product, x_RK, F.linear(x_RK, w_NK, bias_N))


def _cut(rows: Tensor, n: int) -> list[Tensor]:
    """Cut rows [whole, ...] into parts of n; zeros fill the last."""
    return [_aligned(part) for part in F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, -len(rows) % n)).split(n)]


@functools.cache
def is_packable(
    parts: tuple[int, ...], k: int, dtype: torch.dtype, bias: bool, threads: int, wholes: tuple[int, ...] = ()
) -> bool:
    """Return whether one call by a packed weight has the bits of a `linear` by each of its parts, [n, k] for n in `parts`.

    The vendor's GEMM reads a weight in a layout of its own, which it otherwise makes at every call. That layout, and the number
    of columns in a call, decide which of its kernels runs: so all that `is_exact` asks of a part is asked of the packed whole
    again, against the products of the parts. The answer holds for one number of threads.

    Where the parts are themselves cut out of weights with `wholes` rows, each place in them is tried, against their products.
    """
    wholes = wholes or parts
    if not torch.backends.mkldnn.is_available() or not all(is_exact(n, k, dtype, bias, threads) for n in set(wholes)):
        return False
    x_RK, w_NK = bits.cancelling(CALL_ROWS, sum(wholes), k, dtype)
    bias_N = w_NK[:, 0].contiguous() if bias else None
    biases = [None] * len(wholes) if bias_N is None else bias_N.split(wholes)
    full = [F.linear(x_RK, _aligned(w), b) for w, b in zip(w_NK.split(wholes), biases, strict=True)]
    cut_w = [_cut(w, n) for w, n in zip(w_NK.split(wholes), parts, strict=True)]
    cut_b = [None if b is None else _cut(b, n) for b, n in zip(biases, parts, strict=True)]
    cut_y = [y.split(n, -1) for y, n in zip(full, parts, strict=True)]
    for place in range(max(map(len, cut_w))):
        at = [min(place, len(w) - 1) for w in cut_w]  # heads of keys may be fewer than the processes
        rows = torch.cat([w[i] for w, i in zip(cut_w, at, strict=True)])
        own_b = None if bias_N is None else torch.cat([b[i] for b, i in zip(cut_b, at, strict=True) if b is not None])
        packed, own_y = torch.ops.mkldnn._reorder_linear_weight(rows), [y[i] for y, i in zip(cut_y, at, strict=True)]
        kept = own_y[0].shape[1] if len(parts) == 1 else len(rows)  # of a last part, which zeros fill
        if not _keeps_rows(
            lambda x, packed=packed, b=own_b, n=kept: _by_packed(x, packed, b)[:, :n].contiguous(), x_RK, torch.cat(own_y, -1)
        ):
            return False
    return True


def pack_weight(weight: Tensor, parts: Sequence[int], bias: bool, wholes: Sequence[int] = ()) -> Tensor | None:
    """Return a copy of a weight for `linear(packed=)`; None on a GPU, and where `is_packable` is not true.

    Args:
        weight: [N, K], bf16 or fp32. The copy does not follow it when it changes.
        parts: rows of each weight that was merged into this one, in order; together N.
        bias: whether the products have a bias.
        wholes: rows of the weights that the parts were cut out of; none: the parts are whole.

    Returns:
        An opaque tensor of as many bytes as the weight, whose `to_dense()` is the weight, bit for bit.
    """
    n, k = weight.shape
    if weight.is_cuda or not is_packable(
        tuple(parts), k, weight.dtype, bias, torch.get_num_threads(), () if tuple(wholes) == tuple(parts) else tuple(wholes)
    ):
        return None
    _routes[f"{n}x{k} {str(weight.dtype)[6:]}"] = "vendor GEMM, packed, checked equal to its parts here,"
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def forget_routes() -> None:
    """Start the record anew: what was computed to check a model is not part of the run."""
    _routes.clear()


def routes() -> dict[str, str]:
    """Return the route taken by each weight shape used so far, for the run's environment.json."""
    return dict(_routes)


def _aligned(t: Tensor) -> Tensor:
    """Return `t`, or a copy, contiguous and on a cache line: a GEMM may choose its kernel by alignment."""
    return t if t.is_contiguous() and t.data_ptr() % 64 == 0 else t.clone(memory_format=torch.contiguous_format)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    n, k = weight.shape
    dtypes = (torch.bfloat16,) if x.is_cuda else cpu.DTYPES
    if x.dtype not in dtypes or x.shape[-1] != k or (bias is not None and bias.shape != (n,)):
        shapes = (
            f"x {x.dtype} {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {bias if bias is None else tuple(bias.shape)}"
        )
        kinds = " or ".join(str(d)[6:] for d in dtypes)
        raise ValueError(f"linear: expected x [*, K] in {kinds}, weight [N, K] and bias [N], got {shapes}")


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, k = weight.shape
    w_NK, b_N = _aligned(weight.to(x.dtype)), None if bias is None else bias.to(x.dtype).contiguous()
    x_RK = x.reshape(-1, k).contiguous()
    vendor = is_exact(n, k, x.dtype, b_N is not None, torch.get_num_threads())
    _routes[f"{n}x{k} {str(x.dtype)[6:]}"] = "vendor GEMM, checked row invariant here," if vendor else "kernels/linear.c"
    y_RN = (_vendor if vendor else _written)(x_RK, w_NK, b_N)
    return y_RN.view(*x.shape[:-1], n)


def _vendor(x_RK: Tensor, w_NK: Tensor, b_N: Tensor | None) -> Tensor:
    return _in_calls(x_RK, lambda x: F.linear(x, w_NK, b_N))


def _by_packed(x_RK: Tensor, packed: Tensor, bias_N: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_RK, packed, bias_N, "none", [], "")


def _in_calls(x_RK: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply in calls of 16, 32, ..., 256 rows, the only ones that were checked."""
    parts = []
    for part_RK in x_RK.split(CALL_ROWS):
        missing = -len(part_RK) % ROW_STEP
        y_RN = product(F.pad(part_RK, (0, 0, 0, missing)) if missing else _aligned(part_RK))
        parts.append(y_RN[: len(part_RK)].clone() if missing else y_RN)  # an operator's output owns its memory
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _written(x_RK: Tensor, w_NK: Tensor, b_N: Tensor | None) -> Tensor:
    y_RN = x_RK.new_empty(len(x_RK), len(w_NK))
    cpu.call("linear", x_RK, w_NK, b_N, y_RN, *y_RN.shape, x_RK.shape[1], cpu.is_bf16(x_RK))
    return y_RN


def _save(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias = None if bias is None else bias.dtype


def _backward(ctx, dy: Tensor):
    x, weight = ctx.saved_tensors
    return gradients(dy, x, weight, ctx.needs_input_grad, weight.dtype, ctx.bias)


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool], dtype: torch.dtype, bias: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, dweight, dbias) of `linear` by stock GEMMs, each None unless `needed`; dweight in `dtype`, dbias in `bias`.

    dy is [*rows, N], x [*rows, K], weight [N, K]; each gradient has the shape of what it belongs to.
    On a GPU the sum over rows is stored in fp32 as it is, not rounded to dy.dtype on the way.
    """
    dy_RN, x_RK = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = (dy_RN @ weight.to(dy.dtype)).view(x.shape) if needed[0] else None
    dw_NK = product(dy_RN.t(), x_RK, dtype) if needed[1] else None
    db_N = dy_RN.float().sum(0).to(bias) if bias is not None and needed[2] else None
    return dx, dw_NK, db_N


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a [M, K] by b [K, N], by a stock GEMM; in dtype from the accumulator on where the GEMM can."""
    wide: dict[str, Any] = {"out_dtype": dtype} if _stores_wide(a, dtype) else {}
    return torch.mm(a, b, **wide).to(dtype)


def _stores_wide(a: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the GEMM can store the fp32 sums of narrower operands: cuBLAS can."""
    return a.is_cuda and dtype == torch.float32 != a.dtype


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a [M, K] b [K, N] to total [M, N], by a stock GEMM; in total's dtype from the accumulator on where the GEMM can."""
    if _stores_wide(a, total.dtype):
        mm: Any = torch.addmm
        mm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cpu=_cpu,
    cuda="linear.linear",
    fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    check=_check,
    save=_save,
    backward=_backward,
)

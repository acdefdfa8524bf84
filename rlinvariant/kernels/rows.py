"""How a kernel finds the rows of a tensor that may be a slice of a wider one, so that merged projections are read in place."""

from torch import Tensor


def flat(x: Tensor) -> Tensor:
    """x as [rows, D] with contiguous D; a copy only if no view has that form."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def rows(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """x as [outer, inner, D] with contiguous D: (tensor, outer, inner, stride of outer, stride of inner), in elements.

    Two strides reach the heads of a slice [T, H, D] of a merged projection; anything more scattered is copied.
    """
    d = x.shape[-1]
    if not x.is_contiguous() and x.stride(-1) == 1 and x.dim() > 2:
        try:
            x = x.view(-1, *x.shape[-2:])
            return x, x.shape[0], x.shape[1], x.stride(0), x.stride(1)
        except RuntimeError:  # the outer dimensions have no common stride
            pass
    x = flat(x)
    return x, x.shape[0], 1, x.stride(0), d

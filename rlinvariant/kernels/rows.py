"""Find the rows of a tensor that may be a slice of a wider one, so that a kernel reads merged projections in place."""

import torch
from torch import Tensor

GEMM_ROW_STEP = 64  # `linear` takes any multiple of so many rows in one call; a trainer pads its packed rows to one


def aligned(x: Tensor) -> Tensor:
    """Return x, of any shape, or a copy, contiguous from a multiple of 16 bytes, by which Triton lays out a sum."""
    return x if x.is_contiguous() and not x.data_ptr() % 16 else x.clone(memory_format=torch.contiguous_format)


def vectors(x: Tensor) -> Tensor:
    """Return x, [T, H, D], or a copy: each vector of D contiguous from a multiple of 16 bytes, as FlashAttention-3 needs it."""
    vectors_apart = [n * x.element_size() for n in x.stride()[:-1]]
    as_it_lies = x.stride(-1) == 1 and not any(n % 16 for n in (x.data_ptr(), *vectors_apart))
    return x if as_it_lies else x.clone(memory_format=torch.contiguous_format)


def flat(x: Tensor) -> Tensor:
    """Return x as [rows, D] with contiguous D; a copy only if no view has that form."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def rows(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """Return x as [outer, inner, D] with contiguous D: (tensor, outer, inner, stride of outer, stride of inner), in elements.

    Two strides reach the heads of a slice [T, H, D] of a merged projection; anything more scattered is copied. So is what is
    not aligned: Triton lays a reduction out by what it knows of the alignment, and another layout is another order.
    """
    if x.is_contiguous() and not x.data_ptr() % 16:
        return x, x.numel() // max(1, x.shape[-1]), 1, x.shape[-1], 0
    x = x[None] if x.dim() == 2 else x
    aligned = not any(n % 16 for n in (x.data_ptr(), x.shape[-1], *x.stride()[:-1]))
    if x.stride(-1) == 1 and x.dim() > 2 and aligned:
        try:
            x = x.view(-1, *x.shape[-2:])
            return x, x.shape[0], x.shape[1], x.stride(0), x.stride(1)
        except RuntimeError:  # the outer dimensions have no common stride
            pass
    x = x.clone(memory_format=torch.contiguous_format)
    return x, x.numel() // max(1, x.shape[-1]), 1, x.shape[-1], 0

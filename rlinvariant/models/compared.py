"""Comparison of a module with the form that it takes: a copy with random weights, and how far two results are apart."""

import copy

import torch
from torch import Tensor, nn

from rlinvariant.types import Untyped


def random_copy(module: nn.Module) -> Untyped:
    """Return a copy on the CPU, in fp32, with the buffers that the module has, and with random weights.

    A matrix keeps the spread of what it multiplies: an activation then gets inputs of about 1, where one differs from another.
    """
    original = copy.deepcopy(module).to_empty(device="cpu").to(torch.float32)
    for buffer, own in zip(original.buffers(), module.buffers(), strict=True):
        buffer.copy_(own)
    for p in original.parameters():
        p.normal_(0.5, 0.5) if p.dim() == 1 else p.normal_(0.0, p.shape[-1] ** -0.5)
    return original


def difference(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference between two tensors of one shape, relative to the largest expected value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()

"""No op minds how an operand lies in memory, nor a gradient that comes: it is read as it lies, or copied, or refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from tests.kernels.cases import CASES, WITHOUT_GRADIENT
from tests.ladders import assert_same, randn


def rows_apart(x: Tensor) -> Tensor:
    wide = x.new_zeros(len(x), 3, *x.shape[1:])
    wide[:, 1] = x
    return wide[:, 1]


def numbers_apart(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape, 3)
    wide[..., 1] = x
    return wide[..., 1]


def off_alignment(x: Tensor) -> Tensor:
    """Contiguous, from one element after a multiple of 16 bytes on."""
    longer = x.new_zeros(x.numel() + 1)
    longer[1:] = x.flatten()
    return longer[1:].view(x.shape)


@pytest.mark.parametrize("laid", [rows_apart, numbers_apart, off_alignment])
@pytest.mark.parametrize("name", CASES)
def test_no_layout_of_an_operand_changes_a_bit(name, laid: Callable[[Tensor], Tensor], monkeypatch):
    f, inputs = CASES[name]()
    op, calls = getattr(ops, name.split(",")[0]), list[tuple]()
    monkeypatch.setattr(ops, op.__name__, lambda *args, **how: calls.append((args, how)) or op(*args, **how))
    f(*inputs) if f is not op else ops.__dict__[op.__name__](*inputs)
    ((args, how),) = calls
    expected = op(*args, **how)
    for at, x in enumerate(args):
        if isinstance(x, Tensor):
            try:
                found = op(*args[:at], laid(x), *args[at + 1 :], **how)
            except ValueError:  # of a cache of keys, which vLLM lays out; CPUs read it off alignment too
                assert (name, at) == ("paged_attention", 1) and laid in (numbers_apart, off_alignment)
                continue
            assert_same(found, expected, f"argument {at} of {name}")


def expanded(x: Tensor) -> Tensor:
    """One row for all, as the gradient of a sum or a mean comes."""
    return x[:1].expand_as(x)


@pytest.mark.parametrize("laid", [rows_apart, numbers_apart, off_alignment, expanded])
@pytest.mark.parametrize("name", sorted(CASES.keys() - WITHOUT_GRADIENT))
def test_no_layout_of_a_gradient_changes_a_bit(name, laid: Callable[[Tensor], Tensor]):
    f, inputs = CASES[name]()
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = f(*leaves)
    outputs = [y for y in (found if isinstance(found, tuple) else (found,)) if y.requires_grad]
    come = [laid(randn(*y.shape, seed=99 + i).to(y)) for i, y in enumerate(outputs)]
    plain = [dy.clone(memory_format=torch.contiguous_format) for dy in come]
    expected = torch.autograd.grad(outputs, leaves, plain, retain_graph=True)
    assert_same(torch.autograd.grad(outputs, leaves, come), expected, f"gradients of {name}")

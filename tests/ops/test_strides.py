"""No op minds how an operand lies in memory: it is read as it lies, or copied, or refused."""

from collections.abc import Callable

import pytest
from torch import Tensor

from rlinvariant import ops
from tests.kernels.cases import CASES
from tests.ladders import assert_same


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

"""Rows of a table: the lookup is exact, and the gradient has the same bits at every call."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from tests.ladders import DEVICES, randint, randn

VOCAB, WIDTH = 50, 24
PADDING = pytest.mark.parametrize("padding_idx", [None, 3])


def gradient(f, ids: Tensor, weight: Tensor, dy: Tensor, padding_idx: int | None) -> Tensor:
    leaf = weight.clone().requires_grad_()
    return torch.autograd.grad(f(ids, leaf, padding_idx), leaf, dy)[0]


@PADDING
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(40,), (3, 70)])
def test_it_is_the_reference(shape, device, padding_idx):
    """Whole numbers, whose sums are exact in any order: lookup and gradient have no other bits than in float64."""
    ids = randint(VOCAB, *shape).to(device)
    weight, dy = (torch.randint(-9, 9, s, device=device).float() for s in ((VOCAB, WIDTH), (*shape, WIDTH)))
    assert_bits_equal(
        ops.embedding(ids, weight, padding_idx), ops.embedding_ref(ids, weight.double(), padding_idx).float(), "y"
    )
    expected = gradient(ops.embedding_ref, ids, weight.double(), dy.double(), padding_idx)
    assert expected.abs().sum() > 0 and (padding_idx is None or not expected[padding_idx].any())
    assert_bits_equal(gradient(ops.embedding, ids, weight, dy, padding_idx), expected.float(), "gradient")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda ids, w, padding_idx: F.embedding(ids, w),  # the padding learns
        lambda ids, w, padding_idx: F.embedding(ids.flip(0), w, padding_idx),
        lambda ids, w, padding_idx: F.embedding(ids, w, padding_idx, scale_grad_by_freq=True),
    ],
)
def test_planted_faults_are_found(wrong, monkeypatch):
    monkeypatch.setattr(ops, "embedding", wrong)
    with pytest.raises(AssertionError):
        test_it_is_the_reference((40,), "cpu", 3)


@PADDING
def test_on_a_cpu_the_bits_are_pytorchs(padding_idx):
    ids, weight, dy = randint(VOCAB, 4000).cpu(), randn(VOCAB, WIDTH).cpu().float(), randn(4000, WIDTH, seed=1).cpu().float()
    ours, stock = (gradient(f, ids, weight, dy, padding_idx) for f in (ops.embedding, F.embedding))
    assert_bits_equal(ours, stock, "gradient")


def others(f, device: str, times: int = 20) -> int:
    """Count the calls whose gradient has other bits than the first one's: 9,000 tokens of 30 words, as in a real batch."""
    ids = randint(30, 9000).to(device)
    weight, dy = torch.randn(100, 128, device=device), torch.randn(9000, 128, device=device)
    first = gradient(f, ids, weight, dy, None)
    return sum(not torch.equal(first, gradient(f, ids, weight, dy, None)) for _ in range(times))


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_has_the_same_bits_at_every_call(device):
    assert others(ops.embedding, device) == 0


@pytest.mark.gpu
def test_pytorchs_gradient_has_others_on_a_gpu():
    """The control, and the reason for the op."""
    assert others(F.embedding, "cuda") > 0

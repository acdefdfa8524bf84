import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from tests import ladders
from tests.ladders import randn

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]

WIDTH = 3072


def test_vllms_residual_norm_fails_the_ladder():
    """Control: below 256 tokens it takes blocks of 1,024 threads, from there on of 256, which is another order of sums."""
    import vllm._custom_ops  # noqa: F401  # registers torch.ops._C

    x, residual = (randn(1024, WIDTH, dtype=torch.bfloat16, wide=True, seed=i) for i in range(2))
    weight = randn(WIDTH, dtype=torch.bfloat16, seed=2)

    def ours(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x, residual, weight, 1e-6)

    def stock(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = x.clone(), residual.clone()
        torch.ops._C.fused_add_rms_norm(x, residual, weight, 1e-6)
        return x, residual

    def planted(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, total = ours(x, residual)
        return (y if len(x) < 256 else (y.float() * (1 + 2**-8)).bfloat16()), total

    ladders.assert_batch_invariant(ours, x, residual)
    ladders.assert_control(ladders.assert_batch_invariant, planted, [(stock, (x, residual))])

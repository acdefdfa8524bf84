"""Properties of every op on a GPU, whatever the op computes: tests/kernels/cases.py calls each of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from tests import ladders
from tests.kernels.cases import CASES, HIDDEN, MLP, TOKENS, WITHOUT_GRADIENT, bf16
from tests.ladders import Function, randn

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]


def outputs(name: str, f: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the outputs of the op, and its gradients."""
    y = f(*inputs)
    gradients = () if name in WITHOUT_GRADIENT else ladders.gradients(f, inputs)
    return *(y if isinstance(y, tuple) else (y,)), *gradients


def replayed(f: Function, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
    """f(*inputs) from a CUDA graph that was captured while its inputs held other values, into outputs of NaN."""
    held = [x.flip(0).contiguous() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        f(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = f(*held)
    for x, value in zip(held, inputs, strict=True):
        x.copy_(value)
    for y in found if isinstance(found, tuple) else (found,):
        y.fill_(float("nan") if y.is_floating_point() else -7)
    graph.replay()
    return found


@pytest.mark.parametrize("name", CASES)  # none may wait for the GPU, which a capture would refuse
def test_a_cuda_graph_gives_the_bits_of_eager(name):
    f, inputs = CASES[name]()
    ladders.assert_same(replayed(f, *inputs), f(*inputs), name)


def test_a_graph_of_stale_inputs_is_found():
    """Control: `replayed` fills its inputs after the capture."""
    f, inputs = CASES["add_rms_norm"]()
    constant = inputs[1]
    with pytest.raises(AssertionError):
        ladders.assert_same(replayed(lambda x, r, w: f(x, constant.flip(0), w), *inputs), f(*inputs), "stale residual")


@pytest.mark.parametrize("name", CASES)
def test_every_element_of_every_output_is_written(name):
    """New memory is filled with NaN, as PyTorch does in deterministic mode."""
    plain = outputs(name, *CASES[name]())
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = outputs(name, *CASES[name]())
    finally:
        torch.use_deterministic_algorithms(False)
    ladders.assert_same(poisoned, plain, name)


@pytest.mark.parametrize("name", CASES)
def test_the_default_device_changes_nothing(name):
    """The other tests make tensors on the GPU by default; a trainer and an engine do not."""
    f, inputs = CASES[name]()
    expected = outputs(name, f, inputs)
    with torch.device("cpu"):
        ladders.assert_same(outputs(name, f, inputs), expected, name)


@pytest.mark.parametrize("name", CASES)
def test_the_same_call_gives_the_same_bits_on_another_stream(name):
    once, stream = outputs(name, *CASES[name]()), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        again = outputs(name, *CASES[name]())
    torch.cuda.synchronize()
    ladders.assert_same(again, once, name)


def layer(kit, x: Tensor, residual: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Half a decoder layer, with neighbours that Inductor likes to fuse."""
    y, total = kit.add_rms_norm(x * 2, residual, w, 1e-6)
    return kit.linear(kit.swiglu(*kit.linear(y, up).chunk(2, -1)), down) + total


class Stock:
    @staticmethod
    def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        wide = total.float()
        return w.to(x.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype), total

    linear = staticmethod(F.linear)
    swiglu = staticmethod(lambda gate, up: F.silu(gate) * up)


def layer_operands(rows: int) -> tuple[Tensor, ...]:
    weights = randn(HIDDEN, seed=2), bf16(2 * MLP, HIDDEN, seed=3) / 16, bf16(HIDDEN, MLP, seed=4) / 16
    return bf16(rows, HIDDEN), bf16(rows, HIDDEN, seed=1), *weights


@pytest.mark.parametrize("rows", [1, 400])
def test_inductor_keeps_the_bits_of_a_layer(rows):
    ladders.assert_opaque(lambda *x: layer(ops, *x), *layer_operands(rows), backend="inductor")


def test_inductor_changes_the_bits_of_a_stock_layer():
    """Control: it fuses, and drops roundings in between."""
    with pytest.raises(AssertionError):
        ladders.assert_opaque(lambda *x: layer(Stock, *x), *layer_operands(TOKENS), backend="inductor")


def test_gradients_through_a_layer_repeat():
    once, again = (ladders.gradients(lambda *x: layer(ops, *x), layer_operands(400)) for _ in range(2))
    ladders.assert_same(once, again, "gradients, again")


def test_every_op_is_called():
    """Each op of the package is one of the cases."""
    named = {name for name in ops.__all__ if not name.endswith("_ref")} | {"wide_linear"}  # that is lora_linear's other form
    assert {name.split(",")[0] for name in CASES} == named


def test_a_layer_of_half_the_rows_has_their_bits():
    inputs = layer_operands(400)
    full = layer(ops, *inputs)
    for m in (1, 5, 16, 17, 40, 200, 399):
        assert_bits_equal(layer(ops, inputs[0][:m], inputs[1][:m], *inputs[2:]), full[:m], f"{m} rows")

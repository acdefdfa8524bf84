import importlib
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from rlinvariant import ops
from rlinvariant.bits import assert_bits_equal
from rlinvariant.kernels import cpu
from tests import ladders
from tests.ladders import DTYPES, cancelling, cpu_only, dtype_name, matrix_dtypes, per_device, randint, randn

module = importlib.import_module("rlinvariant.ops.token_logprobs")  # the package attribute of this name is the function

VOCABS = (1, 15, 16, 17, 4095, 4096, 4097, 32000)  # around a vector, around a block, several blocks
TEMPERATURES = (1.0, 0.7)  # 0.7: x / 0.7 is not x * (1 / 0.7)

widest = per_device("dtype", [torch.float32], [torch.bfloat16])


def operands(tokens: int, vocab: int, dtype: torch.dtype, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    return randn(tokens, dim, dtype=dtype), randn(vocab, dim, dtype=dtype, seed=1) / 4, randint(vocab, tokens, seed=3)


stock = ops.token_logprobs_ref  # TRL's formulas, in fp32 (or fp64): the whole matrix, log_softmax, entropy


def spikes(values: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight that give these logits exactly, in a single row."""
    return torch.ones(1, 1, dtype=dtype), torch.tensor(values, dtype=dtype)[:, None]


@matrix_dtypes
@pytest.mark.parametrize("shape", [(100, 64), (33, 3072), (4097, 100)])
def test_logprobs_are_batch_invariant(shape, dtype):
    hidden, weight = cancelling(1024 if shape[0] < 4000 else 300, *shape, dtype)
    ids = randint(shape[0], len(hidden))
    ladders.assert_batch_invariant(lambda h, i: ops.token_logprobs(h, weight, i, 0.7), hidden, ids)
    ladders.assert_needle(lambda h, i: ops.token_logprobs(h, weight, i, 0.7), hidden[:1], ids[:1])


@widest
def test_batch_size_control(dtype):
    def shifted(hidden: Tensor, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Planted fault: hidden states in another order of sums for fewer than 32 tokens."""
        flip = (lambda x: x.flip(-1).contiguous()) if len(hidden) < 32 else (lambda x: x)
        return ops.token_logprobs(flip(hidden), flip(weight), ids, 0.7)

    shapes = ((512, 3072, dtype), (33, 3072, dtype), (128, 512, torch.bfloat16))
    inputs = [(h, randint(n, 300), w) for n, k, d in shapes for h, w in [cancelling(300, n, k, d)]]
    weight = inputs[0][2]
    stocks = [((lambda h, i, w=w: stock(h, w, i, 0.7)), (h, i)) for h, i, w in inputs]
    ladders.assert_control(ladders.assert_batch_invariant, lambda h, i: shifted(h, i, weight), stocks)


@matrix_dtypes
def test_logprobs_are_chunk_invariant(dtype, device, monkeypatch):
    hidden, weight, ids = operands(1100, 50, dtype)

    def run() -> tuple[Tensor, ...]:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = ops.token_logprobs(*leaves, ids, 0.7)
        return logprobs, entropy, *torch.autograd.grad((logprobs, entropy), leaves, (randn(1100), randn(1100, seed=1)))

    whole = run()
    assert len(module._chunks(hidden, weight)) == 1
    for rows in (256, 512, 768):
        monkeypatch.setitem(module.CHUNK_BYTES, device, rows * 50 * hidden.element_size())
        assert len(module._chunks(hidden, weight)) == -(-1100 // rows)
        chunked = run()
        ladders.assert_same(chunked[:2], whole[:2], f"log-probs and entropy by {rows} tokens")
        for ours, expected in zip(chunked[2:], whole[2:], strict=True):  # by the stock GEMM: the bits are not promised
            assert (ours - expected).float().norm() < 1e-2 * expected.float().norm()


@matrix_dtypes
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_trainer_matches_sampler(vocab, temperature, dtype):
    """The log-probs of sampled tokens are those that sample returned, and those of log_softmax."""
    hidden, weight, _ = operands(20, vocab, dtype)
    logits, t = ops.linear(hidden, weight), torch.full((20,), temperature)
    tokens, sampled, _ = ops.sample(logits, t, torch.arange(20), torch.arange(20))
    assert_bits_equal(ops.token_logprobs(hidden, weight, tokens, temperature)[0], sampled, "token_logprobs, sample")
    assert_bits_equal(ops.log_softmax(logits, t).gather(1, tokens[:, None])[:, 0], sampled, "log_softmax, sample")
    every = ops.log_softmax(logits, t)[0]
    if vocab <= 100:
        ids = torch.arange(vocab)
        same = ops.token_logprobs(hidden[:1].expand(vocab, -1), weight, ids, temperature)[0]
        assert_bits_equal(same, every, "every token of a row")


@matrix_dtypes
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("vocab", [20000, 151936])  # 5 blocks of 4,096 columns, and 38: Qwen's
def test_trainer_matches_sampler_for_certain_tokens(vocab, temperature, dtype):
    """A log-prob of -1e-10 has all the bits of 1 + 1e-10: the order in which the blocks of a row are added shows."""
    rows = 32
    logits = (randn(rows, vocab) - 35) * temperature
    likely = randint(vocab, rows, seed=1)
    logits[torch.arange(rows), likely] = 0
    logits, eye = logits.to(dtype), torch.eye(rows, dtype=dtype)  # exact: a product with the identity
    tokens, sampled, _ = ops.sample(logits, torch.full((rows,), temperature), torch.arange(rows), torch.arange(rows))
    assert torch.equal(tokens, likely) and ((sampled < 0) & (sampled > -1e-6)).all()
    trained = ops.token_logprobs(eye, logits.t(), tokens, temperature)[0]
    assert_bits_equal(trained, sampled, "token_logprobs, sample")
    every = ops.log_softmax(logits, torch.full((rows,), temperature))
    assert_bits_equal(every.gather(1, tokens[:, None])[:, 0], sampled, "log_softmax, sample")


@widest
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sampler_formula_control(temperature, dtype):
    """Equal logits give other log-probs in vLLM (log_softmax) than in TRL (logit - logsumexp), and both differ from ours."""
    hidden, weight, ids = operands(300, 4097, dtype)
    logits = ops.linear(hidden, weight).float()
    x = logits / torch.tensor(temperature)
    vllm = torch.log_softmax(x, -1).gather(1, ids[:, None])[:, 0]
    trl = x.gather(1, ids[:, None])[:, 0] - x.logsumexp(-1)
    ours, _ = ops.token_logprobs(hidden, weight, ids, temperature)
    multiplied = ops.token_logprobs(hidden, weight, ids, 1.0)[0] if temperature == 1.0 else None
    assert ladders.differs(vllm, trl) and ladders.differs(ours, vllm) and ladders.differs(ours, trl)
    if multiplied is None:  # logits times a reciprocal, as CUDA divides by a Python number
        t = torch.ones(300)
        multiplied = ops.log_softmax(logits * (1 / temperature), t).gather(1, ids[:, None])[:, 0]
        assert ladders.differs(ours, multiplied)


@matrix_dtypes
def test_gradients_are_deterministic(dtype, device, monkeypatch):
    hidden, weight, ids = operands(600, 300, dtype)
    monkeypatch.setitem(module.CHUNK_BYTES, device, 0)  # the least: 256 tokens at a time

    def run(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return ladders.gradients(lambda h, w: ops.token_logprobs(h, w, ids, 0.7), (h, w))

    ladders.assert_same(run(hidden, weight), run(hidden, weight), "gradients, again")


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_softmax_is_thread_invariant(dtype):
    logits, t, ids = randn(301, 4097, dtype=dtype), torch.full((301,), 0.7), torch.arange(301)
    ladders.assert_thread_invariant(lambda x: ops.log_softmax(x, t), logits)
    ladders.assert_thread_invariant(lambda x: ops.sample(x, t, ids, ids), logits)

    def backward(x: Tensor) -> Tensor:
        dlogits = torch.full_like(x, float("nan"))
        cpu.call("token_logprobs_backward", x, ids, t, None, t, t, dlogits, *x.shape, cpu.is_bf16(x))
        return dlogits

    ladders.assert_thread_invariant(backward, logits)


def test_float32_masters_have_the_bits_of_the_cast_weight():
    hidden, weight, ids = operands(20, 100, torch.bfloat16)
    masters = weight.float() + 1e-4
    ours = ops.token_logprobs(hidden, masters, ids, 0.7)
    ladders.assert_same(ours, ops.token_logprobs(hidden, masters.bfloat16(), ids, 0.7), "fp32 masters")
    dh, dw = ladders.gradients(lambda h, w: ops.token_logprobs(h, w, ids, 0.7), (hidden, masters))
    assert (dh.dtype, dw.dtype) == (torch.bfloat16, torch.float32)


def peak_of_cpu(f: Callable[[], None]) -> int:
    """The most tensor memory held at once inside f, from the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        f()
    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def peak_of_gpu(f: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    return torch.cuda.max_memory_allocated() - before


@per_device(
    "tokens, vocab, dtype, peak_bytes",
    [(4096, 512, torch.float32, peak_of_cpu)],
    [(8192, 32768, torch.bfloat16, peak_of_gpu)],  # 512 MiB: cuBLAS's workspace must not show
)
def test_tokens_by_vocabulary_is_never_held(tokens, vocab, dtype, peak_bytes, device, monkeypatch):
    hidden, weight, ids = operands(tokens, vocab, dtype, 16)
    matrix = tokens * vocab * dtype.itemsize
    monkeypatch.setitem(module.CHUNK_BYTES, device, matrix // 16)

    def step(f) -> None:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        sum(x.sum() for x in f(*leaves, ids, 0.7)).backward()

    for f in (stock, ops.token_logprobs):
        step(f)  # what is made once and kept does not count
    assert peak_bytes(lambda: step(ops.token_logprobs)) < matrix / 3  # logits, their gradient, a padded copy; [tokens, D]
    assert peak_bytes(lambda: step(stock)) > 2 * matrix  # control


@matrix_dtypes
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_frozen_weight_costs_no_gradient_and_changes_none(dtype, softcap, monkeypatch):
    """Beside adapters the lm_head is frozen: its gradient is a third of the head's work, and as large as the lm_head."""
    hidden, weight, ids = operands(40, 100, dtype)

    def gradient(trained: bool) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        logprobs, entropy = ops.token_logprobs(leaf, weight.clone().requires_grad_(trained), ids, 0.7, None, softcap)
        (logprobs.sum() + entropy.sum()).backward()
        assert leaf.grad is not None
        return leaf.grad

    def refused(*_: object) -> None:
        raise AssertionError("a product for a gradient that nobody needs")

    expected = gradient(True)
    monkeypatch.setattr(module, "product", refused)
    assert_bits_equal(gradient(False), expected, "hidden states")
    with pytest.raises(AssertionError, match="nobody needs"):  # control
        gradient(True)


@matrix_dtypes
def test_extreme_logits_give_the_limits(dtype):
    inf, nan = float("inf"), float("nan")

    def logprob(values: list[float], token: int) -> tuple[float, float]:
        logprobs, entropy = ops.token_logprobs(*spikes(values, dtype), torch.tensor([token]), 1.0)
        return logprobs.item(), entropy.item()

    assert logprob([3e38, 0.0, -3e38], 0) == (0.0, 0.0)
    assert logprob([-3e38, -3e38], 1) == pytest.approx((-math.log(2), math.log(2)))
    assert logprob([-inf, 1.0, -inf], 1) == (0.0, 0.0)
    assert logprob([-inf, 1.0, 1.0], 0)[0] == -inf
    assert logprob([5.0], 0) == (0.0, 0.0)
    for values in ([nan, 0.0, 1.0], [0.0, 1.0, nan], [inf, 0.0, 1.0], [-inf, -inf, -inf], [0.0] * 5000 + [nan]):
        assert all(torch.tensor(logprob(values, 1)).isnan())


@widest
def test_masked_logits_get_no_gradient(dtype):
    hidden, weight = spikes([float("-inf"), 1.0, 2.0], dtype)
    (dw,) = ladders.gradients(lambda w: ops.token_logprobs(hidden, w, torch.tensor([1]), 0.7), (weight,))
    assert dw.isfinite().all() and dw[0] == 0 and dw[1:].all()


@matrix_dtypes
def test_strides_change_no_bits(dtype):
    hidden, weight, ids = operands(24, 100, dtype)
    expected = ops.token_logprobs(hidden, weight, ids, 0.7)
    ladders.assert_same(ops.token_logprobs(hidden.t().contiguous().t(), weight, ids, 0.7), expected, "hidden, column major")
    ladders.assert_same(ops.token_logprobs(hidden, weight.t().contiguous().t(), ids, 0.7), expected, "weight transposed")
    ladders.assert_same(ops.token_logprobs(hidden, weight, ids.repeat_interleave(2)[::2], 0.7), expected, "strided ids")
    leaf = hidden.clone().requires_grad_()
    ones = torch.autograd.grad(ops.token_logprobs(leaf, weight, ids, 0.7)[0].sum(), leaf)[0]  # a gradient of stride 0
    dense = torch.autograd.grad(ops.token_logprobs(leaf, weight, ids, 0.7)[0], leaf, torch.ones(24))[0]
    assert_bits_equal(ones, dense, "gradient of stride 0")


def test_no_tokens_give_no_logprobs():
    hidden, weight, ids = operands(0, 100, torch.bfloat16)
    assert all(x.shape == (0,) and x.dtype is torch.float32 for x in ops.token_logprobs(hidden, weight, ids, 1.0))
    dh, dw = ladders.gradients(lambda h, w: ops.token_logprobs(h, w, ids, 1.0), (hidden, weight))
    assert dh.shape == hidden.shape and not dw.any()


outside = pytest.mark.parametrize("token", [-1, 100, 2**40, -(2**40)])


@cpu_only
@outside
def test_a_token_outside_the_vocabulary_is_an_index_error(token):
    hidden, weight, ids = operands(4, 100, torch.bfloat16)
    ids[2] = token
    with pytest.raises(IndexError, match=r"\[0, 100\)"):
        ops.token_logprobs(hidden, weight, ids, 1.0)


@outside
@pytest.mark.parametrize("truncation", [(0, 1.0, 0.0), (20, 0.9, 0.01)])
def test_a_token_outside_the_vocabulary_shows_as_nan_where_looking_would_wait(token, truncation):
    """Both devices have the code that a GPU relies on; the other rows keep their bits."""
    hidden, weight, ids = operands(4, 100, torch.bfloat16)
    clean = module._forward(hidden, weight, ids, 1.0, None, None, *truncation)
    ids[2] = token
    broken = module._forward(hidden, weight, ids, 1.0, None, None, *truncation)
    kept = torch.arange(4) != 2
    for x, expected in zip(broken[:2], clean[:2], strict=True):
        assert x[2].isnan()
        assert_bits_equal(x[kept], expected[kept], "rows beside it")
    saved = hidden, weight, ids, *broken
    context = SimpleNamespace(saved_tensors=saved, temperature=1.0, scaling=(None, None), needs_input_grad=(True, True))
    dhidden, dweight, *_ = module._backward(context, torch.ones(4), torch.ones(4))
    assert dhidden[2].isnan().all() and dweight.isnan().all() and dhidden[kept].isfinite().all()


@cpu_only
def test_no_call_waits_for_a_gpu():
    """The tensors are of a GPU and hold no values: to read one would raise."""
    with FakeTensorMode():
        hidden, weight, ids = (torch.empty(s, device="cuda") for s in ((4, 64), (100, 64), (4,)))
        module._check(hidden, weight, ids.long(), 0.7, None, None)
        assert all(x.shape == (4,) for x in module._targets(ids.long(), 100, 0.7))
        with pytest.raises(DataDependentOutputException):  # control
            ids.min().item()


@pytest.mark.parametrize(
    ("hidden", "ids", "ids_dtype", "temperature"),
    [
        ((4, 64), (4,), torch.int32, 1.0),
        ((4, 64), (4,), torch.float32, 1.0),
        ((4, 64), (3,), torch.int64, 1.0),
        ((4, 64), (4, 1), torch.int64, 1.0),
        ((2, 2, 64), (2,), torch.int64, 1.0),
        ((4, 32), (4,), torch.int64, 1.0),
        ((4, 64), (4,), torch.int64, 0.0),
        ((4, 64), (4,), torch.int64, -1.0),
        ((4, 64), (4,), torch.int64, float("nan")),
    ],
)
def test_other_shapes_and_temperatures_are_refused(hidden, ids, ids_dtype, temperature):
    weight = randn(100, 64)
    with pytest.raises(ValueError):
        ops.token_logprobs(randn(*hidden, dtype=torch.bfloat16), weight, torch.zeros(ids, dtype=ids_dtype), temperature)


@per_device("dtype", [torch.float64, torch.float16], [torch.float64, torch.float16, torch.float32])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises((ValueError, TypeError), match=dtype_name(dtype)):
        ops.token_logprobs(randn(4, 64, dtype=dtype), randn(100, 64), torch.arange(4), 1.0)


TRUNCATIONS = [(0, 0.9, 0.0), (7, 1.0, 0.0), (0, 1.0, 0.05), (40, 0.95, 0.01)]


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@matrix_dtypes
def test_truncated_trainer_matches_sampler(dtype, truncation):
    """A token that `sample` draws from the kept ones has the trainer's log-prob; by all tokens it would have another."""
    rows, vocab = 300, 5000
    hidden, weight, _ = operands(rows, vocab, dtype)
    logits, (k, p, m) = ops.linear(hidden, weight), truncation
    t, p_R, m_R = (torch.full((rows,), x) for x in (0.7, p, m))
    theta = ops.threshold(logits, t, torch.full((rows,), k), p_R, m_R)
    tokens, sampled, _ = ops.sample(logits, t, torch.arange(rows), torch.arange(rows), theta)
    assert (logits.gather(1, tokens[:, None])[:, 0] >= theta).all()
    trained, entropy = ops.token_logprobs(hidden, weight, tokens, 0.7, None, None, *truncation)
    assert_bits_equal(trained, sampled, "log-prob")
    assert_bits_equal(ops.log_softmax(logits, t, theta).gather(1, tokens[:, None])[:, 0], sampled, "log_softmax")
    table = ops.log_softmax(logits, t, theta).double()
    expected = -torch.where(table == -torch.inf, 0.0, table.exp() * table).sum(-1)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)
    whole, _ = ops.token_logprobs(hidden, weight, tokens, 0.7)  # control: too small by the logarithm of the kept share
    share = ops.log_softmax(logits, t).double().exp().masked_fill(logits < theta[:, None], 0.0).sum(-1)
    torch.testing.assert_close((whole - trained).double(), share.log(), rtol=1e-4, atol=1e-5)
    assert ladders.differs(whole, trained)


def test_token_logprobs_is_opaque():
    hidden, weight, ids = operands(4, 100, torch.bfloat16)
    ladders.assert_registered(
        torch.ops.rlinvariant.token_logprobs.default, *(hidden, weight, ids, 0.7), 0.5, 30.0, 20, 0.9, 0.01
    )
    ladders.assert_opaque(ops.token_logprobs, hidden, weight, ids, 0.7)


def test_softmax_is_opaque():
    logits, ids, t, g = randn(4, 100), randint(100, 4), torch.full((4,), 0.7), randn(4)
    for theta in (None, torch.zeros(4)):
        ladders.assert_registered(torch.ops.rlinvariant.row_logprobs.default, logits, ids, t, theta)
        found = torch.ops.rlinvariant.row_logprobs(logits, ids, t, theta)
        for dentropy in (None, g):
            given = logits.clone(), ids, t, g, dentropy, theta, *found
            ladders.assert_registered(torch.ops.rlinvariant.row_logprobs_backward.default, *given)
    ladders.assert_opaque(ops.log_softmax, logits, t)

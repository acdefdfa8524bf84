"""Log-probs, entropies and their gradients against float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rlinvariant import ops
from tests import bounds, ladders
from tests.bounded import Arithmetic, Bounded, assert_accurate, assert_found, coarse_sum, exact, slope_scaled
from tests.ladders import cpu_only, matrix_dtypes, per_device, randn
from tests.ops.test_token_logprobs import TEMPERATURES, TRUNCATIONS, VOCABS, module, operands, spikes, stock, widest


def assert_logprobs_accurate(
    f: Callable,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    *scaling: float | None,
    grad: bool = False,
    output: int | None = None,
) -> None:
    """Log-probs and entropies together, or one `output` of the two."""

    def run(g: Callable) -> Callable:
        whole = lambda h, w: g(h, w, ids, temperature, *scaling)  # noqa: E731
        return whole if output is None else lambda h, w: whole(h, w)[output]

    def bound(a: Arithmetic, h: Bounded, w: Bounded, *gradients: Bounded) -> bounds.Bounds:
        if not grad:
            both = bounds.token_logprobs(a, h, w, ids, temperature, *scaling)
            return both if output is None else (both[output],)
        if output is not None:
            gradients = tuple(exact(torch.zeros(len(ids))) if i != output else gradients[0] for i in range(2))
        return bounds.token_logprobs_backward(a, h, w, *gradients, ids, temperature, *scaling)

    assert_accurate(run(f), run(stock), bound, hidden, weight, grad=grad)


@matrix_dtypes
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("vocab", [v for v in VOCABS if 1 < v < 32000])
def test_logprobs_and_entropy_match_float64(vocab, temperature, dtype):
    """The logits are exact, so that the error of the softmax alone is measured."""
    hidden, weight, ids = operands(20, vocab, dtype)
    logits, t = ops.linear(hidden, weight), torch.full((20,), temperature)
    softmax = partial(bounds.log_softmax, temperature=temperature)
    assert_accurate(
        lambda x: ops.log_softmax(x, t), lambda x: ops.log_softmax_ref(x, t.double().fill_(temperature)), softmax, logits
    )
    if vocab > 100:
        return
    identity = torch.eye(vocab, dtype=dtype)
    for grad in (False, True):
        bound = bounds.row_logprobs_backward if grad else bounds.row_logprobs
        assert_accurate(
            *(lambda x, f=f: f(x, identity.to(x.dtype), ids, temperature) for f in (ops.token_logprobs, stock)),
            lambda a, x, *dy, b=bound: b(a, x, *dy, ids=ids, temperature=temperature),
            logits,
            grad=grad,
        )


@matrix_dtypes
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("vocab", [17, 4097])
def test_token_logprobs_and_their_gradients_match_float64(vocab, temperature, dtype):
    """Log-probs and entropy are measured together, as are their gradients for hidden states and weight."""
    hidden, weight, ids = operands(20, vocab, dtype)
    for grad in (False, True):
        assert_logprobs_accurate(ops.token_logprobs, hidden, weight, ids, temperature, grad=grad)


@widest
@pytest.mark.parametrize("output", [0, 1])
def test_each_gradient_alone_matches_float64(output, dtype):
    """The gradient of the log-probs without the entropy's, and the reverse."""
    hidden, weight, ids = operands(20, 100, dtype)
    assert_logprobs_accurate(ops.token_logprobs, hidden, weight, ids, 0.7, grad=True, output=output)


def by_hand(log_sum: Callable[[Tensor], Tensor], weighted: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """token_logprobs with another log of a sum of exponentials, or another entropy of probabilities and their logs."""

    def planted(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        x = ops.linear_ref(hidden, weight).float() / temperature
        logp = x - x.amax(-1, keepdim=True)
        logp = logp - log_sum(logp)[:, None]
        return logp.gather(1, ids[:, None])[:, 0], -weighted(logp.exp(), logp)

    return planted


def log_sum(x: Tensor) -> Tensor:
    return x.exp().sum(-1).log()


def entropy(p: Tensor, logp: Tensor) -> Tensor:
    return (p * logp).sum(-1)


FAULTS = {  # whether of gradients
    "sum in bf16": (by_hand(lambda x: coarse_sum(x.exp(), -1).log(), entropy), False),
    "a column dropped": (by_hand(lambda x: log_sum(x[:, :-1]), entropy), False),
    "entropy in bf16": (by_hand(log_sum, lambda p, logp: coarse_sum(p * logp, -1)), False),
    "entropy without a column": (by_hand(log_sum, lambda p, logp: entropy(p[:, :-1], logp[:, :-1])), False),
    "3 % too warm": (lambda h, w, ids, t: stock(h, w, ids, 1.03 * t), False),
    "the next token": (lambda h, w, ids, t: stock(h, w, ids.roll(1), t), False),
    "sum held constant": (by_hand(lambda x: log_sum(x).detach(), entropy), True),
    "3 % too large": (lambda h, w, ids, t: slope_scaled(lambda h, w: stock(h, w, ids, t), 1.03)(h, w), True),
    "a row dropped": (lambda h, w, ids, t: stock(torch.cat([h[:-1], h[-1:].detach()]), w, ids, t), True),
}


@widest
@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_finds_a_fault(fault, dtype):
    """The hidden states have eight columns: the roundings of their products hide none of the softmax's."""
    planted, grad = FAULTS[fault]
    hidden, weight, ids = operands(20, 300, dtype, 8)
    check = lambda f: assert_logprobs_accurate(f, hidden, weight, ids, 0.7, grad=grad)  # noqa: E731
    assert_found(check, ops.token_logprobs, planted)


@per_device("dtype, accuracy", [(torch.float32, 1e-6)], [(torch.bfloat16, 2**-8)])
def test_gradient_of_a_certain_token_does_not_cancel(dtype, accuracy):
    """1 - p of a token whose probability is nearly 1, to the dtype's relative accuracy; the stock formulas give 0."""
    hidden, weight = spikes([20.0, 0.0, -1.0, 1.0], dtype)
    ours, theirs, exact = (
        ladders.gradients(lambda w, f=f: f(hidden.to(w.dtype), w, torch.tensor([0]), 1.0)[0], (w,))[0].double()
        for f, w in ((ops.token_logprobs, weight), (stock, weight), (stock, weight.double()))
    )
    torch.testing.assert_close(ours, exact, rtol=accuracy, atol=0)
    assert theirs[0] == 0  # control


@widest
def test_gradients_of_likely_and_unlikely_tokens_match_float64(dtype):
    """p of the token near 1, and near 0."""
    hidden, weight = spikes([12.0, 0.0, -1.0, 1.0], dtype)
    for token in (0, 2):
        assert_logprobs_accurate(ops.token_logprobs, hidden, weight, torch.tensor([token]), 1.0, grad=True)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@cpu_only
def test_truncated_gradients_are_onehot_minus_p_on_the_kept_set(truncation, monkeypatch):
    """Against autograd in fp64 with the kept set a constant, of log-probs and entropy, in one chunk and in two."""
    hidden, weight, ids = operands(300, 1000, torch.float32)
    (k, p, m), (da, db) = truncation, (randn(300, seed=5), randn(300, seed=6))
    logits = ops.linear(hidden, weight)
    theta = ops.threshold(logits, *(torch.full((300,), x) for x in (0.7, k, p, m)))
    ids = torch.where(logits.gather(1, ids[:, None])[:, 0] >= theta, ids, logits.argmax(-1))
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    kept = (h @ w.t() / 0.7).masked_fill(logits < theta[:, None], -torch.inf).log_softmax(-1)
    entropy = -torch.where(kept == -torch.inf, 0.0, kept.exp() * kept.masked_fill(kept == -torch.inf, 0.0)).sum(-1)
    loss = (kept.gather(1, ids[:, None])[:, 0] * da).sum() + (entropy * db).sum()
    expected = torch.autograd.grad(loss, (h, w))
    for rows in (300, 256):
        monkeypatch.setitem(module.CHUNK_BYTES, "cpu", rows * 1000 * 4)
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        found = ops.token_logprobs(*leaves, ids, 0.7, None, None, *truncation)
        ours = torch.autograd.grad(found, leaves, (da, db))
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)
    whole = torch.autograd.grad(ops.token_logprobs(*leaves, ids, 0.7), leaves, (da, db))
    assert any((a - b).abs().max() > 1e-2 for a, b in zip(whole, expected, strict=True))  # control

"""Each op's formula and gradients in the arithmetic of tests/bounded.py, step by step as a correct kernel rounds: its bounds.

A function takes the arithmetic, the op's operands and, for gradients, those of its outputs, each `Bounded`.
Depths of sums are those of the Order sections in rlinvariant/ops, and the number of terms where an order is not promised.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bounded import FP32, Arithmetic, Bounded, exact, number

BLOCK = 4096  # columns of the vocabulary whose exponentials are added in fp32


def lanes(n: int) -> float:
    """Additions in the longest chain of `lanes` (kernels/cpu.h); the trees of the GPU's kernels are flatter."""
    return n / 16 + 5


Bounds = tuple[Bounded, ...]


def linear(a: Arithmetic, x: Bounded, w: Bounded, b: Bounded | None = None) -> Bounds:
    """One sum over K, in any order, as vendors' products are admitted; the bias before the rounding."""
    y = a.matmul(x, w.moved(lambda t: t.mT), w.value.shape[1])
    return ((y if b is None else y + b).to(a.dtype),)


def linear_backward(a: Arithmetic, x: Bounded, w: Bounded, dy: Bounded, bias: bool = True) -> Bounds:
    """Vendors' products: sums over N, and over rows."""
    rows, flat = (t.moved(lambda v: v.flatten(0, -2)) for t in (dy, x))
    dx = a.matmul(rows, w, w.value.shape[0], a.dtype).to(a.dtype).moved(lambda v: v.view(x.value.shape))
    count = len(rows.value)
    dw = a.matmul(rows.moved(lambda v: v.mT), flat, count, a.dtype).to(a.dtype)
    return (dx, dw) if not bias else (dx, dw, rows.sum(0, count).to(a.dtype).moved(lambda v: v[0]))


def _scale(x: Bounded, eps: float) -> Bounded:
    d = x.value.shape[-1]
    return ((x * x).sum(-1, lanes(d)) / exact(d) + number(eps)).rsqrt()


def rms_norm(a: Arithmetic, x: Bounded, w: Bounded, eps: float, offset: float | None = None) -> Bounds:
    y = x * _scale(x, eps)
    return ((y.to(a.dtype) * w if offset is None else y * (w + number(offset))).to(a.dtype),)


def rms_norm_backward(
    a: Arithmetic, x: Bounded, w: Bounded, dy: Bounded, eps: float, offset: float | None = None, dtotal: Bounded | None = None
) -> Bounds:
    """dx = s (g - x_hat mean(g x_hat)) with g = dy w, x_hat = s x; dw = sum over rows of dy x_hat.

    The CPU adds dw up in fp64; a GPU in each of 264 programs, and then those.
    """
    (rows, d), s = x.value.shape, _scale(x, eps)
    x_hat, g = x * s, dy * (w if offset is None else w + number(offset))
    mean = (g * x_hat).sum(-1, lanes(d)) / exact(d)
    dx = (s * (g - x_hat * mean)).rounded(4 * FP32)  # the CPU takes s out of the sum, and multiplies twice more
    if dtotal is not None:
        dx = dx.to(a.dtype) + dtotal
    kept = x_hat.to(a.dtype) if a.gpu and offset is None else x_hat
    dw = (dy * kept).sum(0, rows / 264 + 264 + 10 if a.gpu else 1)
    return dx.to(a.dtype), dw.to(a.dtype).moved(lambda v: v[0])


def rope(a: Arithmetic, x: Bounded, cos: Bounded, sin: Bounded) -> Bounds:
    half = cos.value.shape[-1]
    c, s = (t.moved(lambda v: v[:, None]) for t in (cos, sin))
    thirds = slice(half), slice(half, 2 * half), slice(2 * half, None)
    first, second, rest = (x.moved(lambda v, at=at: v[..., at]) for at in thirds)
    turned = (first * c - second * s).to(a.dtype), (second * c + first * s).to(a.dtype), rest
    return (Bounded(torch.cat([t.value for t in turned], -1), torch.cat([t.error for t in turned], -1)),)


def _gate(gate: Bounded, activation: str) -> tuple[Bounded, Bounded]:
    """u of gate / (1 + exp(-u)), and du / dgate."""
    if activation == "silu":
        return gate, exact(1.0)
    first, third, square = 2 * math.sqrt(2 / math.pi), 0.044715 * 2 * math.sqrt(2 / math.pi), gate * gate
    return gate * (number(first) + square * number(third)), number(first) + square * number(3 * third)


def swiglu(a: Arithmetic, gate: Bounded, up: Bounded, activation: str = "silu") -> Bounds:
    u, _ = _gate(gate, activation)
    return (((gate * u.sigmoid()).to(a.dtype) * up).to(a.dtype),)


def swiglu_backward(a: Arithmetic, gate: Bounded, up: Bounded, dy: Bounded, activation: str = "silu") -> Bounds:
    u, slope = _gate(gate, activation)
    s = u.sigmoid()
    act = gate * s
    dgate = dy * up * (s + act * (exact(1.0) - s) * slope)
    return dgate.to(a.dtype), (dy * act.to(a.dtype)).to(a.dtype)


def scale_logits(a: Arithmetic, x: Bounded, scale: float | None, softcap: float | None) -> Bounds:
    x = x if scale is None else (x * number(scale)).to(a.dtype)
    if softcap is None:
        return (x,)
    return (((x / number(softcap)).to(a.dtype).tanh().to(a.dtype) * number(softcap)).to(a.dtype),)


def scale_logits_backward(a: Arithmetic, x: Bounded, dy: Bounded, scale: float | None, softcap: float | None) -> Bounds:
    x, dy = (x, dy) if scale is None else ((x * number(scale)).to(a.dtype), dy * number(scale))
    if softcap is not None:
        t = (x / number(softcap)).to(a.dtype).tanh()
        dy = dy * (exact(1.0) - t * t)
    return (dy.to(a.dtype),)


@dataclass(frozen=True)
class Softmax:
    """Holds x - max of logits / temperature [R, V], e^(x - max), its sum, and that sum weighted by x - max. Any max will do."""

    x: Bounded
    e: Bounded
    sum: Bounded
    weighted: Bounded

    @staticmethod
    def of(logits: Bounded, temperature: float) -> "Softmax":
        x = logits / number(temperature)
        x = x - exact(x.value.amax(-1, keepdim=True))
        e, depth = x.exp(), lanes(min(BLOCK, x.value.shape[-1]))
        return Softmax(x, e, e.sum(-1, depth), (e * x).sum(-1, depth))

    @property
    def entropy(self) -> Bounded:
        return self.sum.log() - self.weighted / self.sum


def log_softmax(a: Arithmetic, logits: Bounded, temperature: float) -> Bounds:
    row = Softmax.of(logits, temperature)
    return (row.x - row.sum.log(),)


def row_logprobs(a: Arithmetic, logits: Bounded, ids: Tensor, temperature: float) -> Bounds:
    row = Softmax.of(logits, temperature)
    chosen = row.x.moved(lambda v: v.gather(-1, ids[:, None]))
    return (chosen - row.sum.log()).moved(lambda v: v[:, 0]), row.entropy.moved(lambda v: v[:, 0])


def row_logprobs_backward(
    a: Arithmetic, logits: Bounded, dlogprobs: Bounded, dentropy: Bounded, ids: Tensor, temperature: float
) -> Bounds:
    """(dlogprob (1[j = id] - p_j) - dentropy p_j (log p_j + entropy)) / temperature; 1 - p is the sum of the others."""
    row = Softmax.of(logits, temperature)
    own = F.one_hot(ids, logits.value.shape[-1]).bool()
    dlogprobs, dentropy = (g.moved(lambda v: v[:, None]) for g in (dlogprobs, dentropy))
    log_p = row.x - row.sum.log()
    p = log_p.exp()
    others = row.e.moved(lambda v: v.masked_fill(own, 0.0)).sum(-1, lanes(min(BLOCK, own.shape[-1]))) / row.sum
    target, rest = dlogprobs * others, -(dlogprobs * p)
    chosen = Bounded(torch.where(own, target.value, rest.value), torch.where(own, target.error, rest.error))
    return (((chosen - dentropy * p * (log_p + row.entropy)) / number(temperature)).to(a.dtype),)


def token_logprobs(
    a: Arithmetic, hidden: Bounded, weight: Bounded, ids: Tensor, temperature: float, scale=None, softcap=None
) -> Bounds:
    (logits,) = linear(a, hidden, weight)
    (logits,) = scale_logits(a, logits, scale, softcap)
    return row_logprobs(a, logits, ids, temperature)


def token_logprobs_backward(
    a: Arithmetic,
    hidden: Bounded,
    weight: Bounded,
    dlogprobs: Bounded,
    dentropy: Bounded,
    ids: Tensor,
    temperature: float,
    scale=None,
    softcap=None,
) -> Bounds:
    (logits,) = linear(a, hidden, weight)
    (scaled,) = scale_logits(a, logits, scale, softcap)
    (dlogits,) = row_logprobs_backward(a, scaled, dlogprobs, dentropy, ids, temperature)
    if scale is not None or softcap is not None:
        (dlogits,) = scale_logits_backward(a, logits, dlogits, scale, softcap)
    dhidden = a.matmul(dlogits, weight, weight.value.shape[0], a.dtype).to(a.dtype)
    dweight = a.matmul(dlogits.moved(lambda v: v.mT), hidden, len(hidden.value))
    return dhidden, dweight.to(a.dtype).to(a.dtype)  # each chunk's, and the whole


@dataclass(frozen=True)
class Scores:
    """Holds q, k, v [H, n, D] of one sequence, keys repeated for each query head; scores, and their tanh if they are capped."""

    q: Bounded
    k: Bounded
    v: Bounded
    scores: Bounded
    tanh: Bounded | None
    seen: Tensor

    @staticmethod
    def of(a: Arithmetic, q: Bounded, k: Bounded, v: Bounded, scale: float, window: int | None, softcap: float | None):
        group, n = q.value.shape[1] // k.value.shape[1], len(q.value)
        q = q.moved(lambda t: t.transpose(0, 1))
        k, v = (x.moved(lambda t: t.transpose(0, 1).repeat_interleave(group, 0)) for x in (k, v))
        x = a.matmul(q, k.moved(lambda t: t.mT), q.value.shape[-1]) * number(scale)
        tanh = None if softcap is None else (x / number(softcap)).tanh()
        x = x if softcap is None or tanh is None else tanh * number(softcap)
        i, j = torch.arange(n)[:, None], torch.arange(n)
        return Scores(q, k, v, x, tanh, (j <= i) & (j > i - (window or n)))

    def exp(self, shift: Bounded) -> Bounded:
        """e^(score - shift) of the keys that a query sees; a GPU scales both before it subtracts."""
        x = self.scores - shift
        x = Bounded(x.value, x.error + FP32 * (self.scores.most + shift.most))
        return x.moved(lambda t: t.masked_fill(~self.seen, 0.0)).exp().moved(lambda t: t.masked_fill(~self.seen, 0.0))


def _attention(a: Arithmetic, s: Scores) -> tuple[Bounded, Bounded]:
    """Output [H, n, D], and log sums [H, n, 1]. CPU: `chain4` of values, `lanes` of the sum; a GPU rescales as it goes."""
    n = s.scores.value.shape[-1]
    most = exact(s.scores.value.masked_fill(~s.seen, -torch.inf).amax(-1, keepdim=True))
    e = s.exp(most)
    total = e.sum(-1, 2 * n if a.gpu else lanes(n), 2 * FP32 if a.gpu else FP32)
    out = a.matmul(a.multiplied(e), s.v, 2 * n if a.gpu else n / 4 + 3) / total
    return out.to(a.dtype), most + total.log()


def _attention_backward(a: Arithmetic, s: Scores, dout: Bounded, scale: float, group: int) -> Bounds:
    """p = e^(score - log sum), ds = p (dout . v - dout . out); dq = ds k, dk = ds^T q, dv = p^T dout (Dao et al. 2022, B)."""
    (out, log_sum), dout = _attention(a, s), dout.moved(lambda t: t.transpose(0, 1))
    heads, n, dim = s.q.value.shape
    p, delta = s.exp(log_sum), (dout * out).sum(-1, dim)
    ds = p * (a.matmul(dout, s.v.moved(lambda t: t.mT), dim) - delta)
    if s.tanh is not None:
        ds = ds * (exact(1.0) - s.tanh * s.tanh)
    ds, p = a.multiplied(ds * number(scale)), a.multiplied(p)
    depth = 2 * n if a.gpu else n
    dq = a.matmul(ds, s.k, depth).to(a.dtype).moved(lambda t: t.transpose(0, 1))
    shared = []
    for weights, x in ((ds, s.q), (p, dout)):  # one sum over the queries of all heads that share the key
        each = a.matmul(weights.moved(lambda t: t.mT), x, depth * (1 if a.gpu else group))
        each = (each.to(a.dtype) if a.gpu else each).moved(lambda t: t.view(heads // group, group, n, dim))
        shared.append(each.sum(1, group).to(a.dtype).moved(lambda t: t[:, 0].transpose(0, 1)))
    return dq, *shared


def attention(
    a: Arithmetic,
    q: Bounded,
    k: Bounded,
    v: Bounded,
    dout: Bounded | None = None,
    *,
    lengths,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Bounds:
    """The output, or with `dout` the gradients of q, k and v."""
    parts: list[Bounds] = []
    for rows in _spans(lengths):
        one, g = ([x.moved(lambda t, r=rows: t[r]) for x in xs] for xs in ((q, k, v), () if dout is None else (dout,)))
        scores = Scores.of(a, *one, scale, window, softcap)
        if g:
            parts.append(_attention_backward(a, scores, g[0], scale, q.value.shape[1] // k.value.shape[1]))
        else:
            parts.append((_attention(a, scores)[0].moved(lambda t: t.transpose(0, 1)),))
    return tuple(Bounded(torch.cat([x.value for x in xs]), torch.cat([x.error for x in xs])) for xs in zip(*parts, strict=True))


def _spans(lengths) -> Iterator[slice]:
    ends = torch.tensor([0, *lengths], device="cpu").cumsum(0).tolist()
    return (slice(a, b) for a, b in pairwise(ends))


def moe_route(a: Arithmetic, logits: Bounded, ids: Tensor, renormalise: bool) -> Bounds:
    """Sums over experts, and over slots; weights are fp32 whatever the logits are."""
    e = (logits - exact(logits.value.amax(-1, keepdim=True))).exp()
    w = (e / e.sum(-1, logits.value.shape[-1])).moved(lambda t: t.gather(-1, ids))
    return (w / w.sum(-1, ids.shape[-1]) if renormalise else w,)


def moe_experts(
    a: Arithmetic, ids: Tensor, x: Bounded, w: Bounded, up: Bounded, down: Bounded, activation: str = "silu"
) -> Bounds:
    """Every row through every expert, of which its slots pick theirs."""
    of_experts = []
    for expert in range(len(up.value)):
        (both,) = linear(a, x, up.moved(lambda t, e=expert: t[e]))
        (inside,) = swiglu(a, *(both.moved(lambda t, i=i: t.chunk(2, -1)[i]) for i in (0, 1)), activation)
        of_experts.append(linear(a, inside, down.moved(lambda t, e=expert: t[e]))[0])
    y = Bounded(torch.stack([t.value for t in of_experts]), torch.stack([t.error for t in of_experts]))  # [E, R, D]
    rows, total = torch.arange(len(ids)), None
    for slot in range(ids.shape[1]):
        part = y.moved(lambda t, s=slot: t[ids[:, s], rows]) * w.moved(lambda t, s=slot: t[:, s, None])
        total = part if total is None else total + part
    assert total is not None
    return (total.to(a.dtype),)

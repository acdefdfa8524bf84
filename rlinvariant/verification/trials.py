"""Trials of each op on the ladder: operands in which another order of a sum shows, and a planted fault that it must see.

With ordinary operands a result that is rounded to bf16 hides the order in which it was summed, from every comparison. So
sums get operands that cancel; and a norm, in which nothing can cancel, gets rows whose results lie in the middle between two
bf16 numbers. The fault of an op that sums is the same sum in another order. An op without sums, a lookup or a formula of one
element, needs no such operands: its fault is one unit in the last place.

R: rows of an op, D: columns of a row; K: columns over which a product sums, N: rows of its weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bits import cancelling, words
from rlinvariant.verification.mixtures import cancelling_experts, logits_with_ties

Arguments = dict[str, Any]
"""Arguments of an op by their names in its schema."""
Call = Callable[[Arguments], tuple[Any, ...]]
"""An op, as a function that returns a tuple."""
TUNED = 8  # columns of a row that give its sum of squares the value that is wanted
LOUD = 2.0**9  # by which queries are larger than usual: the rounding errors of scores then move their softmax


@dataclass(frozen=True)
class Trial:
    """Says how one op is tried.

    Args:
        fault: what is planted, in words.
        wrong: computes the op with the fault.
        hard: returns other operands of the same shapes, which show it; None: the model's own do.
    """

    fault: str
    wrong: Callable[[Call, Arguments], tuple[Any, ...]]
    hard: Callable[[Arguments], Arguments] | None = None


def trial(name: str, arguments: Arguments) -> Trial:
    """Return how an op is tried that is called with such arguments."""
    if name == "qk_norm_rope":
        normed = arguments["q_weight"] is not None and arguments["q"].shape[-1] == 2 * arguments["cos"].shape[-1]
        return Trial("another order", _norms_backwards, _heads_near_ties) if normed else PLAIN
    return TRIALS.get(name, PLAIN)


def _flipped(a: Arguments, **dims: tuple[int, ...]) -> Arguments:
    return a | {name: a[name].flip(d) for name, d in dims.items()}


def _ulp(call: Call, a: Arguments) -> tuple[torch.Tensor | None, ...]:
    return tuple(words(x).add(1).view(x.dtype) for x in call(a))


def _linear_backwards(call: Call, a: Arguments) -> tuple[torch.Tensor | None, ...]:
    return call(_flipped(a, x=(-1,), weight=(-1,)))


def _norm_backwards(call: Call, a: Arguments) -> tuple[torch.Tensor | None, ...]:
    of_rows = {name: (-1,) for name in ("x", "residual", "weight") if name in a}
    return tuple(y.flip(-1) for y in call(_flipped(a, **of_rows)))


def _norms_backwards(call: Call, a: Arguments) -> tuple[torch.Tensor | None, ...]:
    """Sum each head's squares backwards. The two halves that are rotated change places: so does the sign of the angle."""
    weights = {name: (-1,) for name in ("q", "k", "q_weight", "k_weight", "cos", "sin")}
    turned = _flipped(a, **weights)
    return tuple(y.flip(-1) for y in call(turned | {"sin": -turned["sin"]}))


def _attention_backwards(call: Call, a: Arguments) -> tuple[torch.Tensor | None, ...]:
    return call(_flipped(a, q=(-1,), k=(-1,)))


def _head_backwards(call: Call, a: Arguments) -> tuple[torch.Tensor | None, ...]:
    ids = len(a["weight"]) - 1 - a["token_ids"]
    return call(_flipped(a, hidden=(-1,), weight=(0, 1)) | {"token_ids": ids})


def _route_backwards(call: Call, a: Arguments) -> tuple[torch.Tensor | None, ...]:
    """Choose the last of equal logits, and sum over experts backwards."""
    weights, ids = call(_flipped(a, logits=(-1,)))
    return weights, a["logits"].shape[-1] - 1 - ids


def _experts_backwards(call: Call, a: Arguments) -> tuple[torch.Tensor | None, ...]:
    """Sum both products of an expert, and the slots, backwards."""
    inside = a["gate_up"].unflatten(1, (2, -1)).flip(2, 3).flatten(1, 2)
    return call(_flipped(a, x=(-1,), ids=(-1,), weights=(-1,), down=(-1,)) | {"gate_up": inside})


def _cancelling_product(a: Arguments) -> Arguments:
    x, (n, k) = a["x"], a["weight"].shape
    x_RK, w_NK = (t.to(x.device) for t in cancelling(x.numel() // k, n, k, x.dtype))
    bias = None if a["bias"] is None else torch.zeros_like(a["bias"])
    return a | {"x": x_RK.view(x.shape), "weight": w_NK, "bias": bias}


def _cancelling_scores(a: Arguments) -> Arguments:
    q, k = a["q"], a["k"]
    (tokens, heads, d), kv_heads = q.shape, k.shape[1]
    q_RD, k_RD = (t.to(q.device) for t in cancelling(tokens * heads, len(k) * kv_heads, d, q.dtype))
    return a | {"q": (q_RD * LOUD).view(q.shape), "k": k_RD.view(k.shape)}


def near_ties(rows: int, d: int, eps: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return rows [R, D] whose x * rsqrt(mean(x^2) + eps) are half-way between two bf16 numbers, but for rounding errors.

    All columns of a row but a few are one number times signs and powers of two, so that all are half-way at once:
        x = m 2^e,  rsqrt(...) = n 2^k / m,  with n odd, of nine bits: x rsqrt(...) = n 2^(e + k)
    The others, ever smaller, bring the sum of squares to the one that this takes.
    """
    rng = torch.Generator().manual_seed(seed)
    m, n = (torch.randint(128, 256, (rows, 1), generator=rng).double() for _ in range(2))
    n, columns = 2 * n + 1, (rows, d - TUNED)
    sign = 1.0 - 2.0 * torch.randint(0, 2, columns, generator=rng)
    x = torch.cat([sign * m * torch.exp2(torch.randint(-13, -4, columns, generator=rng)), torch.zeros(rows, TUNED)], 1).double()
    total = x.square().sum(1, keepdim=True)
    k = torch.floor(torch.log2(m / n * (total / d + eps).rsqrt()))
    left = d * ((m / n * torch.exp2(-k)).square() - eps) - total
    for column in range(d - TUNED, d):
        mantissa, exponent = torch.frexp(left.clamp(min=0.0).sqrt())
        x[:, column : column + 1] = torch.floor(mantissa * 256) / 256 * torch.exp2(exponent)
        left = left - x[:, column : column + 1].square()
    return x[:, torch.randperm(d, generator=rng)].to(dtype)


def _near_ties_like(x: Tensor, eps: float) -> Tensor:
    return near_ties(x.numel() // x.shape[-1], x.shape[-1], eps, x.dtype).view(x.shape).to(x.device)


def _rows_near_ties(a: Arguments) -> Arguments:
    """Return such rows, in two halves where a residual is added, with weights that multiply by 1."""
    rows = _near_ties_like(a["x"], a["eps"])
    of = {"x": rows / 2, "residual": rows / 2} if "residual" in a else {"x": rows}
    return a | of | {"weight": torch.full_like(a["weight"], 1.0 - (a["offset"] or 0.0))}


def _heads_near_ties(a: Arguments) -> Arguments:
    ones = {name: torch.full_like(a[name], 1.0 - (a["offset"] or 0.0)) for name in ("q_weight", "k_weight")}
    return a | ones | {name: _near_ties_like(a[name], a["eps"]) for name in ("q", "k")}


def _tied_logits(a: Arguments) -> Arguments:
    """Return logits of which every other row has ties."""
    x = a["logits"].clone()
    x[::2] = logits_with_ties(len(x), x.shape[1], x.dtype).to(x.device)[::2]
    return a | {"logits": x}


def _cancelling_mixture(a: Arguments) -> Arguments:
    (rows, slots), (experts, width, inside), dtype = a["ids"].shape, a["down"].shape, a["x"].dtype
    found = cancelling_experts(rows, slots, experts, width, inside, dtype)
    hard = dict(zip(("x", "ids", "weights", "gate_up", "down"), found, strict=True))
    return a | {name: t.to(a["x"].device) for name, t in hard.items()}


PLAIN = Trial("an ulp", _ulp)
TRIALS = {
    "linear": Trial("another order", _linear_backwards, _cancelling_product),
    "rms_norm": Trial("another order", _norm_backwards, _rows_near_ties),
    "add_rms_norm": Trial("another order", _norm_backwards, _rows_near_ties),
    "attention": Trial("another order", _attention_backwards, _cancelling_scores),
    "token_logprobs": Trial("another order", _head_backwards),
    "moe_route": Trial("another order", _route_backwards, _tied_logits),
    "moe_experts": Trial("another order", _experts_backwards, _cancelling_mixture),
}
"""An op's name -> how it is tried; all others by `PLAIN`."""


def by_definition(name: str, a: Arguments) -> tuple[torch.Tensor | None, ...]:
    """Return what an op's results must be, where no rounding has a part in it; None for results of which that is not so."""
    return (None, ops.moe_route_ref(*a.values())[1]) if name == "moe_route" else ()

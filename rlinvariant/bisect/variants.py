"""Known ways to compute an op otherwise: if one gives the wrong bits again, it is the cause.

Each generator takes what an op took, one row of it, and yields (what is done otherwise, the value). A variant is written with
torch alone where a stock kernel is meant, and with `rlinvariant.ops` where all but one thing is ours.

Shapes: K input and N output columns, D features, P positions, H and H_kv heads, R rotated features, V vocabulary.
"""

import functools
from collections.abc import Iterator
from dataclasses import astuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant import bits, ops
from rlinvariant.bisect.trials import Trial
from rlinvariant.ops.lora import widened_by
from rlinvariant.ops.threshold import rows_threshold
from rlinvariant.types import Json

Variants = Iterator[tuple[str, Tensor]]


def linear(x: Tensor, w: Tensor, b: Tensor | None, together: int) -> Variants:
    """Vary `ops.linear`: x [K], w [N, K] as the side keeps it, perhaps in fp32, b [N] or None, `together` rows in the call."""
    dtype, k = x.dtype, x.shape[0]
    x, cast, bias = x[None], w.to(dtype), None if b is None else b.to(dtype)
    for parts in (2, 3, 4, 8):
        bounds = [k * i // parts for i in range(parts + 1)]
        pairs = [(x[:, i:j], cast[:, i:j].contiguous()) for i, j in zip(bounds, bounds[1:], strict=False)]
        rounded = sum((ops.linear(a.contiguous(), c) for a, c in pairs[1:]), ops.linear(pairs[0][0].contiguous(), pairs[0][1]))
        yield f"split-K: the sum over K is taken in {parts} parts, each rounded to {name(dtype)}", _biased(rounded, bias)[0]
    if bias is not None:
        yield "the bias is added after rounding, not before", (ops.linear(x, cast) + bias)[0]
        yield "the bias is left out", ops.linear(x, cast)[0]
    if not bits.same(w.float(), cast.float()):
        wide = None if b is None else b.float()
        yield f"the weight is not cast to {name(dtype)} at use", F.linear(x.float(), w.float(), wide).to(dtype)[0]
    for parts in (2, 4, 8) if dtype != torch.float32 else ():
        bounds = [k * i // parts for i in range(parts + 1)]
        sums = [F.linear(x[:, i:j].float(), cast[:, i:j].float()) for i, j in zip(bounds, bounds[1:], strict=False)]
        whole = functools.reduce(torch.add, sums)
        yield f"split-K: the sum over K is taken in {parts} fp32 parts", _biased(whole, bias).to(dtype)[0]
    for rows in dict.fromkeys((together, 1)):
        yield f"torch's own linear on {rows} rows: a stock kernel", F.linear(x.expand(rows, k).contiguous(), cast, bias)[0]


def lora_linear(x: Tensor, together: int, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Variants:
    """Vary `ops.lora_linear`: x [K], w [N, K], bias [N] or None, a [R, K] and b [N, R], `together` rows in the call."""
    dtype, wide = x.dtype, widened_by(x[None], a.to(x.dtype))[0]
    without = ops.linear(x[None], w, bias)[0]
    yield "the adapter is left out", without
    merged = (w.float() + b.float() @ a.float()).to(dtype)
    yield "the adapter is merged into the weight, which is rounded", ops.linear(x[None], merged, bias)[0]
    apart = without + ops.linear(wide[None, len(x) :].contiguous(), b)[0]
    yield "the adapter's product is added to one that is rounded already, as PEFT does", apart
    yield from linear(wide, torch.cat([w.to(dtype), b.to(dtype)], -1), bias, together)


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Variants:
    """Vary `ops.rms_norm`: x [..., D], w [D]."""
    dtype, w = x.dtype, w.to(x.dtype)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    yield "other rounding order: multiplied by the weight before rounding, not after", (scaled * w.float()).to(dtype)
    yield "the weight is left out", scaled.to(dtype)
    yield "multiplied by 1 + weight", (scaled * (1 + w.float())).to(dtype)
    for other in (0.0, 1e-8, 1e-6, 1e-5, 1e-3):
        if other != eps:
            yield f"eps is {other}, not {eps}", ops.rms_norm(x, w, other)
    yield f"computed in {name(dtype)}", x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w
    yield "torch's own mean: a stock kernel", scaled.to(dtype) * w


def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> Variants:
    """Vary `ops.add_rms_norm`: x and residual [D], w [D]."""
    total = x.float() + residual.float()
    for what, value in rms_norm(total, w.float(), eps):
        if what.startswith(("other rounding", "torch's")):
            yield f"the sum with the residual is not rounded before the norm ({what})", value.to(x.dtype)
    yield "the residual is left out", ops.rms_norm(x, w, eps)
    yield from rms_norm(x + residual, w, eps)


def rotate(x: Tensor, w: Tensor | None, table: dict[int, tuple[Tensor, Tensor]], position: int, eps: float) -> Variants:
    """Vary `ops.qk_norm_rope`: x [H, D] of a token, w [D] or None, `table` from some positions to cos and sin, [R/2] fp32."""
    cos, sin = table[position]

    def turn(y: Tensor, c: Tensor = cos, s: Tensor = sin) -> Tensor:
        return ops.rope(y[None], c[None], s[None])[0]

    normed = x if w is None else ops.rms_norm(x, w, eps)
    if w is not None:
        yield "the norm is left out", turn(x)
        for what, value in rms_norm(x, w, eps):
            yield what, turn(value)
        yield "normalised after the rotation, not before", ops.rms_norm(turn(x), w, eps)
    yield "the rotation is left out", normed
    for other, (c, s) in table.items():
        if other != position:
            yield f"position off by {other - position:+d}: rotated by the angle of position {other}", turn(normed, c, s)
    narrow = cos.to(x.dtype), sin.to(x.dtype)
    yield f"cos and sin are rounded to {name(x.dtype)}", turn(normed, narrow[0].float(), narrow[1].float())
    half = cos.shape[-1]
    a, b = normed[:, :half], normed[:, half : 2 * half]
    for c, s, what in ((*narrow, f"in {name(x.dtype)}, each product rounded, as transformers does"), (cos, sin, "without fma")):
        turned = torch.cat([a * c + -b * s, b * c + a * s], -1).to(x.dtype)
        yield f"rotated {what}", torch.cat([turned, normed[:, 2 * half :]], -1)
    pairs = normed[:, : 2 * half].float().unflatten(-1, (half, 2))
    left, right = pairs.unbind(-1)
    turned = torch.stack([left * cos - right * sin, right * cos + left * sin], -1).flatten(-2).to(x.dtype)
    yield "neighbouring columns are paired, not halves", torch.cat([turned, normed[:, 2 * half :]], -1)


def rope_table(table: dict[int, Tensor], position: int, inv_freq: Tensor | None, dtype: torch.dtype) -> Variants:
    """Vary the rope table: `table` from positions to cos and sin, [R] together; inv_freq [R/2] or None."""
    for other, row in table.items():
        if other != position:
            yield f"position off by {other - position:+d}: the row of position {other}", row
    yield f"rounded to {name(dtype)}", table[position].to(dtype).float()
    if inv_freq is not None:
        angles = torch.tensor(float(position)) * inv_freq.float().cpu()
        yield "the table is made with fp32 angles, not fp64", torch.cat([angles.cos(), angles.sin()]).to(table[position])


def attention(q: Tensor, k: Tensor, v: Tensor, position: int, scale: float) -> Variants:
    """Vary `ops.attention`: q [P, H, D], k and v [P, H_kv, D] of the whole sequence; the value is row `position`, [H, D]."""
    end, dim = position + 1, q.shape[-1]
    seen = range(end)

    def ours(keys: range | list[int], with_scale: float = scale) -> Tensor:
        """Run our kernel on as many equal queries as there are keys: the last query sees all of them."""
        cu = torch.tensor([0, len(keys)], dtype=torch.int32, device=q.device)
        at = list(keys)
        return ops.attention(q[position].expand(len(at), -1, -1).contiguous(), k[at], v[at], cu, with_scale, len(at))[-1]

    def wide(keys: range | list[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute in fp32 and round once, or round scores and probabilities to `dtype`, as eager attention does."""
        groups, at = q.shape[1] // k.shape[1], list(keys)
        kk, vv = (x[at].to(dtype).repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))  # [H, keys, D]
        scores = (q[position].to(dtype)[:, None] @ kk.transpose(1, 2)) * scale
        return (scores.softmax(-1, dtype=torch.float32).to(dtype) @ vv)[:, 0].to(q.dtype)

    for what, keys in _masks(position, len(k)):
        yield what, ours(keys)
        yield what, wide(keys)
    for other in (dim**-0.5, 1 / dim, 1.0):
        if abs(other - scale) > 1e-6 * scale:
            yield f"the scale is {other:.6g}, not {scale:.6g}", ours(seen, other)
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads > kv_heads > 1:
        order = [h % kv_heads for h in range(heads)]
        yield "queries are matched with the wrong key heads", own_attention(q, k[:, order], v[:, order], position, scale)
    qq, kk, vv = (x[:end].transpose(0, 1)[None] for x in (q, k, v))
    kk, vv = (x.repeat_interleave(heads // kv_heads, 1) for x in (kk, vv))
    whole = F.scaled_dot_product_attention(qq, kk, vv, is_causal=True, scale=scale)
    yield "torch's scaled_dot_product_attention over the sequence: a stock kernel", whole[0, :, -1]
    alone = F.scaled_dot_product_attention(qq[:, :, -1:], kk, vv, scale=scale)
    yield "torch's scaled_dot_product_attention of one query: a stock kernel", alone[0, :, -1]
    yield f"scores and probabilities are rounded to {name(q.dtype)} (eager attention): a stock kernel", wide(seen, q.dtype)
    yield "another order of summation, as of split keys or a stock kernel (fp32, one rounding)", wide(seen)


def _masks(position: int, keys: int) -> Iterator[tuple[str, range]]:
    """Yield wrong masks, as (what is wrong, the keys that are seen)."""
    if position:
        yield "mask off by one: a token does not see itself", range(position)
    if position + 1 < keys:
        yield "mask off by one: a token sees the next one", range(position + 2)
    for size in range(position, 0, -1):
        yield f"sliding window: only the last {size} of {position + 1} keys are seen", range(position + 1 - size, position + 1)


def own_attention(q: Tensor, k: Tensor, v: Tensor, position: int, scale: float, **settings: Json) -> Tensor:
    """Return row `position`, [H, D], of `ops.attention` over one sequence."""
    end = position + 1
    cu = torch.tensor([0, end], dtype=torch.int32, device=q.device)
    return ops.attention(q[:end].contiguous(), k[:end].contiguous(), v[:end].contiguous(), cu, scale, end, **settings)[-1]


def swiglu(gate: Tensor, up: Tensor) -> Variants:
    """Vary `ops.swiglu`: gate and up [D]."""
    wide = gate.float()
    once = (wide * torch.sigmoid(wide) * up.float()).to(gate.dtype)
    yield "the inner rounding is left out: silu is not rounded before the product", once
    yield "torch's own silu: a stock kernel", F.silu(gate) * up
    yield "gate and up are exchanged", ops.swiglu(up, gate)
    yield "GELU in place of SiLU", F.gelu(gate, approximate="tanh") * up


def theta(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Return `ops.threshold` of logits [R, V], the same settings for all rows, [R, 1]; -inf where they keep all."""
    t = torch.full((len(logits),), temperature, device=logits.device)
    found = rows_threshold(logits.contiguous(), t, int(top_k), top_p, min_p)
    return (torch.full_like(t, -torch.inf) if found is None else found)[:, None]


def threshold(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Variants:
    """Vary `ops.threshold`: logits [V] give theta [1]."""
    kept = logits.float().sort(descending=True).values
    for what, settings in (("top_p", (top_k, 1.0, min_p)), ("top_k", (0, top_p, min_p)), ("min_p", (top_k, top_p, 0.0))):
        yield f"{what} is left out", theta(logits[None], temperature, *settings)[0]
    yield "the temperature is left out", theta(logits[None], 1.0, top_k, top_p, min_p)[0]
    for count in range(1, len(kept) + 1):
        yield f"another kernel: what it keeps are the {count} likeliest tokens", kept[count - 1 : count]


def log_prob(logits: Tensor, token: int, trial: Trial, others: dict[int, Tensor]) -> Variants:
    """Vary `ops.log_softmax`: logits [V] give the log-prob [1]; `others` from offsets to logits of neighbouring positions."""
    temperature, truncation = trial.temperature, astuple(trial.truncation)
    one, t = torch.ones(1, device=logits.device), torch.full((1,), temperature, device=logits.device)

    def ours(x: Tensor, at: Tensor = one) -> Tensor:
        x = x[None].contiguous()
        return ops.log_softmax(x, at, rows_threshold(x, at, *truncation))[0, token : token + 1]

    if trial.truncation:
        whole = ops.log_softmax(logits[None].contiguous(), t)[0, token : token + 1]
        yield f"{trial.truncation} is left out: the softmax is over all tokens", whole
    yield "the temperature is multiplied by as a reciprocal, not divided by", ours(logits.float() * (1 / t))
    if temperature != 1:
        yield "the temperature is left out", ours(logits)
        yield f"logits / temperature are rounded to {name(logits.dtype)}", ours((logits.float() / t).to(logits.dtype))
    for extra in range(1, 257):
        if (len(logits) + extra) % 16 == 0:
            padded = F.pad(logits, (0, extra))
            what = f"vocabulary padding: the softmax sums {extra} columns of zeros beyond the {len(logits)} of the vocabulary"
            yield what, ours(padded, t)
    for offset, row in others.items():
        yield f"position off by {offset:+d}: predicted from a neighbouring position", ours(row, t)
    scaled = logits.float() / t
    yield "torch's own log_softmax: a stock kernel", scaled.log_softmax(-1)[token : token + 1]
    yield "torch's logsumexp", (scaled - scaled.logsumexp(-1))[token : token + 1]
    kept = scaled.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    whole = ops.log_softmax(logits[None].contiguous(), t)[0, token : token + 1].double()
    for count in range(int((scaled > scaled[token]).sum()) + 1, len(kept)):
        yield f"renormalised over the {count} likeliest tokens (top_k or top_p)", (whole - kept[count - 1].log()).float()


def name(dtype: torch.dtype) -> str:
    """Return a dtype's short name: `bfloat16`."""
    return str(dtype).removeprefix("torch.")

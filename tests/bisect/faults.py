"""Faults that the first batch shows. Each function returns a context in which one side is wrong."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from rlinvariant import ops
from rlinvariant.bisect import both_sides
from rlinvariant.bisect.variants import own_attention
from rlinvariant.sampler import vllm_linear
from rlinvariant.trainer import score as scoring
from tests.bisect.pairs import TRIAL, VOCABULARY, changed, halves, replaced, ulp
from tests.parity.harness import off_by_an_ulp


@contextlib.contextmanager
def rewritten(layer, change):
    """Change a weight of the sampler, which then multiplies by the weight itself and not by a packed copy."""
    with changed(layer.weight, change), replaced(layer, "packed", {}):
        yield


def ulp_in_up(pair):
    return rewritten(pair.sampler("layers.1.mlp.gate_up_proj"), lambda w: ulp(w[384 + 7]))


def one_layer_stale(pair):
    return rewritten(pair.sampler("layers.1.self_attn.o_proj"), lambda w: w.mul_(1.01))


@contextlib.contextmanager
def all_stale(pair):
    newer = {n: p.detach().clone() for n, p in pair.model.named_parameters()}
    try:
        with torch.no_grad():
            for p in pair.model.parameters():
                p.mul_(1.02)
        yield
    finally:
        with torch.no_grad():
            for n, p in pair.model.named_parameters():
                p.copy_(newer[n])


def head_ulp(pair):
    return replaced(vllm_linear._Head, "apply", off_by_an_ulp(40))


def split_k(pair):
    down = pair.sampler("layers.1.mlp.down_proj")
    return replaced(down, "forward", lambda x: halves(x, down.weight))


def split_k_fp32(pair):
    """Sum the trainer's product in two parts of fp32."""
    down = pair.trainer("layers.0.mlp.down_proj")

    def forward(x):
        w = down.weight.to(x.dtype).float()
        return sum(x[..., s].float() @ w[:, s].t() for s in (slice(0, 192), slice(192, 384))).to(x.dtype)  # type: ignore[union-attr]

    return replaced(down, "forward", forward)


def tile_switch(pair):
    down = pair.sampler("layers.1.self_attn.o_proj")
    forward = down.forward
    few = 16  # of 12 sequences that decode, and more rows when they are prefilled

    def switched(x):
        return halves(x, down.weight) if x.reshape(-1, x.shape[-1]).shape[0] <= few else forward(x)

    return replaced(down, "forward", switched)


@contextlib.contextmanager
def tile_switch_of_the_op(pair):
    """Let the op itself depend on the number of rows, on both sides, as a changed kernel does."""
    linear: Any = sys.modules["rlinvariant.ops.linear"]

    def faulty(right):
        def product(x, w, b):
            if len(x) > 16 or w.shape != (256, 384):
                return right(x, w, b)
            return sum(right(x[:, s].contiguous(), w[:, s].contiguous(), None) for s in (slice(0, 192), slice(192, 384)))

        return product

    with contextlib.ExitStack() as stack:
        for route in ("_vendor", "_written"):
            stack.enter_context(replaced(linear, route, faulty(getattr(linear, route))))
        for layer in (0, 1):
            stack.enter_context(replaced(pair.sampler(f"layers.{layer}.mlp.down_proj"), "packed", {}))
        yield


def norm_order(pair):
    norm = pair.sampler("layers.1.input_layernorm")

    def forward(x):
        wide = x.float()
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * norm.weight.float()
        return y.to(x.dtype)

    return replaced(norm, "forward", forward)


def other_eps(pair):
    return replaced(pair.sampler("norm"), "variance_epsilon", 1e-3)


def swiglu_rounding(pair):
    mlp = pair.sampler("layers.0.mlp")

    def forward(x):
        gate, up = mlp.gate_and_up(x)
        return mlp.down_proj((F.silu(gate.float()) * up.float()).to(x.dtype))

    return replaced(mlp, "forward", forward)


@contextlib.contextmanager
def rope_fp32(pair):
    rotary = pair.sampler("rotary_emb")
    inv_freq = 1.0 / (10000.0 ** (torch.arange(0, 64, 2).float() / 64))
    angles = torch.arange(256).float()[:, None] * inv_freq
    with replaced_buffers(rotary, cos_table=angles.cos(), sin_table=angles.sin()):
        yield


@contextlib.contextmanager
def replaced_buffers(module, **buffers):
    kept = {name: getattr(module, name) for name in buffers}
    for name, value in buffers.items():
        setattr(module, name, value.to(kept[name]))
    yield
    for name, value in kept.items():
        setattr(module, name, value)


def no_q_norm(pair):
    """Leave out the trainer's norm of queries."""
    attention = pair.trainer("layers.1.self_attn")
    heads = attention.heads

    def without(q, k, v, cos, sin):
        turned = heads(q, k, v, cos, sin)
        b, t, half = q.shape[0], q.shape[1], cos.shape[-1]
        angles = (x.expand(b, t, half).flatten(0, 1) for x in (cos, sin))
        plain = ops.rope(q.view(b * t, -1, 64), *angles)
        return plain.view(b, t, -1, 64).transpose(1, 2), turned[1], turned[2]

    return replaced(attention, "heads", without)


def attend(pair, layer: int, one: Callable[..., torch.Tensor]):
    """Compute the sampler's attention of a layer by `one(q, k, v, position, scale)`, q, k, v [P, heads, D] of a sequence."""
    impl = pair.attention(layer)

    def forward(layer, query, key, value, kv_cache, m, output, *args, **kwargs):
        starts, lens = m.cu_seqlens_q.tolist(), m.kv_lens.tolist()
        for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False)):
            pages = kv_cache[m.block_table[i].long()].transpose(1, 2).flatten(0, 1)[: lens[i]]  # [P, H_kv, 2 D]
            k, v = pages.split(64, -1)
            q = torch.zeros(lens[i], 4, 64, dtype=query.dtype)
            q[lens[i] - (b - a) :] = query[a:b].view(b - a, 4, 64)
            for row in range(a, b):
                output.view(-1, 4, 64)[row] = one(q, k, v, lens[i] - (b - row), impl.scale)
        return output

    return replaced(impl, "forward", forward)


def windowed(pair):
    def one(q, k, v, p, scale):
        keys = slice(max(0, p - 15), p + 1)
        kk, vv = (x[keys].float().repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
        return ((q[p].float()[:, None] @ kk.transpose(1, 2) * scale).softmax(-1) @ vv)[:, 0]

    return attend(pair, 1, one)


def asked_for_a_window(pair):
    """Ask the op for a window that the trainer does not have."""
    return attend(pair, 1, lambda q, k, v, p, scale: own_attention(q, k, v, p, scale, window=16))


def sdpa(pair):
    def one(q, k, v, p, scale):
        qq, kk, vv = (x.transpose(0, 1)[None] for x in (q[p : p + 1], k[: p + 1], v[: p + 1]))
        kk, vv = (x.repeat_interleave(2, 1) for x in (kk, vv))
        return F.scaled_dot_product_attention(qq, kk, vv, scale=scale)[0, :, 0]

    return attend(pair, 0, one)


def a_key_in_the_cache(pair):
    impl = pair.attention(1)
    update = impl.do_kv_cache_update

    def faulty(layer, key, value, *args):
        key = key.clone()
        ulp(key[:, 0])
        update(layer, key, value, *args)

    return replaced(impl, "do_kv_cache_update", faulty)


def positions_shifted(pair):
    rotary = pair.trainer("rotary_emb")
    forward = rotary.forward
    return replaced(rotary, "forward", lambda x, position_ids, *args: forward(x, position_ids + 1, *args))


def predicted_one_early(pair):
    pack = scoring.pack

    def shifted(*args):
        packed = pack(*args)
        return replace(packed, predicted_from=(packed.predicted_from - 1).clamp(min=0))

    return replaced(scoring, "pack", shifted)


def reciprocal(pair):
    """Multiply the logits of one request by the reciprocal of its temperature."""
    sample = ops.sample

    def faulty(logits, temperature, seeds, positions, theta=None):
        tokens, logprobs, ranks = sample(logits, temperature, seeds, positions, theta)
        _, wrong, _ = sample(logits.float() * (1 / temperature)[:, None], torch.ones_like(temperature), seeds, positions)
        return tokens, torch.where(seeds == TRIAL.seeds[7], wrong, logprobs), ranks

    return replaced(ops, "sample", faulty)


def all_tokens_in_the_trainer(pair):
    score = both_sides.score
    return replaced(both_sides, "score", lambda *given: score(*given[:-1]))


def other_top_p(pair):
    score = both_sides.score
    return replaced(both_sides, "score", lambda *given: score(*given[:-1], replace(given[-1], top_p=0.72)))


def cut_in_a_group(pair):
    """Let the sampler's threshold keep one token more than it should, as another kernel may."""
    threshold = ops.threshold

    def lower(logits, *settings):
        theta = threshold(logits, *settings)
        below = logits.float().masked_fill(logits.float() >= theta[:, None], -torch.inf).amax(-1)
        return torch.where(below > -torch.inf, below, theta)

    return replaced(ops, "threshold", lower)


def padded_vocabulary(pair):
    sample = ops.sample

    def faulty(logits, temperature, seeds, positions, theta=None):
        tokens, _, ranks = sample(logits, temperature, seeds, positions, theta)
        logprobs = ops.log_softmax(F.pad(logits, (0, 128 - VOCABULARY)), temperature).gather(1, tokens[:, None])[:, 0]
        return tokens, logprobs, ranks

    return replaced(ops, "sample", faulty)


@contextlib.contextmanager
def scaled(pair):
    """Scale the output of a whole MLP."""
    mlp = pair.sampler("layers.1.mlp")
    forward = mlp.forward
    with replaced(mlp, "forward", lambda x: forward(x) * 1.01):
        yield


@contextlib.contextmanager
def upcast(pair):
    def wide(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state.float()

    hook = pair.model.model.register_forward_hook(wide)
    yield
    hook.remove()

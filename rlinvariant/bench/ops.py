"""Each op on a CPU against what it takes the place of: PyTorch's, transformers' or vLLM's own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from rlinvariant import ops
from rlinvariant.bench.cases import Case, call, check, drawn_reference, truncated_cases
from rlinvariant.bench.measure import Row, pair

EPS = 1e-6
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Size:
    """Holds the size of a model, and of a batch of `sequences` of `length` tokens each."""

    name: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    sequences: int
    length: int

    @property
    def head_dim(self) -> int:
        return 32 if self.hidden <= 128 else 64


RECIPE = Size("recipe", 128, 384, 4, 2, 98, 128, 40)
LARGER = Size("512", 512, 1408, 8, 4, 32000, 16, 256)


def rows(tiny: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    for size in [Size("tiny", 128, 64, 4, 2, 98, 8, 16)] if tiny else [RECIPE, LARGER]:
        for case in _cases(size):
            yield _row(case, 0.05 if tiny else 2.0)


def _row(case: Case, seconds: float) -> Row:
    """Check the bits, then time."""
    equal = check(case)
    assert equal["ours"], f"{case.name}: a row's bits depend on its batch"
    ours, stock = (call(f, case.inputs, case.gradients) for f in (case.ours, case.stock))
    return Row(bench="ops", case=case.name, target=None, bits_equal=equal, **pair(ours, stock, seconds))


def _cases(s: Size) -> Iterator[Case]:
    tokens, decode = s.sequences * s.length, s.sequences
    for m in sorted({1, 16, decode, tokens}):
        yield from _linear(s, m, train=m == tokens)
        yield from _elementwise(s, m, train=m == tokens)
        yield from _mixture(s, m, train=m == tokens)
    yield from _attention(s)
    yield from _head(s, min(tokens, 1024 if s.vocab > 10000 else tokens), decode)


def _name(s: Size, op: str, shape: str, train: bool = False) -> str:
    return f"{op}, {s.name}, {shape}, {'forward + backward' if train else 'forward'}"


def _linear(s: Size, m: int, train: bool) -> Iterator[Case]:
    shape, bf16 = f"{m} x {s.hidden} -> {s.mlp}", torch.bfloat16
    x, w = torch.randn(m, s.hidden), torch.randn(s.mlp, s.hidden) / s.hidden**0.5
    yield Case(_name(s, "linear", shape), ops.linear, ops.linear_ref, F.linear, (x.to(bf16), w.to(bf16)), 1)
    yield Case(_name(s, "linear fp32", shape), ops.linear, ops.linear_ref, F.linear, (x, w), 1)
    a, b = torch.randn(16, s.hidden) / s.hidden**0.5, torch.randn(s.mlp, 16) / 100
    peft = lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a), b)  # noqa: E731
    adapted = tuple(t.to(bf16) for t in (x, w, a, b))
    yield Case(_name(s, "lora_linear", shape), ops.lora_linear, ops.lora_linear_ref, peft, adapted, 1)
    if train:  # fp32 masters
        stock = lambda x, w: F.linear(x, w.to(x.dtype))  # noqa: E731
        yield Case(_name(s, "linear", shape, True), ops.linear, ops.linear_ref, stock, (x.to(bf16), w), 1, gradients=(0, 1))
    else:
        vllm = _vllm_cpu()[1]
        packed, n = torch.ops._C.convert_weight_packed(w.to(bf16)), s.mlp
        stock = lambda x, w: vllm.weight_packed_linear_cpu(x, packed, n, None)  # noqa: E731
        name = _name(s, "linear (stock: vLLM's)", shape)
        yield Case(name, ops.linear, ops.linear_ref, stock, (x.to(bf16), w.to(bf16)), 1)


def _elementwise(s: Size, m: int, train: bool) -> Iterator[Case]:
    if m == 1:
        return
    x, y = torch.randn(2, m, s.hidden, dtype=torch.bfloat16)
    norm = Qwen3RMSNorm(s.hidden, EPS)

    def rms(x: Tensor, w: Tensor) -> Tensor:
        norm._parameters["weight"] = w  # type: ignore[assignment]
        return norm(x).to(x.dtype)

    def add_rms(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return rms(x + y, w), x + y

    half = s.head_dim // 2
    q, k = (torch.randn(m, n, s.head_dim, dtype=torch.bfloat16) for n in (s.heads, s.kv_heads))
    angle = torch.arange(m)[:, None] / 10000 ** (torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()

    def turn(rope: Callable[..., Tensor], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q, cos, sin), rope(k, cos, sin)

    def turn_stock(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        wide = [torch.cat((x, x), -1)[None].to(q.dtype) for x in (cos, sin)]
        turned = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], wide[0], wide[1])
        return tuple(x[0].transpose(0, 1) for x in turned)

    gate, up = torch.randn(2, m, s.mlp, dtype=torch.bfloat16)
    w = torch.ones(s.hidden)
    for both in (False, True) if train else (False,):
        wide, heads = f"{m} x {s.hidden}", f"{m} x {s.heads}+{s.kv_heads} x {s.head_dim}"
        weight = w if both else w.bfloat16()
        two, three = ((0, 1), (0, 1, 2)) if both else ((), ())
        ours, ref = (partial(f, eps=EPS) for f in (ops.rms_norm, ops.rms_norm_ref))
        yield Case(_name(s, "rms_norm", wide, both), ours, ref, rms, (x, weight), 1, gradients=two)
        ours, ref = (partial(f, eps=EPS) for f in (ops.add_rms_norm, ops.add_rms_norm_ref))
        yield Case(_name(s, "add_rms_norm", wide, both), ours, ref, add_rms, (x, y, weight), 2, gradients=three)
        ours, ref = (partial(turn, f) for f in (ops.rope, ops.rope_ref))
        yield Case(_name(s, "rope", heads, both), ours, ref, turn_stock, (q, k, cos, sin), 4, gradients=two)
        stock = lambda gate, up: F.silu(gate) * up  # noqa: E731
        shape = f"{m} x {s.mlp}"
        yield Case(_name(s, "swiglu", shape, both), ops.swiglu, ops.swiglu_ref, stock, (gate, up), 2, gradients=two)


def _mixture(s: Size, m: int, train: bool) -> Iterator[Case]:
    """Return a router of 16 experts, and those, of which 4 together are as wide as the MLP, against transformers' own."""
    experts, slots, inside, bf16 = 16, 4, s.mlp // 4, torch.bfloat16
    config: Any = Qwen3MoeConfig(
        hidden_size=s.hidden, num_experts=experts, num_experts_per_tok=slots, moe_intermediate_size=inside
    )
    config._experts_implementation = "eager"
    logits, theirs = torch.randn(m, experts), Qwen3MoeExperts(config)
    weights, ids = ops.moe_route(logits, slots, True)
    x, up, down = (
        torch.randn(*shape) / shape[-1] ** 0.5
        for shape in ((m, s.hidden), (experts, 2 * inside, s.hidden), (experts, s.hidden, inside))
    )

    def routed(logits: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = torch.softmax(logits.float(), -1).topk(slots)
        return w / w.sum(-1, keepdim=True), ids

    def stock(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
        theirs._parameters |= {"gate_up_proj": up.to(x.dtype), "down_proj": down.to(x.dtype)}  # type: ignore[dict-item]
        return theirs(x, ids, w)

    ours, ref = (partial(f, slots=slots, renormalise=True) for f in (ops.moe_route, ops.moe_route_ref))
    yield Case(_name(s, "moe_route", f"{m} x {experts}"), ours, ref, routed, (logits,), 1)
    shape = f"{m} x {s.hidden} -> {slots} of {experts} x {inside}"
    for both in (False, True) if train else (False,):
        held = (up, down) if both else (up.to(bf16), down.to(bf16))
        name, by = _name(s, "moe_experts", shape, both), (0, 2, 3, 4) if both else ()
        yield Case(name, ops.moe_experts, ops.moe_experts_ref, stock, (x.to(bf16), ids, weights, *held), 3, gradients=by)


def _attention(s: Size) -> Iterator[Case]:
    b, t, d, scale = s.sequences, s.length, s.head_dim, s.head_dim**-0.5
    q, k, v = (torch.randn(b * t, n, d, dtype=torch.bfloat16) for n in (s.heads, s.kv_heads, s.kv_heads))

    def packed(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, torch.arange(0, len(q) + 1, t, dtype=torch.int32), scale)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, t)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    shape = f"{b} x {t} x {s.heads}/{s.kv_heads} x {d}"
    ours, ref = (partial(packed, f) for f in (ops.attention, ops.attention_ref))
    for both in (False, True):
        name = _name(s, "attention", shape, both)
        yield Case(name, ours, ref, sdpa, (q, k, v), 3, t, gradients=(0, 1, 2) if both else ())
    yield _decode(s, shape)


def _decode(s: Size, shape: str) -> Case:
    """Return one query per sequence against the paged cache, as the sampler decodes."""
    b, t, d, scale, page = s.sequences, s.length, s.head_dim, s.head_dim**-0.5, 128
    width = -(-t // page)
    cache = torch.randn(b * width, s.kv_heads, page, 2 * d, dtype=torch.bfloat16)
    table = torch.arange(b * width, dtype=torch.int32).view(b, width)
    lens, q = torch.full((b,), t, dtype=torch.int32), torch.randn(b, s.heads, d, dtype=torch.bfloat16)
    backend, vllm = _vllm_cpu()
    isa = backend._get_attn_isa(q.dtype, page, d, "auto")
    keys, values = cache.view(*cache.shape[:2], 2 * page, d).chunk(2, dim=2)

    def starts(q: Tensor) -> Tensor:
        return torch.arange(len(q) + 1, dtype=torch.int32)

    def schedule(q: Tensor, lens: Tensor) -> Tensor:
        return vllm.cpu_attn_get_scheduler_metadata(
            num_reqs=len(q),
            num_heads=s.heads,
            num_kv_heads=s.kv_heads,
            head_dim=d,
            seq_lens=lens,
            dtype=q.dtype,
            query_start_loc=starts(q),
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )

    schedules: dict[int, Tensor] = {}  # vLLM makes one per step, for all layers

    def stock(q: Tensor, table: Tensor, lens: Tensor) -> Tensor:
        if len(q) not in schedules:
            schedules[len(q)] = schedule(q, lens)
        out = torch.empty_like(q)
        vllm.cpu_attention_with_kv_cache(
            query=q,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=starts(q),
            seq_lens=lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=schedules[len(q)],
            s_aux=None,
        )
        return out

    def paged(attention: Callable[..., Tensor], q: Tensor, table: Tensor, lens: Tensor) -> Tensor:
        return attention(q, cache, table, starts(q), lens, scale)

    ours, ref = (partial(paged, f) for f in (ops.paged_attention, ops.paged_attention_ref))
    name = _name(s, "paged_attention, one query each (stock: vLLM's)", shape)
    return Case(name, ours, ref, stock, (q, table, lens), 3, same=False)  # vLLM lays the cache out otherwise


def _vllm_cpu() -> tuple[Any, Any]:
    """Return vLLM's CPU attention module, and its operators."""
    from vllm.v1.attention.backends import cpu_attn

    return cpu_attn, vars(cpu_attn)["ops"]


def _head(s: Size, m: int, decode: int) -> Iterator[Case]:
    hidden, w = torch.randn(m, s.hidden, dtype=torch.bfloat16), torch.randn(s.vocab, s.hidden) / s.hidden**0.5
    ids, shape = torch.randint(s.vocab, (m,)), f"{m} x {s.hidden} -> {s.vocab}"

    def scored(op: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, ids: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return op(hidden, w, ids, TEMPERATURE)

    def stock(hidden: Tensor, ids: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logp = F.log_softmax(F.linear(hidden, w.to(hidden.dtype)).float() / TEMPERATURE, -1)
        return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    ours, ref = (partial(scored, f) for f in (ops.token_logprobs, ops.token_logprobs_ref))
    for both in (False, True):
        gradients = (0, 2) if both else ()
        yield Case(_name(s, "token_logprobs", shape, both), ours, ref, stock, (hidden, ids, w), 2, gradients=gradients)

    logits, temperature = torch.randn(decode, s.vocab, dtype=torch.bfloat16), torch.full((decode,), TEMPERATURE)
    seeds, positions = torch.arange(decode), torch.zeros(decode, dtype=torch.int64)

    def draw(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        logp = F.log_softmax(logits.float() / temperature[:, None], -1)
        tokens = torch.multinomial(logp.exp(), 1, generator=torch.Generator().manual_seed(0))
        return tokens[:, 0], logp.gather(1, tokens)[:, 0]

    inputs = (logits, temperature, seeds, positions)
    name = _name(s, "sample", f"{decode} x {s.vocab}")
    yield Case(name, ops.sample, drawn_reference, draw, inputs, 4, same=False)
    yield from truncated_cases(hidden, w, lambda op, of: _name(s, op, of))

"""rms_norm, add_rms_norm, qk_norm_rope and swiglu against vLLM's own CUDA kernels, at the shapes of Qwen3 1.7B and 8B."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bench.cases import Case, gpu_row
from rlinvariant.bench.measure import Row
from rlinvariant.models.shapes import SHAPES, Shape

EPS = 1e-6
TOKEN_COUNTS = (1, 16, 256, 4096, 16384)
CACHED_POSITIONS = 4096

Pairwise = Callable[..., tuple[Tensor, Tensor]]
"""`ops.qk_norm_rope`, or its reference."""


def rows(tiny: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    theirs = _theirs()
    for model in ("tiny",) if tiny else ("qwen3-1.7b", "qwen3-8b"):
        for tokens in (1, 40) if tiny else TOKEN_COUNTS:
            for case in _cases(model, SHAPES[model], tokens, theirs):
                yield gpu_row("norms", case, 0.02 if tiny else 0.2)


def _theirs() -> Any:
    """Return vLLM's operators, which write into their arguments."""
    import vllm._custom_ops  # noqa: F401 - registers them

    return torch.ops._C


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _cases(model: str, s: Shape, tokens: int, theirs: Any) -> Iterator[Case]:
    d, q, kv = s.head_dim, s.heads * s.head_dim, s.kv_heads * s.head_dim
    x, y, w = _randn(tokens, s.hidden), _randn(tokens, s.hidden), 1 + 0.1 * _randn(s.hidden)
    qkv, gate_up, head = _randn(tokens, q + 2 * kv), _randn(tokens, 2 * s.mlp), 1 + 0.1 * _randn(d)

    def rms_theirs(x: Tensor, w: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        theirs.rms_norm(out, x, w, EPS)
        return out

    def heads(qkv: Tensor) -> tuple[Tensor, Tensor]:
        return qkv[:, :q].unflatten(-1, (s.heads, d)), qkv[:, q : q + kv].unflatten(-1, (s.kv_heads, d))

    def add_theirs(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        theirs.fused_add_rms_norm(x, y, w, EPS)
        return x, y

    position = torch.arange(tokens, device="cuda") % CACHED_POSITIONS
    angle = torch.arange(CACHED_POSITIONS, device="cuda")[:, None] / 1e6 ** (torch.arange(d // 2, device="cuda") / (d // 2))
    cache = torch.cat((angle.cos(), angle.sin()), -1).bfloat16()  # vLLM's has the model's dtype
    cos, sin = angle.cos()[position], angle.sin()[position]

    turning = (qkv, cos, sin, position, cache, head)

    def turn(op: Pairwise, qkv: Tensor, cos: Tensor, sin: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return op(*heads(qkv), None, None, cos, sin, EPS)

    def turn_theirs(qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, cache: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        theirs.rotary_embedding(position, qkv[:, :q], qkv[:, q : q + kv], d, cache, True)
        return heads(qkv)

    def norm(
        op: Pairwise, qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, cache: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor]:
        return op(*heads(qkv), w, w, cos, sin, EPS)

    def norm_theirs(qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, cache: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        of_q, of_k = (rms_theirs(x, w) for x in heads(qkv))
        theirs.rotary_embedding(position, of_q.flatten(1), of_k.flatten(1), d, cache, True)
        return of_q, of_k

    def norm_fused(qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, cache: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        theirs.fused_qk_norm_rope(qkv, s.heads, s.kv_heads, s.kv_heads, d, EPS, w, w, cache, True, position, -1)
        return heads(qkv)

    def swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return ops.swiglu(gate, up)

    def swiglu_theirs(gate_up: Tensor) -> Tensor:
        out = torch.empty(len(gate_up), s.mlp, dtype=gate_up.dtype, device=gate_up.device)
        theirs.silu_and_mul(out, gate_up)
        return out

    def name(op: str, shape: str) -> str:
        return f"{op}, {model}, {tokens} x {shape}"

    of_heads = f"{s.heads}+{s.kv_heads} x {d}"
    ours, ref = (partial(f, eps=EPS) for f in (ops.rms_norm, ops.rms_norm_ref))
    yield Case(name("rms_norm", f"{s.hidden}"), ours, ref, rms_theirs, (x, w), 1, target=1.0)
    ours, ref = (partial(f, eps=EPS) for f in (ops.add_rms_norm, ops.add_rms_norm_ref))
    yield Case(name("add_rms_norm", f"{s.hidden}"), ours, ref, add_theirs, (x, y, w), 2, target=1.0)
    ours, ref = (partial(turn, f) for f in (ops.qk_norm_rope, ops.qk_norm_rope_ref))
    yield Case(name("rope", of_heads), ours, ref, turn_theirs, turning, 4, target=1.0)
    ours, ref = (partial(norm, f) for f in (ops.qk_norm_rope, ops.qk_norm_rope_ref))
    yield Case(name("qk_norm_rope", of_heads), ours, ref, norm_theirs, turning, 4, target=1.0)
    yield Case(name("qk_norm_rope against the fused kernel, off by default", of_heads), ours, ref, norm_fused, turning, 4)
    yield Case(name("swiglu", f"{s.mlp}"), swiglu, ops.swiglu_merged_ref, swiglu_theirs, (gate_up,), 1, target=1.0)

"""One call of every op that has a CUDA kernel, with operands of a small model, for tests of what holds for all of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlinvariant import ops
from tests.ladders import Function, randint, randn

Case = tuple[Function, tuple[Tensor, ...]]
"""A function of floating-point tensors, and those tensors."""

TOKENS, HEADS, KV_HEADS, DIM, HIDDEN, MLP, VOCAB, PAGE, EXPERTS = 40, 4, 2, 64, 256, 768, 5008, 16, 10


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, dtype=torch.bfloat16, seed=seed)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def linear(rows: int) -> Case:
    return ops.linear, (bf16(rows, HIDDEN), bf16(MLP, HIDDEN, seed=1), bf16(MLP, seed=2))


def lora_linear() -> Case:
    """A rank of 24, which is padded; the weight, which has no gradient, is no operand of the case."""
    weight, a, b = bf16(MLP, HIDDEN, seed=1), randn(24, HIDDEN, seed=2), randn(MLP, 24, seed=3)
    return lambda x, a, b: ops.lora_linear(x, weight, a, b), (bf16(TOKENS, HIDDEN), a, b)


def wide_linear() -> Case:
    """The same as a sampler keeps it."""
    return ops.wide_linear, (bf16(TOKENS, HIDDEN), bf16(MLP, HIDDEN + 64, seed=1), bf16(64, HIDDEN, seed=2))


def rms_norm(offset: float | None = None) -> Case:
    """Make a case of the norm of the heads in a merged projection, read in place."""
    heads = bf16(TOKENS, (HEADS + 2 * KV_HEADS) * DIM)
    return lambda x, w: ops.rms_norm(x[:, : HEADS * DIM].unflatten(1, (-1, DIM)), w, 1e-6, offset), (heads, randn(DIM, seed=1))


def add_rms_norm(offset: float | None = None) -> Case:
    operands = bf16(TOKENS, HIDDEN), bf16(TOKENS, HIDDEN, seed=1), randn(HIDDEN, seed=2)
    return lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-6, offset), operands


def angles() -> Tensor:
    return torch.arange(TOKENS)[:, None] * 10000.0 ** -torch.linspace(0, 1, DIM // 2)


def rope() -> Case:
    cos, sin = angles().cos(), angles().sin()
    return lambda x: ops.rope(x, cos, sin), (bf16(TOKENS, HEADS, DIM),)


def qk_norm_rope(offset: float | None = None) -> Case:
    cos, sin = angles().cos(), angles().sin()

    def call(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = (x.unflatten(1, (-1, DIM)) for x in qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], 1))
        return ops.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, 1e-6, offset)

    return call, (bf16(TOKENS, (HEADS + 2 * KV_HEADS) * DIM), randn(DIM, seed=1), randn(DIM, seed=2))


def swiglu(activation: str = "silu") -> Case:
    return lambda x: ops.swiglu(*x.chunk(2, -1), activation), (bf16(TOKENS, 2 * MLP),)


def swiglu_merged() -> Case:
    return ops.swiglu_merged, (bf16(TOKENS, 2 * MLP),)


def moe_route(renormalise: bool, experts: int = EXPERTS) -> Case:
    return lambda x: ops.moe_route(x, 3, renormalise), (bf16(TOKENS, experts),)


def moe_experts() -> Case:
    weights, ids = ops.moe_route(bf16(TOKENS, EXPERTS), 3, True)
    operands = bf16(TOKENS, HIDDEN), weights, bf16(EXPERTS, 2 * DIM, HIDDEN, seed=2) / 16, bf16(EXPERTS, HIDDEN, DIM, seed=3)
    return lambda x, w, up, down: ops.moe_experts(x, ids, w, up, down), operands


def attention() -> Case:
    cu = int32(0, 25, 25, TOKENS)
    operands = bf16(TOKENS, HEADS, DIM), bf16(TOKENS, KV_HEADS, DIM, seed=1), bf16(TOKENS, KV_HEADS, DIM, seed=2)
    return lambda q, k, v: ops.attention(q, k, v, cu, 0.125, 25), operands


def paged_attention() -> Case:
    table, cu, lens = int32(3, 0, 5, 1, 2, 4).view(2, 3), int32(0, 39, TOKENS), int32(39, 48)

    def call(q: Tensor, cache: Tensor) -> Tensor:
        return ops.paged_attention(q, cache, table, cu, lens, 0.125, max_seqlen_q=39, max_seqlen_k=48)

    return call, (bf16(TOKENS, HEADS, DIM), bf16(6, KV_HEADS, PAGE, 2 * DIM, seed=1))


def scale_logits() -> Case:
    return lambda x: ops.scale_logits(x, 0.3, 30.0), (bf16(TOKENS, VOCAB),)


def token_logprobs(*scaling: float) -> Case:
    ids = randint(VOCAB, TOKENS)
    return lambda h, w: ops.token_logprobs(h, w, ids, 0.7, *scaling), (bf16(TOKENS, HIDDEN), bf16(VOCAB, HIDDEN, seed=1) / 8)


def log_softmax(*theta: Tensor) -> Case:
    return ops.log_softmax, (bf16(TOKENS, VOCAB), torch.linspace(0, 2, TOKENS), *theta)


def truncated() -> Case:
    """The head, of the tokens that `threshold` keeps."""
    ids, truncation = randint(VOCAB, TOKENS), (0.7, None, None, 200, 0.95, 1e-4)
    return lambda h, w: ops.token_logprobs(h, w, ids, *truncation), (bf16(TOKENS, HIDDEN), bf16(VOCAB, HIDDEN, seed=1) / 8)


def threshold() -> Case:
    t, k = torch.linspace(0, 2, TOKENS), randint(300, TOKENS)
    p, m = torch.linspace(0.1, 1, TOKENS), torch.linspace(0.05, 0, TOKENS)
    return lambda x, t, p, m: ops.threshold(x, t, k, p, m), (bf16(TOKENS, VOCAB), t, p, m)


def sample(*theta: Tensor) -> Case:
    seeds, positions = randint(2**62, TOKENS), randint(99, TOKENS, seed=1)
    operands = bf16(TOKENS, VOCAB), torch.linspace(0, 2, TOKENS), *theta
    return lambda x, t, *theta: ops.sample(x, t, seeds, positions, *theta), operands


def embedding() -> Case:
    ids = randint(VOCAB, TOKENS)
    return lambda w: ops.embedding(ids, w, 3), (bf16(VOCAB, HIDDEN),)


CASES: dict[str, Callable[[], Case]] = {
    "embedding": embedding,
    "linear, 1 row": lambda: linear(1),
    "linear, 40 rows": lambda: linear(40),
    "linear, 400 rows": lambda: linear(400),
    "lora_linear": lora_linear,
    "wide_linear": wide_linear,
    "rms_norm": rms_norm,
    "rms_norm, offset": lambda: rms_norm(1.0),
    "add_rms_norm": add_rms_norm,
    "add_rms_norm, offset": lambda: add_rms_norm(1.0),
    "rope": rope,
    "qk_norm_rope": qk_norm_rope,
    "qk_norm_rope, offset": lambda: qk_norm_rope(1.0),
    "swiglu": swiglu,
    "swiglu, gelu_tanh": lambda: swiglu("gelu_tanh"),
    "swiglu_merged": swiglu_merged,
    "moe_route": lambda: moe_route(True),
    "moe_route, weights as they are": lambda: moe_route(False),
    "moe_route, 128 experts": lambda: moe_route(True, 128),
    "moe_experts": moe_experts,
    "attention": attention,
    "paged_attention": paged_attention,
    "scale_logits": scale_logits,
    "token_logprobs": token_logprobs,
    "token_logprobs, scaled": lambda: token_logprobs(0.3, 30.0),
    "token_logprobs, truncated": truncated,
    "threshold": threshold,
    "log_softmax": log_softmax,
    "log_softmax, truncated": lambda: log_softmax(torch.linspace(-1, 1, TOKENS)),
    "sample": sample,
    "sample, truncated": lambda: sample(torch.linspace(-1, 1, TOKENS)),
}
OF_SAMPLERS = {"wide_linear", "paged_attention", "log_softmax", "sample", "threshold"}
WITHOUT_GRADIENT = {name for name in CASES if name.split(",")[0] in OF_SAMPLERS}

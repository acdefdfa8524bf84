"""A CPU in place of the GPU, so that the GPU benchmarks' own code can run here: tensors, graphs and clocks, no kernels."""

import random
import sys
import time
import types
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rlinvariant import bits, ops
from rlinvariant.bench import gpu


class OnCpu(TorchFunctionMode):
    """Whatever is asked for on "cuda" is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        args = tuple("cpu" if isinstance(a, str) and a.startswith("cuda") else a for a in args)
        return func(*args, **kwargs)


def turns(graphs: Any, rounds: int) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for times, graph in zip(found, graphs, strict=True):
            began = time.perf_counter()
            graph.replay()
            times.append((time.perf_counter() - began) * 1e3)
    return found


def install(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "capture", lambda calls, pool=None: gpu.Loop(calls))
    monkeypatch.setattr(gpu, "turns", turns)
    monkeypatch.setattr(gpu, "ROTATED_BYTES", 1 << 20)
    for name in ("synchronize", "empty_cache", "graph_pool_handle", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    cancelling = bits.cancelling
    monkeypatch.setattr(
        bits, "cancelling", lambda rows, n, k, dtype, device="cpu", seed=0: cancelling(rows, n, k, dtype, seed=seed)
    )
    product = lambda x, w, b: ops.linear(x, w)  # noqa: E731
    linear = types.ModuleType("rlinvariant.kernels.linear")
    vars(linear).update(tiled=lambda x, w, b, tile: product(x, w, b), cublaslt=product, FALLBACK_TILE=(128, 128, 64, 8, 3))
    monkeypatch.setitem(sys.modules, linear.__name__, linear)
    import rlinvariant.kernels

    monkeypatch.setattr(rlinvariant.kernels, "linear", linear, raising=False)


class Vllm:
    """vLLM's operators, in PyTorch: they write where vLLM's do."""

    @staticmethod
    def rms_norm(out, x, w, eps):
        wide = x.float()
        out.copy_((wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * w)

    @staticmethod
    def fused_add_rms_norm(x, residual, w, eps):
        residual += x
        Vllm.rms_norm(x, residual.clone(), w, eps)

    @staticmethod
    def rotary_embedding(positions, q, k, d, cache, neox):
        cos, sin = cache[positions].float()[:, None].chunk(2, -1)
        for x in (q, k):
            a, b = x.unflatten(-1, (-1, d)).float().chunk(2, -1)
            x.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), -1).flatten(1))

    @staticmethod
    def fused_qk_norm_rope(qkv, heads, kv_heads, _, d, eps, q_weight, k_weight, cache, neox, positions, warps):
        q, k, _ = qkv.split((heads * d, kv_heads * d, kv_heads * d), -1)
        for x, w in ((q, q_weight), (k, k_weight)):
            Vllm.rms_norm(x.unflatten(-1, (-1, d)), x.unflatten(-1, (-1, d)).clone(), w, eps)
        Vllm.rotary_embedding(positions, q, k, d, cache, neox)

    @staticmethod
    def silu_and_mul(out, x):
        gate, up = x.chunk(2, -1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    @staticmethod
    def apply_temperature(logits, slots, temperature):
        logits /= temperature[slots.long(), None]

    @staticmethod
    def gumbel_sample(logits, slots, temperature, seeds, positions, apply_temperature):
        return logits.float().argmax(-1)

    @staticmethod
    def compute_topk_scores(logits, count, tokens):
        scores = logits.float().log_softmax(-1).gather(-1, tokens[:, None])
        return types.SimpleNamespace(logprobs=scores, selected_token_ranks=tokens)


def install_attention(monkeypatch, attention) -> None:
    """FlashAttention-3, and our own attention in Triton, by that of the CPU."""

    def varlen(q, k, v, most_q, cu, most_k, *, seqused_k, softmax_scale, window_size, block_table, out, **_):
        cache = torch.cat((k, v), -1).transpose(1, 2)
        window = None if window_size == [-1, -1] else window_size[0] + 1
        return ops.paged_attention(q, cache, block_table, cu, seqused_k, softmax_scale, window=window, out=out)

    fa3 = types.SimpleNamespace(flash_attn_varlen_func=varlen, get_scheduler_metadata=lambda **_: None)
    monkeypatch.setattr(attention, "_fa3", lambda: fa3)
    kernels = types.ModuleType("rlinvariant.kernels.attention")
    vars(kernels)["schedule"] = lambda *_: None
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)

    def paged(q, cache, table, cu, lens, most_q, most_k, form, out, made):
        ops.paged_attention(q, cache, table, cu, lens, form.scale, window=form.window, out=out)

    calls = types.ModuleType("rlinvariant.kernels.chunked_calls")
    form = lambda scale, window: SimpleNamespace(scale=scale, window=window)  # noqa: E731
    vars(calls).update(Form=form, row=lambda _: {"order": None}, plan=lambda *_: None, paged=paged)
    monkeypatch.setitem(sys.modules, calls.__name__, calls)
    import rlinvariant.kernels

    monkeypatch.setattr(rlinvariant.kernels, "chunked_calls", calls, raising=False)


def engine():
    """A class in place of `vllm.LLM` as TRL uses it: draws at random, and remembers what it was given."""

    class Engine:
        arguments, limits, loaded = {}, [], 0

        def __init__(self, **arguments):
            Engine.arguments = arguments
            runner = SimpleNamespace(model=self)
            worker = SimpleNamespace(model_runner=runner)
            self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

        def load_weights(self, pairs):
            Engine.loaded += len(list(pairs))

        def reset_prefix_cache(self):
            return True

        def generate(self, prompts, sampling_params, use_tqdm):
            Engine.limits.append(sampling_params.max_tokens)
            return [self._output(p["prompt_token_ids"], 1 + i % sampling_params.max_tokens) for i, p in enumerate(prompts)]

        @staticmethod
        def _output(prompt, length):
            ids = [random.randrange(9, 1000) for _ in range(length)]
            logprobs = [{i: SimpleNamespace(logprob=-6.9, rank=1)} for i in ids]
            return SimpleNamespace(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs)])

    return Engine

"""token_logprobs against the head that TRL trains with and against PyTorch; sample against vLLM's sampler."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlinvariant import ops
from rlinvariant.bench.cases import TRUNCATION, Case, drawn_reference, gpu_row, truncated_cases
from rlinvariant.bench.measure import Row
from rlinvariant.models.shapes import SHAPES

TEMPERATURE = 0.7
TOKEN_COUNT = 4096
BATCH_SIZES = (1, 16, 64, 256)


def rows(tiny: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    for model in ("tiny",) if tiny else ("qwen3-1.7b", "qwen3-8b"):
        for case in _head(model, SHAPES[model].hidden, SHAPES[model].vocab, 40 if tiny else TOKEN_COUNT):
            yield gpu_row("logprob", case, 0.02 if tiny else 1.0, graphs=False)
            torch.cuda.empty_cache()
        for batch in (1, 4) if tiny else (64, TOKEN_COUNT):
            for case in _truncated(model, SHAPES[model].hidden, SHAPES[model].vocab, batch):
                yield gpu_row("logprob", case, 0.02 if tiny else 1.0, graphs=False)
    for batch in (1, 4) if tiny else BATCH_SIZES:
        yield gpu_row("logprob", _sample(SHAPES["tiny" if tiny else "qwen3-1.7b"].vocab, batch), 0.02 if tiny else 0.3)


def _truncated(model: str, hidden: int, vocab: int, rows: int) -> Iterator[Case]:
    """Yield all three limits on logits of deviation 1, and top-p alone on logits that are spread as a model's are."""
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(vocab, hidden, device="cuda") / hidden**0.5
    yield from truncated_cases(x, w, lambda op, shape: f"{op}, {model}, {shape}")
    alone = 0, TRUNCATION[1], 0.0
    yield from truncated_cases(x, 4 * w, lambda op, shape: f"{op}, {model}, {shape}, top-p alone", alone)


def _head(model: str, hidden: int, vocab: int, tokens: int) -> Iterator[Case]:
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(vocab, hidden, device="cuda") / hidden**0.5  # fp32 masters
    ids = torch.randint(vocab, (tokens,), device="cuda")
    chunked, chunk = _trl()

    def ours(x: Tensor, ids: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return ops.token_logprobs(x, w, ids, TEMPERATURE)

    def reference(x: Tensor, ids: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return ops.token_logprobs_ref(x, w, ids, TEMPERATURE)

    def trl(x: Tensor, ids: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, torch.bfloat16):
            return chunked.apply(x, w, None, ids, TEMPERATURE, chunk, None, 1.0, ("log_probs", "entropy"))[:2]

    def plain(x: Tensor, ids: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logp = F.log_softmax(F.linear(x, w.to(x.dtype)).float() / TEMPERATURE, -1)
        return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    for both in (False, True):
        for name, stock in (("TRL's chunked head", trl), ("PyTorch, all logits at once", plain)):
            what = "forward + backward" if both else "forward"
            case = f"token_logprobs, {model}, {tokens} x {hidden} -> {vocab}, {what}; stock: {name}"
            yield Case(case, ours, reference, stock, (x, ids, w), 2, gradients=(0, 2) if both else ())


def _trl() -> tuple[Any, int]:
    """Return TRL's autograd function, and the columns that it takes at a time."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    return ChunkedLogProbFunction, utils._CHUNKED_LOGPROB_CHUNK_SIZE


def _sample(vocab: int, batch: int) -> Case:
    """Return what a step of decoding does after the lm_head: temperature, draw, log-prob and rank."""
    logits = torch.randn(batch, vocab, device="cuda", dtype=torch.bfloat16)
    temperature = torch.full((batch,), TEMPERATURE, device="cuda")
    seeds, positions = torch.arange(batch, device="cuda"), torch.zeros(batch, dtype=torch.int64, device="cuda")
    theirs = _vllm()

    def stock(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slots = torch.arange(len(logits), device="cuda", dtype=torch.int32)
        scaled = logits.clone()  # its log-probs are of the logits before the temperature
        theirs.apply_temperature(scaled, slots, temperature)
        tokens = theirs.gumbel_sample(scaled, slots, temperature, seeds, positions, apply_temperature=False)
        found = theirs.compute_topk_scores(logits, 0, tokens)
        return tokens, found.logprobs[:, 0], found.selected_token_ranks

    return Case(
        f"sample, {batch} x {vocab}; stock: vLLM's V2 sampler",
        ops.sample,
        drawn_reference,
        stock,
        (logits, temperature, seeds, positions),
        4,
        same=False,
    )


def _vllm() -> Any:
    """Return the functions of vLLM 0.26's V2 model runner, its default."""
    from types import SimpleNamespace

    from vllm.v1.worker.gpu.sample.gumbel import apply_temperature, gumbel_sample
    from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

    return SimpleNamespace(
        apply_temperature=apply_temperature, gumbel_sample=gumbel_sample, compute_topk_scores=compute_topk_scores
    )

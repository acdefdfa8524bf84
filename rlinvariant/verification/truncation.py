"""Truncated sampling in `verify`: the trainer keeps the tokens that the sampler kept, whatever top-k, top-p and min-p say."""

from dataclasses import astuple, replace

import torch
from torch import Tensor

from rlinvariant import ops
from rlinvariant.rollout import ALL_TOKENS, Truncation, request_seed
from rlinvariant.sampler.drive import Request
from rlinvariant.sampler.vllm_truncation import cut
from rlinvariant.verification.pair import Pair, basic_requests
from rlinvariant.verification.relation import Relation

SETTINGS = (Truncation(top_p=0.9), Truncation(top_k=20), Truncation(min_p=0.1), Truncation(20, 0.95, 0.02), ALL_TOKENS)


NAME = "truncated: sampler = trainer"
ROWS = 8  # from which on vLLM 0.26 cuts by another kernel on a GPU


def truncated(pair: Pair, *own: Truncation) -> Relation:
    """Draw requests of every setting, and of a run's own, in one batch, and compare with the trainer's packed forward."""
    relation, requests = Relation(NAME), _requests(pair, *own)
    pair.against_trainer(relation, requests, pair.draw(requests))
    relation.how = "top-p, top-k, min-p, all three and none in one batch"
    return relation


def all_tokens(pair: Pair, *own: Truncation) -> Relation:
    """Score truncated draws by the softmax over all tokens: each log-prob is too small by that of the share that was kept."""
    relation = Relation("planted: all tokens in the trainer")
    requests = [r for r in _requests(pair, *own) if r.truncation]
    drawn = [c for c in pair.draw(requests).completions if c is not None]
    scored = pair.score([replace(r, truncation=ALL_TOKENS) for r in requests], drawn, pair.packed())
    relation.add([c.sampler_logprobs for c in drawn], scored)
    return relation


def rows_alone(pair: Pair) -> Relation:
    """Find the thresholds of rows among 8, and of the first and the last of them among fewer and in reversed order."""
    relation, logits = Relation("op threshold: a row = among others", unit="words"), _logits(pair)
    settings = [astuple(SETTINGS[i % len(SETTINGS)]) for i in range(ROWS)]
    k, p, m = (torch.tensor(column, device=logits.device) for column in zip(*settings, strict=True))
    given = (logits, torch.full((ROWS,), 0.7, device=logits.device), k, p, m)
    whole = ops.threshold(*given)
    for count in (1, 2, ROWS - 1):
        for first in (0, ROWS - count):
            own = slice(first, first + count)
            relation.count(whole[own], ops.threshold(*(x[own].clone() for x in given)), f"{count} rows from {first}: ")
    relation.count(whole, ops.threshold(*(x.flip(0) for x in given)).flip(0), "reversed: ")
    return relation


def vllms_rows(pair: Pair) -> Relation:
    """Let vLLM cut rows among 8, and among 7 and alone: on a GPU, vLLM 0.26 takes another kernel from 8 rows on."""
    relation, logits = Relation("stock: vLLM's top-k and top-p, a row = among 7 or 8", unit="words"), _logits(pair)
    top_k = min(200, logits.shape[1])
    whole = cut(logits, top_k, 0.9)
    for count in (1, ROWS - 1):
        relation.count(whole[:count], cut(logits[:count], top_k, 0.9), f"{count} rows: ")
    relation.how = "" if logits.is_cuda else "a CPU has one kernel for any number of rows"
    return relation


def _logits(pair: Pair) -> Tensor:
    """Return [ROWS, V] bf16 logits of random hidden states by the model's head, spread as those of a trained model."""
    weight = pair.model.get_output_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(request_seed(pair.seed, 4, 0, 0))
    hidden = torch.randn(ROWS, weight.shape[1], generator=generator).to(weight.device, torch.bfloat16)
    logits = ops.linear(hidden, weight.to(torch.bfloat16)).float()
    return (logits * (3 / logits.std())).to(torch.bfloat16)


def _requests(pair: Pair, *own: Truncation) -> list[Request]:
    settings = (*own, *SETTINGS)
    return [replace(r, truncation=settings[i % len(settings)]) for i, r in enumerate(basic_requests(pair, salt=3))]

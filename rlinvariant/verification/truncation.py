"""Truncated sampling in `verify`: the trainer keeps the tokens that the sampler kept, whatever top-k, top-p and min-p say."""

from dataclasses import replace

from rlinvariant.rollout import ALL_TOKENS, Truncation
from rlinvariant.sampler.drive import Request
from rlinvariant.verification.pair import Pair, basic_requests
from rlinvariant.verification.relation import Relation

SETTINGS = (Truncation(top_p=0.9), Truncation(top_k=20), Truncation(min_p=0.1), Truncation(20, 0.95, 0.02), ALL_TOKENS)


NAME = "truncated: sampler = trainer"


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


def _requests(pair: Pair, *own: Truncation) -> list[Request]:
    settings = (*own, *SETTINGS)
    return [replace(r, truncation=settings[i % len(settings)]) for i, r in enumerate(basic_requests(pair, salt=3))]

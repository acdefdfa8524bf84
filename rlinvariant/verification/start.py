"""What an exact run does before its first step: find a certificate of its model and machine, or make sure in seconds."""

import time
from typing import Any

import torch

from rlinvariant.errors import ParityError
from rlinvariant.verification import certificate
from rlinvariant.verification.controls import one_ulp
from rlinvariant.verification.relations import Pair, Sizes, alone, one_by_one, sampler_and_trainer

REQUESTS, PROMPT, TOKENS, SEED = 12, 40, 12, 0


def prove(model: Any, sampler: Any, config: Any, name: str, dtype: str) -> tuple[str, dict[str, Any]]:
    """A line for the user, and a record for the run, of why these two are the same function.

    Args:
        model, sampler: a trainer's, with the same weights. Both are left as they were.
        config: transformers' configuration of the model, as loaded.
        name: of the model, for messages.

    Raises:
        ParityError: a log-prob differs, or the comparison does not see a planted fault.
    """
    eager = bool(sampler.llm.llm_engine.model_config.enforce_eager)
    found = certificate.find(certificate.subject(config, dtype, eager))
    if found is not None:
        path = str(certificate.path_of(found["subject"], found["form"]))
        of = f"0 / {found['tokens']:,} tokens, {found['form']} form, {found['date'][:10]}"
        line = f"certificate: exact on this model and machine, {of} ({path})"
        return line, {"path": path, "tokens": found["tokens"], "form": found["form"], "date": found["date"]}
    began, training = time.monotonic(), model.training
    pair = pair_of(model.eval(), sampler, config.get_text_config().vocab_size)
    try:
        relations = [check(pair) for check in (sampler_and_trainer, alone, one_by_one)]
        fault = one_ulp(pair, getattr(torch, dtype))
    finally:
        model.train(training)
        sampler.llm.reset_prefix_cache()
    compared, wrong = sum(r.compared for r in relations), sum(r.mismatched for r in relations)
    counts = f"{wrong:,} / {compared:,} log-probs differ, {fault.mismatched:,} / {fault.compared:,} with one ulp in the lm_head"
    if broken := next((r for r in relations if not r.holds), None):
        why = broken.first or broken.lost or "nothing was compared"
        raise ParityError(
            f"before the first step: {counts}; first in {broken.name}: {why}. rlinvariant bisect {name} says where; "
            "invariance=off runs without the proof"
        )
    if not fault.mismatched:
        raise ParityError(f"before the first step: {counts}: the comparison is blind; invariance=off runs without the proof")
    took = time.monotonic() - began
    line = f"no certificate of this model here (rlinvariant verify {name} makes one); compared now: {counts}, {took:.1f} s"
    return line, {"path": None, "compared": compared, "mismatched": wrong, "one_ulp": fault.mismatched, "seconds": took}


def pair_of(model: Any, sampler: Any, vocabulary: int) -> Pair:
    """As few and as short requests as an engine of any length takes."""
    limit = sampler.llm.llm_engine.model_config.max_model_len
    tokens = max(1, min(TOKENS, limit // 4))
    prompt = max(2, min(PROMPT, limit - 2 * tokens - 1))
    return Pair(model, sampler, Sizes(REQUESTS, prompt, tokens, prompt, 256, 4096), SEED, vocabulary)

"""Find a certificate for a model's architecture and this machine before the first step of an exact run, or compare now."""

import time
from typing import TYPE_CHECKING

import torch

from rlinvariant.errors import ParityError
from rlinvariant.launch import largest
from rlinvariant.models import lora, shards
from rlinvariant.rollout import ALL_TOKENS, Truncation
from rlinvariant.sampler.served import ServedSampler
from rlinvariant.types import JsonObject, Untyped
from rlinvariant.verification import certificate
from rlinvariant.verification import truncation as truncated
from rlinvariant.verification.controls import one_ulp
from rlinvariant.verification.pair import Pair, Sizes
from rlinvariant.verification.relations import alone, one_by_one, sampler_and_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from rlinvariant.sampler.engine import Sampler

START_SIZES = Sizes(requests=12, prompt=40, tokens=12, longest=40, in_step=256, in_forward=4096)


def prove(
    model: Untyped,
    sampler: "Sampler | ServedSampler",
    config: "PreTrainedConfig",
    name: str,
    dtype: str,
    truncation: Truncation = ALL_TOKENS,
) -> tuple[str, JsonObject]:
    """Return a line for the user, and a record for the run, of why sampler and trainer are the same function.

    Args:
        model: the trainer's model, of transformers or PEFT. Its weights and mode are left as they were.
        sampler: the trainer's engine, with the same weights; its prefix cache is emptied. Or its servers, of which no
            certificate speaks: they are compared at each start.
        config: transformers' configuration of the model, as loaded.
        name: the model's name for messages.
        dtype: of activations, "bfloat16" or "float32".
        truncation: which tokens the run draws from.

    Raises:
        ParityError: a log-prob differs, or the comparison does not see a planted fault.
    """
    eager = bool(sampler.llm.llm_engine.model_config.enforce_eager)
    ranks, served = lora.ranks(model), isinstance(sampler, ServedSampler)
    adapted = bool(ranks)
    found = None
    if not served:
        processes = sampler.llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
        found = certificate.find(certificate.subject(config, dtype, eager, ranks, processes))
    if truncation and found is not None and not any(r["name"] == truncated.NAME for r in found["relations"]):
        found = None
    if not largest(int(found is None)) and found is not None:  # one host may have none, and all compare together
        path = certificate.path_of(found["subject"], found["form"])
        return certified(found, str(path)), {"path": str(path), **{key: found[key] for key in ("tokens", "form", "date")}}
    began, training = time.monotonic(), model.training
    try:
        with lora.counting(model):
            if adapted:
                sampler.sync((name, shards.whole(weight)) for name, weight in lora.adapters(model))
                _require_equal(sampler, model)
            pair = pair_of(model.eval(), sampler, config.get_text_config().vocab_size)
            relations = [check(pair) for check in (sampler_and_trainer, alone, one_by_one)]
            faults = {"with one ulp in the lm_head": one_ulp(pair, getattr(torch, dtype))}
            if truncation:
                relations.append(truncated.truncated(pair, truncation))
                faults[f"where the trainer keeps all tokens ({truncation} and others)"] = truncated.all_tokens(pair, truncation)
            if adapted:  # who ignored adapters on both sides would pass everything else
                with model.disable_adapter():
                    faults["without the trainer's adapters"] = sampler_and_trainer(pair)
    finally:
        model.train(training)
        if adapted:
            sampler.sync((name, shards.whole(weight)) for name, weight in lora.adapters(model))
        sampler.forget_prefixes()
    compared, wrong = sum(r.compared for r in relations), sum(r.mismatched for r in relations)
    counts = f"{wrong:,} / {compared:,} log-probs differ, " + ", ".join(
        f"{fault.mismatched:,} / {fault.compared:,} {what}" for what, fault in faults.items()
    )
    if broken := next((r for r in relations if not r.holds), None):
        why = broken.first or broken.lost or "nothing was compared"
        raise ParityError(
            f"before the first step: {counts}; first in {broken.name}: {why}. rlinvariant bisect {name} says where; "
            "invariance=off runs without the proof"
        )
    if not all(fault.mismatched for fault in faults.values()):
        raise ParityError(f"before the first step: {counts}: the comparison is blind; invariance=off runs without the proof")
    seconds = time.monotonic() - began
    makes = f"no certificate for this architecture here (rlinvariant verify {name} makes one)"
    makes = "each server, at each start" if served else makes
    makes = "adapters, with random values for the comparison" if adapted else makes
    record = {"path": None, "compared": compared, "mismatched": wrong, "seconds": seconds}
    record |= {"one_ulp": faults["with one ulp in the lm_head"].mismatched}
    return f"{makes}; compared now: {counts}, {seconds:.1f} s", record


def _require_equal(sampler: "Sampler | ServedSampler", model: Untyped) -> None:
    """Compare the sampler's weights with the model's, as servers want before they draw. Raises ParityError if one differs."""
    if differing := sampler.differing_checksums(shards.checksums(lora.pairs(model), sampler.dtype)):
        raise ParityError(f"before the first step: {len(differing)} of the sampler's parameters differ, first {differing[0]}")


def certified(found: JsonObject, path: str) -> str:
    """Say what a certificate covers: an architecture on this machine, with the weights that were compared then."""
    verified = found["model"]
    weights = "random weights" if verified["random_weights"] else f"the weights of {verified['name']}"
    weights += f" and {verified['adapters']}" if verified.get("adapters") else ""
    counts = f"0 / {found['tokens']:,} tokens differed, {found['form']} form, {found['date'][:10]}"
    return f"certificate: this architecture is exact on this machine, as verified with {weights}: {counts} ({path})"


def pair_of(model: "PreTrainedModel", sampler: "Sampler | ServedSampler", vocabulary: int) -> Pair:
    """Return a pair that draws few and short requests, which an engine of any length takes."""
    limit = sampler.max_model_len
    tokens = max(1, min(START_SIZES.tokens, limit // 4))
    prompt = max(2, min(START_SIZES.prompt, limit - 2 * tokens - 1))
    sizes = Sizes(START_SIZES.requests, prompt, tokens, prompt, START_SIZES.in_step, START_SIZES.in_forward)
    return Pair(model, sampler, sizes, seed=0, vocabulary=vocabulary)

"""A request's tokens and log-probs are its own: whatever else the engine does, the same bits.

Each way of running the requests is compared with one batch of 64. As controls, the same ways must show a planted fault, and
stock vLLM, which is not invariant; where it happens to agree on this machine the control is reported blind.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from rlinvariant.rollout import Completion
from rlinvariant.sampler import vllm_model
from rlinvariant.sampler.engine import Sampler
from tests.parity.harness import (
    BLOCK,
    Request,
    assert_same_completions,
    drive,
    generate,
    save_model,
    start_engine,
)

VOCABULARY = 97  # no multiple of 64: vLLM pads the head
CHUNK = 16  # tokens per engine step, half a page, so that prompts are cut inside and at page edges
PAGES = 24  # of 32 tokens, for 64 requests that need up to 5 each: 18 at once run out while they decode
TEMPERATURES = (0.0, 0.7, 1.0)
# 1, 2: shortest. 7-9, 15-17, 31-33, 63-65, 127-129: vector, tile and page edges. The rest fill up to 64 ragged requests,
# above the 44 co-resident sequences from which stock vLLM went wrong (vllm #51187).
LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)


def requests(temperature: float) -> list[Request]:
    """64 ragged requests; every fourth begins like the one before it, for two pages."""
    rng, made = random.Random(11), []
    for i in range(64):
        length = LENGTHS[i] if i < len(LENGTHS) else rng.randint(3, 110)
        prompt = tuple(rng.randrange(VOCABULARY) for _ in range(length))
        if i % 4 == 3 and i > len(LENGTHS):
            prompt = (*made[-1].prompt[: 2 * BLOCK], *prompt[:20])
        made.append(Request(prompt, seed=1000 + i, temperature=temperature))
    return made


NEEDLES = [*range(len(LENGTHS)), 20, 63]  # run alone: every edge, and two of the rest


class Engines:
    """Engines of one kind over one checkpoint, each started when it is first asked for."""

    def __init__(self, path: str, invariant: bool) -> None:
        self.path, self.invariant, self.started = path, invariant, {}

    def __call__(self, name: str) -> Sampler:
        if name not in self.started:
            options = {
                "wide": {},
                "chunked": {"max_num_batched_tokens": CHUNK, "max_num_seqs": CHUNK},
                # 2 layers x (keys, values) x 2 heads x 32 x 2 bytes = 512 bytes per token
                "small": {"kv_bytes": PAGES * BLOCK * 512},
            }[name]
            self.started[name] = start_engine(self.path, invariant=self.invariant, **options)
        return self.started[name]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    """Two layers, with a down projection of 3,136 columns: below about 3,072 stock bf16 products do not vary on a CPU."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=3136,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return save_model(config, tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module")
def exact(path) -> Engines:
    return Engines(path, invariant=True)


@pytest.fixture(scope="module")
def stock(path) -> Engines:
    return Engines(path, invariant=False)


# ---- ways to run the same requests: each returns completions in the order of the requests, and which requests it ran

Way = Callable[[Engines, list[Request]], tuple[Sequence[Completion | None], list[int]]]


def together(engines: Engines, asked: list[Request]) -> list[Completion]:
    """The reference: all 64 in one batch, prefilled in one step, cold."""
    return generate(engines("wide"), asked)


def again(engines, asked):
    return together(engines, asked), list(range(64))


def alone(engines, asked):
    return [generate(engines("wide"), [asked[i]])[0] for i in NEEDLES], NEEDLES


def shuffled(engines, asked):
    order = random.Random(2).sample(range(64), 64)
    return generate(engines("wide"), [asked[i] for i in order]), order


def chunked_prefill(engines, asked):
    trace = drive(engines("chunked"), asked)
    assert trace.chunks > 64, "prompts were not cut"
    return trace.completions, list(range(64))


def warm_prefix(engines, asked):
    cold = drive(engines("wide"), asked)
    warm = drive(engines("wide"), asked, cold=False)
    # Every prompt longer than a page finds its whole pages, except that its last token is always computed.
    pages = sum((len(r.prompt) - 1) // BLOCK for r in asked)
    assert warm.cached_tokens == pages * BLOCK > cold.cached_tokens
    return warm.completions, list(range(64))


def preempted(engines, asked):
    trace = drive(engines("small"), asked)
    assert trace.preemptions >= 8, f"only {trace.preemptions} requests were preempted"
    return trace.completions, list(range(64))


def arriving(engines, asked):
    """Three at a time, while others decode; every fifth is aborted in mid-decode."""
    late = [
        replace(r, arrives=i // 3, aborts=i // 3 + 5 if i % 5 == 0 else None) for i, r in enumerate(asked)
    ]
    trace = drive(engines("wide"), late)
    assert max(trace.decoding) >= 16, "no request arrived while others were decoding"
    kept = [i for i in range(64) if i % 5]
    assert all(trace.completions[i] is None for i in range(0, 64, 5)), "a request was not aborted"
    return [trace.completions[i] for i in kept], kept


WAYS: list[Way] = [again, alone, shuffled, chunked_prefill, warm_prefix, preempted, arriving]


@pytest.fixture(scope="module")
def reference(exact):
    """Completions of the batch of 64 by temperature, computed once."""
    return {t: together(exact, requests(t)) for t in TEMPERATURES}


def check(way: Way, engines: Engines, reference: Sequence[Completion], temperature: float) -> int:
    completions, ran = way(engines, requests(temperature))
    return assert_same_completions(completions, [reference[i] for i in ran], way.__name__)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_sampler_is_batch_invariant(way, temperature, exact, reference):
    compared = check(way, exact, reference[temperature], temperature)
    # 19 needles, 51 not aborted or all 64 requests, of 24 tokens less the few that end early
    assert compared >= {alone: 300, arriving: 1000}.get(way, 1200)


def test_64_requests_run_in_one_batch(exact, reference):
    trace = drive(exact("wide"), requests(1.0))
    assert trace.together == 64 and trace.preemptions == 0 and trace.chunks == 0
    assert_same_completions(trace.completions, reference[1.0], "stepped by hand and by Sampler.generate")


def test_sampled_and_greedy_requests_share_a_batch(exact, reference):
    mixed = [replace(r, temperature=TEMPERATURES[i % 3]) for i, r in enumerate(requests(1.0))]
    trace = drive(exact("wide"), mixed)
    expected = [reference[TEMPERATURES[i % 3]][i] for i in range(64)]
    assert_same_completions(trace.completions, expected, "greedy, T=0.7 and T=1 in one batch")


def test_a_completion_depends_on_its_seed(exact):
    """The comparisons above would also pass if nothing were sampled."""
    prompt = requests(1.0)[20].prompt
    group = generate(exact("wide"), [Request(prompt, seed, 1.0) for seed in range(64)])
    assert len({tuple(c.token_ids) for c in group}) == 64
    twice = generate(exact("wide"), [Request(prompt, 7, 1.0)] * 2)
    assert_same_completions(twice[:1], twice[1:], "one prompt, one seed")
    assert_same_completions(twice[:1], group[7:8], "one prompt, one seed, another batch")


@settings(max_examples=8, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    picked=st.lists(st.integers(0, 63), min_size=1, max_size=24, unique=True),
    waits=st.lists(st.integers(0, 12), min_size=24, max_size=24),
    temperatures=st.lists(st.sampled_from(TEMPERATURES), min_size=24, max_size=24),
    engine=st.sampled_from(("wide", "chunked", "small")),
    cold=st.booleans(),
)
def test_sampler_is_invariant_to_any_composition(exact, reference, picked, waits, temperatures, engine, cold):
    """Which requests, in which order, arriving when, at which temperatures, on which engine, cold or warm."""
    by_temperature = {t: requests(t) for t in TEMPERATURES}
    asked = [replace(by_temperature[t][i], arrives=w) for i, w, t in zip(picked, waits, temperatures, strict=False)]
    trace = drive(exact(engine), asked, cold=cold)
    expected = [reference[t][i] for i, t in zip(picked, temperatures, strict=False)]
    assert_same_completions(trace.completions, expected, f"{picked}, {waits}, {temperatures}, {engine}, {cold}")


# ---- controls


def position_dependent(linear, x, weight, bias=None):
    """A product whose odd rows sum over K backwards: rows do not mix, but where a row stands changes its bits."""
    y = linear(x, weight, bias)
    y[1::2] = linear(x.flip(-1), weight.flip(-1), bias)[1::2]
    return y


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: way.__name__)
def test_a_position_dependent_product_is_seen(way, exact, monkeypatch):
    """Greedy, so that a different token comes from the logits and not from the noise."""
    monkeypatch.setattr(vllm_model.ops, "linear", partial(position_dependent, vllm_model.ops.linear))
    with pytest.raises(AssertionError, match=way.__name__):
        check(way, exact, together(exact, requests(0.0)), 0.0)


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: way.__name__)
def test_stock_vllm_is_not_batch_invariant(way, stock):
    try:
        check(way, stock, together(stock, requests(0.0)), 0.0)
    except AssertionError as difference:
        assert way.__name__ in str(difference), difference
        return
    pytest.xfail("blind: stock vLLM gives the same bits here; the planted fault above is seen")


def test_a_seeded_request_survives_a_cut_prefill(stock):
    """vLLM rewinds the generator of such a request, which a CPU generator cannot do."""
    asked = [Request(tuple(range(2 * CHUNK + 3)), seed=5, temperature=1.0)]
    trace = drive(stock("chunked"), asked)
    assert trace.chunks == 2 and trace.completions[0].token_ids


def test_log_probs_are_finite_fp32(reference):
    for completion in reference[1.0]:
        assert torch.isfinite(torch.tensor(completion.sampler_logprobs)).all()
        assert max(completion.sampler_logprobs) <= 0

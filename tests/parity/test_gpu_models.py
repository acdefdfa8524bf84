"""Shapes of real models with random weights, on a GPU: sampler against trainer, a request against its company, GRPO steps.

A model's engine and trainer are shared by its tests. A trainer's fp32
masters go before the next model's come, 32 GiB for the largest, which is the last.
"""

import gc
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

import rlinvariant
from rlinvariant import metrics
from rlinvariant.models import make_trainable, require_exact
from rlinvariant.models.shapes import build
from rlinvariant.rollout import Completion
from rlinvariant.sampler import vllm_linear
from rlinvariant.sampler.engine import Sampler
from tests.parity.harness import (
    Layout,
    Request,
    Run,
    Trace,
    assert_exact,
    assert_same_completions,
    assert_same_weights,
    assert_stops,
    counting,
    drive,
    fp32,
    new_trainer,
    off_by_an_ulp,
    score,
    start_engine,
    train,
    weights,
)

pytestmark = pytest.mark.gpu

SMALLEST = "qwen3-0.6b"  # first, and the one that is trained
MODELS = (SMALLEST, "qwen2.5-0.5b", "qwen3-1.7b", "llama-3.2-1b", "qwen3-8b")
COMPILED = ("qwen3-1.7b", "llama-3.2-1b")  # with CUDA graphs, as users run it; the others are not, to save a minute each
EDGES = (1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 511, 512, 513, 600)  # of pages, tiles and FlashAttention-3's blocks
SEQUENCES, LENGTH = 72, 128
TOKENS = SEQUENCES * 120  # the end of text is drawn now and then
TEMPERATURES = (1.0, 0.7)
NEEDLES = (0, 7, 12, 14)  # run alone: prompts of 1, 129, 512 and 600 tokens
SHORT = 40  # new tokens where the start of a completion says as much as the whole


@dataclass
class Pair:
    """A trained side and a sampling side of one checkpoint, and what the latter drew for the requests, by temperature."""

    name: str
    path: str
    engine: Sampler
    model: Any
    prompts: list[tuple[int, ...]]
    drawn: dict[float, list[Completion]] = field(default_factory=dict)
    trace: Trace = field(default_factory=lambda: Trace([]))

    def requests(self, temperature: float, max_tokens: int = LENGTH) -> list[Request]:
        return [Request(prompt, 1000 + i, temperature, max_tokens) for i, prompt in enumerate(self.prompts)]

    def completions(self, temperature: float) -> list[Completion]:
        """All together, from a cold cache."""
        if temperature not in self.drawn:
            with counting(self.engine) as self.trace:
                self.drawn[temperature] = draw(self.engine, self.requests(temperature))
            assert self.trace.together >= 64, "the requests were not together"
        return self.drawn[temperature]

    def starts(self, temperature: float = 1.0) -> list[Completion]:
        return [Completion(c.token_ids[:SHORT], c.sampler_logprobs[:SHORT]) for c in self.completions(temperature)]


def draw(engine: Sampler, requests: Sequence[Request]) -> list[Completion]:
    assert engine.llm.reset_prefix_cache()
    first = requests[0]
    return engine.generate(
        [r.prompt for r in requests],
        [r.seed for r in requests],
        temperature=first.temperature,
        max_tokens=first.max_tokens,
    )


def start(path: str, **options: Any) -> Sampler:
    options = {"kv_bytes": 4 << 30, "longest": 1024, "max_num_seqs": 96, "max_num_batched_tokens": 8192} | options
    return start_engine(path, **options)


def on_gpu(path: str, dtype: torch.dtype) -> Any:
    """The checkpoint, read straight onto the GPU."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map="cuda").eval()


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def path_of(tmp_path_factory) -> Iterator[Callable[[str], str]]:
    """Checkpoints, 24 GB of them, that pytest would keep for three runs."""
    directory: Path = tmp_path_factory.mktemp("models")
    yield lambda name: build(name, directory / name)
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def stock_smallest(path_of) -> Sampler:
    return start(path_of(SMALLEST), invariant=False)


# ---- GRPO: 3 steps of 4 prompts x 8, up to 64 new tokens

STEPS, ROWS = 3, 4 * 8
STEP_TOKENS = STEPS * ROWS * 40  # a completion ends early now and then
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": ROWS,
    "num_generations": 8,
    "max_completion_length": 64,
    "learning_rate": 1e-3,
}


def words(count: int = 32) -> Dataset:
    """Prompts of 3 to 40 words, each of which is a token."""
    rng = random.Random(4)
    rows = [" ".join(f"w{rng.randrange(10, 150_000)}" for _ in range(rng.randint(3, 40))) for _ in range(count)]
    return Dataset.from_list([{"prompt": row} for row in rows])


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs within a group: the share of even tokens."""
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]


@pytest.fixture(scope="module")
def grpo(path_of, tmp_path_factory) -> Iterator[tuple[Run, Any, dict[str, torch.Tensor], list[list[int]]]]:
    """A run by the one call that users make, all layers recomputed; its engine, last weights and first completions."""
    release()
    path, rows, mismatches = path_of(SMALLEST), [], []
    args = GRPOConfig(
        str(tmp_path_factory.mktemp("run")),
        gradient_checkpointing=True,
        bf16=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        vllm_importance_sampling_correction=False,
        seed=0,
        **SETTINGS,
    )
    trainer = rlinvariant.grpo_trainer(
        path,
        even,
        args,
        words(),
        processing_class=AutoTokenizer.from_pretrained(path),
        sampler_options={"max_model_len": 256, "kv_cache_gib": 4, "options": {"enforce_eager": True, "max_num_seqs": 64}},
        recompute=True,
        on_row=lambda row, mismatch: (rows.append(dict(row)), mismatches.append(mismatch)),
    )
    generate, drawn = trainer.sampler.generate, []

    def recording(*args: Any, **kwargs: Any) -> list[Completion]:
        drawn.append(generate(*args, **kwargs))
        return drawn[-1]

    with mock.patch.object(trainer.sampler, "generate", recording):
        trainer.train()
    run, engine = Run(trainer, rows, mismatches), trainer.sampler
    last = weights(run)
    run.trainer = None  # type: ignore[assignment]
    del trainer
    release()
    yield run, engine, last, [c.token_ids for c in drawn[0]]
    release()


@pytest.fixture
def another(path_of, tmp_path) -> Iterator[Callable[..., Run]]:
    """A trainer with the settings of `grpo`, but for gradient checkpointing, on an engine that runs already."""

    def make(engine: Any, **changes: Any) -> Run:
        settings = {"reward_funcs": even, "train_dataset": words()} | SETTINGS | changes
        return new_trainer(path_of(SMALLEST), engine, tmp_path, **settings)

    yield make
    release()


def test_grpo_steps_are_exact(grpo, path_of):
    run, engine, last, _ = grpo
    assert_exact(run, STEP_TOKENS)
    assert len(run.rows) == STEPS
    for row in run.rows:
        assert row["onpolicy/coverage"] == 1 == row["onpolicy/weights_equal"] and row["onpolicy/group_unique_frac"] == 1
        assert row["grad_norm"] > 0
    before = dict(on_gpu(path_of(SMALLEST), torch.float32).named_parameters())
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.27.mlp.down_proj.weight"):
        moved = (before[name].bfloat16().cpu() != last[name].bfloat16()).float().mean()
        assert moved > 0.05, f"{name}: a stale sampler would hardly be seen"
    assert len(engine.differing_weights(before.items())) > 50, "the sampler holds the first weights"


def test_gradient_checkpointing_changes_no_bit(grpo, another):
    _, engine, last, _ = grpo
    plain = another(engine)
    plain.trainer.train()
    assert_exact(plain, STEP_TOKENS)
    assert_same_weights(weights(plain), last, "without gradient checkpointing")


def test_stock_on_both_sides_is_seen(stock_smallest, path_of, tmp_path):
    """Control."""
    settings = SETTINGS | {"max_steps": 2}
    run = train(
        path_of(SMALLEST), stock_smallest, tmp_path, invariance="off", reward_funcs=even, train_dataset=words(), **settings
    )
    assert all(row["onpolicy/mismatched_tokens"] > 0 for row in run.rows) and run.total("unscored_tokens") == 0
    assert all(0 < row["onpolicy/logprob_absdiff/max"] < 1 for row in run.rows), "another model, not another rounding"


def test_one_bf16_ulp_in_one_row_of_the_lm_head_is_seen(grpo, another, monkeypatch):
    """The row of a token that the first rollout draws: of 151,936 rows the others hardly weigh in a sum."""
    _, engine, _, first = grpo
    token, count = Counter(i for ids in first for i in ids).most_common(1)[0]
    assert count > 1
    monkeypatch.setattr(vllm_linear._Head, "apply", off_by_an_ulp(token))
    assert_stops(another(engine))


# ---- models


@pytest.fixture(scope="module", params=MODELS)
def pair(request, path_of) -> Iterator[Pair]:
    release()
    name, path = request.param, path_of(request.param)
    model = make_trainable(on_gpu(path, torch.float32))
    require_exact(model)
    rng, vocabulary = random.Random(3), model.config.vocab_size
    lengths = [*EDGES, *(rng.randint(3, 300) for _ in range(SEQUENCES - len(EDGES)))]
    prompts = [tuple(rng.randrange(3, vocabulary) for _ in range(n)) for n in lengths]
    made = Pair(name, path, start(path, enforce_eager=name not in COMPILED), model, prompts)
    del model
    yield made
    made.model = None
    release()


smallest = pytest.mark.parametrize("pair", [SMALLEST], indirect=True)


def numbers(completions: Sequence[Completion], scored: Sequence[torch.Tensor]) -> dict[str, Any]:
    """`metrics.onpolicy`; every sampled token must have been scored."""
    sampler = torch.cat([fp32(c.sampler_logprobs) for c in completions])
    found = metrics.onpolicy(sampler, torch.cat(list(scored)), sum(len(c.token_ids) for c in completions), 2.0)
    assert found["onpolicy/coverage"] == 1 and found["onpolicy/unscored_tokens"] == 0
    return found


# ---- sampler against trainer


@pytest.mark.parametrize("layout", [Layout(1), Layout(16, "shuffled", padding=3)], ids=["by 1", "by 16"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_trainer_matches_sampler(pair, temperature, layout):
    completions = pair.completions(temperature)
    found = numbers(completions, score(pair.model, pair.prompts, completions, temperature, layout))
    assert found["onpolicy/mismatched_tokens"] == 0, found
    assert found["onpolicy/compared_tokens"] >= TOKENS


def test_compiled_engines_are_compiled(pair):
    """Control: the comparison above has seen both kinds of engine."""
    config = pair.engine._runner.compilation_config
    assert ("NONE" not in (config.mode.name, config.cudagraph_mode.name)) == (pair.name in COMPILED)


def test_the_stock_forward_does_not_match(pair):
    """Control: transformers as it is, one completion at a time; another rounding of the same model."""
    completions, scored = pair.completions(1.0)[:24], []
    stock = on_gpu(pair.path, torch.bfloat16)
    with torch.no_grad():
        for prompt, completion in zip(pair.prompts, completions, strict=False):
            ids = torch.tensor([[*prompt, *completion.token_ids]], device="cuda")
            table = stock(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            scored.append(table.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu())
    found = numbers(completions, scored)
    assert found["onpolicy/mismatched_tokens"] > 0 and 0 < found["onpolicy/logprob_absdiff/max"] < 1, found


@smallest
def test_a_stock_engine_does_not_match(pair, stock_smallest):
    """Control: what stock vLLM draws has not the log-probs of the exact trainer."""
    stock_smallest.sync(pair.model.named_parameters())  # it may have been trained
    assert stock_smallest.differing_weights(pair.model.named_parameters()) == []
    completions = draw(stock_smallest, pair.requests(1.0))
    found = numbers(completions, score(pair.model, pair.prompts, completions, 1.0, Layout(16)))
    assert found["onpolicy/mismatched_tokens"] > 0 and 0 < found["onpolicy/logprob_absdiff/max"] < 1, found


# ---- a request against its company: what it draws first, with SHORT tokens to save time


def test_alone_is_together(pair):
    expected = pair.starts()
    for i in NEEDLES:
        found = draw(pair.engine, [pair.requests(1.0, SHORT)[i]])
        assert_same_completions(found, [expected[i]], f"request {i} alone")


def test_a_warm_prefix_changes_nothing(pair):
    asked = pair.requests(1.0, SHORT)
    draw(pair.engine, asked)
    warm = drive(pair.engine, asked, cold=False)
    assert warm.cached_tokens >= sum((len(p) - 1) // 16 * 16 for p in pair.prompts) // 2, "hardly a prefix was found again"
    assert assert_same_completions(warm.completions, pair.starts(), "warm") >= SEQUENCES * SHORT * 0.9


def test_a_prefill_that_joins_changes_nothing(pair):
    """Eight requests decode when others arrive, unrelated and long."""
    asked, late = pair.requests(1.0, SHORT), (11, 13, 14)
    first = list(range(3, 11))
    joined = [
        *(asked[i] for i in first),
        *(Request(pair.prompts[i], i, 1.0, SHORT, arrives=9 + 7 * n) for n, i in enumerate(late)),
    ]
    trace = drive(pair.engine, joined)
    assert min(trace.decoding[-len(late) :]) >= 6, "nothing was decoding"
    expected = pair.starts()
    assert_same_completions(trace.completions[: len(first)], [expected[i] for i in first], "joined by a prefill")


@smallest
def test_a_chunked_prefill_changes_nothing(pair):
    """Another engine, 256 tokens a step: prompts are cut, and prefills share every step with those that decode."""
    trace = drive(start(pair.path, max_num_batched_tokens=256, kv_bytes=3 << 30), pair.requests(1.0, SHORT))
    assert trace.chunks >= 32, "prompts were not cut"
    assert assert_same_completions(trace.completions, pair.starts(), "chunked") >= SEQUENCES * SHORT * 0.9


@smallest
def test_a_completion_depends_on_its_seed_and_prompt(pair):
    """Control: the comparisons above would also pass if nothing were drawn."""
    prompt = pair.prompts[20]
    group = draw(pair.engine, [Request(prompt, seed, 1.0, SHORT) for seed in range(8)])
    assert len({tuple(c.token_ids) for c in group}) == 8
    with pytest.raises(AssertionError, match="another seed"):
        assert_same_completions(group[:1], group[1:2], "another seed")

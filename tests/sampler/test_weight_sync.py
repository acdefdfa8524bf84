"""After `sync` the sampler holds the trainer's weights and nothing computed with the old ones; whatever differs is named."""

import functools
import random
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from rlinvariant import checksums
from rlinvariant.models import shards
from rlinvariant.ops.linear import is_packable, pack_weight
from rlinvariant.sampler import weights as synced
from rlinvariant.sampler.drive import params
from rlinvariant.sampler.vllm_linear import multiplied, products
from tests.parity.device import BLOCK, CUDA
from tests.parity.harness import Request, assert_same_completions, drive, generate, load, save_model, start_engine

SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
# Qwen2: biases, and a tied head; Llama: neither
CONFIGS = {"tied": Qwen2Config(**SIZES, tie_word_embeddings=True), "untied": LlamaConfig(**SIZES, tie_word_embeddings=False)}


@pytest.fixture(scope="module", params=["tied", "untied"])
def path(request, tmp_path_factory) -> str:
    return save_model(CONFIGS[request.param], tmp_path_factory.mktemp("models") / request.param)


ENGINES = functools.cache(lambda path, invariant: start_engine(path, invariant=invariant))


@pytest.fixture(scope="module", params=["exact", "stock"])
def engine(request, path):
    return ENGINES(path, request.param == "exact")


@pytest.fixture
def weights(path) -> dict[str, torch.Tensor]:
    """fp32 masters, every one of them changed since the checkpoint."""
    torch.manual_seed(1)
    return {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in load(path).named_parameters()}


def is_named(name: str, found: list[str]) -> bool:
    """vLLM keeps q, k and v in one parameter, gate and up in another, called after their parts."""
    *prefix, module, kind = name.split(".")
    part = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate", "up_proj": "gate"}.get(module, module)
    return any(f.startswith(".".join(prefix)) and part in f and f.endswith(kind) for f in found)


def test_sync_makes_every_weight_equal(engine, weights):
    assert len(engine.differing_weights(weights.items())) > 10, "control: nothing was synced yet"
    engine.sync(weights.items())
    assert engine.differing_weights(weights.items()) == []


def test_each_stale_weight_is_named(engine, weights):
    engine.sync(weights.items())
    for name, weight in weights.items():
        found = engine.differing_weights((weights | {name: weight + 0.5}).items())
        tied = "embed_tokens" in name and "lm_head.weight" not in weights  # a packed copy of it is named too
        assert is_named(name, found) and len(found) <= 1 + tied, f"{name}: {found}"


def test_each_missing_weight_is_named(engine, weights):
    engine.sync(weights.items())
    for name in weights:
        rest = {n: w for n, w in weights.items() if n != name}
        assert is_named(name, engine.differing_weights(rest.items())), name


def test_a_weight_that_the_sampler_does_not_have_is_named(engine, weights):
    engine.sync(weights.items())
    assert engine.differing_weights([*weights.items(), ("model.adapter.weight", torch.ones(3))]) != []


def test_one_bf16_ulp_is_named(engine, weights):
    """An ulp shows in any element of a parameter that vLLM keeps; some columns of a packed matrix are read, 0 among them."""
    engine.sync(weights.items())
    for name, weight in weights.items():
        changed = weight.bfloat16()
        changed.view(-1)[0:1].view(torch.int16).add_(1)
        assert is_named(name, engine.differing_weights((weights | {name: changed.float()}).items())), name


def test_checksums_name_what_bytes_do(path, weights):
    """A trainer with shards of the weights compares no bytes: sums over the words of each, whatever vLLM has merged."""
    engine = ENGINES(path, True)
    sums = shards.checksums(weights.items(), engine.dtype)
    assert len(engine.differing_checksums(sums)) > 10, "control: nothing was synced yet"
    engine.sync(weights.items())
    assert engine.differing_checksums(sums) == []
    for name, weight in weights.items():
        changed = weight.to(engine.dtype)
        changed.view(-1)[-1:].view({2: torch.int16, 4: torch.int32}[changed.element_size()]).add_(1)
        found = engine.differing_checksums(sums | {name: checksums.whole(changed)})
        assert is_named(name, found) and len(found) == 1, f"{name}: {found}"
        rest = {other: checksum for other, checksum in sums.items() if other != name}
        assert is_named(name, engine.differing_checksums(rest)), name
    assert engine.differing_checksums(sums | {"model.adapter.weight": checksums.whole(torch.ones(3))}) != []


@pytest.mark.skipif(CUDA, reason="a GPU's products read the weight itself")
def test_each_stale_packed_copy_is_named(path, weights):
    """A CPU engine multiplies by packed copies where this machine's GEMM has the same bits by them, and nowhere else."""
    engine, threads = ENGINES(path, True), torch.get_num_threads()
    engine.sync(weights.items())
    for name, layer in products(engine.model).items():
        weight = multiplied(layer)
        parts = tuple(getattr(layer, "parts", [len(weight)]))
        packable = is_packable(parts, weight.shape[1], weight.dtype, layer.bias is not None, threads)
        assert list(layer.packed) == ([threads] if packable else []), name
        if packable:
            fresh, changed = layer.packed[threads], weight.detach().clone()
            changed.view(-1)[-1:].view(torch.int16).add_(1)
            layer.packed[threads] = pack_weight(changed, parts, layer.bias is not None)
            assert engine.differing_weights(weights.items()) == [f"{name}.weight (packed copy)"]
            layer.packed[threads] = fresh
    assert engine.differing_weights(weights.items()) == []


def test_less_than_a_rounding_to_bf16_is_no_difference(path, weights):
    """Both sides compute with weights rounded to bf16: a master may be finer. (Stock vLLM keeps biases in fp32.)"""
    engine = ENGINES(path, True)
    engine.sync(weights.items())
    assert engine.differing_weights((name, w.bfloat16().float()) for name, w in weights.items()) == []


def test_completions_follow_the_weights(engine, weights):
    """A stale head or a packed copy would go on giving the old log-probs."""
    asked = [Request(tuple(range(i, i + 40)), i, 1.0) for i in range(8)]
    engine.sync(weights.items())
    before = generate(engine, asked)
    for name in ("embed_tokens.weight", "lm_head.weight", "layers.1.mlp.down_proj.weight", "norm.weight"):
        changed = {n: w * (1.25 if n.endswith(name) else 1.0) for n, w in weights.items()}
        engine.sync(changed.items())
        after = generate(engine, asked)
        if name != "lm_head.weight" or "lm_head.weight" in weights:
            assert all(a.sampler_logprobs != b.sampler_logprobs for a, b in zip(before, after, strict=True)), name
    engine.sync(weights.items())
    assert_same_completions(generate(engine, asked), before, "synced back")


ASKED = [Request(tuple(range(i, i + 2 * BLOCK + 5)), i, 1.0) for i in range(8)]  # two whole pages to find again


def warm_and_cold(engine, weights):
    """Sync new weights; return completions on a cache that the old weights have warmed, and completions on a cold one."""
    engine.sync(weights.items())
    drive(engine, ASKED)
    engine.sync((name, 1.1 * w) for name, w in weights.items())
    warm = drive(engine, ASKED, cold=False)
    return warm, drive(engine, ASKED)


def test_sync_forgets_the_prefixes_of_the_old_weights(engine, weights):
    warm, cold = warm_and_cold(engine, weights)
    assert_same_completions(warm.completions, cold.completions, "after a sync")


def test_a_stale_prefix_is_seen(engine, weights):
    """Control: without the reset the same comparison fails."""
    engine.sync(weights.items())
    drive(engine, ASKED)
    with mock.patch.object(engine.llm, "reset_prefix_cache", return_value=True):
        engine.sync((name, 1.1 * w) for name, w in weights.items())
    warm = drive(engine, ASKED, cold=False)
    assert warm.cached_tokens == 8 * 2 * BLOCK
    with pytest.raises(AssertionError, match="stale"):
        assert_same_completions(warm.completions, drive(engine, ASKED).completions, "stale prefixes")


def test_sync_refuses_while_a_request_runs(engine, weights):
    llm = engine.llm.llm_engine
    llm.add_request("running", {"prompt_token_ids": [1, 2, 3]}, params(engine, ASKED[0]))
    llm.step()
    with pytest.raises(RuntimeError, match="still running"):
        engine.sync(weights.items())
    llm.abort_request(["running"])
    for _ in range(2):  # an engine that schedules ahead has a batch more under way
        llm.step()
    engine.sync(weights.items())


def seed_process() -> None:
    """Seed the process with other seeds than vLLM's own."""
    torch.manual_seed(123)
    random.seed(123)
    np.random.seed(123)


def process_state():
    """Return what vLLM seeds, sets or replaces."""
    return (
        torch.get_rng_state().tolist(),
        torch.cuda.get_rng_state().tolist() if CUDA else None,
        random.getstate(),
        np.random.get_state()[1].tolist(),
        (torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype(), torch.is_grad_enabled()),
    )


def test_a_running_engine_leaves_the_process_as_it_was(engine, weights):
    seed_process()
    before = process_state()
    engine.sync(weights.items())
    engine.differing_weights(weights.items())
    generate(engine, ASKED)
    assert process_state() == before


@pytest.mark.parametrize("invariant", [True, False], ids=["exact", "stock"])
def test_starting_an_engine_leaves_the_process_as_it_was(invariant, arithmetic_dir):
    seed_process()
    before = process_state()
    start_engine(arithmetic_dir, invariant=invariant)
    assert process_state() == before


def test_sync_works_without_a_prefix_cache(path, weights):
    engine = start_engine(path, enable_prefix_caching=False)
    engine.sync(weights.items())
    once, twice = drive(engine, ASKED, cold=False), drive(engine, ASKED, cold=False)
    assert twice.cached_tokens == 0
    cached = ENGINES(path, True)
    cached.sync(weights.items())
    assert_same_completions(twice.completions, once.completions, "again")
    assert_same_completions(once.completions, drive(cached, ASKED).completions, "with and without a prefix cache")


def test_a_part_of_a_weight_is_nobodys_memory():
    """An engine over two processes has half of the rows; what it has may begin where the trainer's own does."""
    whole = torch.zeros(100, 8)
    assert synced._is_memory_of(whole, [whole[:60], whole[60:]]) and not synced._is_memory_of(whole[:64], [whole])


@pytest.mark.skipif(CUDA, reason="a GPU packs no weights")
def test_a_part_of_the_weights_is_packed_alone(path, weights):
    """A server gets them in parts; all packed at each part is a time that grows with the square of the model."""
    engine = ENGINES(path, True)
    engine.sync(weights.items())
    before = {name: dict(layer.packed) for name, layer in products(engine.model).items()}
    packed = {name for name, held in before.items() if held}
    if not packed:
        pytest.skip("this CPU packs no weights")
    tied = "lm_head.weight" not in weights
    for part, layers in (
        ("model.layers.1.self_attn.k_proj.weight", {"model.layers.1.self_attn.qkv_proj"}),
        ("model.layers.0.mlp.down_proj.weight", {"model.layers.0.mlp.down_proj"}),
        ("model.embed_tokens.weight", {"lm_head"} if tied else set()),
        ("model.norm.weight", set()),
    ):
        weights[part] = weights[part] + 0.5
        engine.model.load_weights([(part, weights[part])])
        after = {name: dict(layer.packed) for name, layer in products(engine.model).items()}
        changed = {name for name, held in after.items() if any(held[key] is not before[name][key] for key in held)}
        assert changed == layers & packed
        assert engine.differing_weights(weights.items()) == []
        before = after

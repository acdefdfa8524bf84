"""Several engines in one process, as a notebook has whose cell runs again: each ends without the others."""

import gc
import weakref

import pytest
import torch
import vllm.distributed.parallel_state
import vllm.v1.engine.core

from rlinvariant.models.families import FAMILIES
from rlinvariant.models.random import save_random
from rlinvariant.sampler.engine import Sampler
from tests.parity.harness import start_engine

PROMPTS = [[1, 2, 3], [4, 5]]


def draw(engine: Sampler) -> list[list[int]]:
    return [c.token_ids for c in engine.generate(PROMPTS, [0, 1], temperature=1.0, max_tokens=4)]


@pytest.fixture
def destroyed(monkeypatch):
    """Count how often vLLM would have destroyed the process groups, and keep it from doing so."""
    calls: list[int] = []
    monkeypatch.setattr(vllm.v1.engine.core, "cleanup_dist_env_and_memory", lambda: calls.append(1), raising=False)
    return calls


@pytest.mark.usefixtures("real_freeze")  # what the start of one engine hides from the collector is given back all the same
@pytest.mark.slow
def test_an_engine_ends_alone_and_gives_its_memory_back(arithmetic_dir, exact_engine, destroyed):
    first = start_engine(arithmetic_dir, kv_bytes=1 << 20)
    drawn, module = draw(first), weakref.ref(first.model)
    first.close()
    first.close()
    assert module() is None
    second = start_engine(arithmetic_dir, kv_bytes=1 << 20)
    assert draw(second) == drawn == draw(exact_engine)
    module = weakref.ref(second.model)
    del second
    gc.unfreeze()
    gc.collect()  # what the start of a third one does
    assert module() is None and draw(exact_engine) == drawn
    assert torch.distributed.is_initialized() and not destroyed


def test_a_mixture_comes_after_a_dense_model(arithmetic_dir, tmp_path, monkeypatch):
    """vLLM makes its group of experts with a process's first engine, if that one is of a mixture."""
    first = start_engine(arithmetic_dir, kv_bytes=1 << 20)
    monkeypatch.setattr(vllm.distributed.parallel_state, "_EP", None)  # as it is where no earlier test had a mixture
    stock = start_engine(save_random(FAMILIES["mixtral"](), tmp_path), invariant=False, kv_bytes=1 << 20)
    assert [len(c.token_ids) for c in stock.generate(PROMPTS, [0, 1], temperature=1.0, max_tokens=4)] == [4, 4]
    assert draw(first)


@pytest.mark.skipif(not hasattr(vllm.v1.engine.core, "cleanup_dist_env_and_memory"), reason="vLLM 0.26 leaves the groups alone")
def test_vllm_itself_takes_the_groups_of_all_with_one(arithmetic_dir, destroyed):
    engine = start_engine(arithmetic_dir, kv_bytes=1 << 20)
    engine.llm.llm_engine.engine_core.engine_core.shutdown()
    assert destroyed

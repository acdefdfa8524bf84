"""`rlinvariant serve` of a PEFT adapter: what it answers over HTTP are the numbers of a trainer with that adapter."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from rlinvariant.demo.model import build_small
from rlinvariant.metrics import mismatches
from rlinvariant.model_source import base_and_adapter
from rlinvariant.models import lora
from rlinvariant.rollout import Completion
from rlinvariant.trainer.score import Layout, score
from rlinvariant.verification import adapters, load
from tests.sampler.test_serve import PROMPT, Server, body

PROMPTS = [PROMPT[:n] for n in (1, 9, 130)]
TOKENS = len(PROMPTS) * 16
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """Return the directory of an adapter that counts, on queries and values alone, which vLLM merges with the keys."""
    base, path = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("adapter")
    build_small(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = lora.applied(model, LoraConfig(r=5, lora_alpha=32, target_modules=["q_proj", "v_proj", "up_proj"]), seed=0)
    lora.randomise(model, seed=1)
    model.save_pretrained(path)
    return path


def differing(directory: str, adapter: Path | None, drawn: list[Completion]) -> int:
    """Count the log-probs that are not a trainer's of this base, with the adapter or without."""
    model: Any = load.trained(directory, "bfloat16", adapters.adapt(None if adapter is None else str(adapter), None, 0))
    pairs = zip(drawn, score(model, PROMPTS, drawn, 1.0, Layout(2)), strict=True)
    return sum(int(mismatches(np.float32(c.sampler_logprobs), s.numpy()).sum()) for c, s in pairs)


def test_an_adapter_is_served_with_the_trainers_numbers(adapter, tmp_path):
    """Control: a trainer of the base alone has others, for nearly every token."""
    options = ["--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(2**28)]
    server = Server(["-m", "rlinvariant", "serve", str(adapter), *options], tmp_path / "log")

    async def ask() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=None) as client:
            shared = body(temperature=1, logprobs=0, return_token_ids=True)
            asked = [client.post("/v1/completions", json={**shared, "prompt": p, "seed": i}) for i, p in enumerate(PROMPTS)]
            return [answer.json()["choices"][0] for answer in await asyncio.gather(*asked)]

    try:
        printed = server.wait()
        models = httpx.get(f"{server.url}/v1/models", timeout=None).json()["data"]
        drawn = [Completion(c["token_ids"], c["logprobs"]["token_logprobs"]) for c in asyncio.run(ask())]
    finally:
        server.stop()
    assert "with LoRA adapters, r 5, on 12 projections: " in printed and "exact: engine process " in printed
    assert [model["id"] for model in models] == [str(adapter)], "it has the adapter's name, not the base's"
    base = base_and_adapter(str(adapter))[0]
    assert differing(base, adapter, drawn) == 0
    assert differing(base, None, drawn) > 0.9 * TOKENS

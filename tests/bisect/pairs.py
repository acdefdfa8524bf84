"""A sampler and a trainer of one small model, and ways to change one of them for a while."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Qwen3Config

from rlinvariant import ops
from rlinvariant.bisect import both_sides, search, trials
from rlinvariant.bisect.report import lines

VOCABULARY = 101  # vLLM pads it to 128
CONFIG = Qwen3Config(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
TRIAL = trials.draw_trial(VOCABULARY, 12, 40, 12, 0.7, seed=3, rows=5)  # 5 + 5 + 2; vLLM decodes 12 rows
STEP_TOKENS, LONGEST_REQUEST = 256, 128


@dataclass
class Pair:
    path: str
    engine: Any
    model: Any

    def sampler(self, name: str) -> Any:
        return self.engine.model.get_submodule(f"model.{name}")

    def trainer(self, name: str) -> Any:
        return self.model.get_submodule(f"model.{name}")

    def attention(self, layer: int) -> Any:
        return both_sides.attention_layers(self.engine)[layer].impl

    def find(self, stock: tuple[str, ...] = (), engine: Any = None, **changes: Any) -> tuple[search.Result, list[str]]:
        return self.find_any([replace(TRIAL, **changes)], stock, engine)

    def find_any(self, tried: list[trials.Trial], stock: tuple[str, ...] = (), engine: Any = None):
        result, trial = search.find_any(engine or self.engine, self.model, tried)
        said = lines(result, trial, engine or self.engine, stock)
        print("\n".join(said))
        assert len(said) <= 15 and all(len(line) < 240 for line in said)
        return result, said


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put a value in the place of an attribute of this very object for a while."""
    had, was = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, was) if had else delattr(owner, name)


@contextlib.contextmanager
def changed(parameter: Any, change: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    kept = parameter.detach().clone()
    change(parameter.data)
    try:
        yield
    finally:
        parameter.data.copy_(kept)


def ulp(x: torch.Tensor) -> None:
    x.view(torch.int16).add_(1)


def halves(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    k = x.shape[-1] // 2
    parts = [ops.linear(x[..., s].contiguous(), w[:, s].contiguous()) for s in (slice(0, k), slice(k, None))]
    return parts[0] + parts[1]

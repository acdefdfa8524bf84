"""The model that a demo completes with: as it is named, or a shape filled with random weights."""

from pathlib import Path

from rlinvariant.arguments import suggestion
from rlinvariant.cache import CACHE, made_once
from rlinvariant.model_source import local_model, source_problems
from rlinvariant.runtime import random_state_kept

SMALL_MODEL = "small"  # the default on a CPU


def problems(name: str) -> list[str]:
    """Say in at most one line why there can be no such model."""
    found = [] if name == SMALL_MODEL else source_problems("MODEL", name)
    if not found or "/" in name:  # no shape's
        return found
    from rlinvariant.models.shapes import SHAPES

    names = [SMALL_MODEL, *SHAPES]
    if name in SHAPES:
        return []
    return [f"{line}; shapes are {', '.join(names)}{suggestion(name, names)}" for line in found]


def is_random(name: str) -> bool:
    """Tell whether a model is a shape, filled with random weights."""
    from rlinvariant.models.shapes import SHAPES

    return name == SMALL_MODEL or name in SHAPES


def make_model(name: str) -> str:
    """Return the directory or hub id of a model; a shape is filled with random weights, once."""
    from rlinvariant.models.shapes import build

    if not is_random(name):
        return local_model(name)
    return made_once(CACHE / f"demo-{name}", build_small if name == SMALL_MODEL else lambda directory: build(name, directory))


def build_small(directory: Path) -> None:
    """Write the model that is the default on a CPU: four layers, 256 wide, 8,192 tokens, random weights.

    It is quick, and so many tokens are nearly as likely that rounding can decide between them, as it can in a long answer of a
    real model. It was chosen among a dozen for that, together with its long prompt: stock attention on a CPU splits a long
    context by what else there is to do. On a short prompt stock vLLM often gave one completion, from several sequences of
    log-probs.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from rlinvariant.models.shapes import tokenizer

    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with random_state_kept():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer(config.vocab_size).save_pretrained(directory)

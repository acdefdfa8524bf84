"""Small models of every family, sequences for them, and their log-probs, patched and stock."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlinvariant.models import unsupported
from tests.parity.device import DEVICE, fp32_only_on_cpu

# 3072: down_proj sums so many columns, where a vendor GEMM starts to split them
SMALL = dict(vocab_size=97, hidden_size=128, intermediate_size=3072, num_hidden_layers=2, max_position_embeddings=64)
GROUPED = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64)
FAMILIES = {
    "llama": ("Llama", {**GROUPED}),
    "llama tied": ("Llama", {**GROUPED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen2 tied": ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**GROUPED}),
    "qwen3 tied": ("Qwen3", {**GROUPED, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "sliding_window": 5}),
    "olmo2": ("Olmo2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "gemma3": (
        "Gemma3Text",
        {**GROUPED, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"], "intermediate_size": 384},
    ),
}
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
ROPES = {
    "linear": dict(rope_type="linear", rope_theta=10000.0, factor=2.0),
    "llama3": dict(rope_theta=500000.0, **LLAMA3),
    "yarn": dict(rope_type="yarn", rope_theta=10000.0, factor=2.0, original_max_position_embeddings=32),
}
LENGTHS = (1, 9, 17, 4)
DTYPES = (torch.bfloat16, pytest.param(torch.float32, marks=fp32_only_on_cpu))


def configuration(family: str, **overrides: object) -> Any:
    name, kwargs = FAMILIES.get(family, (family, {}))
    return getattr(transformers, f"{name}Config")(**{**SMALL, **kwargs, **overrides})


SUPPORTED = [family for family in FAMILIES if not list(unsupported(configuration(family), DEVICE))]


def build(family: str, **overrides: object) -> PreTrainedModel:
    """A stock fp32 model whose norms, biases and weights all count; the same weights at every call."""
    config = configuration(family, **overrides)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for p in model.parameters():
            p.normal_(0, 0.1) if p.dim() > 1 else p.normal_(0.8, 0.2)
    return model.to(DEVICE)


def sequences() -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (n,), generator=rng).to(DEVICE) for n in LENGTHS]


def packed(rows: list[Tensor]) -> dict[str, Tensor | int]:
    cu = torch.tensor([0, *torch.tensor([len(r) for r in rows]).cumsum(0)], dtype=torch.int32, device=DEVICE)
    longest = max(len(r) for r in rows)
    return dict(
        input_ids=torch.cat(rows)[None],
        position_ids=torch.cat([torch.arange(len(r), device=DEVICE) for r in rows])[None],
        cu_seq_lens_q=cu,
        cu_seq_lens_k=cu,
        max_length_q=longest,
        max_length_k=longest,
    )


def scored(rows: list[Tensor]) -> dict[str, Tensor]:
    """Every token but the first of each sequence, predicted from the one before."""
    starts = [sum(len(r) for r in rows[:i]) for i in range(len(rows))]
    predicted_from = torch.cat([torch.arange(s, s + len(r) - 1) for s, r in zip(starts, rows, strict=True)]).to(DEVICE)
    return dict(predicted_from=predicted_from, token_ids=torch.cat([r[1:] for r in rows]))


def logprobs(model: nn.Module, rows: list[Tensor], temperature: float = 0.7) -> tuple[Tensor, Tensor]:
    return model(**packed(rows), **scored(rows), temperature=temperature)


def stock_logprobs(model: nn.Module, rows: list[Tensor], temperature: float = 0.7) -> tuple[Tensor, Tensor]:
    """Each sequence alone through the stock model."""
    found, entropies = [], []
    for row in rows:
        logp = torch.log_softmax(model(input_ids=row[None]).logits[0, :-1].float() / temperature, -1)
        found.append(logp.gather(1, row[1:, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(found), torch.cat(entropies)

"""The trainer gives every sampled token the log-prob that the sampler gave it: 0 mismatched, coverage 1."""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rlinvariant import metrics
from rlinvariant.models import make_trainable, require_exact
from tests.parity.device import DEVICE, fp32_only_on_cpu
from tests.parity.harness import Layout, Pair, fp32, load, padded, save_model, score, start_engine

VOCABULARY = 101  # prime: no multiple of any tile, and vLLM pads the head
SEQUENCES = 40  # 16 + 16 + 8, 8 x 5: whole and broken micro-batches
LONGEST = 130  # several pages of 16 or 32, and key-value lengths 127 to 129
TOKENS = SEQUENCES * 20  # up to 24 each, a few end early
# TRL's micro-batches, packed in any order, padded on either side by any amount
LAYOUTS = [
    Layout(1),
    Layout(2, "reversed", padding=3),
    Layout(5, "shuffled", prompts="right", padding=7),
    Layout(16, "shuffled", padding=1),
    Layout(16, "as sampled", prompts="right", grad=True),
    Layout(SEQUENCES, "shuffled", grad=True),
]

FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}  # Qwen2: bias of q, k, v; Qwen3: q and k norms


@dataclass(frozen=True)
class Case:
    family: str
    dtype: str
    tied: bool
    head_dim: int
    heads: tuple[int, int]  # of queries, of keys and values
    hidden: int
    intermediate: int
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        head = "tied" if self.tied else "untied"
        return f"{self.family}-{self.dtype}-{head}-d{self.head_dim}-k{self.intermediate}"

    def config(self):
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": 2,
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "head_dim": self.head_dim,
            "max_position_embeddings": 256,
            "tie_word_embeddings": self.tied,
        }
        return FAMILIES[self.family](**sizes | self.more)


# Each family in both dtypes, tied and untied; head sizes 32, 64, 128 and, which only a GPU treats apart, 256; groups of 1, 2
# and 4 queries to a key. 3,072: from about there oneDNN splits K, at M = 1. 3,083: K that is no multiple of a block, whose rows
# are not even aligned.
LINEAR_ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
CASES = [
    Case("llama", "bfloat16", False, 64, (4, 2), 256, 3083),
    Case("llama", "float32", True, 32, (4, 4), 256, 384, LINEAR_ROPE),
    Case("qwen2", "bfloat16", True, 128, (2, 2), 256, 3072),
    Case("qwen2", "float32", False, 64, (4, 1), 256, 384),
    Case("qwen3", "bfloat16", False, 128, (4, 1), 256, 384),
    Case("qwen3", "float32", True, 32, (8, 2), 128, 3072),
    Case("qwen3", "bfloat16", True, 256, (2, 1), 256, 384),
]
MARKS = {"float32": [fp32_only_on_cpu], "d256": [pytest.mark.gpu]}


def marked(case: Case):
    return pytest.param(case, id=str(case), marks=[m for part, marks in MARKS.items() if part in str(case) for m in marks])


@pytest.fixture(scope="module", params=map(marked, CASES))
def pair(request, tmp_path_factory) -> Pair:
    case: Case = request.param
    path = save_model(case.config(), tmp_path_factory.mktemp("models") / str(case))
    with torch.random.fork_rng():
        biased = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for name, p in biased.named_parameters():  # transformers starts them at 0 and 1, which would hide them
            if name.endswith("bias") or "norm" in name:
                p.data.normal_(1.0 * ("norm" in name), 0.3)
        biased.save_pretrained(path)
    model = make_trainable(biased.to(DEVICE), getattr(torch, case.dtype))
    require_exact(model)
    rng = random.Random(1)
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 64, 104, LONGEST - 1, LONGEST]
    lengths += [rng.randint(3, 90) for _ in range(SEQUENCES - len(lengths))]
    prompts = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in lengths]
    return Pair(path, start_engine(path, dtype=case.dtype), model, prompts)


def mismatched(pair: Pair, temperature: float, scored: list[torch.Tensor]) -> dict[str, Any]:
    """`metrics.onpolicy` of the two sides; every sampled token must have been scored."""
    completions = pair.completions(temperature)
    sampled = sum(len(c.token_ids) for c in completions)
    sampler = torch.cat([fp32(c.sampler_logprobs) for c in completions])
    numbers = metrics.onpolicy(sampler, torch.cat(scored), sampled, 2.0)
    assert numbers["onpolicy/coverage"] == 1 and numbers["onpolicy/compared_tokens"] >= TOKENS
    return numbers


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_trainer_matches_sampler(pair, temperature):
    for layout in LAYOUTS:
        scored = score(pair.model, pair.prompts, pair.completions(temperature), temperature, layout)
        numbers = mismatched(pair, temperature, scored)
        assert numbers["onpolicy/mismatched_tokens"] == 0, f"{layout}: {numbers}"


def test_the_stock_forward_does_not_match(pair):
    """Control: transformers' own forward, cast to the sampler's dtype, on TRL's padded batches."""
    dtype = next(pair.engine.model.parameters()).dtype
    stock, found = load(pair.path, dtype), 0
    completions = pair.completions(1.0)
    ids, mask, length = padded(pair.prompts, [c.token_ids for c in completions], Layout(SEQUENCES))
    ids, mask = ids.to(DEVICE), mask.to(DEVICE)
    with torch.no_grad():
        logits = stock(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    table = logits[:, -length - 1 : -1].float().log_softmax(-1).gather(2, ids[:, -length:, None])[..., 0].cpu()
    keep = mask[:, -length:].bool().cpu()
    numbers = mismatched(pair, 1.0, [row[k] for row, k in zip(table, keep, strict=True)])
    found = numbers["onpolicy/mismatched_tokens"]
    assert found > 0 and numbers["onpolicy/logprob_absdiff/max"] < 1, f"{found}: the stock side is another model"


def test_a_temperature_that_differs_does_not_match(pair):
    """Control: the comparison looks at values."""
    scored = score(pair.model, pair.prompts, pair.completions(0.7), 1.0, LAYOUTS[3])
    assert mismatched(pair, 0.7, scored)["onpolicy/mismatched_tokens"] > TOKENS // 2


def test_greedy_log_probs_are_those_of_temperature_one(pair):
    greedy = pair.engine.generate(pair.prompts[:8], [0] * 8, temperature=0.0, max_tokens=24)
    scored = torch.cat(score(pair.model, pair.prompts[:8], greedy, 1.0, LAYOUTS[1]))
    sampler = torch.cat([fp32(c.sampler_logprobs) for c in greedy])
    numbers = metrics.onpolicy(sampler, scored, len(sampler), 2.0)
    assert numbers["onpolicy/mismatched_tokens"] == 0 and len(sampler) >= 8 * 20

"""Count the sampled tokens whose log-prob is not the same 32 bits: sampler against itself, and against the trainer.

Random models of three families, 256 wide with a 3,072-wide MLP (long enough for a GEMM to split its sums), weights spread so
that tokens differ in likelihood, ragged prompts. The control is the same comparison with a stock engine, or a stock trainer.
"""

import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rlinvariant.bench.compare import Parity, against_stock_trainer, against_trainer, differing
from rlinvariant.models import make_trainable, require_exact
from rlinvariant.rollout import Completion, request_seed
from rlinvariant.sampler.engine import Sampler

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1009,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
MODELS = {
    "Qwen3, tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "Qwen2, qkv bias": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "Llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
}
_kept: list[Sampler] = []  # engines of one process share process groups: none may be collected


def rows(tiny: bool) -> list[Parity]:
    found = []
    for name, config in MODELS.items():
        for dtype in ("bfloat16", "float32") if name.startswith("Qwen3") and not tiny else ("bfloat16",):
            found += _model(name, config, dtype, requests=8 if tiny else 96, length=8 if tiny else 64)
    return found


def _model(name: str, config: Any, dtype: str, requests: int, length: int) -> list[Parity]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        ours, stock = (Sampler(directory, invariant=i, dtype=dtype, max_model_len=256, kv_cache_gib=0.2) for i in (True, False))
        _kept.extend((ours, stock))
        kind = getattr(torch, dtype)
        exact = make_trainable(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), kind).eval()
        require_exact(exact)
        plain = AutoModelForCausalLM.from_pretrained(directory, dtype=kind).eval()

    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 150, (requests,), generator=generator).tolist()
    prompts = [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    found: list[Parity] = []
    one_by_one = max(2, requests // 8)
    for temperature in (1.0, 0.7):

        def draw(engine: Sampler, order: list[int], t: float = temperature) -> dict[int, Completion]:
            seeds = [request_seed(0, 0, i, 0) for i in order]
            out = engine.generate([prompts[i] for i in order], seeds, temperature=t, max_tokens=length, ignore_eos=True)
            return dict(zip(order, out, strict=True))

        def alone(engine: Sampler) -> int:
            engine.llm.reset_prefix_cache()
            together = draw(engine, list(range(requests)))
            engine.llm.reset_prefix_cache()
            apart = {i: draw(engine, [i])[i] for i in range(one_by_one)}
            return sum(differing(together[i], one) for i, one in apart.items())

        def warm(engine: Sampler) -> int:
            engine.llm.reset_prefix_cache()
            cold = draw(engine, list(range(requests)))
            again = draw(engine, list(reversed(range(requests))))
            return sum(differing(cold[i], again[i]) for i in cold)

        def add(compared: str, tokens: int, mismatched: int, control: str, control_mismatched: int) -> None:
            at = f"{compared}, T = {temperature}"  # noqa: B023
            found.append(Parity("parity", name, dtype, at, tokens, mismatched, control, control_mismatched))

        add("sampler: batch against alone", one_by_one * length, alone(ours), "stock vLLM", alone(stock))
        add("sampler: cold prefix against warm, shuffled", requests * length, warm(ours), "stock vLLM", warm(stock))
        drawn, drawn_stock = draw(ours, list(range(requests))), draw(stock, list(range(requests)))
        for rows_per_batch in (1, 16):
            mismatched = against_trainer(exact, prompts, list(drawn.values()), temperature, rows_per_batch)
            control = against_stock_trainer(plain, prompts, list(drawn_stock.values()), temperature)
            what = f"sampler against trainer, micro-batch {rows_per_batch}"
            add(what, requests * length, mismatched, "stock vLLM and transformers", control)
    return found

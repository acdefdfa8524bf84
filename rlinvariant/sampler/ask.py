"""`python -m rlinvariant.sampler.ask DIRECTORY`: start vLLM's engine in a process of its own and print what it says it runs.

The engine is spawned, not forked: it finds the plugin by its entry point alone, as a server's does. `DIRECTORY` is where a tiny
checkpoint with random weights is written.
"""

import os
import sys

from rlinvariant import runtime
from rlinvariant.sampler.names import NOT_ACTIVE, QUANTIZATION


def ask(directory: str) -> str:
    """What the engine process runs, in words. Raises RuntimeError or UserError where that is not all ours."""
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"}
    os.environ.update(runtime.VLLM | runtime.QUIET | apart)
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config
    from vllm import LLM, ModelRegistry
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    from rlinvariant.errors import UserError

    config = Qwen3Config(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=256,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    load_general_plugins()
    if QUANTIZATION not in QUANTIZATION_METHODS:
        raise UserError(NOT_ACTIVE)
    from rlinvariant.sampler.vllm_model import InvariantForCausalLM
    from rlinvariant.sampler.vllm_serve import OURS

    for name in OURS["hf_overrides"]["architectures"]:
        ModelRegistry.register_model(name, InvariantForCausalLM)  # the class itself: see sampler/engine.py
    options = {name: value for name, value in OURS.items() if name != "logits_processors"}  # those are of a server's front end
    if not torch.cuda.is_available():  # as sampler/engine.py has it
        options |= {"async_scheduling": False}
    options |= {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4}
    llm = LLM(directory, dtype="bfloat16", kv_cache_memory_bytes=64 << 20, gpu_memory_utilization=0.01, **options)
    (proof,) = llm.collective_rpc("prove")
    return proof


if __name__ == "__main__":
    print(f"exact: {ask(sys.argv[1])}", flush=True)

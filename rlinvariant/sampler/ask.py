"""`python -m rlinvariant.sampler.ask DIRECTORY`: start vLLM's engine in a process of its own and print what it says it runs.

The engine is spawned, not forked, as a server's is, and has nothing but the entry point to find the plugin by: this process
registers its own names by hand. `DIRECTORY` is where a tiny checkpoint with random weights is written.
"""

import os
import sys

from rlinvariant import runtime
from rlinvariant.kernels import choice
from rlinvariant.sampler import plugin
from rlinvariant.text import say

IN_ITS_OWN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # the engine core in a process of its own
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # which starts from nothing; a forked one would have what is registered here
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for the proof
}


def ask(directory: str) -> str:
    """Return what the engine process runs, in words.

    Raises:
        RuntimeError: it did not start, or not all that it runs is ours. Its own process writes the cause on stderr: the entry
            point was not found, or a fork gave it what is registered here.
    """
    os.environ.update(runtime.VLLM | runtime.QUIET | IN_ITS_OWN_PROCESS)
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config
    from vllm import LLM

    from rlinvariant.sampler.vllm_serve import ATTENTION_KEY, SET_HERE

    config = Qwen3Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    plugin.register()
    plugin.register_class()
    options = {name: value for name, value in SET_HERE.items() if name != "logits_processors"}  # a server's front end has them
    if not torch.cuda.is_available():  # see sampler/engine.py
        options |= {"async_scheduling": False}
    options |= {"additional_config": {ATTENTION_KEY: choice.chosen()}, "skip_tokenizer_init": True}
    options |= {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4}
    llm = LLM(directory, dtype="bfloat16", kv_cache_memory_bytes=64 << 20, gpu_memory_utilization=0.01, **options)
    (proof,) = llm.collective_rpc("prove")
    return proof


if __name__ == "__main__":
    say(f"exact: {ask(sys.argv[1])}")

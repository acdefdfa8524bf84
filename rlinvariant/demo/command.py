"""`rlinvariant demo [MODEL] [key=value ...]`: run the experiment, print its numbers, write its page."""

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinvariant import runtime
from rlinvariant.arguments import definitions, suggestion, twice
from rlinvariant.demo import model
from rlinvariant.errors import ConfigErrors, ParityError, UserError, one_line
from rlinvariant.files import RUNS, require_writable, write_atomically
from rlinvariant.report.console import Console
from rlinvariant.text import plural
from rlinvariant.types import JsonObject, Untyped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DESCRIPTION = """Completes one prompt many times at temperature 0 while other requests join and leave, on stock vLLM and with
the invariant ops. Prints unique completions, the first token that differs, the same of log-probs, and tokens/s; writes
runs/demo-*/demo.json and demo.html. By default it takes two to four minutes on two cores; completions=200 takes less than
one."""
EXAMPLE = "rlinvariant demo small completions=200"
DEFAULT_GPU_MODEL = "qwen3-0.6b"
OTHER_PROMPT_TOKENS = 128  # longest prompt of another request
RANDOM_PROMPT_TOKENS = 400
QUESTION = "Explain how a computer adds two numbers."
PROMPT_HELP = (
    f"text, asked as the model's chat template says; empty: a question, of random weights {RANDOM_PROMPT_TOKENS} tokens"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Holds the keys of the command."""

    completions: int = dataclasses.field(default=1000, metadata={"doc": "how often the prompt is completed"})
    tokens: int = dataclasses.field(default=64, metadata={"doc": "length of each completion"})
    concurrency: int = dataclasses.field(default=32, metadata={"doc": "most requests in the engine at once; it wanders from 1"})
    prompt: str = dataclasses.field(default="", metadata={"doc": PROMPT_HELP})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"doc": "bfloat16 or float32"})
    seed: int = dataclasses.field(default=0, metadata={"doc": "decides the traffic and a random prompt"})
    run: str = dataclasses.field(default="", metadata={"doc": "name under runs/; empty: demo and the time"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and the keys of `demo`."""
    which = (
        "MODEL: a Hugging Face directory or hub id, or a shape to fill with random weights, as small, tiny, qwen3-0.6b or "
        f"llama-3.2-1b; {model.SMALL_MODEL} by default on a CPU, {DEFAULT_GPU_MODEL} on a GPU"
    )
    parser.add_argument("settings", nargs="*", metavar="MODEL, key=value", help=which)
    keys = {f"{f.name}={f.default}": f.metadata["doc"] for f in dataclasses.fields(Options)}
    parser.add_argument_group("keys and their defaults", definitions(keys, 16))


def run(options: argparse.Namespace) -> None:
    """Run the experiment, print its numbers, and write them.

    Raises:
        ConfigErrors: what is wrong with the arguments, one line each, before anything starts.
        UserError: the model cannot be loaded, or cannot run exactly.
        ParityError: the invariant engine's completions were not all the same; everything was written before.
    """
    name, asked = parse(options.settings)
    directory = RUNS / (asked.run or f"demo-{time.strftime('%Y%m%d-%H%M%S')}")
    if (directory / "demo.json").exists():
        raise UserError(f"run={asked.run}: {directory} already holds a demo; choose another run=NAME")
    require_writable(directory, f"run={asked.run}", "choose another run=NAME", directory=True)
    runtime.configure()
    runtime.quiet()
    console = Console()
    with console.stage("loading transformers and vLLM"):
        import torch
        from transformers.utils import logging

        from rlinvariant.demo.measure import summary
    logging.disable_progress_bar()  # it would run into the spinner
    cuda = torch.cuda.is_available()
    name = name or (DEFAULT_GPU_MODEL if cuda else model.SMALL_MODEL)
    path = model.make_model(name)
    tokenizer, prompt, longest = tokenized(name, path, asked)
    count = f"{plural(asked.completions, 'completion')} of {plural(asked.tokens, 'token')}"
    console.print(f"{name}: {count} of a prompt of {len(prompt)}, on stock vLLM and with the invariant ops")
    result = {
        "model": name,
        "random_weights": model.is_random(name),
        "prompt": asked.prompt or ("" if model.is_random(name) else QUESTION),
        "options": dataclasses.asdict(asked),
        "prompt_token_ids": prompt,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "arms": complete(path, asked, tokenizer, prompt, longest, console),
    }
    write(directory, result)
    for line in summary(result):
        console.print(line)
    console.print(f"files  {directory / 'demo.html'}, {directory / 'demo.json'}")
    ours = result["arms"]["ours"]
    if ours["unique_logprobs"] != 1 or ours["logprobs_as_alone"] != asked.completions:
        raise ParityError(
            f"the invariant engine gave {plural(ours['unique_logprobs'], 'log-prob sequence')}, {ours['logprobs_as_alone']} of "
            f"{asked.completions} as alone: expected 1, and all; {directory / 'demo.json'} has them"
        )


def complete(
    path: str, asked: Options, tokenizer: "PreTrainedTokenizerBase", prompt: list[int], longest: int, console: Console
) -> dict[str, JsonObject]:
    """Complete the prompt on each engine, among the same traffic, and return what was counted: {"stock" | "ours": numbers}."""
    from rlinvariant.demo.measure import measured
    from rlinvariant.sampler.engine import Sampler
    from rlinvariant.sampler.traffic import alone, among_traffic

    arms: dict[str, dict[str, Any]] = {}
    engines = []  # engines of a process share process groups: none may be collected while another is used
    for arm, invariant in (("stock", False), ("ours", True)):
        with console.stage(f"{arm}: starting the engine"):
            room = {"max_model_len": longest, "options": {"max_num_seqs": asked.concurrency}}
            sampler = Sampler(path, invariant=invariant, dtype=asked.dtype, **room)
            engines.append(sampler)
        with console.stage(f"{arm}: completing", total=asked.completions) as advance:
            by_itself = alone(sampler, prompt, asked.tokens)
            traffic = among_traffic(
                sampler,
                prompt,
                completions=asked.completions,
                tokens=asked.tokens,
                vocabulary=len(tokenizer),
                most=asked.concurrency,
                seed=asked.seed,
                longest=OTHER_PROMPT_TOKENS,
                advance=advance,
            )
        arms[arm] = measured(traffic.completions, by_itself, tokenizer) | {
            "tokens_per_s": traffic.tokens / traffic.seconds,
            **{k: getattr(traffic, k) for k in ("seconds", "others", "cancelled", "fewest", "most")},
        }
    return arms


def parse(arguments: Sequence[str]) -> tuple[str | None, Options]:
    """Return MODEL, or None, and the options. Raises ConfigErrors with one line for each problem."""
    fields = {field.name: field for field in dataclasses.fields(Options)}
    name, given, errors = None, {}, []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals and not argument.startswith("-") and name is None:
            name = argument
            errors += model.problems(name)
        elif not equals or key.startswith("-"):
            errors.append(f"{argument}: expected MODEL once, and key=value without dashes; see rlinvariant demo --help")
        elif key not in fields:
            errors.append(f"{argument}: unknown key; there are {', '.join(fields)}{suggestion(key, fields)}")
        elif key in given:
            errors.append(twice(key, given[key], text))
        elif fields[key].type is int and not (text.isdigit() and (int(text) > 0 or key == "seed")):
            errors.append(f"{argument}: expected a whole number{'' if key == 'seed' else ' of at least 1'}")
        elif key == "dtype" and text not in ("bfloat16", "float32"):
            errors.append(f"{argument}: expected bfloat16 or float32")
        elif key == "run" and ("/" in text or text in (".", "..")):
            errors.append(f"{argument}: expected a name, not a path")
        else:
            given[key] = int(text) if fields[key].type is int else text
    if errors:
        raise ConfigErrors(errors)
    return name, Options(**given)


def tokenized(name: str, path: str, asked: Options) -> tuple["PreTrainedTokenizerBase", list[int], int]:
    """Return the model's tokenizer, the prompt's token ids, and the positions that the longest request needs.

    Raises:
        UserError: the model cannot run exactly, has no tokenizer, or has too few positions.
    """
    from transformers import AutoTokenizer

    from rlinvariant.sampler.engine import refuse

    positions = refuse({}, path, asked.dtype)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"MODEL {path}: no tokenizer: {one_line(error, 400)}") from error
    rng = random.Random(asked.seed)
    prompt = [rng.randrange(len(tokenizer)) for _ in range(RANDOM_PROMPT_TOKENS)]
    if asked.prompt or not model.is_random(name):
        prompt = asked_tokens(tokenizer, asked.prompt or QUESTION)
    longest = max(len(prompt), OTHER_PROMPT_TOKENS) + asked.tokens
    if longest > positions:
        has = f"{name} has {positions} positions"
        raise UserError(f"tokens={asked.tokens}: with the prompt {longest} tokens, and {has}; lower it")
    return tokenizer, prompt, longest


def asked_tokens(tokenizer: Untyped, text: str) -> list[int]:
    """Return the token ids of a question: in the chat template, where there is one."""
    if not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    turns = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"])


def write(directory: Path, result: JsonObject) -> None:
    """Write demo.html, and demo.json with the environment, which says that the demo is done."""
    from rlinvariant.demo.page import page
    from rlinvariant.machine import environment

    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "demo.html", page(result))
    write_atomically(directory / "demo.json", json.dumps({**result, "environment": environment()}, indent=2) + "\n")

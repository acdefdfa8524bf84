"""`rlinvariant demo [MODEL]`: one prompt, 1,000 times at temperature 0, among changing traffic, with the ops off and on.

A server's answer at temperature 0 should not depend on who else is being served. Stock kernels change their order of summation
with the batch, so bits differ at once, and a token as soon as two are nearly as likely. The experiment is that of Horace He and
Thinking Machines Lab, "Defeating Nondeterminism in LLM Inference", 2025.
"""

import dataclasses
import difflib
import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlinvariant.config import RUNS
from rlinvariant.errors import ConfigErrors, ParityError, UserError, one_line
from rlinvariant.report.console import Console, printable
from rlinvariant.rollout import Completion
from rlinvariant.warmstart import CACHE

HELP = """usage: rlinvariant demo [MODEL] [key=value ...]

Completes one prompt many times at temperature 0 while other requests join and leave, on stock vLLM and with the invariant ops:
unique completions, the first token that differs, the same of log-probs, tokens/s. Writes runs/demo-*/demo.json and demo.html.
By default it takes two to four minutes on two cores; completions=200 takes less than one.

MODEL is a Hugging Face directory or hub id, or the name of a shape to fill with random weights: {shapes}. Default: {default}.
"""
SMALL = "small"  # the default on a CPU
LONGEST = 128  # tokens of another request's prompt


@dataclasses.dataclass(frozen=True)
class Options:
    completions: int = dataclasses.field(default=1000, metadata={"doc": "how often the prompt is completed"})
    tokens: int = dataclasses.field(default=64, metadata={"doc": "length of each completion"})
    concurrency: int = dataclasses.field(default=32, metadata={"doc": "most requests in the engine at once; it wanders from 1"})
    prompt: str = dataclasses.field(default="", metadata={"doc": "text; empty: 400 random tokens"})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"doc": "bfloat16 or float32"})
    seed: int = dataclasses.field(default=0, metadata={"doc": "of the traffic and of a random prompt"})
    run: str = dataclasses.field(default="", metadata={"doc": "name under runs/; empty: demo and the time"})


def demo(argv: Sequence[str]) -> None:
    """Run the experiment, print its numbers, and write them.

    Raises:
        ConfigErrors: what is wrong with the arguments, one line each, before anything starts.
        UserError: the model cannot be loaded, or cannot run exactly.
        ParityError: after everything was written, if the invariant engine's completions were not all the same.
    """
    import torch

    cuda = torch.cuda.is_available()
    default = "qwen3-0.6b" if cuda else SMALL
    if {"--help", "-h"} & set(argv):
        from rlinvariant.models.shapes import SHAPES

        print(HELP.format(shapes=", ".join([SMALL, *SHAPES]), default=default))
        for field in dataclasses.fields(Options):
            print(f"{field.name + '=' + str(field.default):<20}  {field.metadata['doc']}")
        return
    name, options = parse(argv)
    directory = RUNS / (options.run or f"demo-{time.strftime('%Y%m%d-%H%M%S')}")
    if (directory / "demo.json").exists():
        raise UserError(f"run={options.run}: {directory} already holds a demo; choose another run=NAME")
    console = Console()
    with console.stage("loading transformers and vLLM"):
        from transformers import AutoTokenizer

        from rlinvariant.sampler.engine import Sampler, refuse
        from rlinvariant.sampler.traffic import alone, among_traffic
    model = make_model(name or default)
    positions = refuse({}, model, options.dtype)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"MODEL {model}: no tokenizer: {one_line(error, 400)}") from error
    prompt = prompt_ids(options, tokenizer, len(tokenizer))
    longest = max(len(prompt), LONGEST) + options.tokens
    if longest > positions:
        raise UserError(f"tokens={options.tokens}: with the prompt {longest} tokens, and {name or default} has {positions}")
    count = f"{options.completions:,} completions of {options.tokens} tokens"
    console.print(f"{name or default}: {count} of a prompt of {len(prompt)}, on stock vLLM and with the invariant ops")
    arms: dict[str, dict[str, Any]] = {}
    engines = []  # of one process share process groups: none may be collected
    for arm, invariant in (("stock", False), ("ours", True)):
        with console.stage(f"{arm}: starting the engine"):
            sampler = Sampler(
                model,
                invariant=invariant,
                dtype=options.dtype,
                max_model_len=longest,
                options={"max_num_seqs": options.concurrency},
            )
            engines.append(sampler)
        with console.stage(f"{arm}: completing", total=options.completions) as advance:
            by_itself = alone(sampler, prompt, options.tokens)
            traffic = among_traffic(
                sampler,
                prompt,
                completions=options.completions,
                tokens=options.tokens,
                vocabulary=len(tokenizer),
                most=options.concurrency,
                seed=options.seed,
                longest=LONGEST,
                advance=advance,
            )
        arms[arm] = measured(traffic.completions, by_itself, tokenizer) | {
            "tokens_per_s": traffic.tokens / traffic.seconds,
            **{k: getattr(traffic, k) for k in ("seconds", "others", "cancelled", "fewest", "most")},
        }
    result = {
        "model": name or default,
        "random_weights": model != name,
        "options": dataclasses.asdict(options),
        "prompt_token_ids": prompt,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "arms": arms,
    }
    write(directory, result)
    for line in summary(result):
        console.print(line)
    console.print(f"files  {directory / 'demo.html'}, {directory / 'demo.json'}")
    ours = arms["ours"]
    if ours["unique_logprobs"] != 1 or ours["logprobs_as_alone"] != options.completions:
        raise ParityError(
            f"the invariant engine gave {ours['unique_logprobs']} log-prob sequences, {ours['logprobs_as_alone']} of "
            f"{options.completions} as alone: expected 1, and all; {directory / 'demo.json'} has them"
        )


def parse(argv: Sequence[str]) -> tuple[str | None, Options]:
    """(MODEL or None, options). Raises ConfigErrors with one line per problem."""
    fields = {field.name: field for field in dataclasses.fields(Options)}
    model, given, errors = None, {}, []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals and not argument.startswith("-") and model is None:
            model = argument
        elif not equals or key.startswith("-"):
            errors.append(f"{argument}: expected MODEL once, and key=value without dashes; see rlinvariant demo --help")
        elif key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            errors.append(
                f"{argument}: unknown key{f', did you mean {close[0]}?' if close else ''}; there are {', '.join(fields)}"
            )
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
    return model, Options(**given)


def make_model(name: str) -> str:
    """The directory of a model: as it is named, or made with random weights if a shape is named, once."""
    from filelock import FileLock

    from rlinvariant.models.shapes import SHAPES, build

    if name != SMALL and name not in SHAPES:
        return name
    directory = CACHE / f"demo-{name}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.is_dir():
            partial = Path(f"{directory}.{os.getpid()}.partial")
            build_small(partial) if name == SMALL else build(name, partial)
            os.rename(partial, directory)
    return str(directory)


def build_small(directory: Path) -> None:
    """Four layers, 256 wide, 8,192 tokens, random: quick, and so many tokens are nearly as likely that rounding can decide
    between them, as it can in a long answer of a real model.

    Chosen among a dozen for that, with its long prompt: stock attention on a CPU splits a long context by what else there is to
    do. On a short prompt stock vLLM often gave one completion, from several sequences of log-probs.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from rlinvariant.models.shapes import tokenizer

    config = Qwen3Config(
        vocab_size=8192, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer(config.vocab_size).save_pretrained(directory)


def prompt_ids(options: Options, tokenizer: Any, vocabulary: int) -> list[int]:
    import random

    if options.prompt:
        return list(tokenizer(options.prompt)["input_ids"])
    rng = random.Random(options.seed)
    return [rng.randrange(vocabulary) for _ in range(400)]


# ---- numbers


def measured(completions: Sequence[Completion], alone: Completion, tokenizer: Any) -> dict[str, Any]:
    """What is counted of one engine's completions. Positions count from 1, None: no difference; log-probs by their bits."""
    tokens = [tuple(c.token_ids) for c in completions]
    words = [tuple(x.hex() for x in c.sampler_logprobs) for c in completions]
    counts = Counter(tokens)
    at = first_difference(tokens)
    branches = Counter(t[at - 1] for t in tokens).most_common(8) if at else []
    return {
        "completions": len(completions),
        "unique": len(counts),
        "first_token": at,
        "unique_logprobs": len(set(words)),
        "first_logprob": first_difference(words),
        "as_alone": tokens.count(tuple(alone.token_ids)),
        "logprobs_as_alone": words.count(tuple(x.hex() for x in alone.sampler_logprobs)),
        "branches": [[tokenizer.decode([token]), count] for token, count in branches],
        "unique_by_token": growth(tokens),
        "unique_logprobs_by_token": growth(words),
        "samples": [[tokenizer.decode(list(row)), count] for row, count in counts.most_common(5)],
    }


def first_difference(rows: Sequence[tuple[Any, ...]]) -> int | None:
    """The first position, from 1, at which not all rows have the same."""
    return next((i for i, column in enumerate(zip(*rows, strict=True), 1) if len(set(column)) > 1), None)


def growth(rows: Sequence[tuple[Any, ...]]) -> list[int]:
    """How many different beginnings the rows have, at each length from 1."""
    return [len({row[:length] for row in rows}) for length in range(1, len(rows[0]) + 1)]


def summary(result: dict[str, Any]) -> list[str]:
    """The outcome in lines: what each engine did, and what it cost."""
    lines, arms = [], result["arms"]
    for name, arm in arms.items():
        counted = [
            f"{arm[key]:,} unique{what}, " + (f"first differing at token {arm[first]}" if arm[first] else "no difference seen")
            for what, key, first in (("", "unique", "first_token"), (" in log-probs", "unique_logprobs", "first_logprob"))
        ]
        lines.append(f"{name + ':':<6} {arm['completions']:,} completions: {'; '.join(counted)}")
        lines.append(f"       {arm['as_alone']:,} as when alone, {arm['logprobs_as_alone']:,} of them to the last bit")
        if arm["branches"]:
            said = ", ".join(f"{text!r} {count:,} times" for text, count in arm["branches"])
            lines.append(f"       token {arm['first_token']}: {said}")
    stock, ours = arms["stock"], arms["ours"]
    lines.append(
        f"speed: stock {stock['tokens_per_s']:,.0f} tokens/s, ours {ours['tokens_per_s']:,.0f}: "
        f"{ours['tokens_per_s'] / stock['tokens_per_s']:.2f}x; traffic: {ours['others']:,} other requests, "
        f"{ours['cancelled']:,} of them cancelled, {ours['fewest']} to {ours['most']} at once"
    )
    return lines


# ---- files


def write(directory: Path, result: dict[str, Any]) -> None:
    """demo.json, with the environment, and demo.html."""
    from rlinvariant.report.rundir import environment

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "demo.json").write_text(json.dumps({**result, "environment": environment()}, indent=2) + "\n")
    (directory / "demo.html").write_text(page(result), encoding="utf-8", errors="backslashreplace")


def page(result: dict[str, Any]) -> str:
    """One file without network or script: the sentences, the curves, the numbers, what was said."""
    arms, options = result["arms"], result["options"]
    css = (Path(__file__).parent / "report" / "page.css").read_text()
    title = f"One prompt, {options['completions']:,} times, at temperature 0"
    rows = (
        ("unique completions", "unique"),
        ("first token that differs", "first_token"),
        ("unique sequences of log-probs", "unique_logprobs"),
        ("first log-prob that differs, at token", "first_logprob"),
        ("completions as when alone", "as_alone"),
        ("... and their log-probs, bit for bit", "logprobs_as_alone"),
        ("tokens/s", "tokens_per_s"),
    )
    table = "".join(
        f"<tr><th>{label}</th>" + "".join(f"<td>{_number(arm[key])}</td>" for arm in arms.values()) + "</tr>"
        for label, key in rows
    )
    samples = "".join(
        f'<tr><th>{name}</th><td>{count:,}</td><td class="text">{_text(text)}</td></tr>'
        for name, arm in arms.items()
        for text, count in arm["samples"]
    )
    sentences = "".join(f"<li>{_text(line.strip())}</li>" for line in summary(result))
    weights = ", random weights" if result["random_weights"] else ""
    given = [f"{k}={v}" for k, v in options.items() if v != "" and k != "run"]  # a second demo needs another name
    command = shlex.join(["rlinvariant", "demo", result["model"], *given])
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title><style>{css}</style></head><body>
<header><h1>{title}</h1>
<p class="meta">{_text(result["model"])}{weights}, {options["dtype"]}, {_text(result["device"])}: a prompt of
{len(result["prompt_token_ids"])} tokens, while other requests join and leave</p></header>
<ul class="verdict">{sentences}</ul>
<figure style="max-width:720px"><figcaption><b>Different completions so far</b>
<span class="unit">of {options["completions"]:,}, against their length in tokens</span></figcaption>{chart(arms)}</figure>
<div class="wide"><table><thead><tr><th></th><th>stock vLLM</th><th>ours</th></tr></thead><tbody>{table}</tbody></table></div>
<h2>What was said</h2><p class="small">The five most frequent completions of each engine, whole.</p>
<div class="wide"><table><thead><tr><th></th><th>times</th><th class="text">completion</th></tr></thead><tbody>{samples}</tbody>
</table></div><h2>Reproduce</h2><pre>{_text(command)}</pre></body></html>
"""


def chart(arms: dict[str, dict[str, Any]]) -> str:
    """How many different beginnings there are at each length: of the tokens, and of the log-probs' bits."""
    width, height, left, right, top, bottom = 720, 300, 60, 190, 14, 34
    lines = [
        ("ours, tokens and log-probs", arms["ours"]["unique_logprobs_by_token"], "c0"),
        ("stock, log-probs", arms["stock"]["unique_logprobs_by_token"], "c2"),
        ("stock, tokens", arms["stock"]["unique_by_token"], "c1"),
    ]
    length, highest = len(lines[0][1]), max(max(values) for _, values, _ in lines)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**6) if highest / s <= 6)
    ceiling = max(2, -(-highest // step) * step)

    def x(position: float) -> float:
        return left + (position - 1) / max(1, length - 1) * (width - left - right)

    def y(count: float) -> float:
        return height - bottom - (count / ceiling) * (height - top - bottom)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="Different completions by length">']
    for count in range(0, ceiling + 1, step):
        parts.append(f'<path class="grid" d="M{left} {y(count):.1f}H{width - right}"/>')
        parts.append(f'<text class="tick" x="{left - 7}" y="{y(count) + 4:.1f}">{count:,}</text>')
    for position in sorted({1, *(round(length * i / 4) for i in range(1, 5))} - {0}):
        parts.append(f'<text class="step" x="{x(position):.1f}" y="{height - 14}">{position:,}</text>')
    taken: list[float] = []
    for label, values, colour in lines:
        path = "".join(f"{'M' if i == 0 else 'L'}{x(i + 1):.1f} {y(v):.1f}" for i, v in enumerate(values))
        at = y(values[-1])
        while any(abs(at - other) < 15 for other in taken):
            at -= 15
        taken.append(at)
        parts.append(f'<path class="line {colour}" d="{path}"/>')
        parts.append(f'<text x="{width - right + 8}" y="{at + 4:.1f}">{label}: {values[-1]:,}</text>')
    return "".join([*parts, "</svg>"])


def _number(value: float | None) -> str:
    return "no difference seen" if value is None else f"{value:,.0f}"


def _text(text: str) -> str:
    return escape(printable(text))

"""`rlinvariant verify MODEL`: is it exact here, on my model? A table, and a certificate."""

import argparse
import dataclasses
from pathlib import Path

from rlinvariant import runtime
from rlinvariant.arguments import at_least
from rlinvariant.errors import INTERRUPTED, NOT_EXACT, OK, ConfigErrors
from rlinvariant.files import require_writable
from rlinvariant.launch import is_launched, launch_command, rank
from rlinvariant.model_source import base_and_adapter
from rlinvariant.report.console import Console
from rlinvariant.verification.options import Options, add_lora, lora_config

DESCRIPTION = """Is exact mode exact here, on this model? Draws with a real vLLM engine, scores with the trainer's model, and
counts the log-probs that are not the same 32 bits: prefill, decode, chunks, cached prefixes, preemption, random batch
compositions, micro-batches, weight sync; beside controls that must differ. Exit code 0: exact, and a certificate is written,
which training looks for; 1: not exact, or not shown; 2: cannot run."""
EXAMPLE = """rlinvariant verify Qwen/Qwen3-0.6B --short
rlinvariant verify Qwen/Qwen3-0.6B --lora r=16
rlinvariant verify Qwen/Qwen3-8B --tensor-parallel-size 2
rlinvariant verify runs/words_lora/model"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `verify`."""
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face directory or hub id, or a PEFT adapter's directory")
    many = "compare at least so many sampled tokens with the trainer's; without it, about two minutes' worth"
    parser.add_argument("--tokens", type=at_least(1), metavar="N", help=many)
    short = "every relation with few tokens: under a minute for a tiny model, minutes for 100 million parameters on a CPU"
    parser.add_argument("--short", action="store_true", help=short)
    parser.add_argument("--random", action="store_true", help="random weights: of MODEL only the configuration is read")
    add_lora(parser)
    parser.add_argument("--seed", type=at_least(0), metavar="N", default=0, help="decides prompts, batches, random weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of activations")
    parser.add_argument("--eager", action="store_true", help="on a GPU: no CUDA graphs and compilation, to start sooner")
    spread = "spread the sampler over N processes, by columns; each has its own trainer, whole. On GPUs each takes one"
    parser.add_argument("--tensor-parallel-size", type=at_least(1), metavar="N", default=1, help=spread)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the certificate there too")


def run(options: argparse.Namespace) -> int:
    """Verify, print the table, write the certificate, and return the exit code.

    Raises:
        UserError: what keeps it from running, in one line.
    """
    options.lora = lora_config(options.lora)
    asked = Options(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Options)})
    asked.require_sense()
    if options.out:
        require_writable(options.out, "verify: --out", "name another file")
    if asked.tensor_parallel_size > 1 and not is_launched():
        return _spread(asked, options.out)
    console = Console(rank() == 0)
    runtime.configure()
    runtime.quiet()
    with console.stage("loading transformers and vLLM"):
        from rlinvariant.verification import certificate, load, table
        from rlinvariant.verification.verify import verify_with
    certificate.require_room()
    try:
        found = verify_with(asked, console)
    except KeyboardInterrupt:
        console.print("interrupted: what was compared so far proves nothing of the rest, and no certificate is written")
        return INTERRUPTED
    load.live_engines.clear()
    for line in table.verdict(found):
        console.print(line, style="" if found["exact"] else "bold red")
    if rank() != 0:
        return OK if found["exact"] else NOT_EXACT
    path = certificate.write(found, options.out)
    console.print(f"certificate  {path}" + (f", {options.out}" if options.out else ""))
    return OK if found["exact"] else NOT_EXACT


def _spread(asked: Options, out: Path | None) -> int:
    """Verify in several processes, unless the model or the machine speaks against it."""
    with Console().stage("reading the configuration"):
        import torch

        from rlinvariant.sampler.refusals import load_config, process_problems

    count, config = asked.tensor_parallel_size, load_config(base_and_adapter(asked.model)[0])
    if problems := process_problems(count, asked.model, config, torch.cuda.device_count() or count):
        raise ConfigErrors(problems)
    return launch_command(["verify", *asked.arguments(), *(["--out", str(out)] if out else [])], count)

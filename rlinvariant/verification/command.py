"""`rlinvariant verify MODEL`: is it exact here, on my model? A table, and a certificate."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlinvariant import runtime
from rlinvariant.arguments import Parser, at_least, model_problems
from rlinvariant.errors import ConfigErrors, UserError, one_line
from rlinvariant.report.console import Console

DESCRIPTION = """Is exact mode exact here, on this model? Draws with a real vLLM engine, scores with the trainer's model, and
counts the log-probs that are not the same 32 bits: prefill, decode, chunks, cached prefixes, preemption, random batch
compositions, micro-batches, weight sync; beside controls that must differ. Exit code 0: exact, and a certificate is written,
which training looks for; 1: not exact, or not shown; 2: cannot run."""
SECONDS = 110  # of random compositions, where --tokens does not say how many


def parser() -> Parser:
    p = Parser("verify", DESCRIPTION)
    p.add_argument("model", metavar="MODEL", help="a Hugging Face directory or hub id; no tokenizer is needed")
    many = "compare so many sampled tokens with the trainer's, or a few more; None: about two minutes' worth"
    p.add_argument("--tokens", type=at_least(1), help=many)
    p.add_argument("--short", action="store_true", help="every relation with few tokens: seconds for a small model")
    p.add_argument("--random", action="store_true", help="random weights: MODEL's configuration alone is read")
    p.add_argument("--seed", type=at_least(0), default=0, help="of weights, prompts and batches")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of activations")
    p.add_argument("--eager", action="store_true", help="on a GPU: without CUDA graphs and compilation, to start sooner")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the certificate there")
    return p


def command(argv: Sequence[str]) -> int:
    """Verify as `argv` says, print the table, write the certificate. Returns the exit code; raises UserError."""
    options = parser().parse_args(argv)
    if problems := model_problems("model", options.model):
        raise ConfigErrors(problems)
    if options.short and options.tokens:
        raise UserError(f"verify: --tokens {options.tokens} with --short: expected one of them; remove one")
    console = Console()
    runtime.configure()
    runtime.quiet()
    with console.stage("loading transformers and vLLM"):
        from rlinvariant.verification import certificate, load, table
    certificate.require_writable(*([options.out] if options.out else []), certificate.cache_dir() / "certificates" / "any.json")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            found = verify(**{k: v for k, v in vars(options).items() if k != "out"}, scratch=scratch, console=console)
    except KeyboardInterrupt:
        console.print("interrupted: what was compared so far proves nothing of the rest, and no certificate is written")
        return 130
    except (RuntimeError, ValueError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        much = "fp32 masters, a copy in the engine and one of the stock model have to fit"
        raise UserError(f"verify: out of memory ({one_line(error, 160)}): {much}; choose a smaller model") from error
    load.engines.clear()
    for line in table.verdict(found):
        console.print(line, style="" if found["exact"] else "bold red")
    path = certificate.write(found, options.out)
    console.print(f"certificate  {path}" + (f", {options.out}" if options.out else ""))
    return 0 if found["exact"] else 1


def is_out_of_memory(error: Exception) -> bool:
    """torch's on a GPU and on a CPU, Python's, and vLLM's of the memory for its cache."""
    import torch

    words = ("out of memory", "can't allocate memory", "No available memory", "available KV cache memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def is_exact(relations: Sequence[Any], controls: Sequence[Any]) -> bool:
    """Whether every relation was shown to hold, by a comparison that sees every planted fault; there must be some of both."""
    planted = [c for c in controls if c.name.startswith("planted")]
    return bool(relations and planted) and all(r.holds for r in relations) and all(c.mismatched for c in planted)


def verify(
    model: str,
    *,
    scratch: str,
    console: Console,
    tokens: int | None = None,
    short: bool = False,
    random: bool = False,
    seed: int = 0,
    dtype: str = "bfloat16",
    eager: bool = False,
) -> dict[str, Any]:
    """Run every relation and control on a model, and return the certificate, exact or not. Prints the table as it grows.

    Args:
        model: directory or hub id of a checkpoint; with `random`, of a configuration.
        scratch: an empty directory, for random weights.
        tokens: how many sampled tokens to compare with the trainer's at least; None: as many as fit into two minutes.
        short: few tokens, and no speed.
        eager: on a GPU, without CUDA graphs and compilation.

    Raises:
        UserError: the model cannot be loaded, or is refused by name.
    """
    began = time.monotonic()
    import torch

    from rlinvariant.verification import certificate, controls, load, relations, speed, table
    from rlinvariant.verification.ladder import ladder

    config = load.configuration(model, dtype)
    sizes = (relations.SHORT if short else relations.FULL).within(config.get_text_config().max_position_embeddings)
    with console.stage("loading the model, as the trainer does"):
        directory = load.random_weights(config, scratch, seed) if random else model
        trained = load.trained(directory, dtype)
    for line in table.head(model, trained, random, dtype, seed):
        console.print(line)
    options = load.options(sizes, eager)
    with console.stage("starting the vLLM engine"):
        sampler = load.engine(directory, True, dtype, options, sizes)
    vocabulary = config.get_text_config().vocab_size
    pair = relations.Pair(trained, sampler, sizes, seed, vocabulary)
    found: list[relations.Relation] = []
    seen: list[relations.Relation] = []

    def report(relation: relations.Relation) -> None:
        control = relation.name.startswith(("planted", "stock"))
        (seen if control else found).append(relation)
        for line in table.line(relation, control).splitlines():
            console.print(line, style="" if control or relation.holds else "bold red")

    console.print(table.TITLES, style="dim")
    with console.stage("verifying", total=tokens if tokens or short else SECONDS) as advance:
        started = time.monotonic()
        limit = started + (0 if short or tokens else SECONDS)
        pair.advance = lambda n: advance(n if tokens or short else min(SECONDS, int(time.monotonic() - started)))
        for relation in ladder(trained, torch.Generator().manual_seed(seed)):
            report(relation)
        for check in relations.OF_A_BATCH:
            report(check(pair))
        report(relations.compositions(pair, lambda: pair.tokens < (tokens or 0) or time.monotonic() < limit))
        report(controls.one_ulp(pair, getattr(torch, dtype)))
        report(controls.stock_attention(pair))
        plain = load.or_reason(lambda: load.stock(directory, dtype))
        report(controls.stock_trainer(pair, plain))
        report(relations.weight_sync(pair))
        report(controls.stale_weights(pair))
        more = {"enforce_eager": True} if short else {}
        stock = load.or_reason(lambda: load.engine(directory, False, dtype, options | more, sizes))
        report(controls.stock_both(pair, plain, stock))
    known = not isinstance(plain, str) and not isinstance(stock, str)
    rates = speed.rates(pair, plain, stock) if known and not short else {}
    for line in table.speed(rates):
        console.print(line)
    return {
        "exact": is_exact(found, seen),
        "form": "short" if short else "full",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - began, 1),
        "model": load.description(model, random, directory, trained),
        "subject": certificate.subject(config, dtype, bool(sampler.llm.llm_engine.model_config.enforce_eager)),
        "environment": certificate.environment(),
        "kernels": load.kernels(),
        "engine": options,
        "sizes": asdict(sizes),
        "seed": seed,
        "tokens": pair.tokens,
        "mismatched": pair.mismatched,
        "relations": [asdict(r) for r in found],
        "controls": [asdict(c) | {"blind": not c.mismatched} for c in seen],
        "speed": rates,
    }

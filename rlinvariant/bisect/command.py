"""`rlinvariant bisect MODEL`: where sampler and trainer differ first, by how much, and why."""

import argparse
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

from rlinvariant import runtime
from rlinvariant.arguments import at_least, temperature
from rlinvariant.conflicts import INVARIANCE, SIDES, adapter_conflicts
from rlinvariant.errors import NOT_EXACT, OK, ConfigErrors, UserError
from rlinvariant.model_source import adapter_base, base_and_adapter, source_problems
from rlinvariant.report.console import Console
from rlinvariant.rollout import RANGES, Truncation
from rlinvariant.verification.options import add_lora, clash, lora_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from rlinvariant.sampler.engine import Sampler

DESCRIPTION = """Draws completions of random prompts with the exact sampler, scores them with the exact trainer. If a log-prob
differs, says where the two part first: sequence, token, layer, op, by how many ulps, whether the op's inputs and weights were
equal, and the likely cause. Tries few sequences, many, long prompts, a warm prefix, preemption, a second turn; the last lines
say which. Exit code 0: none of these differ, which proves nothing of others; 1: something does; 2: it could not be tried."""
EXAMPLE = "rlinvariant bisect Qwen/Qwen3-0.6B --invariance off"


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the options of `bisect`."""
    p.add_argument("model", metavar="MODEL", help="a Hugging Face directory or hub id, or a PEFT adapter's directory")
    p.add_argument("--random", action="store_true", help="random weights: of MODEL only the configuration is read")
    add_lora(p)
    p.add_argument("--seed", type=at_least(0), metavar="N", default=0, help="decides prompts, draws and random weights")
    p.add_argument("--sequences", type=at_least(1), metavar="N", default=16, help="completions drawn first, in one batch")
    p.add_argument(
        "--prompt",
        type=at_least(1),
        metavar="N",
        default=48,
        help="longest of the first prompts, in tokens",
    )
    p.add_argument("--tokens", type=at_least(1), metavar="N", default=24, help="length of each completion")
    p.add_argument("--micro-batch", type=at_least(1), metavar="N", default=4, help="sequences that the trainer packs together")
    step = "most tokens in one step of the engine; more where there are more sequences"
    p.add_argument("--chunk", type=at_least(64), metavar="N", default=256, help=step)
    p.add_argument("--temperature", type=temperature, metavar="T", default=0.7, help="temperature of the draws")
    kept = "draw from the likeliest tokens alone"
    p.add_argument("--top-k", type=_setting("top_k", int), metavar="K", help=f"{kept}: so many")
    p.add_argument("--top-p", type=_setting("top_p", float), metavar="P", help=f"{kept}: with this share of the probability")
    p.add_argument("--min-p", type=_setting("min_p", float), metavar="P", help=f"{kept}: with this share of the largest one's")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of activations")
    sides = "which sides run our ops: both (exact), neither (off), or one"
    p.add_argument("--invariance", choices=INVARIANCE, default="exact", help=sides)


def run(options: argparse.Namespace) -> int:
    """Draw, score, print what was found, and return the exit code.

    Raises:
        UserError: a model that cannot be loaded or cannot run exactly, or sizes that do not fit it.
    """
    options.lora = lora_config(options.lora)
    problems = source_problems("model", options.model, adapters=True) or clash(options.model, options.lora)
    if options.lora is not None or (not problems and adapter_base(options.model) is not None):
        problems += adapter_conflicts("adapters", "none", options.invariance)
    if problems := problems + _truncation_problems(options):
        raise ConfigErrors(problems)
    console = Console()
    runtime.quiet()
    with tempfile.TemporaryDirectory(prefix="rlinvariant-bisect-") as directory:
        with console.stage(f"{options.model}: loading transformers and vLLM, the model, and the engine"):
            model, engine = load_sides(options, directory)
        from rlinvariant.bisect import report, search
        from rlinvariant.bisect.trials import all_trials

        vocabulary, (step, longest) = model.config.get_text_config().vocab_size, room(options, model.config)
        first = vocabulary, options.sequences, options.prompt, options.tokens, options.temperature
        trials = all_trials(*first, options.seed, options.micro_batch, step, longest, Truncation.of(options))
        stock = _stock_sides(options)
        with console.stage(f"completions of {options.tokens} tokens: drawing and scoring"):
            result, trial = search.find_any(engine, model, trials, stock_trainer="trainer" in stock)
            said = report.lines(result, trial, engine, stock)
        for line in said:
            console.print(line)
    return NOT_EXACT if result.mismatched else OK


def _setting(name: str, kind: type[int] | type[float]) -> Callable[[str], float]:
    """Return an argparse `type` that reads a setting of truncated sampling: top_k, top_p or min_p."""
    allows, expected = RANGES[name]

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = -2  # which none allows
        if not allows(value):
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return value

    return read


def _truncation_problems(options: argparse.Namespace) -> list[str]:
    """Refuse truncated sampling where the two sides would keep other tokens."""
    if not (truncation := Truncation.of(options)):
        return []
    given = ", ".join(f"--{name.replace('_', '-')}" for name in (one.partition("=")[0] for one in truncation.settings()))
    if options.invariance not in ("exact", "off"):
        return [f"{given}: expected --invariance exact or off: the stock side keeps other tokens"]
    return []


def load_sides(options: argparse.Namespace, directory: str) -> tuple["PreTrainedModel", "Sampler"]:
    """Load the trainer's model and start the sampler, as `verify` does; random weights go into `directory`."""
    from rlinvariant.models import lora
    from rlinvariant.verification import adapters, load
    from rlinvariant.verification.compositions import CROWD_SIZES
    from rlinvariant.verification.pair import Sizes

    source, adapter = base_and_adapter(options.model)
    config = load.configuration(source, options.dtype)
    step, longest = room(options, config)
    sizes = Sizes(options.sequences, 0, options.tokens, longest, step, longest * options.micro_batch)
    stock = _stock_sides(options)
    path = load.random_weights(config, directory, options.seed) if options.random else source
    adapt = adapters.adapt(adapter, options.lora, options.seed)
    model = load.stock(path, options.dtype) if "trainer" in stock else load.trained(path, options.dtype, adapt)
    more = load.options(sizes, eager=True) | {"max_num_seqs": max(options.sequences, CROWD_SIZES[1])}
    ranks = lora.ranks(model)
    engine = load.engine(path, "sampler" not in stock, options.dtype, more, sizes, ranks)
    if ranks:
        engine.sync(lora.adapters(model))
    return model, engine


def room(options: argparse.Namespace, config: "PreTrainedConfig") -> tuple[int, int]:
    """Return the most tokens in one step of the engine, and the longest prompt: two steps and a token if the model has room.

    Raises:
        UserError: the prompts and completions that were asked for do not fit the model's positions.
    """
    step = max(options.chunk, options.sequences)  # vLLM gives every request a token in a step
    most = config.get_text_config().max_position_embeddings - options.tokens - 1
    if options.prompt > most:
        limit = f"expected at most {most + options.tokens} together, for the positions of {options.model}; lower one of them"
        raise UserError(f"bisect: --prompt {options.prompt} and --tokens {options.tokens}: {limit}")
    return step, max(options.prompt, min(2 * step + 1, most))


def _stock_sides(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of the sides that run stock kernels."""
    return tuple(side for side, ours in zip(("sampler", "trainer"), SIDES[options.invariance], strict=True) if not ours)

"""`rlinvariant bisect MODEL`: arguments, the two sides, and what is printed."""

import collections
import tempfile
from collections.abc import Sequence
from typing import Any

from rlinvariant.arguments import Parser, at_least, model_problems, temperature
from rlinvariant.conflicts import INVARIANCE, SIDES
from rlinvariant.errors import ConfigErrors, UserError

DESCRIPTION = """Draws completions of random prompts with the exact sampler, scores them with the exact trainer. If a log-prob
differs, says where the two part first: sequence, token, layer, op, by how many ulps, whether the op's inputs and weights were
equal, and the likely cause. Tries few sequences, many, long prompts, a warm prefix, preemption; the last line says which. Exit
code 0: none of these differ, which proves nothing of others; 1: something does; 2: it could not be tried."""

TRIED = "tried      prompts of up to so many tokens:"


def parser() -> Parser:
    p = Parser("bisect", DESCRIPTION)
    p.add_argument("model", metavar="MODEL", help="a Hugging Face directory or hub id")
    p.add_argument("--random", action="store_true", help="random weights: MODEL's configuration alone is read")
    p.add_argument("--seed", type=at_least(0), default=0, help="of the prompts, the draws and random weights")
    p.add_argument("--sequences", type=at_least(1), default=16, help="completions drawn first, in one batch")
    p.add_argument("--prompt", type=at_least(1), default=48, help="longest of their prompts, in tokens; prompts are ragged")
    p.add_argument("--tokens", type=at_least(1), default=24, help="length of each completion")
    p.add_argument("--micro-batch", type=at_least(1), default=4, help="sequences that the trainer packs together")
    p.add_argument(
        "--chunk", type=at_least(64), default=256, help="most tokens in one step of the engine, with many sequences more"
    )
    p.add_argument("--temperature", type=temperature, default=0.7, help="of the draws; divides the logits")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of activations")
    sides = "exact, or which side alone is ours; off: neither"
    p.add_argument("--invariance", choices=INVARIANCE, default="exact", help=sides)
    return p


def bisect(argv: Sequence[str]) -> int:
    """Run the command and print its findings. Returns the exit code: 0 nothing that was tried differs, 1 something does.

    Raises:
        UserError: bad arguments, or a model that cannot be loaded or cannot run exactly.
    """
    options = parser().parse_args(argv)
    if problems := model_problems("model", options.model):
        raise ConfigErrors(problems)
    name = options.model
    from rlinvariant import runtime
    from rlinvariant.report.console import Console

    console = Console()
    runtime.quiet()
    with tempfile.TemporaryDirectory(prefix="rlinvariant-bisect-") as directory:
        with console.stage(f"{name}: loading"):
            model, engine = _sides(name, options, directory)
        from rlinvariant.bisect import search

        trials = search.trials(
            model.config.get_text_config().vocab_size, options.sequences, options.prompt, options.tokens, options.temperature,
            options.seed, options.micro_batch, *room(options, model.config),
        )  # fmt: skip
        stock = _stock(options)
        with console.stage(f"completions of {options.tokens} tokens: drawing and scoring"):
            result, trial = search.find_any(engine, model, trials, stock_trainer="trainer" in stock)
            said = lines(result, trial, engine, stock)
        for line in said:
            console.print(line)
    return 1 if result.mismatched else 0


def _sides(name: str, options: Any, directory: str) -> tuple[Any, Any]:
    """The trainer's model, made first, and the sampler, as `verify` has them."""
    from rlinvariant.verification import load
    from rlinvariant.verification.relations import CROWD, Sizes

    config = load.configuration(name, options.dtype)
    step, longest = room(options, config)
    sizes = Sizes(options.sequences, 0, options.tokens, longest, step, longest * options.micro_batch)
    stock = _stock(options)
    path = load.random_weights(config, directory, options.seed) if options.random else name
    model = (load.stock if "trainer" in stock else load.trained)(path, options.dtype)
    more = load.options(sizes, eager=True) | {"max_num_seqs": max(options.sequences, CROWD[1])}
    return model, load.engine(path, "sampler" not in stock, options.dtype, more, sizes)


def room(options: Any, config: Any) -> tuple[int, int]:
    """Most tokens in one step of the engine, and the longest prompt: two steps and a token, or what the model has room for.

    Raises:
        UserError: the prompts and completions that were asked for do not fit the model's positions.
    """
    step = max(options.chunk, options.sequences)  # vLLM gives every request in it a token
    most = config.get_text_config().max_position_embeddings - options.tokens - 1
    if options.prompt > most:
        limit = f"expected at most {most + options.tokens} together, by the positions of {options.model}; lower one of them"
        raise UserError(f"--prompt {options.prompt} and --tokens {options.tokens}: {limit}")
    return step, max(options.prompt, min(2 * step + 1, most))


def _stock(options: Any) -> tuple[str, ...]:
    """Sides that are not ours."""
    return tuple(side for side, ours in zip(("sampler", "trainer"), SIDES[options.invariance], strict=True) if not ours)


def lines(result: Any, trial: Any, engine: Any, stock: tuple[str, ...] = ()) -> list[str]:
    """A `search.Result` in at most fifteen lines; the last says what was tried."""
    if not result.mismatched:
        said = f"nothing to bisect: 0 of {result.compared:,} tokens differ (temperature {trial.temperature})"
        return [said, f"{TRIED} {'; '.join(result.tried)}. Exit code 0: none of these differ"]
    *equal, differs = result.tried
    found = _found(result, trial, engine, stock)
    if not equal:
        return [*found, f"{TRIED} {differs} (differs)"]
    return [*found, f"shows      {trial.hint}", f"{TRIED} {'; '.join(equal)} (all equal); {differs} (differs)"]


def _found(result: Any, trial: Any, engine: Any, stock: tuple[str, ...]) -> list[str]:
    """All but the last."""
    drawn = f"{len(trial.prompts)} sequences at temperature {trial.temperature}, seed {trial.seed}"
    head = f"{result.mismatched:,} of {result.compared:,} tokens differ ({drawn})"
    if result.vanished:
        return [head, "not reproducible: drawn and scored again, the first difference did not come back", *result.vanished]
    from rlinvariant import bits
    from rlinvariant.bisect import causes
    from rlinvariant.bisect.case import OP
    from rlinvariant.bisect.search import fp32, shown

    first = result.first
    a, b = fp32([first.sampler_logprob, first.trainer_logprob])
    position = first.prompt_tokens - 1 + first.token
    found = [
        head,
        f"log-prob   sequence {first.sequence}, token {first.token} of its completion, predicted at position {position}: "
        f"sampler {shown(a)}, trainer {shown(b)}, {int(bits.ulps(a, b)):,} ulp",
    ]
    if first.place is None:
        return [*found, "first      nothing else that was recorded differs"]
    layer, role = first.place
    x, y = first.sampler.value, first.trainer.value
    where = "prompt" if first.position < first.prompt_tokens else f"completion token {first.position - first.prompt_tokens}"
    inside = "" if layer is None else f"layer {layer}, "
    found.append(f"first      {inside}{role}, at position {first.position} ({where})")
    for name, side in (("sampler", first.sampler), ("trainer", first.trainer)):
        called = collections.Counter(side.block.calls)
        named = [f"rlinvariant.ops.{op}{f' {n} times' if n > 1 else ''}" for op, n in called.items()]
        through = f", by {', '.join(named)}" if named else ", by no op of rlinvariant" if role in OP else ""
        count = f"{side.block.together} row{'s' if side.block.together > 1 else ''}"
        value = "" if x.dtype != y.dtype else shown(side.value[_at(x, y)])
        found.append(f"  {name}  {value or str(side.value.dtype)[6:]}{through}, among {count}")
    if x.dtype == y.dtype and (difference := bits.compare(*_common(x, y))) is not None:
        found.append(f"  {difference.count:,} of {difference.total:,} {str(x.dtype)[6:]} values differ, by up to "
                     f"{difference.max_ulps:,} ulp; element {difference.coordinate[0]} is shown")  # fmt: skip
    why = causes.explain(first, [*trial.prompts[first.sequence], *first.token_ids], trial.temperature, engine, stock)
    found += [f"inputs     {why.inputs}", f"weights    {why.weights}"]
    if why.deviates:
        found.append(
            f"deviates   the {why.deviates}: computed anew from the same inputs and weights, the other side's bits come out"
        )
    found.append(f"cause      {why.cause}")
    if why.reproduced:
        found.append(f"reproduced {why.reproduced}")
    return found


def _common(x: Any, y: Any) -> tuple[Any, Any]:
    columns = min(len(x), len(y))
    return x[:columns], y[:columns]


def _at(x: Any, y: Any) -> int:
    """The first element that differs; if none does, the first that is no number."""
    from rlinvariant import bits

    difference = bits.compare(*_common(x, y))
    return int(x.isnan().int().argmax()) if difference is None else difference.coordinate[0]

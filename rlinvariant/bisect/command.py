"""`rlinvariant bisect MODEL`: arguments, the two sides, and what is printed."""

import collections
import tempfile
from collections.abc import Sequence
from typing import Any

from rlinvariant.arguments import Parser, at_least, temperature
from rlinvariant.errors import UserError

DESCRIPTION = """Draws completions of random prompts with the exact sampler, scores them with the exact trainer. If a log-prob
differs, says where the two part first: sequence, token, layer, op, by how many ulps, whether the op's inputs and weights were
equal, and the likely cause. Exit code 0: nothing differs; 1: something does; 2: it could not be tried."""
STOCK = {
    "exact": (),
    "sampler": ("trainer",),
    "trainer": ("sampler",),
    "off": ("sampler", "trainer"),
}  # sides that are not ours


def parser() -> Parser:
    p = Parser("bisect", DESCRIPTION)
    p.add_argument("model", metavar="MODEL", help="a Hugging Face directory or hub id")
    p.add_argument("--random", action="store_true", help="random weights: MODEL's configuration alone is read")
    p.add_argument("--seed", type=at_least(0), default=0, help="of the prompts, the draws and random weights")
    p.add_argument("--sequences", type=at_least(1), default=16, help="completions drawn in one batch")
    p.add_argument("--prompt", type=at_least(1), default=48, help="longest prompt, in tokens; prompts are ragged")
    p.add_argument("--tokens", type=at_least(1), default=24, help="length of each completion")
    p.add_argument("--micro-batch", type=at_least(1), default=4, help="sequences that the trainer packs together")
    p.add_argument("--chunk", type=at_least(1), default=256, help="most tokens in one step of the engine")
    p.add_argument("--temperature", type=temperature, default=0.7, help="of the draws; divides the logits")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of activations")
    sides = "exact, or which side alone is ours; off: neither"
    p.add_argument("--invariance", choices=tuple(STOCK), default="exact", help=sides)
    return p


def bisect(argv: Sequence[str]) -> int:
    """Run the command and print its findings. Returns the exit code: 0 nothing differs, 1 something does.

    Raises:
        UserError: bad arguments, or a model that cannot be loaded or cannot run exactly.
    """
    options = parser().parse_args(argv)
    name = options.model
    from rlinvariant import runtime
    from rlinvariant.report.console import Console

    console = Console()
    runtime.quiet()
    with tempfile.TemporaryDirectory(prefix="rlinvariant-bisect-") as directory:
        with console.stage(f"{name}: loading"):
            model, engine = _sides(name, options, directory)
        from rlinvariant.bisect import search

        vocabulary, stock = model.config.get_text_config().vocab_size, STOCK[options.invariance]
        batches = [  # few rows may take another kernel than many
            search.draw_batch(
                vocabulary, count, options.prompt, options.tokens, options.temperature, options.seed + i, options.micro_batch
            )
            for i, count in enumerate(dict.fromkeys((options.sequences, 1, 3)))
        ]
        with console.stage(f"completions of {options.tokens} tokens: drawing and scoring"):
            result, batch = search.find_any(engine, model, batches, stock_trainer="trainer" in stock)
            said = lines(result, batch, engine, stock)
        for line in said:
            console.print(line)
    return 1 if result.mismatched else 0


def _sides(name: str, options: Any, directory: str) -> tuple[Any, Any]:
    """The trainer's model, made first, and the sampler, as `verify` has them."""
    from rlinvariant.verify import load
    from rlinvariant.verify.relations import Sizes

    config = load.configuration(name, options.dtype)
    longest, positions = options.prompt + options.tokens, config.get_text_config().max_position_embeddings
    if longest > positions:
        raise UserError(
            f"--prompt {options.prompt} and --tokens {options.tokens}: together more than the {positions} of {name}"
        )
    step = max(options.chunk, options.sequences)  # vLLM gives every request in it a token
    sizes = Sizes(options.sequences, options.prompt, options.tokens, options.prompt, step, longest * options.micro_batch)
    ours = {side: side not in STOCK[options.invariance] for side in ("sampler", "trainer")}
    path = load.random_weights(config, directory, options.seed) if options.random else name
    model = (load.trained if ours["trainer"] else load.stock)(path, options.dtype)
    more = load.options(sizes, eager=True) | {"max_num_seqs": options.sequences}
    return model, load.engine(path, ours["sampler"], options.dtype, more, sizes)


def lines(result: Any, batch: Any, engine: Any, stock: tuple[str, ...] = ()) -> list[str]:
    """A `search.Result` in at most fifteen lines."""
    if not result.mismatched:
        return [f"nothing to bisect: 0 of {result.compared:,} tokens differ (temperature {batch.temperature})"]
    drawn = f"{len(batch.prompts)} sequences at temperature {batch.temperature}, seed {batch.seed}"
    head = f"{result.mismatched:,} of {result.compared:,} tokens differ ({drawn})"
    if result.vanished:
        return [head, "not reproducible: drawn and scored again, the first difference did not come back", *result.vanished]
    import torch

    from rlinvariant import bits
    from rlinvariant.bisect import causes
    from rlinvariant.bisect.case import OP

    first = result.first
    a, b = torch.tensor([first.sampler_logprob, first.trainer_logprob], dtype=torch.float32)
    position = first.prompt_tokens - 1 + first.token
    found = [
        head,
        f"log-prob   sequence {first.sequence}, token {first.token} of its completion, predicted at position {position}: "
        f"sampler {_word(a)}, trainer {_word(b)}, {int(bits.ulps(a, b)):,} ulp",
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
        value = "" if x.dtype != y.dtype else _word(side.value[_at(x, y)])
        found.append(f"  {name}  {value or str(side.value.dtype)[6:]}{through}, among {count}")
    if x.dtype == y.dtype and (difference := bits.compare(*_common(x, y))) is not None:
        found.append(f"  {difference.count:,} of {difference.total:,} {str(x.dtype)[6:]} values differ, by up to "
                     f"{difference.max_ulps:,} ulp; element {difference.coordinate[0]} is shown")  # fmt: skip
    why = causes.explain(first, [*batch.prompts[first.sequence], *first.token_ids], batch.temperature, engine, stock)
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


def _word(value: Any) -> str:
    import torch

    word = value.view({2: torch.int16, 4: torch.int32}[value.element_size()]).item()
    digits = 2 * value.element_size()
    return f"{value.item():.9g} (0x{word & (16**digits - 1):0{digits}X})"

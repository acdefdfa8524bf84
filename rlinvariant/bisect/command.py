"""`rlinvariant bisect MODEL [key=value ...]`: arguments, the two sides, and what is printed."""

import collections
import dataclasses
import difflib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlinvariant.errors import ConfigErrors, UserError

HELP = """usage: rlinvariant bisect MODEL [key=value ...]

Draws completions of random prompts with the exact sampler, scores them with the exact trainer, and if log-probs differ says
where the two part first: sequence, token, layer, op, by how many ulps, whether the op's inputs and weights were equal, and the
likely cause. Exit code 0: nothing differs; 1: something does; 2: it could not be tried.

MODEL is a Hugging Face directory or hub id; with random=true its config.json is enough. --seed 3 may stand for seed=3.
"""


def _field(default: Any, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class Options:
    sequences: int = _field(16, "completions drawn in one batch")
    prompt: int = _field(48, "longest prompt, in tokens; prompts are ragged")
    tokens: int = _field(24, "length of each completion")
    micro_batch: int = _field(4, "sequences that the trainer packs together")
    chunk: int = _field(256, "most tokens in one step of the engine: a longer prompt is cut")
    temperature: float = _field(0.7, "of the draws; divides the logits")
    dtype: str = _field("bfloat16", "bfloat16 or float32")
    seed: int = _field(0, "of the prompts, the draws and random weights")
    random: bool = _field(False, "true: take random weights, of MODEL's configuration alone")
    invariance: str = _field("exact", "exact, or which side alone is ours: sampler, trainer; off: neither")


STOCK = {
    "exact": (),
    "sampler": ("trainer",),
    "trainer": ("sampler",),
    "off": ("sampler", "trainer"),
}  # sides that are not ours
CHOICES = {"dtype": ("bfloat16", "float32"), "invariance": tuple(STOCK)}


def parse(argv: Sequence[str]) -> tuple[str, Options]:
    """(MODEL, options). Raises ConfigErrors with one line per problem."""
    fields = {field.name: field for field in dataclasses.fields(Options)}
    model, given, errors = None, {}, []
    for argument in _pairs(argv, fields):
        key, equals, text = argument.partition("=")
        if not equals and not argument.startswith("-") and model is None:
            model = argument
        elif not equals or key.startswith("-"):
            errors.append(f"{argument}: expected MODEL once, and key=value; see rlinvariant bisect --help")
        elif key not in fields:
            close = difflib.get_close_matches(key, fields, 1)
            meant = f", did you mean {close[0]}?" if close else ""
            errors.append(f"{argument}: unknown key{meant}; there are {', '.join(fields)}")
        else:
            value, kind = _value(text, fields[key].type, least=0 if key == "seed" else 1)
            if value is None or text not in CHOICES.get(key, (text,)):
                errors.append(f"{argument}: expected {' or '.join(CHOICES.get(key, (kind,)))}")
            given[key] = value
    if model is None:
        errors.insert(0, "MODEL: missing; write rlinvariant bisect MODEL, a Hugging Face directory or hub id")
    if errors:
        raise ConfigErrors(errors)
    assert model is not None
    return model, Options(**given)


def _pairs(argv: Sequence[str], fields: Mapping[str, Any]) -> Iterator[str]:
    """The arguments, those that are written as `verify` has them (--random, --seed 3) as key=value."""
    words = iter(argv)
    for word in words:
        key, equals, text = word.removeprefix("--").replace("-", "_").partition("=")
        if not word.startswith("--") or key not in fields:
            yield word
        elif equals:
            yield f"{key}={text}"
        else:
            yield f"{key}=true" if fields[key].type is bool else f"{key}={next(words, '')}"


def _value(text: str, kind: Any, least: int) -> tuple[Any, str]:
    """The value, None where the text is none of that kind, and what is expected."""
    if kind is bool:
        return {"true": True, "false": False}.get(text), "true or false"
    if kind is int:
        return int(text) if text.isdigit() and int(text) >= least else None, f"a whole number of at least {least}"
    if kind is float:
        number = float(text) if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) else 0.0
        return number if number >= 0.01 else None, "a number of at least 0.01"
    return text, "a name"


def bisect(argv: Sequence[str]) -> int:
    """Run the command and print its findings. Returns the exit code: 0 nothing differs, 1 something does.

    Raises:
        ConfigErrors, UserError: bad arguments, or a model that cannot be loaded or cannot run exactly.
    """
    if any(a in ("--help", "-h") for a in argv):
        print(HELP)
        for field in dataclasses.fields(Options):
            print(f"  {field.name + '=' + str(field.default):<20} {field.metadata['doc']}")
        return 0
    name, options = parse(argv)
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


def _sides(name: str, options: Options, directory: str) -> tuple[Any, Any]:
    """The trainer's model, made first, and the sampler, as `verify` has them."""
    from rlinvariant.verify import load
    from rlinvariant.verify.relations import Sizes

    config = load.configuration(name, options.dtype)
    longest, positions = options.prompt + options.tokens, config.get_text_config().max_position_embeddings
    if longest > positions:
        raise UserError(f"prompt={options.prompt} and tokens={options.tokens}: together more than the {positions} of {name}")
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

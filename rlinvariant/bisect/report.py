"""Print a result of `bisect`."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlinvariant import bits
from rlinvariant.bisect import causes
from rlinvariant.bisect.case import ROLE_OPS
from rlinvariant.bisect.record import fp32
from rlinvariant.bisect.search import First, Result, Side, shown
from rlinvariant.bisect.trials import Trial, in_words
from rlinvariant.bisect.variants import name
from rlinvariant.text import plural

if TYPE_CHECKING:
    from rlinvariant.sampler.engine import Sampler


def lines(result: Result, trial: Trial, engine: "Sampler", stock: tuple[str, ...] = ()) -> list[str]:
    """Say what was found in at most fifteen lines; the last say what was tried.

    Args:
        result: of `search.find_any`.
        trial: the trial that differs, or the last.
        engine: the sampler.
        stock: names of the sides that run stock kernels.
    """
    if not result.mismatched:
        return [
            f"nothing to bisect: 0 of {result.compared:,} tokens differ ({trial.policy})",
            f"equal      {in_words(result.tried)}",
            "exit code  0: none of these differ, which says nothing of other prompts",
        ]
    *equal, differs = result.tried
    found = _found(result, trial, engine, stock)
    if equal:
        found += [f"shows      {trial.hint}", f"equal      {in_words(equal)}"]
    return [*found, f"differs    {in_words([differs])}"]


def _found(result: Result, trial: Trial, engine: Any, stock: tuple[str, ...]) -> list[str]:
    """Return all lines but those on what was tried."""
    drawn = f"{plural(len(trial.prompts), 'sequence')} at {trial.policy}, seed {trial.seed}"
    found = [f"{result.mismatched:,} of {result.compared:,} tokens differ ({drawn})"]
    if (first := result.first) is None:
        vanished = "not reproducible: drawn and scored again, the first difference did not come back"
        return [*found, vanished, *(result.vanished or [])]
    a, b = fp32([first.sampler_logprob, first.trainer_logprob])
    found.append(
        f"log-prob   sequence {first.sequence}, token {first.token} of its completion, predicted at position "
        f"{first.prompt_tokens - 1 + first.token}: sampler {shown(a)}, trainer {shown(b)}, {int(bits.ulps(a, b)):,} ulp"
    )
    if first.place is None or first.sampler is None or first.trainer is None:
        return [*found, "first      nothing else that was recorded differs"]
    found += _values(first, first.sampler, first.trainer)
    tokens = [*trial.prompts[first.sequence], *first.token_ids]
    why = causes.explain(first, tokens, trial, engine, stock)
    found += [f"inputs     {why.inputs}", f"weights    {why.weights}"]
    if why.deviates:
        anew = "computed anew from the same inputs and weights, the other side's bits come out"
        found.append(f"deviates   the {why.deviates}: {anew}")
    found.append(f"cause      {why.cause}")
    return [*found, f"reproduced {why.reproduced}"] if why.reproduced else found


def _values(first: First, sampler: Side, trainer: Side) -> list[str]:
    """Say where a value differs first, what each side has there, and by how much the two differ."""
    assert first.place is not None
    layer, role = first.place
    x, y = sampler.value, trainer.value
    where = "prompt" if first.position < first.prompt_tokens else f"completion token {first.position - first.prompt_tokens}"
    inside = "" if layer is None else f"layer {layer}, "
    found = [f"first      {inside}{role}, at position {first.position} ({where})"]
    for side_name, side in (("sampler", sampler), ("trainer", trainer)):
        ops = [f"rlinvariant.ops.{op}{f' {n} times' if n > 1 else ''}" for op, n in Counter(side.block.calls).items()]
        through = f", by {', '.join(ops)}" if ops else ", by no op of rlinvariant" if role in ROLE_OPS else ""
        value = shown(side.value[_shown_element(x, y)]) if x.dtype == y.dtype else name(side.value.dtype)
        found.append(f"  {side_name}  {value}{through}, among {plural(side.block.together, 'row')}")
    if x.dtype == y.dtype and (difference := bits.compare(*_common(x, y))) is not None:
        found.append(
            f"  {difference.count:,} of {difference.total:,} {name(x.dtype)} values differ, by up to "
            f"{difference.max_ulps:,} ulp; element {difference.coordinate[0]} is shown"
        )
    return found


def _common(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns that both values have."""
    columns = min(len(x), len(y))
    return x[:columns], y[:columns]


def _shown_element(x: Tensor, y: Tensor) -> int:
    """Return the first element that differs; if none does, the first that is no number."""
    difference = bits.compare(*_common(x, y))
    return int(x.isnan().int().argmax()) if difference is None else difference.coordinate[0]

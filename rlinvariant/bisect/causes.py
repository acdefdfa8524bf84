"""Find out why a value differs, by a short list of rules over what was recorded, and by computing known variants.

Each side's value is first computed anew by `rlinvariant.ops` from that side's own inputs and weights. A side whose bits do not
come back deviates, and a variant (variants.py) that gives its bits is the cause. If both sides' bits come back, the cause is in
what the sides were given: weights, settings, inputs.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlinvariant import bits
from rlinvariant.bisect import variants
from rlinvariant.bisect.case import Case, other_side
from rlinvariant.bisect.record import LOGPROB_PLACE, THRESHOLD_PLACE
from rlinvariant.bisect.search import First, equal, side_at
from rlinvariant.bisect.trials import Trial
from rlinvariant.models import lora
from rlinvariant.verification.ladder import ROW_COUNTS

if TYPE_CHECKING:
    from rlinvariant.sampler.engine import Sampler


@dataclass(frozen=True)
class Explanation:
    """Holds what `bisect` says of a difference.

    Args:
        inputs: "equal", or in words what differs.
        weights: the same, with the parameter's name.
        deviates: the side whose value `rlinvariant.ops` does not give from its own inputs and weights; None: neither, or both.
        cause: in words.
        reproduced: what gave the wrong bits when it was computed again; None if nothing did.
    """

    inputs: str
    weights: str
    deviates: str | None
    cause: str
    reproduced: str | None = None


def explain(first: First, tokens: list[int], trial: Trial, engine: "Sampler", stock: tuple[str, ...] = ()) -> Explanation:
    """Find the cause of a first difference.

    Args:
        first: the difference; something recorded must differ.
        tokens: those of the whole sequence.
        trial: how it was drawn.
        engine: the sampler.
        stock: names of the sides that run stock kernels.
    """
    with torch.inference_mode():
        evidence = _Evidence(Case(first, tokens, trial, engine), stock)
        rules = (_of_the_values, _of_what_was_given, _of_a_deviating_side, _of_what_is_left)
        return next(found for rule in rules if (found := rule(evidence)) is not None)


class _Evidence:
    """Holds the evidence of the rules: each side's value, the value computed anew, and how inputs and weights differ."""

    def __init__(self, case: Case, stock: tuple[str, ...]) -> None:
        self.case = case
        self.values = {name: side.value for name, side in case.sides.items()}
        self.anew = {name: case.ours(name) for name in self.values}
        self.deviating = [n for n, y in self.anew.items() if y is not None and not _gives(y, self.values[n])]
        self.inputs, self.weights = _inputs(case), _weights(case)
        runs = "runs" if len(stock) == 1 else "run"
        kernels = f"stock kernels: the {' and the '.join(stock)} {runs} without the plugin (invariance is not exact)"
        self.stock = kernels if stock else ""

    @property
    def all_computed(self) -> bool:
        """Return whether both sides' values could be computed anew."""
        return all(y is not None for y in self.anew.values())

    def explain(self, cause: str, reproduced: str | None = None) -> Explanation:
        deviates = self.deviating[0] if len(self.deviating) == 1 else None
        return Explanation(self.inputs, self.weights, deviates, cause, reproduced)


def _of_the_values(e: _Evidence) -> Explanation | None:
    """Explain values that are no numbers, or of two dtypes."""
    if equal(e.values["sampler"], e.values["trainer"]):
        return e.explain("not a number, on both sides: NaN equals nothing, and comes from here")
    dtypes = {name: value.dtype for name, value in e.values.items()}
    if dtypes["sampler"] == dtypes["trainer"]:
        return None
    taken = {next(iter(x.values())).dtype for name in e.values if (x := e.case.inputs(name))}
    came = "; its input came so: autocast or an upcast before it" if len(taken) > 1 else ""
    said = ", ".join(f"{name} in {variants.name(dtype)}" for name, dtype in dtypes.items())
    return e.explain(e.stock or f"another dtype (autocast or an upcast): {said}{came}")


def _of_what_was_given(e: _Evidence) -> Explanation | None:
    """Explain a value that differs because the sides were given other inputs, settings or weights."""
    if e.inputs.startswith("differ"):
        between = f"something between the {e.case.before()} and here differs: a hook, a sum, a scale, a cast"
        return e.explain(_moved(e.case) or e.stock or between)
    if e.deviating:
        return None
    if settings := _settings(e.case):
        return e.explain(f"the op was called otherwise: {settings}", "rlinvariant.ops, called so, gives each side's bits")
    if e.weights.startswith("differ") and not e.stock:
        anew = "rlinvariant.ops, given each side's own weight, gives each side's bits"
        return e.explain(_weight_cause(e.case), anew if e.all_computed else None)
    return None


def _of_a_deviating_side(e: _Evidence) -> Explanation | None:
    """Explain a side that computes otherwise: by the number of rows, or by a variant that gives its bits."""
    for name in e.deviating or [n for n in e.values if e.anew[n] is None]:
        other = e.values[other_side(name)]
        what, near = _variant(e.case, name, other)
        by_rows = {} if e.stock else e.case.by_rows(name)
        same = [n for n, y in by_rows.items() if _gives(y, e.values[name])]
        others = [n for n, y in by_rows.items() if _gives(y, other)]
        if same and (others or (what is None and len(same) < len(by_rows))):
            shared = len({y.tobytes() for y in map(_raw, e.case.by_rows(other_side(name)).values())}) > 1
            kernel = "the kernel of both sides" if shared else f"the {name}'s kernel"
            also = f"; {what} gives them too" if what and not shared else ""
            explanation = e.explain(
                f"{kernel} depends on the number of rows (tile switch, or split-K chosen by it){also}",
                f"one row among {_ranges(same)} has the {name}'s bits, among {_ranges(others) or 'others'} the other side's",
            )
            return replace(explanation, deviates=None) if shared else explanation
        stock = f"{e.stock}; " if e.stock else ""
        if what is not None:
            return e.explain(stock + what, f"computed so, all bits are those of the {name}")
        if near is not None:
            return e.explain(f"{stock}likely {near[0]}", f"nearly: {near[1]}")
    return None


def _of_what_is_left(e: _Evidence) -> Explanation:
    """Explain what no variant gives, as far as what was recorded says."""
    case, widths = e.case, {name: len(value) for name, value in e.values.items()}
    if widths["sampler"] != widths["trainer"]:
        return e.explain(f"vocabulary padding: the sampler has {widths['sampler']} columns, the trainer {widths['trainer']}")
    if e.stock or e.weights.startswith("differ"):
        return e.explain(e.stock or _weight_cause(case))
    bypassed = [n for n in e.values if case.op is not None and case.call(n) is None]
    if len(bypassed) == 1:
        return e.explain(f"the {bypassed[0]} does not compute this by rlinvariant.ops.{case.op}: another kernel")
    if not e.deviating and e.all_computed:
        return e.explain("both values come back from rlinvariant.ops: what is behind it (cache, table, temperature) differs")
    if case.role == "attention" and e.deviating == ["sampler"]:
        return e.explain("the sampler's cache (keys or values that are not those written, a wrong page or slot), or its kernel")
    if case.op is None:
        return e.explain(f"what stands between the {case.before()} and this differs: a sum, a scale, a cast, or a hook")
    who = f"of the {e.deviating[0]} " if len(e.deviating) == 1 else ""
    return e.explain(f"unknown: the kernel {who}sums or rounds otherwise, in no way of the catalogue")


def _variant(case: Case, name: str, other: Tensor) -> tuple[str | None, tuple[str, str] | None]:
    """Find the first variant that gives a side's bits, or else one that comes much nearer than the other side does.

    Returns (variant, None), (None, (variant, how near)) or (None, None).
    """
    value = case.sides[name].value
    columns = min(len(value), len(other))
    count = int((bits.words(value[:columns]) != bits.words(other[:columns])).sum())
    near, fewest = None, count // 4
    for what, y in case.variants(name):
        y = y.detach().flatten().cpu()
        if y.shape != value.shape or y.dtype != value.dtype:
            continue
        left = int((bits.words(y) != bits.words(value)).sum())
        if left == 0 and not equal(y, other):
            return what, None
        if 0 < left < fewest:
            near, fewest = (what, f"computed so, all but {left:,} of {len(value):,} values are those of the {name}"), left
    return None, near


def _raw(x: Tensor) -> np.ndarray:
    return bits.words(x.detach().flatten().cpu()).numpy()


def _gives(value: Tensor, bits_of: Tensor) -> bool:
    """Return whether two values are the same in shape, dtype and bits."""
    value = value.detach().flatten().cpu()
    return value.shape == bits_of.shape and value.dtype == bits_of.dtype and equal(value, bits_of)


def _inputs(case: Case) -> str:
    """Say how the inputs of the two sides differ, or that they are equal."""
    a, b = case.inputs("sampler"), case.inputs("trainer")
    if not a and not b:
        return "equal" if case.role in ("embedding", "rope table") else "not recorded"
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        if case.first.place in (LOGPROB_PLACE, THRESHOLD_PLACE):  # a padded vocabulary is longer
            x, y = x[: min(len(x), len(y))], y[: min(len(x), len(y))]
        if x.dtype != y.dtype or x.shape != y.shape:
            return f"differ: {name} in {variants.name(x.dtype)} {tuple(x.shape)} and {variants.name(y.dtype)} {tuple(y.shape)}"
        if (difference := bits.compare(x, y)) is not None:
            return f"differ: {name}, {difference.count:,} of {difference.total:,} values, by up to {difference.max_ulps:,} ulp"
    return "equal" if a and b else "not recorded on one side"


def _settings(case: Case) -> str | None:
    """Say how the settings of the two calls differ; None if they do not, or if a side made no call."""
    a, b = case.call("sampler"), case.call("trainer")
    if a is None or b is None:
        return None
    pairs = [(name, a.settings[name], b.settings[name]) for name in a.settings.keys() & b.settings.keys()]
    return ", ".join(f"{name}={x} in the sampler, {y} in the trainer" for name, x, y in sorted(pairs) if x != y) or None


def _moved(case: Case) -> str | None:
    """Say whether a side's lm_head took the final norm of a neighbouring position; None if neither did."""
    for name in ("trainer", "sampler") if case.role == "lm_head" else ():
        norms, taken = side_at(case.sides[name].recorder, (None, "final norm")), case.inputs(name).get("x")
        for offset in (-1, 1):
            position = case.first.position + offset
            if taken is not None and position in norms and equal(taken.cpu(), norms[position].value):
                return f"position off by {offset:+d}: the {name}'s input is the final norm of position {position}"
    return None


def _weights(case: Case) -> str:
    """Say how the weights of the two sides differ at use, or that they are equal."""
    a, b = case.weights("sampler"), case.weights("trainer")
    name = case.parameter()
    if not a or not b:
        return "not read on one side" if (a or b) else "none"
    for what, x, y in zip(("weight", "bias", "lora_A", "lora_B"), a, b, strict=False):
        if x is None or y is None:
            if x is not y:
                return f"differ: {name}.{what} is missing in the {'sampler' if x is None else 'trainer'}"
            continue
        dtype = min((side.value.dtype for side in case.sides.values()), key=lambda d: d.itemsize)
        rows = min(len(x), len(y))
        difference = bits.compare(x[:rows].detach().to(dtype).cpu(), y[:rows].detach().to(dtype).cpu())
        if difference is not None:
            return f"differ: {name}.{what}, {difference.count:,} of {difference.total:,}, by up to {difference.max_ulps:,} ulp"
    return "equal"


def _weight_cause(case: Case) -> str:
    """Say why weights differ: a sync that missed them, or an op that was given others."""
    own = dict(lora.pairs(case.sides["trainer"].recorder.model))
    try:
        others = case.engine.differing_weights(own.items())
    except (RuntimeError, AttributeError, ValueError):
        return "a weight of other bits"
    if len(others) > len(own) // 2:
        return f"stale or other weights: {len(others)} parameters of the engine differ, as after a sync that did not run"
    if others:
        return f"a weight of other bits, as of a sync that missed it: in the engine {', '.join(others[:3])} differs"
    return "a weight of other bits at use: the engine's parameters are the trainer's, but the op was given others"


def _ranges(counts: list[int]) -> str:
    """List row counts, neighbours on the ladder of row counts as a range: `1 to 3, 8 rows`."""
    runs: list[list[int]] = []
    for n in counts:
        if runs and ROW_COUNTS.index(n) == ROW_COUNTS.index(runs[-1][-1]) + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{', '.join(parts)} rows" if parts else ""

